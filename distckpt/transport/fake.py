"""FakeAccelerator: host memory that behaves like that of an accelerator, as unkindly as one is allowed to. For tests.

Copies are done as late as they may be: none before its event has been ordered before compute or waited for, and what
the host gets is not there before it has been waited for. What was relied on too early is so seen to be wrong.
"""

from __future__ import annotations

import sys
import threading
import weakref
from bisect import bisect_right, insort
from collections import Counter, deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distckpt._C import Memory
from distckpt.transport.devices import Transports
from distckpt.transport.elements import flat_bytes, movable
from distckpt.transport.port import Copies, Event, Registration, Transport, check_sizes

PENDING_BYTE = 0xA5  # what the host sees of a copy that it has not waited for
REUSED_BYTE = 0x5A  # what becomes of the memory of a tensor that was freed


class FakeAccelerator:
    """A Transport, and the device whose tensors it moves: those that put() made, and their views.

    counts: how often what was asked: the port's methods, "wait", "order_before_compute", "copies", "pageable copies"
    (from or to memory that is not registered), "bytes". peak_in_flight_bytes: the most that was on the way at once.
    refuses_registration: as where the kernel allows no locked memory. wait_error: what the next wait() raises, once.
    """

    is_host = False

    def __init__(self, *, refuses_registration: bool = False) -> None:
        self.counts: Counter[str] = Counter()
        self.peak_in_flight_bytes = 0
        self.refuses_registration = refuses_registration
        self.wait_error: Exception | None = None
        self._memories: list[npt.NDArray[np.uint8]] = []  # never given back: who reads a freed tensor finds it reused
        self._extents: list[tuple[int, int]] = []  # of the tensors that live, sorted
        self._registered: list[tuple[int, int]] = []
        self._queue: deque[_Copy] = deque()
        self._enqueued = 0
        self._lock = threading.RLock()

    def put(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor on the device, as tensor.to(device) is; also for module._apply()."""
        strides = torch.empty_like(tensor, device="meta").stride()
        memory = np.zeros(max(tensor.nbytes, 16), np.uint8)
        lease = memory.view()  # The storage holds this array, and no one else does.
        data = torch.frombuffer(lease, dtype=torch.uint8)[: tensor.nbytes].view(tensor.dtype)
        weakref.finalize(lease, self._reuse, memory).atexit = False
        self._memories.append(memory)
        with self._lock:
            insort(self._extents, (memory.ctypes.data, memory.ctypes.data + len(memory)))
        with torch.no_grad():
            return data.as_strided(tensor.shape, strides).copy_(tensor)

    def _reuse(self, memory: npt.NDArray[np.uint8]) -> None:
        with self._lock:
            self._extents.remove((memory.ctypes.data, memory.ctypes.data + len(memory)))
        memory.fill(REUSED_BYTE)

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor is on this device."""
        if tensor.device.type != "cpu":
            return False
        address = tensor.untyped_storage().data_ptr()
        with self._lock:
            before = bisect_right(self._extents, (address, sys.maxsize))
            return before > 0 and address < self._extents[before - 1][1]

    def transports(self) -> Transports:
        """For what takes tensors of any devices: this one moves its own."""
        return _WithFake(self)

    def register(self, memory: Memory, device: torch.device) -> Registration:
        self.counts["register"] += 1
        return _FakeRegistration(self, memory)

    def copy_to_host(self, copies: Copies) -> Event:
        self.counts["copy_to_host"] += 1
        check_sizes(copies)
        return self._enqueue([_ToHost(source, target) for source, target in copies])

    def copy_from_host(self, copies: Copies) -> Event:
        self.counts["copy_from_host"] += 1
        check_sizes(copies)
        return self._enqueue([_FromHost(source, target) for source, target in copies])

    def _enqueue(self, copies: Sequence[_Copy]) -> Event:
        with self._lock:
            for copy in copies:
                self._queue.append(copy)
                self.counts["copies"] += 1
                self.counts["bytes"] += len(copy.host)
                self.counts["pageable copies"] += not self._is_registered(copy.host)
            self._enqueued += len(copies)
            in_flight = sum(len(copy.host) for copy in self._queue)
            self.peak_in_flight_bytes = max(self.peak_in_flight_bytes, in_flight)
            return _FakeEvent(self, self._enqueued)

    def _is_registered(self, host: Tensor) -> bool:
        start, stop = _extent(host)
        return any(first <= start and stop <= last for first, last in self._registered)

    def _advance(self, last: int, *, to_the_end: bool) -> None:
        """Do the device's side of all copies up to number `last`, and the host's too if to_the_end; in order."""
        with self._lock:
            waiting = last - (self._enqueued - len(self._queue))
            for copy in list(self._queue)[: max(waiting, 0)]:
                copy.move()
                if to_the_end:
                    copy.finish()
                    self._queue.popleft()


class _WithFake(Transports):
    def __init__(self, accelerator: FakeAccelerator) -> None:
        super().__init__()
        self._accelerator = accelerator

    def of(self, tensor: Tensor) -> Transport:
        return self._accelerator if self._accelerator.holds(tensor) else super().of(tensor)


class _FakeEvent:
    def __init__(self, accelerator: FakeAccelerator, last: int) -> None:
        self._accelerator = accelerator
        self._last = last

    def wait(self, timeout_s: float) -> None:
        self._accelerator.counts["wait"] += 1
        error, self._accelerator.wait_error = self._accelerator.wait_error, None
        if error is not None:
            raise error
        self._accelerator._advance(self._last, to_the_end=True)

    def order_before_compute(self) -> None:
        self._accelerator.counts["order_before_compute"] += 1
        self._accelerator._advance(self._last, to_the_end=False)


class _FakeRegistration:
    def __init__(self, accelerator: FakeAccelerator, memory: Memory) -> None:
        self._accelerator = accelerator
        self._extent = _extent(torch.frombuffer(memory, dtype=torch.uint8)) if len(memory) else (0, 0)
        self.size_bytes = 0
        self.refusal: str | None = None
        if accelerator.refuses_registration:
            self.refusal = "the accelerator was told to refuse page-locked memory"
        else:
            self.size_bytes = len(memory)
            accelerator._registered.append(self._extent)

    def release(self) -> None:
        self._accelerator.counts["release"] += 1
        if self.size_bytes:
            self.size_bytes = 0
            self._accelerator._registered.remove(self._extent)
            for copy in self._accelerator._queue:
                start, stop = _extent(copy.host)
                assert stop <= self._extent[0] or start >= self._extent[1], "released while copies were under way"


class _Copy(Protocol):
    """One copy under way; it holds both sides. move() is what the device sees of it, finish() what the host sees."""

    host: Tensor

    def move(self) -> None: ...
    def finish(self) -> None: ...


class _ToHost:
    def __init__(self, source: Tensor, target: Tensor) -> None:
        self.host = target.fill_(PENDING_BYTE)
        self._source = source
        self._moved: Tensor | None = None

    def move(self) -> None:
        if self._moved is None:
            self._moved = flat_bytes(self._source).clone()

    def finish(self) -> None:
        assert self._moved is not None
        self.host.copy_(self._moved)


class _FromHost:
    def __init__(self, source: Tensor, target: Tensor) -> None:
        self.host = source
        self._target = target
        self._moved: Tensor | None = None

    def move(self) -> None:
        if self._moved is None:
            self._moved = self.host.clone()
            elements = movable(self._target)
            elements.copy_(self._moved.view(elements.dtype).view(elements.shape))

    def finish(self) -> None:
        assert self._moved is not None
        assert torch.equal(self.host, self._moved), "host memory was changed before the copy from it was waited for"


def _extent(host: Tensor) -> tuple[int, int]:
    return host.data_ptr(), host.data_ptr() + len(host)
