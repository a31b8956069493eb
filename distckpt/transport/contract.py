"""What the Transport port promises, as tests. A transport subclasses TransportContract and gives `transport` and `put`.

Expected bytes are those of a tensor on the host to which was done what was done to the one on the device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distckpt._C import Memory
from distckpt.shard_file import DTYPES
from distckpt.transport.elements import flat_bytes
from distckpt.transport.port import Transport

_TIMEOUT_S = 60.0
_ELEMENT_TYPES = [name for name in DTYPES if hasattr(torch, name)]

View = Callable[[Tensor], Tensor]
# Of a (6, 10) tensor.
_VIEWS: dict[str, View] = {
    "whole": lambda t: t,
    "transposed": lambda t: t.t(),
    "every other column": lambda t: t[:, ::2],
    "inner box": lambda t: t[1:5, 3:7],
    "rows": lambda t: t[2:4],
    "with a dimension of one": lambda t: t[:, None, 3:],
    "one element": lambda t: t[3, 4],
    "empty": lambda t: t[:, 4:4],
}
_LAZY_VIEWS: dict[str, View] = {
    "conjugate": lambda t: t.conj(),
    "transposed conjugate": lambda t: t.t().conj(),
    "negative": lambda t: t.conj().imag,
    "negative, strided": lambda t: t.conj().imag[:, ::3],
}


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Elements of any bit pattern, not-a-numbers included (but 0 and 1 for bool)."""
    size = torch.empty(shape, dtype=dtype, device="meta").nbytes
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    return torch.randint(high, (size,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def to_host(transport: Transport, source: Tensor) -> Tensor:
    """The bytes of a tensor by one copy that was waited for."""
    target = torch.zeros(source.nbytes, dtype=torch.uint8)
    transport.copy_to_host([(source, target)]).wait(_TIMEOUT_S)
    return target


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
class TransportContract:
    """Subclass it and define `transport` and `put`; then pytest runs every test on it."""

    def transport(self) -> Transport:
        """A new one."""
        raise NotImplementedError

    def put(self, transport: Transport, tensor: Tensor) -> Tensor:
        """A copy of a tensor on the transport's device, with its strides."""
        raise NotImplementedError

    def refusing(self) -> Transport:
        """One that is refused some or all page locks; skip the test where none is asked for."""
        raise NotImplementedError

    @pytest.mark.parametrize("name", _ELEMENT_TYPES)
    @pytest.mark.parametrize("view", _VIEWS)
    def test_elements_of_every_type_and_layout_go_both_ways_bit_by_bit(self, name: str, view: str) -> None:
        self._check_both_ways(random_tensor((6, 10), getattr(torch, name)), _VIEWS[view])

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
    @pytest.mark.parametrize("view", _LAZY_VIEWS)
    def test_lazy_conjugates_and_negatives_go_both_ways(self, dtype: torch.dtype, view: str) -> None:
        self._check_both_ways(random_tensor((6, 10), dtype), _LAZY_VIEWS[view])

    def _check_both_ways(self, base: Tensor, view: View) -> None:
        transport = self.transport()
        on_device = self.put(transport, base)
        expected = flat_bytes(view(base))
        assert torch.equal(to_host(transport, view(on_device)), expected)
        new = random_tensor(tuple(view(base).shape), view(base).dtype, seed=1)
        source, twin = flat_bytes(new), base.clone()
        view(twin).copy_(new)
        transport.copy_from_host([(source, view(on_device))]).wait(_TIMEOUT_S)
        assert torch.equal(to_host(transport, view(on_device)), source)
        assert torch.equal(to_host(transport, on_device), flat_bytes(twin))

    def test_expanded_source(self) -> None:
        transport = self.transport()
        row = random_tensor((1, 10), torch.float32)
        assert torch.equal(to_host(transport, self.put(transport, row).expand(7, 10)), flat_bytes(row.expand(7, 10)))

    def test_large_tensor_with_any_strides_goes_both_ways(self) -> None:
        self._check_both_ways(random_tensor((310, 300), torch.float64), lambda t: t.t()[1:, 2:])

    def test_sides_that_differ_in_size_are_refused(self) -> None:
        transport = self.transport()
        tensor, host = self.put(transport, torch.ones(4)), torch.zeros(17, dtype=torch.uint8)
        for size in (0, 15, 17):
            with pytest.raises(ValueError, match="both sides must have as many"):
                transport.copy_to_host([(tensor, host[:size])])
            with pytest.raises(ValueError, match="both sides must have as many"):
                transport.copy_from_host([(host[:size], tensor)])
        assert not host.any()

    def test_no_copies_at_all(self) -> None:
        event = self.transport().copy_to_host([])
        event.order_before_compute()
        event.wait(_TIMEOUT_S)

    def test_source_may_be_changed_after_the_order_point(self) -> None:
        transport = self.transport()
        tensors = [random_tensor((1000, 1000), torch.float32, seed) for seed in range(3)]
        sources = [self.put(transport, tensor) for tensor in tensors]
        targets = [torch.zeros(tensor.nbytes, dtype=torch.uint8) for tensor in tensors]
        event = transport.copy_to_host(list(zip(sources, targets, strict=True)))
        event.order_before_compute()
        for source in sources:
            source.zero_()
        event.wait(_TIMEOUT_S)
        for tensor, target in zip(tensors, targets, strict=True):
            assert torch.equal(target, flat_bytes(tensor))

    def test_change_before_the_copy_is_copied(self) -> None:
        transport = self.transport()
        source = self.put(transport, torch.zeros(1000, 1000))
        for _ in range(20):
            source.add_(1)
        assert torch.equal(to_host(transport, source), flat_bytes(torch.full((1000, 1000), 20.0)))

    def test_source_may_be_freed_before_it_is_copied(self) -> None:
        transport = self.transport()
        tensor = random_tensor((1000, 1000), torch.float32)
        target = torch.zeros(tensor.nbytes, dtype=torch.uint8)
        event = transport.copy_to_host([(self.put(transport, tensor), target)])
        others = [self.put(transport, torch.full((1000, 1000), 7.0)) for _ in range(3)]
        event.wait(_TIMEOUT_S)
        assert torch.equal(target, flat_bytes(tensor))
        assert all(bool((other == 7.0).all()) for other in others)

    def test_targets_may_be_used_after_the_order_point(self) -> None:
        transport = self.transport()
        tensor = random_tensor((1000, 1000), torch.int32)
        target = self.put(transport, torch.zeros_like(tensor))
        event = transport.copy_from_host([(flat_bytes(tensor), target)])
        event.order_before_compute()
        used = target + 1
        target.zero_()
        event.wait(_TIMEOUT_S)
        assert torch.equal(used.cpu(), tensor + 1)
        assert not target.any()

    def test_host_memory_may_be_used_again_after_the_wait(self) -> None:
        transport = self.transport()
        source = torch.zeros(1 << 20, dtype=torch.uint8)
        targets = [self.put(transport, torch.zeros_like(source)) for _ in range(5)]
        for number, target in enumerate(targets):
            source.fill_(number + 1)
            transport.copy_from_host([(source, target)]).wait(_TIMEOUT_S)
        for number, target in enumerate(targets):
            assert torch.equal(to_host(transport, target), torch.full_like(source, number + 1))

    def test_batches_are_done_in_order(self) -> None:
        transport = self.transport()
        tensors = [random_tensor((300, 300), torch.float32, seed) for seed in range(4)]
        shared = torch.zeros(tensors[0].nbytes, dtype=torch.uint8)
        own = [torch.zeros_like(shared) for _ in tensors]
        events = [
            transport.copy_to_host([(self.put(transport, tensor), shared), (self.put(transport, tensor), target)])
            for tensor, target in zip(tensors, own, strict=True)
        ]
        events[-1].wait(_TIMEOUT_S)  # of all before it too
        assert torch.equal(shared, flat_bytes(tensors[-1]))
        for tensor, target in zip(tensors, own, strict=True):
            assert torch.equal(target, flat_bytes(tensor))
        for event in events:
            event.order_before_compute()
            event.wait(_TIMEOUT_S)
        assert torch.equal(shared, flat_bytes(tensors[-1]))

    def test_another_thread_may_wait(self) -> None:
        transport = self.transport()
        tensor = random_tensor((500, 500), torch.float32)
        source, target = self.put(transport, tensor), torch.zeros(tensor.nbytes, dtype=torch.uint8)
        event = transport.copy_to_host([(source, target)])
        event.order_before_compute()
        seen: list[bool] = []

        def wait() -> None:
            event.wait(_TIMEOUT_S)
            seen.append(torch.equal(target, flat_bytes(tensor)))

        thread = threading.Thread(target=wait)
        thread.start()
        source.zero_()
        thread.join()
        assert seen == [True]

    def test_copies_from_and_to_registered_memory(self) -> None:
        self._check_memory(self.transport())

    def test_refused_registration_is_reported_and_copies_go_on(self) -> None:
        assert self._check_memory(self.refusing())

    def _check_memory(self, transport: Transport) -> str | None:
        tensor = random_tensor((1 << 18,), torch.int32)
        source = self.put(transport, tensor)
        memory = Memory(tensor.nbytes + 128)
        registration = transport.register(memory, source.device)
        assert registration.size_bytes <= len(memory)
        host = torch.frombuffer(memory, dtype=torch.uint8)[64 : 64 + tensor.nbytes]
        transport.copy_to_host([(source, host)]).wait(_TIMEOUT_S)
        assert torch.equal(host, flat_bytes(tensor))
        target = self.put(transport, torch.zeros_like(tensor))
        transport.copy_from_host([(host, target)]).wait(_TIMEOUT_S)
        refusal = registration.refusal
        registration.release()
        registration.release()
        assert torch.equal(to_host(transport, target), flat_bytes(tensor))
        return refusal
