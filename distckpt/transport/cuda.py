"""CUDA (and ROCm) through torch: copies on a side stream, page-locked host memory, nothing that blocks the host.

1. The side stream waits for what the caller's current stream has been asked to do, then copies.
2. An event after the copies: the host polls it, bounded; the current stream waits for it where the caller asks.
3. Tensors and host memory are held until the event has come to pass. The tensors are also recorded on the side
   stream: holding one does not keep its memory when its owner resizes the storage to nothing, as FSDP does.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol, cast

import torch
from torch import Tensor

from distckpt._C import Memory
from distckpt.errors import CheckpointError
from distckpt.transport.elements import flat_bytes, is_plain, movable, pieces
from distckpt.transport.port import AllOf, Copies, Event, Registration, check_sizes

logger = logging.getLogger("distckpt")

_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for all devices of the process
_FAILED_BATCH_TIMEOUT_S = 60.0
_LONGEST_PAUSE_S = 1e-3


class _Runtime(Protocol):
    """What of torch.cuda.cudart() is used: results are cudaError values, 0 is success."""

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int: ...
    def cudaHostUnregister(self, address: int) -> int: ...
    def cudaGetErrorString(self, error: int) -> str: ...


class CudaTransport:
    """Copies for all CUDA devices of this process; each has a stream of its own for them.

    segment_bytes: host memory is page-locked in segments of this size, so that a refusal costs only the rest.
    piece_bytes: bound of the memory that is taken on the device to make tensors contiguous.
    """

    is_host = False

    def __init__(self, *, segment_bytes: int = 256 << 20, piece_bytes: int = 64 << 20) -> None:
        self._segment_bytes = segment_bytes
        self._piece_bytes = piece_bytes
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._edges: list[int] = []  # addresses at which page-locked segments begin and end, sorted
        self._in_flight: set[_CudaEvent] = set()

    def register(self, memory: Memory, device: torch.device) -> Registration:
        return _CudaRegistration(memory, device, self._segment_bytes, self._edges)

    def copy_to_host(self, copies: Copies) -> Event:
        return self._enqueue(copies, 0, self._to_host)

    def copy_from_host(self, copies: Copies) -> Event:
        return self._enqueue(copies, 1, self._from_host)

    def _enqueue(self, copies: Copies, device_side: int, copy: Callable[[Tensor, Tensor], None]) -> Event:
        check_sizes(copies)
        by_device: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        for pair in copies:
            by_device.setdefault(pair[device_side].device, []).append(pair)
        for device in by_device:
            with torch.cuda.device(device):
                if torch.cuda.is_current_stream_capturing():
                    raise CheckpointError(f"{device}: the current stream captures a graph; save and load outside of it")
        for event in list(self._in_flight):
            event.forget_if_done()
        try:
            return AllOf([self._enqueue_on(d, own, device_side, copy) for d, own in by_device.items()])
        except BaseException:
            # The caller has no event to wait for, and may free what the first copies still use.
            AllOf(list(self._in_flight)).wait(_FAILED_BATCH_TIMEOUT_S)
            raise

    def _enqueue_on(
        self, device: torch.device, copies: Copies, device_side: int, copy: Callable[[Tensor, Tensor], None]
    ) -> Event:
        with torch.cuda.device(device):
            stream = self._streams.get(device)
            if stream is None:
                stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(device))
            event = _CudaEvent(device, copies, self._in_flight)
            try:
                with torch.cuda.stream(stream):
                    for pair in copies:
                        copy(*pair)
                        pair[device_side].record_stream(stream)
            finally:
                event.record(stream)
            return event

    def _to_host(self, source: Tensor, target: Tensor) -> None:
        if is_plain(source):
            self._copy(target, flat_bytes(source), target)
            return
        at = 0
        for _, piece in pieces(source, self._piece_bytes):
            elements = flat_bytes(piece)  # A temporary goes back to the side stream's own pool: no copy overtakes it.
            host = target[at : at + len(elements)]
            self._copy(host, elements, host)
            at += len(elements)

    def _from_host(self, source: Tensor, target: Tensor) -> None:
        if is_plain(target):
            self._copy(flat_bytes(target), source, source)
            return
        at = 0
        for _, piece in pieces(target, self._piece_bytes):
            elements = torch.empty(piece.nbytes, dtype=torch.uint8, device=piece.device)
            host = source[at : at + len(elements)]
            self._copy(elements, host, host)
            scattered = movable(piece)
            scattered.copy_(elements.view(scattered.dtype).view(scattered.shape))
            at += len(elements)

    def _copy(self, target: Tensor, source: Tensor, host: Tensor) -> None:
        """Bytes, one side of which is `host`; cut where a page-locked segment ends, which one copy must not cross."""
        start, stop = host.data_ptr(), host.data_ptr() + len(host)
        edges = self._edges[bisect_right(self._edges, start) : bisect_left(self._edges, stop)]
        if not edges:
            target.copy_(source, non_blocking=True)
            return
        for begin, end in pairwise([start, *edges, stop]):
            part = slice(begin - start, end - start)
            target[part].copy_(source[part], non_blocking=True)


class _CudaEvent:
    """Recorded after a batch. Among those in flight, and holding the batch's memory, until it is seen done."""

    def __init__(self, device: torch.device, held: Copies, in_flight: set[_CudaEvent]) -> None:
        self._device = device
        self._held = held
        self._in_flight = in_flight
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        in_flight.add(self)

    def record(self, stream: torch.cuda.Stream) -> None:
        self._event.record(stream)

    def forget_if_done(self) -> bool:
        # Any thread: without its device as the current one, the query would open a context on device 0.
        with torch.cuda.device(self._device):
            is_done = bool(self._event.query())  # type: ignore[no-untyped-call]
        if is_done:
            self._held = ()
            self._in_flight.discard(self)
        return is_done

    def wait(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        pause_s = 2e-5
        while not self.forget_if_done():  # Polled, as synchronize() has no bound.
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{self._device}: copies are still under way after {timeout_s} s")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def order_before_compute(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)


class _CudaRegistration:
    """The page locks of one memory, taken when it is made. Its edges are among `edges` until it is released."""

    def __init__(self, memory: Memory, device: torch.device, segment_bytes: int, edges: list[int]) -> None:
        self.size_bytes = 0
        self.refusal: str | None = None
        self._memory: Memory | None = memory  # Held: memory that is freed while page-locked stays locked.
        self._device = device
        self._edges = edges
        self._segments: list[int] = []
        address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr() if len(memory) else 0
        with torch.cuda.device(device):
            runtime = _runtime()
            for start in range(0, len(memory), segment_bytes):
                size = min(segment_bytes, len(memory) - start)
                error = runtime.cudaHostRegister(address + start, size, _PORTABLE)
                if int(error):
                    self.refusal = (
                        f"{device}: page-locking bytes {start}-{start + size - 1} of {len(memory)} of memory failed "
                        f"({int(error)}: {runtime.cudaGetErrorString(error)}); copies from and to them are slower"
                    )
                    _clear_error(device)
                    break
                self._segments.append(address + start)
                self.size_bytes += size
        self._own_edges = [*self._segments, address + self.size_bytes] if self._segments else []
        edges[:] = sorted([*edges, *self._own_edges])

    def release(self) -> None:
        segments, self._segments = self._segments, []
        own, self._own_edges = self._own_edges, []
        for edge in own:
            self._edges.remove(edge)
        with torch.cuda.device(self._device):
            runtime = _runtime()
            for address in segments:
                error = runtime.cudaHostUnregister(address)
                if int(error):
                    message = runtime.cudaGetErrorString(error)
                    logger.warning("%s: host memory stays page-locked (%d: %s)", self._device, int(error), message)
                    _clear_error(self._device)
        self.size_bytes = 0
        self._memory = None


def _runtime() -> _Runtime:
    return cast(_Runtime, torch.cuda.cudart())  # type: ignore[no-untyped-call]


def _clear_error(device: torch.device) -> None:
    """Take back the runtime's "last error", which a refused page lock has set.

    torch looks at it after its next kernel, and would blame that. It offers no other way to reset it than such a look.
    """
    try:
        torch.empty(1, device=device).fill_(1)
    except RuntimeError:
        return
