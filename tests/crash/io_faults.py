"""System calls that fail, in a process that runs below the library of io_faults.cc.

    launch(SCRIPT, 1, env=environment())
    # and in SCRIPT:
    with injected(Fault("fsync", "shard-00001", errno.EIO)) as calls:
        save()
    assert calls.failed == 1

Only calls through the C library can fail, hence those of PosixStorage(io_backend="threads").
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.crash.preload import preload_library

KINDS = ("open", "write", "truncate", "fsync", "fstat", "close", "link", "rename", "unlink")
EVERY = 2**31 - 1


@dataclass(frozen=True)
class Fault:
    """Which calls fail, of those of one kind to paths that contain `text` ("$" stands at the end of each path).

    kind: of KINDS; write is every call that writes, fsync is fdatasync too. code: an errno; 0, of writes, is no error
    but a short write, of half the bytes. first, count: the first call to fail, from 1, and how many from there on.
    after: the call has its effect, and only its reply is lost.
    """

    kind: str
    text: str
    code: int
    first: int = 1
    count: int = 1
    after: bool = False


@dataclass
class Calls:
    """Filled at the end of the body: how many calls the fault was about, and how many of them failed."""

    seen: int = 0
    failed: int = 0


def environment() -> dict[str, str]:
    """What a process needs so that calls of it can fail."""
    return {"LD_PRELOAD": preload_library("io_faults.cc")}


@contextmanager
def injected(fault: Fault) -> Iterator[Calls]:
    """The calls fail while the body runs, in all threads of this process."""
    assert fault.kind in KINDS
    library = ctypes.CDLL(None)
    kind, text = fault.kind.encode(), fault.text.encode()
    library.io_faults_set(kind, text, fault.first, fault.count, fault.code, int(fault.after))
    calls = Calls()
    try:
        yield calls
    finally:
        library.io_faults_stop()
        calls.seen, calls.failed = library.io_faults_seen(), library.io_faults_failed()
