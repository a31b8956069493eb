"""Termination: that a job is to end, told to any of its ranks by a signal, and agreed by all of them.

Decides when all ranks stop at the same step; the loop saves and leaves. A scheduler kills what has not left by its
deadline, at any moment; `grace_s` has this process leave before that, whatever hangs in it.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from types import FrameType

import msgspec
from typing_extensions import Self

from distckpt.coordinator import Coordinator, agree, default_coordinator

logger = logging.getLogger("distckpt")


class _Told(msgspec.Struct, frozen=True):
    """Why a rank, or any rank, is to end; None if it is not."""

    why: str | None


class Termination:
    """Whether this job is to end. A context manager; collective, in the main thread.

        with Termination(grace_s=110) as termination:
            for step in range(first, last):
                train(step)
                if termination.is_agreed():
                    checkpointer.save(state, iteration=step)
                    break

    signals: which ones tell a rank; their handlers are put back on leaving. every: the ranks ask each other at every
    so many calls of is_agreed. grace_s: how long after it was told (or has heard that another rank was) the process
    may go on: then it exits with 128 + SIGTERM, as a killed one would; a save under way is void, the one before it
    whole. None is no bound. timeout_s: how long the others wait for a rank that does not ask. coordinator: one of its
    own, closed by the caller; default_coordinator() if None.
    """

    def __init__(
        self,
        *,
        signals: Sequence[signal.Signals] = (signal.SIGTERM,),
        every: int = 1,
        grace_s: float | None = None,
        timeout_s: float = 600.0,
        coordinator: Coordinator | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every}: expected at least 1")
        self._owns_coordinator = coordinator is None
        self._coordinator = default_coordinator() if coordinator is None else coordinator
        self._signals = tuple(signals)
        self._every = every
        self._grace_s = grace_s
        self._timeout_s = timeout_s
        self._calls = 0
        self._told: str | None = None  # by whom, on this rank
        self._agreed = False
        self._left = threading.Event()
        self._deadline: float | None = None
        self._before: dict[signal.Signals, object] = {}
        self._ears: tuple[socket.socket, ...] = ()
        self._wakeup_before = -1

    def __enter__(self) -> Self:
        if self._signals:
            self._listen()
        for number in self._signals:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def _listen(self) -> None:
        """Hear of signals in a thread too: a handler in Python does not run while the main thread hangs in C."""
        heard, told = socket.socketpair()
        told.setblocking(False)
        self._ears, self._wakeup_before = (heard, told), signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(heard,), name="distckpt-signals", daemon=True).start()

    def _hear(self, heard: socket.socket) -> None:
        with heard:
            while number := heard.recv(1):
                if number[0] in self._signals:
                    self.tell(signal.Signals(number[0]).name)

    def __exit__(self, *_: object) -> None:
        self._left.set()
        for number, handler in self._before.items():
            if handler is not None:  # None: it was not installed by Python, and cannot be put back.
                signal.signal(number, handler)  # type: ignore[arg-type]
        if self._ears:
            signal.set_wakeup_fd(self._wakeup_before)
            self._ears[1].close()  # Ends the thread, which reads to the end.
        if self._owns_coordinator:
            self._coordinator.close()

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.tell(signal.Signals(number).name)

    def tell(self, why: str) -> None:
        """As a signal does: from now on the next is_agreed() that asks is true on every rank. Any thread."""
        if self._told is None:
            self._told = why
            self._start_clock()

    @property
    def told(self) -> str | None:
        """Why this rank is to end, for who asks the others himself; None if nobody has told it."""
        return self._told

    def is_agreed(self) -> bool:
        """Whether any rank has been told; the same on all ranks, which call it equally often. Stays true.

        Raises DistributedError if a rank does not call it in time.
        """
        self._calls += 1
        if self._agreed or (self._calls - 1) % self._every:
            return self._agreed

        def decide(ranks: Sequence[_Told]) -> list[_Told]:
            reasons = [f"rank {rank}: {told.why}" for rank, told in enumerate(ranks) if told.why is not None]
            return [_Told(reasons[0] if reasons else None)] * len(ranks)

        told = agree(
            self._coordinator,
            f"termination {self._calls}",
            lambda: _Told(self._told),
            decide,
            message=_Told,
            decision=_Told,
            timeout_s=self._timeout_s,
        )
        if told.why is not None:
            self._agreed = True
            self._start_clock()
            if self._coordinator.rank == 0:
                logger.info("the job is to end (%s)", told.why)
        return self._agreed

    def remaining_s(self) -> float | None:
        """What is left of grace_s; None if there is no bound, or nobody has told this rank anything."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _start_clock(self) -> None:
        if self._grace_s is not None and self._deadline is None:
            self._deadline = time.monotonic() + self._grace_s
            threading.Thread(target=self._leave_in_time, name="distckpt-termination", daemon=True).start()

    def _leave_in_time(self) -> None:
        if not self._left.wait(self._grace_s):
            logger.error("this process was told to end %g s ago and has not: it exits now", self._grace_s)
            os._exit(128 + signal.SIGTERM)
