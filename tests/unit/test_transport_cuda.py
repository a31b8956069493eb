"""What the CUDA transport asks of torch.cuda, on a stand-in that does at once, on the host, what a stream would do.

This shows which calls are made and in which order, and that tensors and memory are cut right. It does not show that
a device does what is asked: tests marked `cuda` do.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from distckpt import CheckpointError
from distckpt._C import Memory
from distckpt.testing import TransportContract
from distckpt.transport import Transport
from distckpt.transport.contract import random_tensor
from distckpt.transport.cuda import CudaTransport

CPU = torch.device("cpu")
KIB = 1 << 10


class StandIn:
    """Of torch.cuda. `log` has what it was asked; `is_done` is what events say; calls numbered in `refused` fail."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.is_done = True
        self.is_capturing = False
        self.locked: dict[int, int] = {}  # address -> size
        self.refused: set[int] = set()
        self.last_error = False
        self.copies: list[tuple[int, int]] = []  # addresses of both sides of copies that do not block
        self.current = Stream(self, "current")
        self._calls = 0

    def Stream(self, device: torch.device) -> Stream:
        return Stream(self, "side")

    def Event(self) -> Event:
        return Event(self)

    def current_stream(self, device: torch.device) -> Stream:
        return self.current

    def is_current_stream_capturing(self) -> bool:
        return self.is_capturing

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.log.append(f"begin on {stream.name}")
        try:
            yield
        finally:
            self.log.append(f"end on {stream.name}")

    def cudart(self) -> StandIn:
        return self

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:
        assert flags == 1
        return self._change(lambda: self.locked.update({address: size_bytes}))

    def cudaHostUnregister(self, address: int) -> int:
        return self._change(lambda: self.locked.pop(address))

    def _change(self, change: object) -> int:
        self._calls += 1
        if self._calls in self.refused:
            self.last_error = True
            return 2
        change()  # type: ignore[operator]
        return 0

    def cudaGetErrorString(self, error: int) -> str:
        assert error == 2
        return "out of memory"


class Stream:
    def __init__(self, cuda: StandIn, name: str) -> None:
        self._cuda = cuda
        self.name = name

    def wait_stream(self, other: Stream) -> None:
        self._cuda.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: Event) -> None:
        self._cuda.log.append(f"{self.name} waits for the event")


