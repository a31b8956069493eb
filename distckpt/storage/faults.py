"""A Storage whose N-th call fails, for tests that try every N. It decides when to fail and stores nothing.

counting = CrashingStorage(MemoryStorage())
save(counting)
for call in range(1, len(counting.calls) + 1):
    memory = MemoryStorage()
    with pytest.raises(OSError):
        save(CrashingStorage(memory, fail_at=call))
    check(memory), check(memory.power_cut()), check(memory.power_cut(seed=call))
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from typing_extensions import Buffer

from distckpt.storage.port import FreeSpace, ReadFile, Storage, WriteFile

Result = TypeVar("Result")
Moment = Literal["before", "half", "after"]


class Crash(Exception):
    """The process died here: this call may or may not have had its effect, no later one has any."""


class CrashingStorage:
    """Passes every call on to `inner`, and makes call number `fail_at` (from 1; 0 is never) fail.

    error: what it raises; by default OSError(EIO). After a Crash every later call raises it too.
    moment: fail "before" the call has any effect; "after" it had all of it, as when a reply gets lost; or, a
    write, when "half" of it is done (other calls as with "before").

    Counted are the methods of the port and of the files it opens, except those that cannot fail: properties,
    `abandon` and closing a ReadFile. Safe to use from several threads.
    """

    def __init__(
        self,
        inner: Storage,
        *,
        fail_at: int = 0,
        error: Exception | None = None,
        moment: Moment = "before",
    ) -> None:
        self._inner = inner
        self._fail_at = fail_at
        self._error = error if error is not None else OSError(errno.EIO, os.strerror(errno.EIO), "injected")
        self._moment = moment
        self._calls: list[str] = []
        self._lock = threading.Lock()

    @property
    def calls(self) -> Sequence[str]:
        """What was called so far, the failed call included: "put_if_absent iter_0000001/index-1.json"."""
        return tuple(self._calls)

    @property
    def failed(self) -> bool:
        """Whether the failure has happened."""
        return 0 < self._fail_at <= len(self._calls)

    @property
    def location(self) -> str:
        return self._inner.location

    def list(self, directory: str) -> Sequence[str]:
        return self.run("list", directory, lambda: self._inner.list(directory))

    def make_directory(self, directory: str) -> None:
        self.run("make_directory", directory, lambda: self._inner.make_directory(directory))

    def sync_directory(self, directory: str) -> None:
        self.run("sync_directory", directory, lambda: self._inner.sync_directory(directory))

    def create(self, name: str, *, size_hint: int = 0) -> WriteFile:
        file = self.run("create", name, lambda: self._inner.create(name, size_hint=size_hint))
        return _CrashingWriteFile(self, file)

    def reopen(self, name: str) -> WriteFile:
        return _CrashingWriteFile(self, self.run("reopen", name, lambda: self._inner.reopen(name)))

    def open(self, name: str) -> ReadFile:
        return _CrashingReadFile(self, self.run("open", name, lambda: self._inner.open(name)))

    def put_if_absent(self, name: str, data: bytes) -> bool:
        return self.run("put_if_absent", name, lambda: self._inner.put_if_absent(name, data))

    def replace(self, name: str, data: bytes) -> None:
        self.run("replace", name, lambda: self._inner.replace(name, data))

    def append(self, name: str, data: bytes) -> None:
        half = data[: len(data) // 2]
        self.run("append", name, lambda: self._inner.append(name, data), lambda: self._inner.append(name, half))

    def move(self, name: str, new_name: str) -> None:
        self.run("move", name, lambda: self._inner.move(name, new_name))

    def remove(self, name: str) -> None:
        self.run("remove", name, lambda: self._inner.remove(name))

    def remove_directory(self, directory: str) -> None:
        self.run("remove_directory", directory, lambda: self._inner.remove_directory(directory))

    def touch(self, name: str) -> None:
        self.run("touch", name, lambda: self._inner.touch(name))

    def age_s(self, name: str) -> float:
        return self.run("age_s", name, lambda: self._inner.age_s(name))

    def free_space(self) -> FreeSpace | None:
        return self.run("free_space", "", lambda: self._inner.free_space())

    def run(
        self,
        method: str,
        name: str,
        call: Callable[[], Result],
        half: Callable[[], None] | None = None,
    ) -> Result:
        """Count a call and make it, or its half, or fail, as the case may be."""
        with self._lock:
            dead = self.failed and isinstance(self._error, Crash)
            if not dead:
                self._calls.append(f"{method} {name}".rstrip())
            fails = dead or len(self._calls) == self._fail_at
        if not fails:
            return call()
        if not dead and self._moment == "after":
            call()
        elif not dead and self._moment == "half" and half is not None:
            half()
        raise self._error


class _CrashingWriteFile:
    def __init__(self, storage: CrashingStorage, inner: WriteFile) -> None:
        self._storage = storage
        self._inner = inner

    @property
    def name(self) -> str:
        return self._inner.name

    def write(self, offset: int, buffer: Buffer) -> None:
        def write_half() -> None:
            data = bytes(buffer)
            self._inner.write(offset, data[: len(data) // 2])

        self._run("write", lambda: self._inner.write(offset, buffer), write_half)

    def sync(self) -> None:
        self._run("sync", self._inner.sync, None)

    def finish(self, size_bytes: int) -> None:
        self._run("finish", lambda: self._inner.finish(size_bytes), None)

    def abandon(self) -> None:
        self._inner.abandon()

    def _run(self, method: str, call: Callable[[], None], half: Callable[[], None] | None) -> None:
        try:
            self._storage.run(method, self.name, call, half)
        except Exception:
            self._inner.abandon()
            raise


class _CrashingReadFile:
    def __init__(self, storage: CrashingStorage, inner: ReadFile) -> None:
        self._storage = storage
        self._inner = inner

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def size_bytes(self) -> int:
        return self._inner.size_bytes

    def read_into(self, offset: int, buffer: Buffer) -> None:
        self._storage.run("read_into", self.name, lambda: self._inner.read_into(offset, buffer))

    def close(self) -> None:
        self._inner.close()
