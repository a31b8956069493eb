"""Storage in memory, for tests. It models what a power cut may leave, and promises no more than the port.

Content that was not finished and names whose directory was not synced are visible, as they are on a real
system, but `power_cut` loses them. A name that put_if_absent or replace made durable says nothing about the
other names of the directory, although on POSIX one fsync happens to cover them all.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from typing_extensions import Buffer

from distckpt.storage.names import split_name
from distckpt.storage.port import FreeSpace

_ALIGNMENT = 4096
_SECTOR = 512


@dataclass(slots=True, eq=False)
class _File:
    """One file, whatever its names: what readers see, what is durable, and the writes that lie between."""

    modified_s: float
    content: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    unsynced: list[tuple[int, bytes]] = field(default_factory=list)

    def sync(self) -> None:
        self.durable = bytes(self.content)
        self.unsynced = []

    def after_power_cut(self, rng: random.Random | None) -> bytes:
        """The durable content; with `rng`, some of the later writes too, torn, in any order."""
        if rng is None:
            return self.durable
        content = bytearray(self.durable)
        for offset, data in rng.sample(self.unsynced, rng.randint(0, len(self.unsynced))):
            sectors = -(-len(data) // _SECTOR)
            start = rng.randint(0, sectors) * _SECTOR if rng.random() < 0.3 else 0
            stop = rng.randint(0, sectors) * _SECTOR if rng.random() < 0.5 else len(data)
            _overwrite(content, offset + start, data[start:stop])
        return bytes(content)


class MemoryStorage:
    """A Storage whose root does not exist until make_directory. Safe to use from several threads.

    clock: what `touch` and `age_s` go by, in seconds. capacity_bytes: a write that does not fit stores what
    does and raises ENOSPC.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, capacity_bytes: int | None = None) -> None:
        self._clock = clock
        self._capacity_bytes = capacity_bytes
        self._lock = threading.RLock()
        self._directories: set[str] = set()
        self._durable_directories: set[str] = set()
        self._files: dict[str, _File] = {}
        self._durable_files: dict[str, _File] = {}
        # Per directory, how its names changed since its last sync: name -> where it led after each change.
        self._unsynced: dict[str, dict[str, list[_File | None]]] = {}

    def power_cut(self, seed: int | None = None) -> MemoryStorage:
        """What a power cut now would leave, as a new storage; this one goes on as if nothing had happened.

        Without `seed`, exactly what is durable. With it, also a random part of what is not: some changes of
        names but not others, and files with some of their later writes, torn at sector boundaries.
        """
        rng = None if seed is None else random.Random(seed)
        with self._lock:
            after = MemoryStorage(clock=self._clock, capacity_bytes=self._capacity_bytes)
            directories = {name for name in self._durable_directories if self._survives(name, rng)}
            after._directories = {name for name in directories if directories.issuperset(_parents(name))}
            names: dict[str, _File | None] = dict(self._durable_files)
            if rng is not None:
                names.update(self._some_unsynced_names(rng))
            for name, file in names.items():
                if file is not None and _parent(name) in after._directories:
                    content = file.after_power_cut(rng)
                    after._files[name] = _File(file.modified_s, bytearray(content), content)
            after._durable_directories = set(after._directories)
            after._durable_files = dict(after._files)
            return after

    @property
    def location(self) -> str:
        return "memory:"

    def list(self, directory: str) -> Sequence[str]:
        prefix = _prefix(directory)
        with self._lock:
            names = [*self._files, *self._directories - {""}]
        return sorted(name[len(prefix) :] for name in names if _is_directly_in(name, prefix))

    def make_directory(self, directory: str) -> None:
        _prefix(directory)
        with self._lock:
            for name in (*_parents(directory), directory):
                if name in self._files:
                    raise _os_error(errno.EEXIST, name)
                if name not in self._directories:
                    self._forget_below(name)
                    self._directories.add(name)
                self._durable_directories.add(name)
                self._unsynced.get(_parent(name), {}).pop(name, None)

    def sync_directory(self, directory: str) -> None:
        with self._lock:
            self._require_directory(directory)
            for name, changes in self._unsynced.pop(directory, {}).items():
                self._make_name_durable(name, changes[-1])

    def create(self, name: str, *, size_hint: int = 0) -> MemoryWriteFile:
        with self._lock:
            self._require_parent(name)
            if self._is_taken(name):
                raise _os_error(errno.EEXIST, name)
            file = _File(self._clock())
            self._change_name(name, file)
            return MemoryWriteFile(self, name, file)

    def reopen(self, name: str) -> MemoryWriteFile:
        with self._lock:
            return MemoryWriteFile(self, name, self._lookup(name))

    def open(self, name: str) -> MemoryReadFile:
        with self._lock:
            return MemoryReadFile(name, self._lookup(name), self._lock)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        with self._lock:
            self._require_parent(name)
            if self._is_taken(name):
                return False
            self._put(name, data)
            return True

    def replace(self, name: str, data: bytes) -> None:
        with self._lock:
            self._require_parent(name)
            if name in self._directories:
                raise _os_error(errno.EISDIR, name)
            self._put(name, data)

    def append(self, name: str, data: bytes) -> None:
        with self._lock:
            self._require_parent(name)
            if not self._is_taken(name):
                self._change_name(name, _File(self._clock()))
            file = self._lookup(name)
            is_torn = bool(file.content) and not file.content.endswith(b"\n")
            line = b"\n" + data if is_torn else data
            if self._capacity_bytes is not None and len(line) > self._free_bytes():
                raise _os_error(errno.ENOSPC, name)
            file.unsynced.append((len(file.content), line))
            file.content += line
            file.modified_s = self._clock()

    def move(self, name: str, new_name: str) -> None:
        with self._lock:
            self._require_parent(new_name)
            file = self._lookup(name)
            if new_name in self._directories:
                raise _os_error(errno.EISDIR, new_name)
            self._change_name(name, None)
            self._change_name(new_name, file)

    def remove(self, name: str) -> None:
        split_name(name)
        with self._lock:
            if name in self._directories:
                raise _os_error(errno.EISDIR, name)
            if name in self._files:
                self._change_name(name, None)

    def remove_directory(self, directory: str) -> None:
        split_name(directory)
        with self._lock:
            if directory in self._files:
                raise _os_error(errno.ENOTDIR, directory)
            if directory in self._directories and not self.list(directory):
                self._directories.remove(directory)
                self._unsynced.setdefault(_parent(directory), {})[directory] = [None]

    def touch(self, name: str) -> None:
        with self._lock:
            self._lookup(name).modified_s = self._clock()

    def age_s(self, name: str) -> float:
        with self._lock:
            return max(0.0, self._clock() - self._lookup(name).modified_s)

    def free_space(self) -> FreeSpace | None:
        with self._lock:
            if self._capacity_bytes is None:
                return None
            return FreeSpace(f"memory:{id(self)}", self._free_bytes())

    def _survives(self, directory: str, rng: random.Random | None) -> bool:
        removed = directory in self._unsynced.get(_parent(directory), {})
        return rng is None or not removed or rng.random() < 0.5

    def _some_unsynced_names(self, rng: random.Random) -> Iterator[tuple[str, _File | None]]:
        for changes_of in self._unsynced.values():
            for name, changes in changes_of.items():
                # Changes of one name keep their order, so any one of them may be the last that survives.
                survived = rng.randint(0, len(changes))
                if survived and name not in self._durable_directories:
                    yield name, changes[survived - 1]

    def _forget_below(self, directory: str) -> None:
        # A directory that is made again is a new one: what was in the old one can no longer come back.
        self._unsynced.pop(directory, None)
        for name in [name for name in self._durable_files if name.startswith(directory + "/")]:
            del self._durable_files[name]
        self._durable_directories -= {n for n in self._durable_directories if n.startswith(directory + "/")}

    def _change_name(self, name: str, file: _File | None) -> None:
        if file is None:
            del self._files[name]
        else:
            self._files[name] = file
        self._unsynced.setdefault(_parent(name), {}).setdefault(name, []).append(file)

    def _make_name_durable(self, name: str, file: _File | None) -> None:
        if file is not None:
            self._durable_files[name] = file
        else:
            self._durable_files.pop(name, None)
            self._durable_directories.discard(name)
            self._forget_below(name)

    def _put(self, name: str, data: bytes) -> None:
        if self._capacity_bytes is not None and len(data) > self._free_bytes():
            raise _os_error(errno.ENOSPC, name)
        file = _File(self._clock(), bytearray(data), bytes(data))
        self._files[name] = file
        self._durable_files[name] = file
        self._unsynced.get(_parent(name), {}).pop(name, None)

    def _is_taken(self, name: str) -> bool:
        return name in self._files or name in self._directories

    def _require_parent(self, name: str) -> None:
        split_name(name)
        self._require_directory(_parent(name))

    def _require_directory(self, directory: str) -> None:
        _prefix(directory)
        if directory in self._files:
            raise _os_error(errno.ENOTDIR, directory)
        if directory not in self._directories:
            raise _os_error(errno.ENOENT, directory)

    def _lookup(self, name: str) -> _File:
        split_name(name)
        if name in self._directories:
            raise _os_error(errno.EISDIR, name)
        if name not in self._files:
            raise _os_error(errno.ENOENT, name)
        return self._files[name]

    def _free_bytes(self) -> int:
        assert self._capacity_bytes is not None
        used = sum(len(file.content) for file in set(self._files.values()))
        return max(0, self._capacity_bytes - used)


