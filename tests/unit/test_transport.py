"""The transports: what each of them promises, and how the stand-in for an accelerator betrays what relies on less."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from distckpt._C import Memory
from distckpt.testing import FakeAccelerator, TransportContract
from distckpt.transport import BlockingTransport, Registration, Transport, Transports, pieces
from distckpt.transport.cuda import CudaTransport
from distckpt.transport.fake import PENDING_BYTE, REUSED_BYTE

SEGMENT_BYTES = 256 << 10


class TestHost(TransportContract):
    def transport(self) -> Transport:
        return BlockingTransport(is_host=True)

    def put(self, transport: Transport, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def refusing(self) -> Transport:
        pytest.skip("the host asks for no page locks")


class TestFakeAccelerator(TransportContract):
    def transport(self) -> Transport:
        return FakeAccelerator()

    def put(self, transport: Transport, tensor: Tensor) -> Tensor:
        assert isinstance(transport, FakeAccelerator)
        return transport.put(tensor)

    def refusing(self) -> Transport:
        return FakeAccelerator(refuses_registration=True)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestCuda(TransportContract):
    def transport(self) -> Transport:
        # Small enough for the contract's tensors to be cut.
        return CudaTransport(segment_bytes=SEGMENT_BYTES, piece_bytes=16 << 10)

    def put(self, transport: Transport, tensor: Tensor) -> Tensor:
        return tensor.to("cuda")

    def refusing(self) -> Transport:
        return _RegisteredBefore(segment_bytes=SEGMENT_BYTES)


class _RegisteredBefore(CudaTransport):
    """The runtime refuses to page-lock what is page-locked: here the second of the segments."""

    def register(self, memory: Memory, device: torch.device) -> Registration:
        address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr() + SEGMENT_BYTES
        runtime = torch.cuda.cudart()
        with torch.cuda.device(device):
            assert int(runtime.cudaHostRegister(address, SEGMENT_BYTES, 1)) == 0
            try:
                return super().register(memory, device)
            finally:
                assert int(runtime.cudaHostUnregister(address)) == 0


def test_fake_accelerator_shows_the_host_nothing_before_the_wait() -> None:
    fake = FakeAccelerator()
    source, target = fake.put(torch.arange(8.0)), torch.zeros(32, dtype=torch.uint8)
    event = fake.copy_to_host([(source, target)])
    assert (target == PENDING_BYTE).all()
    event.order_before_compute()
    assert (target == PENDING_BYTE).all()
    event.wait(1.0)
    assert torch.equal(target.view(torch.float32), torch.arange(8.0))


def test_fake_accelerator_copies_what_was_changed_before_the_order_point() -> None:
    fake = FakeAccelerator()
    source, target = fake.put(torch.arange(8.0)), torch.zeros(32, dtype=torch.uint8)
    event = fake.copy_to_host([(source, target)])
    source.fill_(9.0)
    event.order_before_compute()
    source.fill_(10.0)
    event.wait(1.0)
    assert (target.view(torch.float32) == 9.0).all()


def test_fake_accelerator_fills_targets_no_earlier_than_at_the_order_point() -> None:
    fake = FakeAccelerator()
    target = fake.put(torch.zeros(4))
    event = fake.copy_from_host([(torch.ones(4).view(torch.uint8), target)])
    assert (target == 0).all()
    event.order_before_compute()
    assert (target == 1).all()


def test_fake_accelerator_tells_who_changes_host_memory_before_the_wait() -> None:
    fake = FakeAccelerator()
    source = torch.ones(4, dtype=torch.uint8)
    event = fake.copy_from_host([(source, fake.put(torch.zeros(4, dtype=torch.uint8)))])
    event.order_before_compute()
    source.zero_()
    with pytest.raises(AssertionError, match="was changed before the copy from it was waited for"):
        event.wait(1.0)


def test_fake_accelerator_tells_who_releases_memory_before_the_wait() -> None:
    fake, memory = FakeAccelerator(), Memory(4096)
    registration = fake.register(memory, torch.device("cpu"))
    event = fake.copy_to_host([(fake.put(torch.ones(4)), torch.frombuffer(memory, dtype=torch.uint8)[:16])])
    with pytest.raises(AssertionError, match="copies were under way"):
        registration.release()
    event.wait(1.0)


def test_fake_accelerator_reuses_the_memory_of_freed_tensors() -> None:
    fake = FakeAccelerator()
    tensor = fake.put(torch.ones(100))
    view, address = tensor[50:], tensor.data_ptr()
    del tensor
    assert fake.holds(view)
    assert (view == 1).all()
    del view
    assert ctypes.string_at(address, 400) == bytes([REUSED_BYTE]) * 400


def test_fake_accelerator_holds_what_was_put_on_it_and_its_views() -> None:
    fake = FakeAccelerator()
    tensor = torch.arange(12.0).view(3, 4).t()
    put = fake.put(tensor)
    assert torch.equal(put, tensor)
    assert put.stride() == tensor.stride()
    assert fake.holds(put)
    assert fake.holds(put[1:, ::2])
    assert fake.holds(torch.nn.Parameter(put).data)
    assert fake.holds(fake.put(torch.empty(0)))
    assert fake.holds(torch.from_numpy(put[1:].numpy()))
    assert not fake.holds(tensor)
    assert not fake.holds(put + 1)
    assert not FakeAccelerator().holds(put)


def test_fake_accelerator_fails_a_wait_when_told() -> None:
    fake = FakeAccelerator()
    source, target = fake.put(torch.ones(4)), torch.zeros(16, dtype=torch.uint8)
    event = fake.copy_to_host([(source, target)])
    fake.wait_error = TimeoutError("still under way")
    with pytest.raises(TimeoutError, match="still under way"):
        event.wait(1.0)
    assert (target == PENDING_BYTE).all()
    event.wait(1.0)
    assert torch.equal(target.view(torch.float32), torch.ones(4))


def test_fake_accelerator_counts_what_it_is_asked() -> None:
    fake, memory = FakeAccelerator(), Memory(4096)
    registration = fake.register(memory, torch.device("cpu"))
    host = torch.frombuffer(memory, dtype=torch.uint8)
    sources = [fake.put(torch.ones(4)) for _ in range(3)]
    fake.copy_to_host([(source, host[16 * i :][:16]) for i, source in enumerate(sources)]).wait(1.0)
    fake.copy_from_host([(torch.zeros(16, dtype=torch.uint8), sources[0])]).wait(1.0)
    registration.release()
    assert fake.counts == {
        "register": 1,
        "release": 1,
        "copy_to_host": 1,
        "copy_from_host": 1,
        "wait": 2,
        "copies": 4,
        "pageable copies": 1,
        "bytes": 64,
    }
    assert fake.peak_in_flight_bytes == 48


def test_mixed_tensors_go_each_by_the_transport_of_its_device() -> None:
    fake = FakeAccelerator()
    transports = fake.transports()
    tensors = [torch.full((4,), float(i)) for i in range(6)]
    mixed = [fake.put(t) if i % 2 else t for i, t in enumerate(tensors)]
    assert [transports.of(t).is_host for t in mixed] == [True, False] * 3
    targets = [torch.zeros(16, dtype=torch.uint8) for _ in mixed]
    event = transports.copy_to_host(list(zip(mixed, targets, strict=True)))
    event.order_before_compute()
    for tensor in mixed:
        tensor.fill_(-1.0)
    event.wait(1.0)
    assert fake.counts["copy_to_host"] == 1
    assert [float(t.view(torch.float32)[0]) for t in targets] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    transports.copy_from_host(list(zip(targets, mixed, strict=True))).wait(1.0)
    assert all(torch.equal(t, m) for t, m in zip(tensors, mixed, strict=True))


def test_snapshot_of_tensors_that_change_and_go_away_is_enqueued_without_a_wait() -> None:
    fake = FakeAccelerator()
    transports = fake.transports()
    tensors = [torch.full((n,), float(n)) for n in range(1, 200)]
    state = [fake.put(t) if i % 3 else t.clone() for i, t in enumerate(tensors)]
    memory = Memory(sum(t.nbytes for t in tensors))
    registration = transports.register(memory, state)
    image = torch.frombuffer(memory, dtype=torch.uint8)
    parts = image.split([t.nbytes for t in tensors])
    event = transports.copy_to_host(list(zip(state, parts, strict=True)))
    event.order_before_compute()
    for tensor in state[: len(state) // 2]:
        tensor.zero_()
    state.clear()
    del tensor
    assert fake.counts["wait"] == fake.counts["pageable copies"] == 0
    assert fake.counts["copy_to_host"] == fake.counts["order_before_compute"] == 1
    event.wait(1.0)  # as whoever writes the image does
    registration.release()
    assert torch.equal(image.view(torch.float32), torch.cat(tensors))


def test_a_registration_for_several_devices_says_what_all_have_locked() -> None:
    memory, tensor = Memory(4096), torch.ones(4)
    fake = FakeAccelerator()
    on_device = fake.put(tensor)
    registration = fake.transports().register(memory, [on_device, on_device])
    assert (registration.size_bytes, registration.refusal) == (4096, None)
    assert fake.counts["register"] == 1
    registration.release()
    assert fake.counts["release"] == 1
    fake.refuses_registration = True
    registration = fake.transports().register(memory, [tensor, on_device])
    assert registration.size_bytes == 0
    assert registration.refusal == "the accelerator was told to refuse page-locked memory"
    assert Transports().register(memory, []).refusal is None


@pytest.mark.parametrize("max_bytes", [1, 8, 16, 40, 100, 240, 10_000])
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (2, 3, 5), (1, 1, 30), (30, 1, 1)])
def test_pieces_make_up_a_tensor_in_c_order(shape: tuple[int, ...], max_bytes: int) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    cut = list(pieces(tensor, max_bytes))
    assert torch.equal(torch.cat([piece.reshape(-1) for _, piece in cut]), tensor.reshape(-1))
    for at, piece in cut:
        assert piece.nbytes <= max(max_bytes, 8)
        box = tuple(slice(a, a + n) for a, n in zip(at, piece.shape, strict=True))
        assert torch.equal(tensor[box], piece)
