"""torch DTensor (FSDP2, tensor parallelism) as ShardedTensors: any mesh, uneven, strided.

A DTensor's placements are applied from left to right, as torch defines them: `Shard(d)` cuts what is left of
dimension d as torch.chunk does; `_StridedShard(d, split_factor)` first cuts it into split_factor pieces and takes
its chunk of each. What is left of each dimension is a list of index ranges; their products are the boxes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch

from distckpt.errors import InvalidShardingError
from distckpt.geometry import index_runs_boxes
from distckpt.sharded_tensor import ShardedTensor
from distckpt.state_dict import Adapted

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

Runs: TypeAlias = list[tuple[int, int]]


def adapt_dtensor(key: str, value: object) -> Adapted | None:
    """The boxes of a DTensor's local tensor. Raises InvalidShardingError for a Partial or unknown placement."""
    tensor_module = sys.modules.get("torch.distributed.tensor")  # Slow to import; no DTensor exists without it.
    if tensor_module is None or not isinstance(value, tensor_module.DTensor):
        return None
    local = value.to_local().detach()
    mesh = value.device_mesh
    _check_order(key, value)
    coordinates = mesh.get_coordinate()
    if coordinates is None:  # This rank is not in the mesh: it knows the tensor, but has nothing of it.
        runs: list[Runs] = [[] for _ in value.shape]
        if not value.shape:
            return Adapted(skip=True)
    else:
        runs = [[(0, n)] for n in value.shape]
        for dim, (placement, at) in enumerate(zip(value.placements, coordinates, strict=True)):
            _place(key, placement, runs, at, mesh.size(dim))
        expected = tuple(sum(stop - start for start, stop in dimension) for dimension in runs)
        if tuple(local.shape) != expected:
            raise InvalidShardingError(
                f"{key!r}: a DTensor {tuple(value.shape)} with placements {value.placements} has a local tensor of "
                f"shape {tuple(local.shape)} here, expected {expected}"
            )
    names = mesh.mesh_dim_names or ()
    partition = _partition(value.placements, names, len(value.shape))
    pieces = list(index_runs_boxes(runs))
    slices = [tuple(slice(o, e) for o, e in zip(inner.offset, inner.end, strict=True)) for _, inner in pieces]
    shards = [
        ShardedTensor(key, local[at], global_shape=value.shape, global_offset=box.offset, partition=partition)
        for at, (box, _) in zip(slices, pieces, strict=True)
    ]
    if not shards:
        empty = local.new_empty((0,) * len(value.shape))
        offset = (0,) * len(value.shape)
        shards = [ShardedTensor(key, empty, global_shape=value.shape, global_offset=offset, partition=partition)]

    def replacement() -> object:
        from torch.distributed.tensor import DTensor

        whole = torch.empty_like(local, device=shards[0].data.device)
        for at, part in zip(slices, shards, strict=False):
            whole[at] = part.data
        made = DTensor.from_local(
            whole, mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
        )
        return torch.nn.Parameter(made, value.requires_grad) if isinstance(value, torch.nn.Parameter) else made

    return Adapted(shards=shards, replacement=replacement if local.is_meta else None)


def _check_order(key: str, value: DTensor) -> None:
    """torch can keep, beside the placements, another order than left to right; no public name shows it yet."""
    order = getattr(getattr(value, "_spec", None), "shard_order", None)
    if any(list(entry.mesh_dims) != sorted(entry.mesh_dims) for entry in order or ()):
        raise InvalidShardingError(
            f"{key!r}: a DTensor whose dimensions are cut in the order {order}; redistribute it to placements that "
            f"apply from left to right"
        )


def _place(key: str, placement: Placement, runs: list[Runs], at: int, parts: int) -> None:
    """Narrow `runs` to what rank `at` of `parts` keeps under one placement."""
    if placement.is_replicate():
        return
    split_factor = getattr(placement, "split_factor", 1)
    dim = getattr(placement, "dim", None)
    if dim is None or not (placement.is_shard() or hasattr(placement, "split_factor")):
        raise InvalidShardingError(
            f"{key!r}: a DTensor with placement {placement!r} is no tensor yet; redistribute it to Shard or Replicate"
        )
    pieces = _chunk(runs[dim], split_factor)
    runs[dim] = [run for piece in pieces for run in _chunk(piece, parts)[at]]


def _chunk(runs: Runs, parts: int) -> list[Runs]:
    """The concatenated ranges cut as torch.chunk cuts: all of the rounded-up size, the last ones short or empty."""
    total = sum(stop - start for start, stop in runs)
    size = -(-total // parts)
    chunks: list[Runs] = [[] for _ in range(parts)]
    position = 0
    for start, stop in runs:
        while start < stop:
            number = position // size
            end = min(stop, start + (number + 1) * size - position)
            chunks[number].append((start, end))
            position += end - start
            start = end
    return chunks


def _partition(placements: Sequence[Placement], names: Sequence[str], ndim: int) -> tuple[str | None, ...] | None:
    """The mesh axis that splits each dimension; None when the mesh is unnamed or two axes split one dimension."""
    if not names:
        return None
    partition: list[str | None] = [None] * ndim
    for placement, name in zip(placements, names, strict=True):
        dim = getattr(placement, "dim", None)
        if dim is not None and partition[dim] is not None:
            return None
        if dim is not None:
            partition[dim] = name
    return tuple(partition)
