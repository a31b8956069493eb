"""How commands end: exit codes, errors in words and as JSON, signals, and standard streams that are not what they were.

Real processes and real signals, as all of it is about processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import distckpt
from distckpt.cli import app
from distckpt.cli.running import run_command
from distckpt.storage import PosixStorage
from tests.unit.damage import change, flip, newest
from tests.unit.saved_roots import check_loads, save

COMMAND = [sys.executable, "-m", "distckpt.cli"]
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("saved")
    save(PosixStorage(root), 10, 20)
    return root


def run(*arguments: object, command: Sequence[str] = COMMAND, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [*command, *map(str, arguments)],
        **{
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "timeout": 60,
            "check": False,
            **options,
        },
    )


@contextmanager
def started(command: Sequence[object]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(condition: object) -> None:
    deadline = time.monotonic() + 60
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def said_of_it(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("distckpt: ")]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_copy_that_is_interrupted_leaves_whole_files_and_goes_on(
    root: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    copies = tmp_path / "copies"
    with started([*COMMAND, "copy", root, copies, "--limit", 4]) as process:
        wait_until(lambda: list(copies.glob("iter_*/shard-*")) and list(copies.glob("iter_*/.tmp-*")))
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    (line,) = said_of_it(stderr)
    assert line.startswith(f"distckpt: stopped by {number.name}: whole files stay in {copies}, ")
    assert "Traceback" not in stderr
    left = {path.name.partition("-")[0] for path in copies.glob("iter_*/*")}
    assert left == {"shard", "pending"}  # No temporary file, and the marker that tells others to leave them alone.
    done = run("copy", root, copies, "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, 0 < report["bytes_copied"] < report["bytes"]) == (0, True)
    check_loads(PosixStorage(copies), 20)


# Verifies block by block, in two threads that say of each of the 9 that they read it, and take long.
SLOW_VERIFY = """
import sys, time
from distckpt import verifying
from distckpt.cli import main
verifying._PIECE_BLOCKS = 1
tell = verifying.CheckedFile.faults
def slow_faults(self, ranges):
    with open(sys.argv[1], "a") as reading:
        reading.write(".")
    time.sleep(1.0)
    return tell(self, ranges)
verifying.CheckedFile.faults = slow_faults
main(sys.argv[2:])
"""


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_verify_with_threads_stops_before_they_have_read_all(
    root: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    reading = tmp_path / "reading"
    with started([sys.executable, "-c", SLOW_VERIFY, reading, "verify", root, "--jobs", 2]) as process:
        wait_until(reading.exists)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert said_of_it(stderr) == [f"distckpt: stopped by {number.name}: nothing was changed"]
    assert len(reading.read_text()) <= 4
    assert "verify iteration 20: stopped: " in stderr


IMPORTS = """
import builtins, signal, sys
find = builtins.__import__
def interrupted(name, *rest):
    if name == "distckpt.cli.commands":
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException as error:
            raise {raised} from (None if {raised} is error else error)
    return find(name, *rest)
builtins.__import__ = interrupted
from distckpt.cli import main
main(["--version"])
"""


@pytest.mark.parametrize("raised", ["error", "ImportError('initialization failed')"])
def test_command_can_be_interrupted_while_it_is_imported(raised: str) -> None:
    """Also while an extension is, which makes an error of its own of what is raised in it."""
    done = run(command=[sys.executable, "-c", IMPORTS.format(raised=raised)])
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "distckpt: stopped by SIGINT before it was done\n"


EARLY = """
import signal, threading
def and_then_raise(call, number):
    def called(*arguments):
        call(*arguments)
        signal.raise_signal(number or arguments[0])
    return called
{owner}.{name} = and_then_raise({owner}.{name}, {number})
from distckpt.cli import main
main(["--version"])
"""


@pytest.mark.parametrize(
    ("owner", "name", "number", "code"),
    [("signal", "signal", "None", 130), ("threading.Thread", "start", "signal.SIGTERM", -signal.SIGTERM)],
)
def test_signal_is_no_finding_however_soon_it_comes(owner: str, name: str, number: str, code: int) -> None:
    """Exit code 1 would say that something is damaged."""
    done = run(command=[sys.executable, "-c", EARLY.format(owner=owner, name=name, number=number)])
    assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (code, "", False), done.stderr


HANGS = """
import sys, threading
from distckpt.cli import interruption
interruption.listen_for_signals()
try:
    print("ready", flush=True)
    threading.Event().wait()