class Event:
    def __init__(self, cuda: StandIn) -> None:
        self._cuda = cuda

    def record(self, stream: Stream) -> None:
        self._cuda.log.append(f"event on {stream.name}")

    def query(self) -> bool:
        return self._cuda.is_done


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    for name in ("Stream", "Event", "current_stream", "is_current_stream_capturing", "device", "stream", "cudart"):
        monkeypatch.setattr(torch.cuda, name, getattr(stand_in, name))
    copy, fill = Tensor.copy_, Tensor.fill_

    def copy_(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if non_blocking:
            stand_in.log.append("copy")
            stand_in.copies += [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in (self, source)]
        return copy(self, source)

    def fill_(self: Tensor, value: float) -> Tensor:
        stand_in.last_error, error = False, stand_in.last_error
        if error:
            raise RuntimeError("CUDA error: out of memory")
        return fill(self, value)

    def record_stream(self: Tensor, stream: Stream) -> None:
        stand_in.log.append(f"tensor on {stream.name}")

    monkeypatch.setattr(Tensor, "copy_", copy_)
    monkeypatch.setattr(Tensor, "fill_", fill_)
    monkeypatch.setattr(Tensor, "record_stream", record_stream)
    return stand_in


class TestCudaOverStandIn(TransportContract):
    def transport(self) -> Transport:
        return CudaTransport(segment_bytes=64 * KIB, piece_bytes=200)

    def put(self, transport: Transport, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @pytest.fixture(autouse=True)
    def _with(self, cuda: StandIn) -> None:
        self.cuda = cuda

    def refusing(self) -> Transport:
        self.cuda.refused = {3}
        return self.transport()


def host(size_bytes: int) -> Tensor:
    return torch.zeros(size_bytes, dtype=torch.uint8)


def test_copies_run_on_a_side_stream_after_what_was_enqueued_and_tensors_are_recorded_on_it(cuda: StandIn) -> None:
    transport = CudaTransport()
    before = ["side waits for current", "begin on side"]
    one_copy, after = ["copy", "tensor on side"], ["end on side", "event on side"]
    event = transport.copy_to_host([(torch.ones(4), host(16)), (torch.ones(2), host(8))])
    assert cuda.log == before + one_copy * 2 + after
    event.order_before_compute()
    assert cuda.log[-1] == "current waits for the event"
    cuda.log.clear()
    transport.copy_from_host([(host(16), torch.ones(4))])
    assert cuda.log == before + one_copy + after


def test_each_device_has_one_side_stream(cuda: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or Stream(cuda, "side"))
    transport = CudaTransport()
    for _ in range(3):
        transport.copy_to_host([(torch.ones(4), host(16))])
    assert made == [CPU]


def test_both_sides_are_held_until_the_event_is_seen_done(cuda: StandIn) -> None:
    cuda.is_done = False
    transport = CudaTransport()
    source, target = torch.ones(4), host(16)
    seen = weakref.ref(source), weakref.ref(target)
    transport.copy_to_host([(source, target)])  # Nobody keeps the event.
    del source, target
    transport.copy_to_host([(torch.ones(4), host(16))])
    gc.collect()
    assert None not in (seen[0](), seen[1]())
    cuda.is_done = True
    transport.copy_to_host([(torch.ones(4), host(16))])
    gc.collect()
    assert (seen[0](), seen[1]()) == (None, None)


def test_wait_gives_up_after_its_bound_and_may_be_called_again(cuda: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))  # a second goes by at every look; a wait without a bound ends it
    monkeypatch.setattr("distckpt.transport.cuda.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("distckpt.transport.cuda.time.sleep", lambda seconds: next(clock))
    cuda.is_done = False
    event = CudaTransport().copy_to_host([(torch.ones(4), host(16))])
    with pytest.raises(TimeoutError, match="cpu: copies are still under way after"):
        event.wait(10.0)
    cuda.is_done = True
    event.wait(10.0)


def test_graph_capture_is_refused_before_anything_is_enqueued(cuda: StandIn) -> None:
    cuda.is_capturing = True
    with pytest.raises(CheckpointError, match="captures a graph"):
        CudaTransport().copy_to_host([(torch.ones(4), host(16))])
    assert cuda.log == []


def test_batch_that_fails_is_waited_for_before_the_error(cuda: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def record_stream(tensor: Tensor, stream: Stream) -> None:
        cuda.is_done = False
        raise RuntimeError("no such stream")

    polled: list[float] = []

    def sleep(seconds: float) -> None:
        polled.append(seconds)
        cuda.is_done = len(polled) == 3

    monkeypatch.setattr(Tensor, "record_stream", record_stream)
    monkeypatch.setattr("distckpt.transport.cuda.time.sleep", sleep)
    with pytest.raises(RuntimeError, match="no such stream"):
        CudaTransport().copy_to_host([(torch.ones(4), host(16))])
    assert cuda.log[-3:] == ["copy", "end on side", "event on side"]
    assert len(polled) == 3


def test_temporaries_on_the_device_are_bounded(cuda: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    contiguous = Tensor.contiguous

    def record(self: Tensor) -> Tensor:
        if not self.is_contiguous():
            made.append(self.nbytes)
        return contiguous(self)

    monkeypatch.setattr(Tensor, "contiguous", record)
    tensor = random_tensor((100, 90), torch.float32)
    target = host(tensor.nbytes)
    CudaTransport(piece_bytes=5000).copy_to_host([(tensor.t(), target)])
    assert max(made) <= 5000
    assert sum(made) == tensor.nbytes


def test_memory_is_page_locked_in_segments_and_given_back(cuda: StandIn) -> None:
    memory = Memory(10 * KIB)
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    registration = CudaTransport(segment_bytes=4 * KIB).register(memory, CPU)
    assert cuda.locked == {address: 4 * KIB, address + 4 * KIB: 4 * KIB, address + 8 * KIB: 2 * KIB}
    assert (registration.size_bytes, registration.refusal) == (10 * KIB, None)
    registration.release()
    assert cuda.locked == {}
    assert registration.size_bytes == 0


def test_refused_segment_ends_the_page_locks_and_leaves_no_error_behind(cuda: StandIn) -> None:
    cuda.refused = {3}
    memory = Memory(20 * KIB)
    registration = CudaTransport(segment_bytes=4 * KIB).register(memory, CPU)
    assert registration.size_bytes == 8 * KIB
    assert registration.refusal == (
        "cpu: page-locking bytes 8192-12287 of 20480 of memory failed (2: out of memory); "
        "copies from and to them are slower"
    )
    assert len(cuda.locked) == 2
    assert not cuda.last_error
    registration.release()
    assert cuda.locked == {}


def test_page_lock_that_cannot_be_given_back_is_logged_and_the_others_are(
    cuda: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.refused = {4}
    registration = CudaTransport(segment_bytes=4 * KIB).register(Memory(12 * KIB), CPU)
    with caplog.at_level(logging.WARNING, "distckpt"):
        registration.release()
    assert caplog.messages == ["cpu: host memory stays page-locked (2: out of memory)"]
    assert len(cuda.locked) == 1
    assert not cuda.last_error


def test_no_copy_crosses_the_edge_of_a_page_locked_segment(cuda: StandIn) -> None:
    transport = CudaTransport(segment_bytes=4 * KIB, piece_bytes=3 * KIB)
    cuda.refused = {6}  # the second segment of the second memory
    memories = [Memory(11 * KIB), Memory(11 * KIB)]
    registrations = [transport.register(memory, CPU) for memory in memories]
    edges = {edge for start, size in cuda.locked.items() for edge in (start, start + size)}
    for memory in memories:
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        for tensor in (random_tensor((11 * KIB - 16,), torch.uint8), random_tensor((100, 109), torch.uint8).t()):
            target = whole[8 : 8 + tensor.nbytes]
            transport.copy_to_host([(tensor, target)])
            transport.copy_from_host([(target, tensor)])
    assert len(cuda.copies) > 20
    assert not [(a, b, edge) for a, b in cuda.copies for edge in edges if a < edge < b]
    for registration in registrations:
        registration.release()
    cuda.copies.clear()
    transport.copy_to_host([(random_tensor((9 * KIB,), torch.uint8), whole[: 9 * KIB])])
    assert len(cuda.copies) == 2  # both sides of one
