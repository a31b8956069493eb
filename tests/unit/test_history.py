"""The history of a root: what is logged when, what reading it stands, and that it never harms a save or a load."""

from __future__ import annotations

import errno
import json
import logging
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import distckpt
from distckpt import Checkpointer, CheckpointError, CheckpointNotFoundError, FencedError, LoadReport, SaveReport
from distckpt.cli import app
from distckpt.commit import Writer
from distckpt.coordinator import Coordinator
from distckpt.history_log import FILE, MAX_LINE_BYTES, HistoryLine, append_line, line_of, line_of_failure, read_history
from distckpt.report import CopyReport
from distckpt.storage import PosixStorage
from distckpt.storage.contract import read_all
from distckpt.testing import CrashingStorage, MemoryStorage, run_ranks
from tests.unit.protocol import io_error
from tests.unit.saved_roots import make_state

SAVED = SaveReport(
    iteration=5,
    save_id="a" * 32,
    bytes=100,
    plan_s=0.1,
    stage_s=0.2,
    stall_s=0.3,
    write_s=0.4,
    commit_s=0.5,
    total_s=1.5,
    slowest={"write": (1, 0.4), "stage": (0, 0.2)},
    backend="threads",
    degraded=("slow",),
    peak_rss_bytes=2_000_000,
)
LOADED = LoadReport(
    iteration=5, save_id="a" * 32, bytes=100, bytes_read=50, read_s=0.1, total_s=0.2, fell_back_from={7: "damaged"}
)
COPIED = CopyReport(
    iteration=5, save_id="a" * 32, source="/local", target="/shared", bytes=100, bytes_copied=60, total_s=3.0
)


def memory(content: bytes = b"") -> MemoryStorage:
    storage = MemoryStorage()
    storage.make_directory("")
    if content:
        storage.replace(FILE, content)
    return storage


def kinds(storage: MemoryStorage) -> list[str]:
    return [line.kind for line in distckpt.history(storage)]


# What is logged


def test_saves_and_loads_are_logged_once_with_their_reports() -> None:
    storage = MemoryStorage()

    def run(coordinator: Coordinator) -> tuple[object, ...]:
        with Checkpointer(storage, coordinator=coordinator) as checkpointer:
            saved = checkpointer.save(make_state(1, coordinator), iteration=1)
            later = checkpointer.async_save(make_state(2, coordinator), iteration=2).wait()
            return saved, later, checkpointer.load(make_state(0, coordinator))

    reports, _, _ = run_ranks(3, run)
    lines = distckpt.history(storage)
    assert [line.kind for line in lines] == ["save", "save", "load"]
    assert [line.report for line in lines] == list(reports)
    assert [line.iteration for line in lines] == [1, 2, 2]
    assert {line.world_size for line in lines} == {3}
    assert [line.save_id for line in lines] == [line.report.save_id for line in lines if line.report]
    assert [line.time_unix_s for line in lines] == sorted(line.time_unix_s for line in lines)
    assert distckpt.history(storage, last=2) == lines[1:]


@pytest.mark.parametrize("how", ["save", "async_save"])
def test_failed_save_is_logged_with_its_error(how: str) -> None:
    storage = MemoryStorage(capacity_bytes=200_000)
    with Checkpointer(storage) as checkpointer:
        checkpointer.save({"w": torch.zeros(5)}, iteration=1)
        larger: dict[str, object] = {"w": torch.zeros(1_000_000)}
        with pytest.raises(CheckpointError, match="not enough space"):
            getattr(checkpointer, how)(larger, iteration=2).wait()
    line = distckpt.history(storage)[-1]
    assert (line.kind, line.iteration, line.report, line.committed) == ("failed save", 2, None, "no")
    assert line.error is not None
    assert "not enough space" in line.error


def test_job_that_was_fenced_logs_nothing() -> None:
    storage = MemoryStorage()
    with Checkpointer(storage) as checkpointer:
        checkpointer.save({"w": torch.zeros(5)}, iteration=1)
        assert checkpointer.iterations() == [1]
        Writer.claim(storage)
        before = read_all(storage, FILE)
        with pytest.raises(FencedError):
            checkpointer.save({"w": torch.zeros(5)}, iteration=2)
    assert read_all(storage, FILE) == before


def test_load_begins_no_history_where_none_is() -> None:
    storage = MemoryStorage()
    with Checkpointer(storage) as checkpointer:
        checkpointer.save({"w": torch.zeros(5)}, iteration=1)
    storage.remove(FILE)
    with Checkpointer(storage) as checkpointer:
        checkpointer.load({"w": torch.zeros(5)})
    assert FILE not in storage.list("")


def test_failed_load_is_not_logged() -> None:
    storage = MemoryStorage()
    with Checkpointer(storage) as checkpointer:
        checkpointer.save({"w": torch.zeros(5)}, iteration=1)
        with pytest.raises(CheckpointNotFoundError):
            checkpointer.load({"w": torch.zeros(5)}, 7)
    assert kinds(storage) == ["save"]


# It never harms


class Refusing(MemoryStorage):
    def append(self, name: str, data: bytes) -> None:
        raise io_error(errno.EROFS)


