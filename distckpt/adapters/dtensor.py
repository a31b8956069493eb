"""torch DTensor (FSDP2, tensor parallelism) as ShardedTensors: any mesh, uneven, strided.

A DTensor's placements are applied from left to right, as torch defines them: `Shard(d)` cuts what is left of
dimension d as torch.chunk does; `_StridedShard(d, split_factor)` first cuts it into split_factor pieces and takes
its chunk of each. What is left of each dimension is a list of index ranges; their products are the boxes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

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
    local = value.to_local()
    mesh = value.device_mesh
    shape, placements = tuple(value.shape), tuple(value.placements)
    _check_order(key, value)
    coordinates = mesh.get_coordinate()
    if coordinates is None and not shape:
        return Adapted(skip=True)
    try:
        place = _place(shape, placements, mesh.mesh_dim_names, mesh.shape, coordinates and tuple(coordinates))
    except ValueError as error:
        raise InvalidShardingError(f"{key!r}: {error}") from error
    if coordinates is not None and tuple(local.shape) != place.local_shape:
        raise InvalidShardingError(
            f"{key!r}: a DTensor {shape} with placements {placements} has a local tensor of shape "
            f"{tuple(local.shape)} here, expected {place.local_shape}"
        )
    shards = [
        ShardedTensor(
            key,
            local[at] if len(place.pieces) > 1 else local,  # One piece is all of it.
            global_shape=shape,
            global_offset=offset,
            partition=place.partition,
        )
        for offset, at in place.pieces
    ]
    if not shards:
        empty, nowhere = local.new_empty((0,) * len(shape)), (0,) * len(shape)
        shards = [ShardedTensor(key, empty, global_shape=shape, global_offset=nowhere, partition=place.partition)]

    def replacement() -> object:
        from torch.distributed.tensor import DTensor

        whole = torch.empty_like(local, device=shards[0].data.device)
        for (_, at), part in zip(place.pieces, shards, strict=False):
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


class _Place(NamedTuple):
    """Where a rank's local tensor lies: (offset in the global tensor, slices of the local one) of each box."""

    local_shape: tuple[int, ...]
    pieces: tuple[tuple[tuple[int, ...], tuple[slice, ...]], ...]
    partition: tuple[str | None, ...] | None


@lru_cache(maxsize=4096)  # The tensors of a model have few shapes.
def _place(
    shape: tuple[int, ...],
    placements: tuple[Placement, ...],
    names: tuple[str, ...] | None,
    sizes: tuple[int, ...],
    coordinates: tuple[int, ...] | None,
) -> _Place:
    """Of the rank at these coordinates of a mesh of these sizes; of one outside the mesh if there are none: nothing.

    Raises ValueError for a placement that is none of a tensor's parts.
    """
    for placement in placements:
        cuts = placement.is_shard() or hasattr(placement, "split_factor")
        if not (placement.is_replicate() or (cuts and hasattr(placement, "dim"))):
            raise ValueError(
                f"a DTensor with placement {placement!r} is no tensor yet; redistribute it to Shard or Replicate"
            )
    runs: list[Runs] = [[(0, n)] if coordinates is not None else [] for n in shape]
    for placement, at, parts in zip(placements, coordinates or (), sizes, strict=coordinates is not None):
        if not placement.is_replicate():
            _narrow(runs, placement.dim, getattr(placement, "split_factor", 1), at, parts)  # type: ignore[attr-defined]
    pieces = tuple(
        (outer.offset, tuple(slice(o, e) for o, e in zip(inner.offset, inner.end, strict=True)))
        for outer, inner in index_runs_boxes(runs)
    )
    local_shape = tuple(sum(stop - start for start, stop in dimension) for dimension in runs)
    return _Place(local_shape, pieces, _partition(placements, names or (), len(shape)))


def _narrow(runs: list[Runs], dim: int, split_factor: int, at: int, parts: int) -> None:
    """Leave of dimension `dim` what rank `at` of `parts` keeps of each of split_factor pieces of it."""
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
