"""The layout that a checkpoint gets on another mesh: which target rank holds which box of every tensor. Pure; no torch.

Decides from labels alone: the mesh axis that splits each dimension, the axis whose coordinate holds a tensor, the
sub-blocks that are split one by one. Where these come from (the index, the plan file, what can be inferred) is
distckpt.resharding.tensor_labels' business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TypeAlias

import numpy as np

from distckpt.errors import CheckpointError
from distckpt.geometry import Box, Int64Array, index_runs_boxes
from distckpt.index import Spec
from distckpt.shard_file import DTYPES

# Ranks count the first of these fastest, as Megatron's do by default; other axes follow in the order given.
AXIS_ORDER = ("tp", "cp", "ep", "dp", "pp")
MAX_WORLD_SIZE = 1 << 17
MAX_CHUNKS = 1 << 20  # of one tensor; blocks are cut one by one


@dataclass(frozen=True, slots=True)
class TargetMesh:
    """sizes: axis -> size, the fastest axis first. Every combination of coordinates is one rank."""

    sizes: Mapping[str, int]

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> TargetMesh:
        """In the order of ranks. Raises ValueError for a size that is none, and more ranks than there can be."""
        for axis, size in sizes.items():
            if size < 1:
                raise ValueError(f"mesh axis {axis!r} has size {size}, at least 1 expected")
        if prod(sizes.values()) > MAX_WORLD_SIZE:
            raise ValueError(
                f"a mesh of {prod(sizes.values())} ranks, {dict(sizes)}: at most {MAX_WORLD_SIZE} expected"
            )
        ordered = [axis for axis in AXIS_ORDER if axis in sizes]
        ordered += [axis for axis in sizes if axis not in AXIS_ORDER]
        return cls({axis: sizes[axis] for axis in ordered})

    @property
    def world_size(self) -> int:
        return prod(self.sizes.values())

    def size(self, axis: str) -> int:
        """1 for an axis that it has not."""
        return self.sizes.get(axis, 1)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Axis -> coordinate of a rank."""
        found = {}
        for axis, size in self.sizes.items():
            rank, found[axis] = divmod(rank, size)
        return found

    def ranks_at(self, at: Mapping[str, int]) -> list[int]:
        """The ranks with these coordinates, whatever their others are; ascending."""
        ranks, stride = np.zeros(1, np.int64), 1
        for axis, size in self.sizes.items():
            own = [at[axis]] if axis in at else range(size)
            ranks = (np.array(own, np.int64)[:, None] * stride + ranks).ravel()
            stride *= size
        found: list[int] = np.sort(ranks).tolist()
        return found

    def __str__(self) -> str:
        return " ".join(f"{axis}{size}" for axis, size in self.sizes.items()) or "one rank"


