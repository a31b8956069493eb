"""Coordinator of an MPI job: point-to-point messages on a communicator of its own.

Nothing in it blocks: messages are probed for, received and sent by polling, so that every wait has a bound
and other threads may use MPI meanwhile.

A message's header says to which call it belongs: gathers are numbered, and a scatter belongs to the gather
before it. What came early waits in the inbox, what comes late is dropped.
"""

from __future__ import annotations

import atexit
import struct
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from distckpt.coordinator.port import RankFailure
from distckpt.errors import CheckpointError

if TYPE_CHECKING:
    from mpi4py import MPI

_HEADER = struct.Struct("<QQ")  # number of the gather; 0, or number of the scatter since
_TAG = 1
_LINGER_S = 10.0  # how long close() waits for messages on their way out


class MpiCoordinator:
    """All ranks of `comm` (default: MPI.COMM_WORLD). Constructed on all of them, from the main thread.

    Needs MPI_THREAD_MULTIPLE, for it is called from background threads. Its duplicate of the communicator is
    not freed: that would be collective.
    """

    def __init__(self, comm: MPI.Comm | None = None) -> None:
        try:
            from mpi4py import MPI  # this initialises MPI
        except ImportError as error:
            raise CheckpointError("mpi4py cannot be imported: install distckpt[mpi]") from error
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise CheckpointError(
                "MPI was initialised without MPI_THREAD_MULTIPLE, which checkpoints from a background thread "
                'need. Leave mpi4py.rc.thread_level at "multiple", its default; where another library '
                "initialises MPI, let it call MPI_Init_thread with MPI_THREAD_MULTIPLE"
            )
        self._comm = (MPI.COMM_WORLD if comm is None else comm).Dup()
        self._gathers = 0
        self._scatters = 0  # since the last gather
        self._silent: set[int] = set()  # in the last gather
        self._inbox: dict[tuple[int, int, int], bytes] = {}  # (gather, scatter, source) -> payload
        self._arriving: list[tuple[MPI.Request, bytearray, int]] = []
        self._leaving: list[tuple[MPI.Request, bytes, int]] = []  # the buffer must live as long as the request
        self._finish = weakref.finalize(self, _finish_sends, self._leaving)

    @property
    def rank(self) -> int:
        return self._comm.Get_rank()

    @property
    def world_size(self) -> int:
        return self._comm.Get_size()

    def gather(self, tag: str, payload: bytes, *, timeout_s: float) -> Sequence[bytes] | None:
        self._gathers, self._scatters = self._gathers + 1, 0
        if self.rank != 0:
            self._send(payload, 0)
            if not self._poll(self._sent, timeout_s):
                raise RankFailure({0: f"does not receive {tag!r} within {timeout_s:g} s"})
            return None
        others = range(1, self.world_size)
        wanted = [(self._gathers, 0, rank) for rank in others]
        self._poll(lambda: all(key in self._inbox for key in wanted), timeout_s)
        got = [self._inbox.pop(key, None) for key in wanted]
        self._silent = {rank for rank, one in zip(others, got, strict=True) if one is None}
        if self._silent:
            raise RankFailure(dict.fromkeys(self._silent, f"no answer to {tag!r} within {timeout_s:g} s"))
        return [payload, *(one for one in got if one is not None)]

    def scatter(self, tag: str, payloads: Sequence[bytes] | None, *, timeout_s: float) -> bytes:
        self._scatters += 1
        if self.rank != 0:
            wanted = (self._gathers, self._scatters, 0)
            if not self._poll(lambda: wanted in self._inbox, timeout_s):
                raise RankFailure({0: f"no answer to {tag!r} within {timeout_s:g} s"})
            return self._inbox.pop(wanted)
        if payloads is None or len(payloads) != self.world_size:
            raise ValueError(f"scatter {tag!r}: rank 0 must give {self.world_size} payloads")
        for rank, payload in enumerate(payloads[1:], 1):
            self._send(payload, rank)
        # A large message moves only while both sides call MPI. The next gather finds who did not take it.
        self._poll(self._sent, timeout_s)
        return payloads[0]

    def close(self) -> None:
        """Waits a bounded time for messages on their way out."""
        self._finish()

    def _send(self, payload: bytes, rank: int) -> None:
        from mpi4py import MPI

        message = _HEADER.pack(self._gathers, self._scatters) + payload
        self._leaving.append((self._comm.Isend([message, MPI.BYTE], rank, _TAG), message, rank))

    def _sent(self) -> bool:
        return all(rank in self._silent for _, _, rank in self._leaving)

    def _poll(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Move messages until done() or the bound; whether it is done."""
        started = time.monotonic()
        while True:
            self._progress()
            if done():
                return True
            waited_s = time.monotonic() - started
            if waited_s > timeout_s:
                return False
            time.sleep(min(max(waited_s / 50, 2e-5), 5e-3))  # a fiftieth of the wait, so that it costs no more

    def _progress(self) -> None:
        from mpi4py import MPI

        status = MPI.Status()
        while message := self._comm.Improbe(MPI.ANY_SOURCE, _TAG, status):
            buffer = bytearray(status.Get_count(MPI.BYTE))
            self._arriving.append((message.Irecv([buffer, MPI.BYTE]), buffer, status.Get_source()))
        self._leaving[:] = [one for one in self._leaving if not one[0].Test()]
        arrived = [one for one in self._arriving if one[0].Test()]
        self._arriving = [one for one in self._arriving if one[0]]  # a request that completed is null
        for _, buffer, source in arrived:
            gathers, scatters = _HEADER.unpack_from(buffer)
            self._inbox[gathers, scatters, source] = bytes(memoryview(buffer)[_HEADER.size :])
        now = (self._gathers, self._scatters)
        self._inbox = {key: payload for key, payload in self._inbox.items() if key[:2] >= now}


def _finish_sends(leaving: list[tuple[MPI.Request, bytes, int]]) -> None:
    from mpi4py import MPI

    deadline = time.monotonic() + _LINGER_S
    while leaving and not MPI.Is_finalized() and time.monotonic() < deadline:
        leaving[:] = [one for one in leaving if not one[0].Test()]
        time.sleep(1e-3 if leaving else 0)
    if leaving:
        # MPI may still read the buffers of sends that nobody received, and sends cannot be cancelled.
        atexit.register(len, leaving)