class MemoryWriteFile:
    """One new file, open for writing."""

    def __init__(self, storage: MemoryStorage, name: str, file: _File) -> None:
        self._storage = storage
        self._name = name
        self._file: _File | None = file

    @property
    def name(self) -> str:
        return self._name

    def write(self, offset: int, buffer: Buffer) -> None:
        if offset < 0 or offset % _ALIGNMENT:
            raise ValueError(f"{self._name}: write offset {offset} is not a multiple of {_ALIGNMENT}")
        data = bytes(buffer)
        # Zeros, as with O_DIRECT, so that a writer who relies on what lies there is found out.
        data += bytes(-len(data) % _ALIGNMENT)
        storage = self._storage
        with storage._lock:
            file = self._open_file()
            fits = len(data)
            if storage._capacity_bytes is not None:
                fits = min(fits, len(file.content) + storage._free_bytes() - offset)
            _overwrite(file.content, offset, data[: max(0, fits)])
            file.unsynced.append((offset, data[: max(0, fits)]))
            file.modified_s = storage._clock()
            if fits < len(data):
                self.abandon()
                raise _os_error(errno.ENOSPC, self._name)

    def sync(self) -> None:
        with self._storage._lock:
            self._open_file().sync()

    def finish(self, size_bytes: int) -> None:
        with self._storage._lock:
            file = self._open_file()
            self._file = None
            del file.content[size_bytes:]
            file.content.extend(bytes(size_bytes - len(file.content)))
            file.sync()
            if self._storage._files.get(self._name) is not file:
                raise OSError(errno.ESTALE, "path no longer names the file that was written", self._name)

    def abandon(self) -> None:
        self._file = None

    def _open_file(self) -> _File:
        if self._file is None:
            raise ValueError(f"{self._name}: already finished or abandoned")
        return self._file