def test_save_whose_line_cannot_be_written_warns(caplog: pytest.LogCaptureFixture) -> None:
    storage = Refusing()
    with Checkpointer(storage) as checkpointer:
        checkpointer.save({"w": torch.zeros(5)}, iteration=1)
    assert [record.levelname for record in caplog.records if "has no line of this save" in record.message] == [
        "WARNING"
    ]


def test_load_whose_line_cannot_be_written_says_so_only_to_who_debugs(caplog: pytest.LogCaptureFixture) -> None:
    storage = Refusing()
    with Checkpointer(storage) as checkpointer:
        checkpointer.save({"w": torch.zeros(5)}, iteration=1)
    storage.replace(FILE, b"")
    caplog.clear()
    caplog.set_level(logging.DEBUG, "distckpt")
    with Checkpointer(storage) as checkpointer:
        checkpointer.load({"w": torch.zeros(5)})
    assert [record.levelname for record in caplog.records if "no line" in record.message] == ["DEBUG"]


# Reading and bounds


@pytest.mark.parametrize("report", [SAVED, LOADED, COPIED])
def test_line_reads_back_as_it_was_written(report: SaveReport | LoadReport | CopyReport) -> None:
    storage = memory()
    line = line_of(report, 8)
    append_line(storage, line)
    assert read_history(storage).lines == [line]


def test_failed_save_reads_back_as_it_was_written() -> None:
    storage = memory()
    line = line_of_failure("failed save", 7, OSError(28, "full"), 2)
    append_line(storage, line)
    assert read_history(storage).lines == [line]
    assert line_of_failure("failed save", "seven", OSError(), 2).iteration is None


@pytest.mark.parametrize(
    "foreign",
    [
        b"not JSON",
        b"[]",
        b'{"kind": "save"}',
        b'{"kind":"dream","time_unix_s":1.0,"iteration":1,"save_id":"","world_size":1}',
        b'{"kind":"save","time_unix_s":1.0,"iteration":1,"save_id":"","world_size":1}',
        b'{"kind":"save","time_unix_s":1.0,"iteration":1,"save_id":"","world_size":1,"report":{"iteration":"x"}}',
        b'{"kind":"failed save","time_unix_s":1e300,"iteration":1,"save_id":"","world_size":1}',
        b'{"kind":"failed save","time_unix_s":1.0,"iteration":-1,"save_id":"","world_size":1}',
        b"[" * 100_000,
        b"\xff\xfe",
        b'"' + b"x" * MAX_LINE_BYTES + b'"',
    ],
)
def test_lines_that_are_torn_or_foreign_are_skipped_and_counted(foreign: bytes) -> None:
    storage = memory(msgspec.json.encode(line_of(SAVED, 1)) + b"\n" + foreign)
    append_line(storage, line_of(LOADED, 1))
    found = read_history(storage)
    assert [line.kind for line in found.lines] == ["save", "load"]
    assert found.skipped == 1


@given(st.binary(max_size=300), st.integers(0, 400))
def test_whatever_lies_in_the_file_the_next_line_is_found(noise: bytes, cut: int) -> None:
    line = msgspec.json.encode(line_of(SAVED, 1)) + b"\n"
    storage = memory(noise + line[:cut])
    append_line(storage, line_of(COPIED, 1))
    assert read_history(storage).lines[-1].report == COPIED


def test_file_is_bounded_and_keeps_its_last_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distckpt.history_log.MAX_FILE_BYTES", 20_000)
    storage = memory()
    lines = [line_of(SAVED, number) for number in range(200)]
    sizes = []
    for line in lines:
        append_line(storage, line)
        sizes.append(len(read_all(storage, FILE)))
    assert max(sizes) <= 20_000
    assert sum(later < earlier for earlier, later in pairwise(sizes)) > 2
    found = read_history(storage)
    assert found.skipped == 0
    assert found.lines == lines[-len(found.lines) :]
    assert len(found.lines) >= 9_000 // len(msgspec.json.encode(lines[0]))


def test_file_of_somebody_else_that_is_too_long_is_read_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distckpt.history_log.MAX_FILE_BYTES", 20_000)
    line = msgspec.json.encode(line_of(SAVED, 1)) + b"\n"
    storage = memory(line * 1000)
    found = read_history(storage)
    assert found.skipped == 0
    assert 0 < len(found.lines) < 1000


def test_line_that_would_be_too_long_is_shortened() -> None:
    storage = memory()
    many = tuple(f"model.layers.{number}.weight" for number in range(50_000))
    report = msgspec.structs.replace(line_of(LOADED, 1), report=None)
    assert report.report is None
    append_line(
        storage,
        line_of(LoadReport(iteration=1, save_id="b" * 32, bytes=1, bytes_read=1, read_s=1, total_s=1, missing=many), 1),
    )
    assert len(read_all(storage, FILE)) <= MAX_LINE_BYTES
    [line] = read_history(storage).lines
    assert isinstance(line.report, LoadReport)
    assert line.report.missing == (*many[:20], "and 49980 more")


