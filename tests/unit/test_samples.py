"""Samples of tensors: equal for equal tensors wherever they lie, and gathered without a wait per tensor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from distckpt.testing import FakeAccelerator
from distckpt.transport import Transports, sample_checksum, sample_checksums, samples
from distckpt.transport.contract import random_tensor

SMALL_BYTES = 64 << 10


def many_tensors() -> list[Tensor]:
    """Of all sizes about the one from which not all elements are looked at, several element types, and empty ones."""
    dtypes = [torch.float32, torch.bfloat16, torch.uint8, torch.float64, torch.complex128, torch.bool]
    shapes = [(), (0, 4), (7,), (3, 5, 2), (130, 128), (128, 128), (129, 130, 9), (1, 70_000)]
    return [random_tensor(shape, dtype, seed=len(shape)) for shape in shapes for dtype in dtypes]


def same_elements(tensor: Tensor, layout: str) -> Tensor:
    """A tensor of the same elements and shape that lies in memory in another way."""
    if layout == "transposed":
        backwards = tuple(reversed(range(tensor.dim())))
        return tensor.permute(backwards).contiguous().permute(backwards)
    padded = torch.zeros([2 * n + 1 for n in tensor.shape], dtype=tensor.dtype)
    view = padded[tuple(slice(1, 2 * n + 1, 2) for n in tensor.shape)]
    return view.copy_(tensor)


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_equal_tensors_have_equal_samples_in_any_layout(layout: str) -> None:
    tensors = many_tensors()
    others = [same_elements(tensor, layout) for tensor in tensors]
    expected = sample_checksums(tensors, Transports())
    np.testing.assert_array_equal(sample_checksums(others, Transports()), expected)


def test_samples_are_the_same_on_an_accelerator_on_the_host_and_one_by_one() -> None:
    accelerator = FakeAccelerator()
    tensors = many_tensors()
    mixed = [accelerator.put(t) if i % 3 else t for i, t in enumerate(tensors)]
    expected = [sample_checksum(t) for t in tensors]
    np.testing.assert_array_equal(sample_checksums(mixed, accelerator.transports()), expected)
    transposed = [same_elements(t, "transposed") for t in tensors]
    on_device = [accelerator.put(t) for t in transposed]
    np.testing.assert_array_equal(sample_checksums(on_device, accelerator.transports()), expected)


@pytest.mark.parametrize("view", [lambda t: t.conj(), lambda t: t.conj().imag], ids=["conjugate", "negative"])
@pytest.mark.parametrize("rows", [20, 2000])
def test_lazy_tensors_have_the_samples_of_their_elements(rows: int, view: Callable[[Tensor], Tensor]) -> None:
    lazy = view(random_tensor((rows, 50), torch.complex64))
    plain = lazy.resolve_conj().resolve_neg().contiguous()
    assert sample_checksum(lazy) == sample_checksum(plain)


def test_every_element_of_a_small_tensor_counts() -> None:
    tensor = torch.zeros(SMALL_BYTES // 4, dtype=torch.int32)
    before = sample_checksum(tensor)
    for at in (0, 1, 4097, len(tensor) - 1):
        tensor[at] = 1
        assert sample_checksum(tensor) != before
        tensor[at] = 0


def test_first_last_and_evenly_spread_elements_of_a_large_tensor_count() -> None:
    tensor = torch.zeros(63 * 1000 + 40, dtype=torch.int32)
    before = sample_checksum(tensor)
    for at in (*range(0, 64_000, 1000), len(tensor) - 1):
        tensor[at] = 1
        assert sample_checksum(tensor) != before
        tensor[at] = 0


def test_samples_of_an_accelerator_come_in_one_copy() -> None:
    accelerator = FakeAccelerator()
    tensors = [accelerator.put(tensor) for tensor in many_tensors() for _ in range(10)]
    sample_checksums(tensors, accelerator.transports())
    assert accelerator.counts["copies"] == accelerator.counts["wait"] == 1


def test_samples_that_are_large_together_come_in_several_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_BATCH_BYTES", 1000)
    accelerator = FakeAccelerator()
    tensors = [random_tensor((n,), torch.uint8, seed=n) for n in (400, 500, 101, 2000, 1, 999, 1)]
    found = sample_checksums([accelerator.put(t) for t in tensors], accelerator.transports())
    np.testing.assert_array_equal(found, sample_checksums(tensors, Transports()))
    assert accelerator.counts["copies"] == 5
    assert accelerator.peak_in_flight_bytes == 2000


def test_samples_are_not_waited_for_without_end() -> None:
    accelerator = FakeAccelerator()
    accelerator.wait_error = TimeoutError("copies are still under way")
    with pytest.raises(TimeoutError, match="still under way"):
        sample_checksums([accelerator.put(torch.ones(4))], accelerator.transports(), timeout_s=0.1)


def test_no_tensors_have_no_samples() -> None:
    assert sample_checksums([], Transports()).tolist() == []
    assert sample_checksums([torch.empty(0)], Transports()).tolist() == [0]


def test_one_element_between_others_is_sampled() -> None:
    lone = torch.arange(6.0)[1::2][:1]
    assert sample_checksum(lone) == sample_checksum(lone.clone())
