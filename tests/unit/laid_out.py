"""Checkpoints of given tensors in given layouts: what tests of reading any layout begin with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import strategies as st

from distckpt import Checkpointer, ShardedTensor
from distckpt.coordinator import Coordinator
from distckpt.shard_file import DTYPES
from distckpt.storage import Storage
from distckpt.testing import MemoryStorage, run_ranks


@dataclass(frozen=True)
class Layout:
    """ranks: how many there are. cut: the dimension that each tensor is cut along, by key; others lie on rank 0."""

    ranks: int = 1
    cut: Mapping[str, int] = field(default_factory=dict)


def save_laid_out(
    storage: Storage,
    tensors: Mapping[str, torch.Tensor],
    layout: Layout,
    *,
    iteration: int = 1,
    values: Mapping[str, object] | None = None,
    **options: object,
) -> None:
    """values: leaves beside the tensors, the same on all ranks."""

    def state_of(rank: int) -> dict[str, object]:
        state: dict[str, object] = dict(values or {})
        for key, tensor in tensors.items():
            dim = layout.cut.get(key)
            if dim is None:
                state[key] = tensor
                continue
            cuts = [tensor.shape[dim] * i // layout.ranks for i in (rank, rank + 1)]
            offset = tuple(cuts[0] if d == dim else 0 for d in range(tensor.dim()))
            part = tensor.narrow(dim, cuts[0], cuts[1] - cuts[0]).contiguous()
            state[key] = ShardedTensor(key, part, global_shape=tuple(tensor.shape), global_offset=offset)
        return state

    def save(coordinator: Coordinator) -> None:
        with Checkpointer(storage, coordinator=coordinator) as checkpointer:
            checkpointer.save(state_of(coordinator.rank), iteration=iteration, **options)  # type: ignore[arg-type]

    run_ranks(layout.ranks, save)


def laid_out(tensors: Mapping[str, torch.Tensor], layout: Layout | None = None, **options: object) -> MemoryStorage:
    storage = MemoryStorage()
    save_laid_out(storage, tensors, layout or Layout(), **options)  # type: ignore[arg-type]
    return storage


def tensor_of(data: bytes, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """Bytes as a tensor."""
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
    return raw.view(getattr(torch, dtype)).reshape(tuple(shape))


def random_tensor(dtype: str, shape: Sequence[int], seed: int) -> torch.Tensor:
    """Any bits at all, NaNs among them; of bool zeros and ones."""
    random = np.random.default_rng(seed)
    count = int(np.prod(shape)) * DTYPES[dtype].item_bytes
    data = random.integers(0, 2 if dtype == "bool" else 256, count, dtype=np.uint8)
    return tensor_of(data.tobytes(), dtype, shape)


@st.composite
def layouts(draw: st.DrawFn, shapes: Mapping[str, Sequence[int]]) -> Layout:
    """Any that these tensors can have."""
    ranks = draw(st.integers(1, 3))
    dims = {key: [d for d, n in enumerate(shape) if n >= ranks] for key, shape in shapes.items()}
    cut = {key: draw(st.sampled_from([None, *dims[key]])) for key in shapes}
    return Layout(ranks, {key: dim for key, dim in cut.items() if dim is not None})
