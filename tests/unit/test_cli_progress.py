"""Progress of a command: lines in a log, a bar on a terminal, and nothing of it in what programs read."""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from distckpt.cli.output import OnProgress, progress_bar
from distckpt.storage import PosixStorage
from tests.unit.saved_roots import save

STEP = r"\d+(\.\d)? (bytes|[kMG]B)"


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.splitlines()


def test_log_has_a_line_at_the_beginning_and_one_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("copy iteration 7", 40_000_000) as on_bytes:
        on_bytes(30_000_000)
        on_bytes(10_000_000)
    begin, end = lines_of(capsys)
    assert begin == "copy iteration 7: 40.0 MB"
    assert re.fullmatch(rf"copy iteration 7: done: 40\.0 MB in \d+\.\d s, {STEP}/s", end)


def test_log_says_in_between_how_far_it_is_and_what_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from distckpt.cli import output

    clock = iter([100.0, 110.0, 120.0, 130.0])
    monkeypatch.setattr(output.time, "monotonic", lambda: next(clock))
    lines = output._ProgressLines("copy iteration 7", 4_000_000_000)
    lines.advance(1_000_000_000)
    lines.print_state()
    lines.print_state()  # Nothing moved: the speed of the last lines sinks.
    lines.print_end(is_done=False)
    assert lines_of(capsys)[1:] == [
        "copy iteration 7: 1.0 GB of 4.0 GB, 100.0 MB/s, 30 s left",
        "copy iteration 7: 1.0 GB of 4.0 GB, 50.0 MB/s, 1 min 0 s left",
        "copy iteration 7: stopped: 1.0 GB of 4.0 GB in 30.0 s, 33.3 MB/s",
    ]


def test_log_goes_on_while_nothing_moves(capsys: pytest.CaptureFixture[str]) -> None:
    said = ""
    with progress_bar("verify", 4000, log_interval_s=0.001) as on_bytes:
        on_bytes(1000)
        while said.count("\n") < 4:
            said += capsys.readouterr().err
    assert "verify: 1.0 kB of 4.0 kB, " in said


def test_log_says_where_it_was_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    def give_up(on_bytes: Callable[[int], None]) -> None:
        on_bytes(1000)
        raise KeyError

    with pytest.raises(KeyError), progress_bar("copy", 4000) as on_bytes:
        give_up(on_bytes)
    assert lines_of(capsys)[-1].startswith("copy: stopped: 1.0 kB of 4.0 kB in ")


def test_steps_of_many_threads_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("verify", 0) as on_bytes:
        threads = [threading.Thread(target=lambda: [on_bytes(5) for _ in range(2000)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    begin, end = lines_of(capsys)
    assert begin == "verify: begins"
    assert end.startswith("verify: done: 80.0 kB in ")


def test_no_thread_of_it_stays() -> None:
    before = threading.active_count()
    with progress_bar("verify", 10):
        pass
    assert threading.active_count() == before


def test_total_may_be_known_later(capsys: pytest.CaptureFixture[str]) -> None:
    def give_up(on_bytes: OnProgress) -> None:
        on_bytes.expect(4000)
        on_bytes(1000)
        raise KeyError

    with pytest.raises(KeyError), progress_bar("reshard", 0) as on_bytes:
        give_up(on_bytes)
    assert lines_of(capsys)[-1].startswith("reshard: stopped: 1.0 kB of 4.0 kB in ")


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("reshard", 0, is_shown=False) as on_bytes:
        on_bytes.expect(4000)
        on_bytes(1000)
    assert lines_of(capsys) == []


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "gone"), ValueError("closed")])
def test_standard_error_that_nobody_reads_stops_nothing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    for stream in (Closed(), None):
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", stream)
            with progress_bar("verify", 10) as on_bytes:
                on_bytes(10)


@pytest.mark.parametrize("columns", ["120", "30"])
def test_bar_is_drawn_on_a_terminal_and_standard_output_stays_json(tmp_path: Path, columns: str) -> None:
    save(PosixStorage(tmp_path), 10)
    control, terminal = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "distckpt.cli", "verify", str(tmp_path), "--json"],
        stdout=subprocess.PIPE,
        stderr=terminal,
        env={**os.environ, "COLUMNS": columns, "TERM": "xterm"},
        timeout=120,
        check=False,
    )
    os.close(terminal)
    drawn = os.read(control, 1 << 16).decode()
    os.close(control)
    assert done.returncode == 0
    assert json.loads(done.stdout)["is_sound"] is True
    assert "verify" in drawn
    assert "\x1b[" in drawn
    assert "done: " not in drawn