def test_text_that_is_no_unicode_is_logged_with_replacements() -> None:
    storage = memory()
    warnings = ("no such file: \udcff.bin",)
    append_line(storage, line_of(replace(LOADED, warnings=warnings, fell_back_from={7: "\ud800"}), 1))
    append_line(storage, line_of_failure("failed save", 5, ValueError("\udcff"), 1))
    loaded, failed = read_history(storage).lines
    assert isinstance(loaded.report, LoadReport)
    assert (loaded.report.warnings, loaded.report.fell_back_from) == (("no such file: ?.bin",), {7: "?"})
    assert failed.error == "ValueError: ?"


def test_root_without_a_history_has_an_empty_one(tmp_path: Path) -> None:
    assert distckpt.history(tmp_path) == []


@pytest.mark.parametrize("seed", [None, *range(20)])
def test_power_cut_loses_lines_and_harms_none_that_follow(seed: int | None) -> None:
    storage = memory()
    append_line(storage, line_of(SAVED, 1))
    storage.sync_directory("")
    append_line(storage, line_of(LOADED, 1))
    left = storage.power_cut(seed)
    append_line(left, line_of(COPIED, 1))
    assert read_history(left).lines[-1].report == COPIED


def test_append_that_fails_at_any_call_leaves_a_history_that_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distckpt.history_log.MAX_FILE_BYTES", 2000)
    line = msgspec.json.encode(line_of(SAVED, 1)) + b"\n"
    full = line * (2000 // len(line))
    counting = CrashingStorage(memory(full))
    append_line(counting, line_of(LOADED, 1))
    assert len(counting.calls) > 4
    for call in range(1, len(counting.calls) + 1):
        for moment in ("before", "half", "after"):
            storage = memory(full)
            with pytest.raises(OSError, match="injected"):
                append_line(CrashingStorage(storage, fail_at=call, moment=moment), line_of(LOADED, 1))  # type: ignore[arg-type]
            append_line(storage, line_of(COPIED, 1))
            found = read_history(storage)
            assert found.lines[0].report == SAVED
            assert found.lines[-1].report == COPIED


# The command


def run_command(*arguments: object) -> str:
    """What it prints."""
    done = CliRunner().invoke(app, ["history", *map(str, arguments)])
    assert done.exception is None, done.exception
    return done.stdout


def write_history(root: Path, *lines: HistoryLine) -> None:
    for line in lines:
        append_line(PosixStorage(root), line)


def test_history_prints_a_row_for_each_line(tmp_path: Path) -> None:
    failed = line_of_failure("failed save", 6, OSError(28, "No space\x1b[31m left"), 4)
    write_history(tmp_path, line_of(SAVED, 4), failed, line_of(LOADED, 4), line_of(COPIED, 4))
    PosixStorage(tmp_path).append(FILE, b"torn")
    said = run_command(tmp_path)
    rows = said.splitlines()
    assert rows[0].split() == ["time", "what", "iteration", "size", "seconds", "stall", "slowest", "peak", "memory"]
    assert "5  100 bytes     1.50  0.300  write 0.40 s, rank 1       2.0 MB  slow" in rows[1]
    assert rows[2].rstrip().endswith("OSError: [Errno 28] No space [31m left")
    assert "to /shared" in rows[4]
    assert rows[5] == "lines that could not be read: 1"
    assert "\x1b" not in said


def test_history_of_the_directory_of_an_iteration_is_what_its_root_knows_of_it(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        for iteration in (1, 2, 3):
            checkpointer.save({"w": torch.ones(2)}, iteration=iteration)
        checkpointer.load({"w": torch.zeros(2)}, 2)
    lines = run_command(tmp_path / "iter_0000002", "--json").splitlines()
    assert [(json.loads(line)["kind"], json.loads(line)["iteration"]) for line in lines] == [("save", 2), ("load", 2)]
    assert "load" in run_command(tmp_path / "iter_0000002", "--json", "--last", "1")


def test_history_as_json_is_what_was_logged(tmp_path: Path) -> None:
    write_history(tmp_path, line_of(SAVED, 4), line_of(LOADED, 4))
    said = run_command(tmp_path, "--json", "--last", 1)
    assert [json.loads(line)["kind"] for line in said.splitlines()] == ["load"]
    assert said.encode() == read_all(PosixStorage(tmp_path), FILE).splitlines(keepends=True)[1]


@pytest.mark.parametrize("reports", [[], [SAVED], [SAVED, LOADED, COPIED, SAVED]])
def test_history_draws_a_picture(tmp_path: Path, reports: list[SaveReport | LoadReport | CopyReport]) -> None:
    pytest.importorskip("matplotlib")
    failed = [line_of_failure("failed save", 6, OSError(), 4)] if reports else []
    write_history(tmp_path, *(line_of(report, 4) for report in reports), *failed)
    assert run_command(tmp_path, "--plot", tmp_path / "history.png").endswith(f"drawn: {tmp_path}/history.png\n")
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")


def test_history_of_what_is_no_directory_is_an_error(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["history", str(tmp_path / "missing")])
    assert isinstance(done.exception, NotADirectoryError)
    assert str(done.exception) == f"{tmp_path}/missing is no directory"