finally:
    print("cleaning up", flush=True)
    {hang}
"""
IN_PYTHON = "threading.Event().wait()"
# A mutex that is locked twice: in C, and no signal ends the wait.
IN_C = (
    "import ctypes; b = ctypes.create_string_buffer(64); c = ctypes.CDLL(None); [c.pthread_mutex_lock(b) for _ in '12']"
)


@pytest.mark.parametrize(("hang", "number", "code"), [(IN_PYTHON, *SIGNALS[0]), (IN_C, *SIGNALS[1])])
def test_second_signal_ends_a_command_that_hangs(hang: str, number: signal.Signals, code: int) -> None:
    with started([sys.executable, "-c", HANGS.format(hang=hang)]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == "cleaning up\n"
        process.send_signal(number)  # A launcher passes on what its terminal sent: this is the first once more.
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert stderr == f"distckpt: ended at once by a second {number.name}\n"


def test_signal_that_is_ignored_stays_ignored(root: Path, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    ignoring = ["sh", "-c", 'trap "" INT; exec "$0" "$@"', *COMMAND]
    with started([*ignoring, "copy", root, copies, "--limit", 8]) as process:
        wait_until(lambda: list(copies.glob("iter_*/.tmp-*")))
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0
    check_loads(PosixStorage(copies), 20)


def test_interrupted_command_says_so_as_json(root: Path, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    with started([*COMMAND, "copy", root, copies, "--limit", 1, "--json"]) as process:
        wait_until(lambda: list(copies.glob("iter_*/.tmp-*")))
        process.send_signal(signal.SIGTERM)
        stdout, _ = process.communicate(timeout=60)
    error = json.loads(stdout)["error"]
    assert error["kind"] == "Interrupted"
    assert error["message"].startswith("stopped by SIGTERM: whole files stay in ")


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["ls", "{root}/nothing"], "CheckpointNotFoundError", "no checkpoint under {root}/nothing: "),
        (["ls", "{root}", "--sort", "loss"], "ValueError", "--sort loss: no checkpoint has this metric"),
        (["verify", "{root}", "--iteration", "tag:x"], "CheckpointNotFoundError", "tag:x: no checkpoint has this tag"),
        (["verify", "{root}", "--jobs", "0"], "UsageError", "Invalid value for '--jobs'"),
        (["verify", "{root}", "--sample", "nan"], "ValueError", "--sample nan: expected"),
        (["copy", "{root}", "{root}/x", "--limit", "inf"], "ValueError", "--limit inf: expected"),
        (["copy", "{root}", "{root}/iter_0000010"], "CheckpointError", ""),
        (["copy", "{root}"], "UsageError", "Missing argument"),
        (["prune", "{root}"], "UsageError", "Invalid value: give at least one rule"),
        (["du"], "UsageError", "Missing argument"),
        (["prune", "--keep-last", "1", ""], "UsageError", "Invalid value: an argument is empty"),
        (["note", "", "text"], "UsageError", "Invalid value: an argument is empty"),
        (["copy", "{root}", "{root}/latest_checkpointed_iteration.txt"], "NotADirectoryError", "{root}/latest_"),
        (["history", "{root}/nothing"], "NotADirectoryError", "{root}/nothing is no directory"),
        (
            ["reshard", "{root}", "{root}/x", "--tp", "1", "--plan", "/dev/zero"],
            "CheckpointError",
            "/dev/zero is no plan",
        ),
        (["repair", "{root}/nothing"], "CheckpointNotFoundError", "no checkpoint under {root}/nothing: "),
        (["nonsense"], "UsageError", "No such command 'nonsense'"),
    ],
)
def test_what_could_not_be_done_is_told_in_words_as_json_and_by_exit_code_2(
    root: Path, arguments: list[str], kind: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [argument.format(root=root) for argument in arguments]
    assert run_command(app, [*arguments, "--json"]) == 2
    said = capsys.readouterr()
    error = json.loads(said.out)["error"]
    assert error["kind"] == kind
    assert error["message"].startswith(message.format(root=root))
    assert said.err == f"distckpt: {error['message']}\n"
    assert run_command(app, arguments) == 2
    plain = capsys.readouterr()
    assert (plain.out, plain.err) == ("", said.err)


def test_json_that_is_an_argument_asks_for_no_json(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(app, ["note", f"{root}/nothing", "--", "--json"]) == 2
    assert capsys.readouterr().out == ""


def test_what_was_found_is_exit_code_1_and_no_error(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copies = tmp_path / "copies"
    assert run_command(app, ["copy", str(root), str(copies)]) == 0
    directory, index = newest(PosixStorage(copies))
    change(PosixStorage(copies), f"{directory}/{index.files[1].name}", flip(5000))
    capsys.readouterr()
    assert run_command(app, ["verify", str(copies), "--json"]) == 1
    assert "error" not in json.loads(capsys.readouterr().out)
    assert run_command(app, ["copy", str(copies), str(tmp_path / "more")]) == 2


def test_no_arguments_are_answered_with_help_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(app, []) == 2
    assert "Usage: distckpt" in capsys.readouterr().out
    assert run_command(app, ["--help"]) == 0


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(app, ["--version"]) == 0
    assert capsys.readouterr().out == f"distckpt {distckpt.__version__}\n"


def test_defect_is_told_with_its_traceback_and_is_no_finding(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["distckpt.cli.verify"], "open_selected", None)
    assert run_command(app, ["verify", str(root), "--json"]) == 2
    said = capsys.readouterr()
    assert "Traceback" in said.err
    assert json.loads(said.out)["error"]["kind"] == "TypeError"


@pytest.mark.parametrize("arguments", [["ls", "{root}"], ["ls", "{root}", "--json"], ["--version"]])
def test_standard_output_on_a_full_disk_is_an_error(root: Path, arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
        done = run(*(argument.format(root=root) for argument in arguments), stdout=full, env=buffered)
    assert done.returncode == 2
    assert done.stderr == "distckpt: No space left on device\n"


@pytest.mark.parametrize("closed", ["<&- >&-", "2>&-"])
def test_standard_streams_may_be_closed(root: Path, closed: str) -> None:
    done = run("verify", root, "--json", command=["sh", "-c", f'exec "$0" "$@" {closed}', *COMMAND])
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)


@pytest.mark.parametrize("command", ["copy", "history", "inspect", "diff"])
def test_letters_that_the_locale_has_not_are_escaped(root: Path, tmp_path: Path, command: str) -> None:
    """And a path that is no text at all is one all the same."""
    strange = os.path.join(os.fsencode(tmp_path), "ü\xff".encode("latin-1"))
    os.mkdir(strange)
    os.symlink(root, os.path.join(strange, b"run"))
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    path = os.fsdecode(os.path.join(strange, b"run"))
    target = {"copy": [os.fsdecode(os.path.join(strange, b"copies"))], "diff": [path]}.get(command, [])
    for options in ([], ["--json"]):
        done = run(command, path, *target, *options, env=ascii_only)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


def test_error_cannot_do_things_to_a_terminal(root: Path, tmp_path: Path) -> None:
    """It names what lies beside, and what anybody may have named."""
    (tmp_path / "\x1b[31mred\u202e").symlink_to(root)
    done = run("ls", tmp_path / "nothing")
    assert done.returncode == 2
    assert "\\x1b[31mred\\u202e" in done.stderr
    assert all(line.isprintable() for line in done.stderr.splitlines())
