"""PosixStorage keeps its promises over a power cut at any moment, and needs each of its fsyncs to do so."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.crash.power_cut import CrashTree, Op, crash_states, marks_before, record

# The second argument is Python source that takes a step of the protocol away.
SCRIPT = """
import os, sys
from distckpt import _C
from distckpt.storage import PosixStorage, posix
from tests.crash.power_cut import mark

exec(sys.argv[2])
storage = PosixStorage(sys.argv[1] + "/root", io_backend="threads")
storage.make_directory("d/e")
mark("made")
assert storage.put_if_absent("d/put", b"P" * 3000)
mark("put")
assert not storage.put_if_absent("d/put", b"Q" * 3000)
mark("not put")
storage.replace("d/replaced", b"1" * 2000)
mark("replaced once")
storage.replace("d/replaced", b"2" * 5000)
mark("replaced twice")
file = storage.create("d/e/large")
file.write(0, b"L" * 8192)
file.write(8192, b"M" * 1000)
file.finish(9192)
mark("finished")
storage.sync_directory("d/e")
mark("synced")
storage.remove("d/put")
storage.sync_directory("d")
mark("removed")
"""
LARGE = b"L" * 8192 + b"M" * 1000
MARKS = ["made", "put", "not put", "replaced once", "replaced twice", "finished", "synced", "removed"]


def broken_promises(tree: dict[str, bytes | None], marks: Sequence[str]) -> Iterator[str]:
    """Which promises given by `marks` this tree breaks."""
    put, replaced = tree.get("root/d/put"), tree.get("root/d/replaced")
    if "made" in marks and "root/d/e" not in tree:
        yield "make_directory: it is gone"
    if put not in (None, b"P" * 3000):
        yield "put_if_absent: not whole"
    if put is None and "put" in marks and "synced" not in marks:
        yield "put_if_absent: it is gone"
    if put is not None and "removed" in marks:
        yield "remove and sync_directory: it is back"
    if replaced not in (None, b"1" * 2000, b"2" * 5000):
        yield "replace: neither old nor new"
    if replaced is None and "replaced once" in marks:
        yield "replace: it is gone"
    if replaced == b"1" * 2000 and "replaced twice" in marks:
        yield "replace: the old content is back"
    if "finished" in marks and tree.get("root/d/e/large", LARGE) != LARGE:
        yield "finish: not whole"
    if "synced" in marks and "root/d/e/large" not in tree:
        yield "sync_directory: the file is gone"


def record_without(step: str, tmp_path: Path) -> list[Op]:
    root = tmp_path / "recorded"
    root.mkdir()
    return record(SCRIPT, root, tmp_path, [step])


def all_broken_promises(ops: Sequence[Op]) -> set[str]:
    broken: set[str] = set()
    for position, tree in crash_states(ops, seed=0, random_states=20):
        assert isinstance(tree, CrashTree)
        broken.update(broken_promises(tree.entries, marks_before(ops, position)))
    return broken


def test_promises_hold_after_a_power_cut_at_any_moment(tmp_path: Path) -> None:
    ops = record_without("", tmp_path)
    assert marks_before(ops, len(ops)) == MARKS
    assert all_broken_promises(ops) == set()


def test_root_that_another_process_has_just_made_is_made_durable(tmp_path: Path) -> None:
    """The other one may die before its own fsync."""
    script = """
import os, sys
from distckpt.storage import PosixStorage
from tests.crash.power_cut import mark

