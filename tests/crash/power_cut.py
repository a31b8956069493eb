"""What a power cut could leave of the files that a program writes, at every moment of its run.

    ops = record(SCRIPT, root, tmp)                  # SCRIPT: Python source; it finds root in sys.argv[1]
    for position, build in crash_states(ops, seed=0):
        directory = fresh directory
        build(directory)                             # now looks as `root` might after a cut at `position`
        check(directory, marks_before(ops, position))

`record` runs the script in a process of its own, below a library that logs its system calls
(syscall_recorder.cc). The script says how far it got with `mark("saved 1000")`: a mark among the first
`position` ops is a promise given before the power failed. It must write through the C library, hence with
PosixStorage(io_backend="threads"). It may start further processes; their calls are logged too, in one order.
Before the log is used, it is replayed in full and compared with the real files, so that a call that escaped
is an error.

The model takes nothing for granted but what POSIX says, and less than any real file system does:
* The content of a file is that of its last fsync. Any of the later writes and truncations may have reached
  the disk too, in any combination, and writes may be torn at sector boundaries.
* The names in a directory are those of its last fsync. Any of the later changes may have reached the disk
  too, in any combination; a rename is atomic. The fsync of a file says nothing about its name.
* What is in the tree when recording starts is durable.

For each position crash_states yields first what is durable and nothing else, then all that was written, then
`random_states` random choices in between. (The idea is that of ALICE: Pillai et al., "All File Systems Are
Not Created Equal", OSDI 2014.)
"""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash.preload import preload_library

SECTOR = 512
SOURCE_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Op:
    """One call that succeeded. Paths are absolute; the path of a mark is its text.

    kind: create, write, truncate, fsync, link, rename, unlink (of directories too), mkdir or mark; `initial`
    is what lay there before: a file with its content as data, or a directory, whose size is -1.
    """

    kind: str
    path: str
    path2: str = ""
    inode: int = 0
    offset: int = 0
    size: int = 0
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class CrashTree:
    """Relative path -> content (None: a directory), parents first. Call it with a place to build it in."""

    entries: dict[str, bytes | None]

    def __call__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.entries.items():
            if content is None:
                (directory / name).mkdir()
            else:
                (directory / name).write_bytes(content)


def mark(text: str) -> None:
    """Called in the recorded script: all that it did before this has returned."""
    ctypes.CDLL(None).recorder_mark(text.encode())


def marks_before(ops: Sequence[Op], position: int) -> list[str]:
    """The marks that the script had passed when the power failed."""
    return [op.path for op in ops[:position] if op.kind == "mark"]


def record(script: str, root: Path, tmp: Path, arguments: Sequence[str] = ()) -> list[Op]:
    """Run Python source as `script root *arguments`; what it did below `root`, an existing directory."""
    return record_command([sys.executable, "-c", script, str(root.resolve()), *arguments], root, tmp)