class MemoryReadFile:
    """One open file; it stays readable when its name is removed."""

    def __init__(self, name: str, file: _File, lock: threading.RLock) -> None:
        self._name = name
        self._file = file
        self._lock = lock
        self._size_bytes = len(file.content)

    @property
    def name(self) -> str:
        return self._name

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def read_into(self, offset: int, buffer: Buffer) -> None:
        if offset < 0:
            raise ValueError(f"{self._name}: read offset {offset} is negative")
        view = memoryview(buffer)
        with self._lock:
            data = bytes(self._file.content[offset : offset + view.nbytes])
        if len(data) != view.nbytes:
            raise EOFError(
                f"{self._name}: {view.nbytes} bytes wanted at offset {offset}, but only {len(data)} are there"
            )
        if data:  # An empty view cannot be cast.
            view.cast("B")[:] = data

    def close(self) -> None:
        pass


def _parent(name: str) -> str:
    return "/".join(split_name(name)[:-1]) if name else ""


def _parents(name: str) -> list[str]:
    """All above it, from the root ("") down."""
    if not name:
        return []
    segments = split_name(name)
    return ["/".join(segments[:count]) for count in range(len(segments))]


def _prefix(directory: str) -> str:
    """What the names in it begin with; ValueError if it is not a valid name."""
    return "/".join(split_name(directory)) + "/" if directory else ""


def _is_directly_in(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and "/" not in name[len(prefix) :]


def _overwrite(content: bytearray, offset: int, data: bytes) -> None:
    if data and len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def _os_error(code: int, name: str) -> OSError:
    return OSError(code, os.strerror(code), name)