os.mkdir(sys.argv[1] + "/root")
storage = PosixStorage(sys.argv[1] + "/root", io_backend="threads")
storage.make_directory("")
mark("made")
"""
    root = tmp_path / "recorded"
    root.mkdir()
    ops = record(script, root, tmp_path)
    for position, tree in crash_states(ops, seed=0):
        assert isinstance(tree, CrashTree)
        assert "root" in tree.entries or not marks_before(ops, position)


def test_nothing_temporary_is_left_once_a_call_has_returned(tmp_path: Path) -> None:
    ops = record_without("", tmp_path)
    for position, tree in crash_states(ops, seed=0):
        assert isinstance(tree, CrashTree)
        if ops[position - 1].kind == "mark" and ops[position - 1].path in ("put", "replaced twice"):
            assert not [name for name in tree.entries if ".tmp-" in name]


@pytest.mark.parametrize(
    ("step", "broken"),
    [
        (
            "os.fsync = lambda descriptor: None",
            {"put_if_absent: not whole", "replace: neither old nor new"},
        ),
        ("_C.File.sync = lambda file: None", {"finish: not whole"}),
        (
            "_C.sync_directory = lambda path: None",
            {
                "make_directory: it is gone",
                "put_if_absent: it is gone",
                "replace: it is gone",
                "sync_directory: the file is gone",
            },
        ),
        (
            # Only of what holds the names of directories.
            "sync = _C.sync_directory\n"
            "_C.sync_directory = lambda path: None if path.endswith(('recorded', 'root')) else sync(path)",
            {"make_directory: it is gone"},
        ),
        (
            # Only of what holds the names of small files.
            "sync = _C.sync_directory\n"
            "_C.sync_directory = lambda path: None if path.endswith('root/d') else sync(path)",
            {"put_if_absent: it is gone", "replace: it is gone"},
        ),
        (
            # The right calls in the wrong order: the directory is synced before the name is in it.
            "link = os.link\n"
            "sync = _C.sync_directory\n"
            "def link_late(source, target, **options):\n"
            "    sync(os.path.dirname(target))\n"
            "    link(source, target, **options)\n"
            "    _C.sync_directory = lambda path: setattr(_C, 'sync_directory', sync)\n"
            "os.link = link_late",
            {"put_if_absent: it is gone"},
        ),
        (
            # In place instead of under a temporary name.
            "def write_in_place(storage, name, data):\n"
            "    descriptor = os.open(storage._path(name), os.O_CREAT | os.O_TRUNC | os.O_WRONLY)\n"
            "    os.write(descriptor, data)\n"
            "    os.fsync(descriptor)\n"
            "    os.close(descriptor)\n"
            "    _C.sync_directory(os.path.dirname(storage._path(name)))\n"
            "PosixStorage.replace = write_in_place",
            {"replace: neither old nor new"},
        ),
    ],
    ids=[
        "no fsync of small files",
        "no fsync of large files",
        "no fsync of directories",
        "no fsync of parents of directories",
        "no fsync of the directory of small files",
        "fsync of the directory before the link",
        "replace in place",
    ],
)
def test_each_step_is_needed(tmp_path: Path, step: str, broken: set[str]) -> None:
    assert broken <= all_broken_promises(record_without(step, tmp_path))


# The model and the recorder themselves


def test_what_lay_there_before_is_durable(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "old").mkdir(parents=True)
    (root / "old" / "file").write_bytes(b"old")
    ops = record("import os, sys; os.chdir(sys.argv[1]); os.rename('old/file', 'old/new')", root, tmp_path)
    for number, (_, build) in enumerate(crash_states(ops, seed=0)):
        built = tmp_path / str(number)
        build(built)
        (name,) = os.listdir(built / "old")
        assert name in ("file", "new")
        assert (built / "old" / name).read_bytes() == b"old"


def test_calls_of_child_processes_are_recorded(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    script = """
import os, subprocess, sys
os.chdir(sys.argv[1])
subprocess.run([sys.executable, "-c", "open('a', 'xb').write(b'1')"], check=True)
if os.fork() == 0:
    open("b", "xb").write(b"2")
    os._exit(0)
os.wait()
"""
    ops = record(script, root, tmp_path)
    *_, (_, tree) = (state for state in crash_states(ops, seed=0, random_states=0))
    assert isinstance(tree, CrashTree)
    assert tree.entries == {"a": b"1", "b": b"2"}


def test_call_that_the_recorder_does_not_see_is_an_error(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(RuntimeError, match="not seen: \\['link'\\]"):
        record("import os, sys; os.symlink('/', sys.argv[1] + '/link')", root, tmp_path)


def test_failure_of_the_recorded_script_is_an_error(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        record("1 / 0", root, tmp_path)
