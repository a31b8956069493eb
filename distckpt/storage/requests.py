"""How transfers are cut into requests, and the BlockIO objects that make them. Knows no file.

A request is copied or summed while others are in flight. How large and how many they are was measured beside raw
transfers (docs/design.md, section 8); each kind of transfer has its own best.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from distckpt import _C


@dataclass(frozen=True, slots=True)
class Requests:
    """size_bytes: of each, a multiple of 4096. in_flight: how many at the most."""

    size_bytes: int
    in_flight: int


# Few and large: many in flight are no faster, and take more than twice as much from the training beside them.
WRITES = Requests(8 << 20, 4)
READS = Requests(2 << 20, 16)
# From the page cache, where a request ends as soon as it begins: what was read is still in the processor's cache when
# it is summed and copied.
CACHED_READS = Requests(1 << 20, 2)


class BlockIOPool:
    """Lends each call a BlockIO of its own, since one serves one user at a time. Thread-safe.

    backend: "" is the best one. Raises ValueError for an unknown one, OSError for one that the system refuses.
    """

    def __init__(self, backend: str, requests: Requests) -> None:
        self._backend = backend
        self._requests = requests
        self._pid = os.getpid()
        self._idle: list[_C.BlockIO] = []
        with self.borrow():  # An unknown or refused backend is an error now, not at the first save.
            pass

    @contextmanager
    def borrow(self) -> Iterator[_C.BlockIO]:
        if os.getpid() != self._pid:
            # The parent's rings and threads are of no use in a forked child.
            self._pid, self._idle = os.getpid(), []
        idle, requests = self._idle, self._requests
        try:
            block_io = idle.pop()
        except IndexError:
            block_io = _C.BlockIO(self._backend, request_size=requests.size_bytes, queue_depth=requests.in_flight)
        yield block_io
        # Not after an error: a BlockIO that failed half-way is not used again.
        idle.append(block_io)