@dataclass(frozen=True, slots=True)
class TargetTensor:
    """One tensor of the target. spec: as its index will have it. at: the coordinate of the owner axis that holds it;
    None where the owner is None or not of the mesh. counts: by mesh axis, how many entries of a dimension that is split
    over it each coordinate gets, if not equally many."""

    key: str
    spec: Spec
    at: int | None = None
    counts: Mapping[str, Sequence[int]] | None = None

    @property
    def pattern(self) -> tuple[object, ...]:
        """What decides how it is cut: tensors with equal ones are cut alike."""
        spec = self.spec
        counts = tuple((axis, tuple(of)) for axis, of in (self.counts or {}).items())
        return spec.global_shape, spec.partition, spec.blocks, spec.owner, self.at, counts

    def runs(self, dim: int, coordinate: int, parts: int) -> list[tuple[int, int]]:
        """The ranges (start, stop) of a dimension that one coordinate of the axis that splits it holds.

        Equal parts are cut as torch.chunk cuts: all of the rounded-up size, the last ones short or empty.
        """
        extent, axis = self.spec.global_shape[dim], (self.spec.partition or ())[dim]
        counts = (self.counts or {}).get(axis or "")
        if counts is not None:
            if sum(counts) != extent or len(counts) != parts:
                raise CheckpointError(
                    f"{self.key!r}: dimension {dim} has {extent} entries, the counts for axis {axis!r} are "
                    f"{list(counts)} ({sum(counts)} for {len(counts)} coordinates of {parts})"
                )
            begin = sum(counts[:coordinate])
            return [(begin, begin + counts[coordinate])]
        blocks = self.spec.blocks[dim] if self.spec.blocks else 1
        block = extent // blocks
        step = -(-block // parts)
        low, high = min(coordinate * step, block), min((coordinate + 1) * step, block)
        return [(i * block + low, i * block + high) for i in range(blocks)]


@dataclass(frozen=True, slots=True)
class TargetChunks:
    """The chunks of one tensor: (n, ndim) offsets and shapes, (n,) rank that holds each."""

    offsets: Int64Array
    shapes: Int64Array
    ranks: Int64Array

    def __len__(self) -> int:
        return len(self.ranks)

    def box(self, number: int) -> Box:
        return Box(tuple(self.offsets[number].tolist()), tuple(self.shapes[number].tolist()))


@dataclass(frozen=True, slots=True)
class TargetLayout:
    """tensors and chunks: one of each, in the same order. bytes_by_rank: of tensors, (world,)."""

    mesh: TargetMesh
    tensors: Sequence[TargetTensor]
    chunks: Sequence[TargetChunks]
    bytes_by_rank: Int64Array


def lay_out(tensors: Sequence[TargetTensor], mesh: TargetMesh) -> TargetLayout:
    """Who holds what. A box that several ranks would hold is stored once, by the one of them with the fewest bytes;
    from large to small boxes, as a save does it."""
    known: dict[tuple[object, ...], _Cut] = {}  # The tensors of a model are cut alike by the thousands.
    cuts = []
    for tensor in tensors:
        pattern = tensor.pattern
        if pattern not in known:
            known[pattern] = _cut(tensor, mesh)
        cuts.append(known[pattern])
    sized = [
        (size * DTYPES[tensor.spec.dtype].item_bytes, number, i, at)
        for number, (tensor, cut) in enumerate(zip(tensors, cuts, strict=True))
        for i, (size, at) in enumerate(zip(cut.sizes, cut.held, strict=True))
    ]
    sized.sort(key=lambda one: -one[0])
    loads = np.zeros(mesh.world_size, np.int64)
    ranks = [np.zeros(len(cut.sizes), np.int64) for cut in cuts]
    holders: dict[_Coordinates, Int64Array] = {}
    for size, number, i, at in sized:
        if at not in holders:
            holders[at] = np.array(mesh.ranks_at(dict(at)), np.int64)
        candidates = holders[at]
        rank = candidates[loads[candidates].argmin()]
        loads[rank] += size
        ranks[number][i] = rank
    chunks = [TargetChunks(cut.offsets, cut.shapes, of) for cut, of in zip(cuts, ranks, strict=True)]
    return TargetLayout(mesh, tensors, chunks, loads)


_Coordinates: TypeAlias = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class _Cut:
    """How tensors are cut: (n, ndim) offsets and shapes, the elements of each box, and the coordinates of the ranks
    that have it."""

    offsets: Int64Array
    shapes: Int64Array
    sizes: Sequence[int]
    held: Sequence[_Coordinates]


def _cut(tensor: TargetTensor, mesh: TargetMesh) -> _Cut:
    found = list(_boxes(tensor, mesh))
    ndim = len(tensor.spec.global_shape)
    offsets = np.array([box.offset for box, _ in found], np.int64).reshape(len(found), ndim)
    shapes = np.array([box.shape for box, _ in found], np.int64).reshape(len(found), ndim)
    return _Cut(offsets, shapes, [box.size for box, _ in found], [at for _, at in found])


def _boxes(tensor: TargetTensor, mesh: TargetMesh) -> Iterator[tuple[Box, _Coordinates]]:
    """The boxes that a tensor is cut into, and the coordinates of the ranks that have each."""
    spec = tensor.spec
    partition = spec.partition or (None,) * len(spec.global_shape)
    axes = list(dict.fromkeys(axis for axis in partition if axis is not None and mesh.size(axis) > 1))
    cut_blocks = [n for n, axis in zip(spec.blocks or (), partition, strict=False) if axis in axes]
    count = prod(mesh.size(axis) for axis in axes) * prod(cut_blocks)
    if count > MAX_CHUNKS:
        raise CheckpointError(
            f"{tensor.key!r} {spec.global_shape} would be cut into {count} parts ({mesh}, blocks {spec.blocks}): "
            f"at most {MAX_CHUNKS} expected"
        )
    held: _Coordinates = ()
    if spec.owner is not None and tensor.at is not None and spec.owner in mesh.sizes and spec.owner not in axes:
        held = ((spec.owner, tensor.at),)
    for coordinates in product(*(range(mesh.size(axis)) for axis in axes)):
        at = dict(zip(axes, coordinates, strict=True))
        runs = [
            tensor.runs(d, at[axis], mesh.size(axis)) if axis in at else [(0, extent)]
            for d, (axis, extent) in enumerate(zip(partition, spec.global_shape, strict=True))
        ]
        for box, _ in index_runs_boxes(runs):
            yield box, (*at.items(), *held)