def record_command(command: Sequence[str], root: Path, tmp: Path) -> list[Op]:
    """The same for any command, such as a launcher of several ranks. No symlinks in its paths."""
    root = root.resolve()
    log = Path(tempfile.mkdtemp(dir=tmp)) / "log"
    ops = list(_initial_ops(root))
    environment = os.environ | {
        "LD_PRELOAD": preload_library("syscall_recorder.cc"),
        "RECORD_ROOT": str(root),
        "RECORD_LOG": str(log),
        "PYTHONPATH": os.pathsep.join([str(SOURCE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    done = subprocess.run(command, env=environment, cwd=SOURCE_ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the recorded program failed:\n{done.stdout}{done.stderr}")
    ops += _parse(log.read_bytes() if log.exists() else b"")
    _check_replay(ops, root)
    return ops


def crash_states(
    ops: Sequence[Op], seed: int, *, random_states: int = 3
) -> Iterator[tuple[int, Callable[[Path], None]]]:
    """(position, build) for a power cut after each position: the number of ops that had returned by then."""
    rng = random.Random(seed)
    model = _Model()
    for position, op in enumerate(ops, 1):
        model.apply(op)
        if op.kind == "initial" and position < len(ops) and ops[position].kind == "initial":
            continue
        yield position, CrashTree(dict(model.root.survivors(_keep_none)))
        yield position, CrashTree(dict(model.root.survivors(_keep_all)))
        for _ in range(random_states):
            yield position, CrashTree(dict(model.root.survivors(_RandomChoice(rng))))


class _RandomChoice:
    """Which of the changes that are not durable have reached the disk."""

    def __init__(self, rng: random.Random) -> None:
        # Some cuts lose little, some nearly all.
        self._probability = rng.choice((0.1, 0.5, 0.9))
        self._rng = rng

    def keeps(self) -> bool:
        return self._rng.random() < self._probability

    def tears(self, size: int) -> tuple[int, int]:
        """Which bytes of a write of that size have reached the disk."""
        if self._rng.random() < 0.5:
            return 0, size
        sectors = -(-size // SECTOR)
        start, stop = sorted(self._rng.randint(0, sectors) for _ in range(2))
        return start * SECTOR, min(size, stop * SECTOR)


class _Certain(_RandomChoice):
    def __init__(self, keep: bool) -> None:
        self._keep = keep

    def keeps(self) -> bool:
        return self._keep

    def tears(self, size: int) -> tuple[int, int]:
        return 0, size


_keep_none = _Certain(False)
_keep_all = _Certain(True)


@dataclass(slots=True, eq=False)
class _File:
    durable: bytes = b""
    unsynced: list[Op] = field(default_factory=list)

    def sync(self) -> None:
        self.durable = self.content(_keep_all)
        self.unsynced = []

    def content(self, choice: _RandomChoice) -> bytes:
        if not self.unsynced:
            return self.durable
        content = bytearray(self.durable)
        for op in self.unsynced:
            if not choice.keeps():
                continue
            if op.kind == "truncate":
                del content[op.size :]
                content.extend(bytes(op.size - len(content)))
                continue
            start, stop = choice.tears(len(op.data))
            if start < stop:
                content.extend(bytes(max(0, op.offset + start - len(content))))
                content[op.offset + start : op.offset + stop] = op.data[start:stop]
        return bytes(content)


@dataclass(slots=True, eq=False)
class _Directory:
    """`unsynced`: changes since the last fsync; each gives some names new meanings (None: no such name)."""

    visible: dict[str, _File | _Directory] = field(default_factory=dict)
    durable: dict[str, _File | _Directory] = field(default_factory=dict)
    unsynced: list[dict[str, _File | _Directory | None]] = field(default_factory=list)

    def change(self, names: dict[str, _File | _Directory | None]) -> None:
        _update(self.visible, names)
        self.unsynced.append(names)

    def sync(self) -> None:
        self.durable = dict(self.visible)
        self.unsynced = []

    def survivors(self, choice: _RandomChoice, prefix: str = "") -> Iterator[tuple[str, bytes | None]]:
        names = dict(self.durable)
        for change in self.unsynced:
            if choice.keeps():
                _update(names, change)
        for name, node in sorted(names.items()):
            if isinstance(node, _File):
                yield prefix + name, node.content(choice)
            else:
                yield prefix + name, None
                yield from node.survivors(choice, f"{prefix}{name}/")


def _update(names: dict[str, _File | _Directory], change: dict[str, _File | _Directory | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class _Model:
    """The files as the program sees them, and what of them is durable, after the ops that were applied."""

    def __init__(self) -> None:
        self.root = _Directory()
        self._root_path = ""
        self._nodes: dict[int, _File | _Directory] = {}

    def apply(self, op: Op) -> None:
        match op.kind:
            case "initial":
                self._apply_initial(op)
            case "create" | "mkdir":
                self._add(op, _File() if op.kind == "create" else _Directory())
            case "write" | "truncate":
                file = self._nodes[op.inode]
                assert isinstance(file, _File)
                file.unsynced.append(op)
            case "fsync":
                self._nodes[op.inode].sync()
            case "link":
                self._add(op, self._nodes[op.inode], path=op.path2)
            case "rename":
                self._rename(op)
            case "unlink":
                directory, name = self._locate(op.path)
                directory.change({name: None})
            case "mark":
                pass
            case _:
                raise NotImplementedError(f"{op.kind} {op.path} {op.path2}")

    def _apply_initial(self, op: Op) -> None:
        if not self._root_path:
            self._root_path = op.path
            self._nodes[op.inode] = self.root
            return
        self._add(op, _File(op.data) if op.size >= 0 else _Directory())
        self._locate(op.path)[0].sync()

    def _add(self, op: Op, node: _File | _Directory, path: str | None = None) -> None:
        self._nodes[op.inode] = node
        directory, name = self._locate(path or op.path)
        directory.change({name: node})

    def _rename(self, op: Op) -> None:
        directory, old = self._locate(op.path)
        target, new = self._locate(op.path2)
        if target is not directory:
            raise NotImplementedError(f"rename between directories: {op.path} {op.path2}")
        if old != new:
            directory.change({new: directory.visible[old], old: None})

    def _locate(self, path: str) -> tuple[_Directory, str]:
        *parents, name = os.path.relpath(os.path.normpath(path), self._root_path).split(os.sep)
        directory = self.root
        for parent in parents:
            child = directory.visible[parent]
            assert isinstance(child, _Directory), path
            directory = child
        return directory, name


def _initial_ops(root: Path) -> Iterator[Op]:
    yield Op("initial", str(root), inode=root.stat().st_ino, size=-1)
    for path in sorted(root.rglob("*")):
        content = None if path.is_dir() else path.read_bytes()
        size = -1 if content is None else len(content)
        yield Op("initial", str(path), inode=path.stat().st_ino, size=size, data=content or b"")


def _parse(log: bytes) -> Iterator[Op]:
    position = 0
    while position < len(log):
        header_end = log.index(b"\n", position)
        kind, inode, offset, size, *lengths = log[position:header_end].split(b" ")
        position = header_end + 1
        fields = []
        for length in map(int, lengths):
            fields.append(log[position : position + length])
            position += length
        path, path2, data = fields
        yield Op(kind.decode(), os.fsdecode(path), os.fsdecode(path2), int(inode), int(offset), int(size), data)


def _check_replay(ops: Sequence[Op], root: Path) -> None:
    model = _Model()
    for op in ops:
        model.apply(op)
    replayed = dict(model.root.survivors(_keep_all))
    real = {str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in root.rglob("*")}
    different = sorted(
        name
        for name in replayed.keys() | real.keys()
        if name not in replayed or name not in real or replayed[name] != real[name]
    )
    if different:
        raise RuntimeError(f"the log does not explain these files; some calls were not seen: {different}")
