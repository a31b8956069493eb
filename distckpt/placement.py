"""Placing: which boxes there are of every tensor, and which of the ranks that have a box writes it.

Decides both, and refuses boxes that do not tile their tensors. Everything as long as the world is columns; Python
objects are made for messages of errors only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from distckpt.errors import InvalidShardingError
from distckpt.geometry import (
    BoolArray,
    Box,
    Int32Array,
    Int64Array,
    find_overlap,
    find_untiled,
    first_elements,
    first_hole,
    intersect,
)
from distckpt.index import MAX_BYTES, Spec
from distckpt.shard_file import DTYPES

_MAX_ELEMENTS = MAX_BYTES // 16  # of the largest items, as the index has it
_BATCH = 1 << 16  # boxes whose holders are Python integers at a time


@dataclass(frozen=True, slots=True)
class GivenShards:
    """All ranks' shards, by rank, then by their number in the rank's message.

    counts: (world,) shards a rank. tensor: (n,) number of the tensor. boxes: offset then shape, ragged. available:
    (n,) whether the rank can still write it; None where all can.
    """

    counts: Int64Array
    tensor: Int32Array
    boxes: Int64Array
    available: BoolArray | None


@dataclass(frozen=True, slots=True)
class ChunkColumns:
    """Chunks of the tensors of one number of dimensions, sorted by tensor, then offset.

    tensor, writer and place (where it stands among the chunks that its writer writes) are (n,); boxes (n, 2 * ndim).
    """

    tensor: Int32Array
    boxes: Int64Array
    writer: Int32Array
    place: Int32Array


@dataclass(frozen=True, slots=True)
class ByRank:
    """Numbers of shards of each rank, ascending: those of rank r are numbers[starts[r] : starts[r + 1]]."""

    starts: Int64Array
    numbers: Int32Array

    def of(self, rank: int) -> Int32Array:
        return self.numbers[self.starts[rank] : self.starts[rank + 1]]


@dataclass(frozen=True, slots=True)
class Replicas:
    """The shards whose box is given more than once. chunk: (n,) which one that is, of all ChunkColumns one after the
    other; first: (n,) the entry of the lowest rank that has the same."""

    shards: ByRank
    chunk: Int32Array
    first: Int32Array


@dataclass(frozen=True, slots=True)
class Placement:
    columns: tuple[ChunkColumns, ...]
    written: ByRank
    replicas: Replicas
    bytes_by_rank: Int64Array


@dataclass(frozen=True, slots=True)
class _Distinct:
    """The distinct boxes of one number of dimensions, sorted; all that hold one, in order of rank, follow each other
    in `rows`, which are numbers of shards among all ranks' shards."""

    tensor: Int32Array
    boxes: Int64Array
    rows: Int64Array
    counts: Int64Array


def place_shards(specs: Mapping[str, Spec], given: GivenShards) -> Placement:
    """Check that the boxes of every tensor (numbers count in `specs`) tile it, and choose who writes each.

    Equal boxes are replicas and are written once, by the least loaded of the ranks that can. Raises
    InvalidShardingError naming key, region and ranks.
    """
    _check_sizes(specs)
    rank = np.repeat(np.arange(len(given.counts), dtype=np.int32), given.counts)
    groups = list(_distinct_boxes(specs, given, rank))
    tensor, rows, counts = (
        np.concatenate([getattr(g, name) for g in groups] or [np.zeros(0, np.int64)])
        for name in ("tensor", "rows", "counts")
    )
    holders = _Holders(specs, [g.boxes for g in groups], tensor, counts, rank[rows], len(given.counts))
    _check_tiling(groups, holders)
    item_bytes = np.array([DTYPES[s.dtype].item_bytes for s in specs.values()], np.int64)
    volumes = [g.boxes[:, g.boxes.shape[1] // 2 :].prod(axis=1) for g in groups]
    sizes = item_bytes[tensor] * np.concatenate(volumes or [np.zeros(0, np.int64)])
    usable = None if given.available is None else given.available[rows]
    chosen, bytes_by_rank = _choose_writers(holders, sizes, usable)
    first_of_rank = np.cumsum(given.counts) - given.counts
    number = (rows - first_of_rank[holders.rank]).astype(np.int32)
    order, written = _by_rank(holders.rank[chosen], number[chosen], len(given.counts))
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order)) - written.starts[holders.rank[chosen[order]]]
    columns, low = [], 0
    for g in groups:
        high = low + len(g.tensor)
        columns.append(ChunkColumns(g.tensor, g.boxes, holders.rank[chosen[low:high]], place[low:high]))
        low = high
    return Placement(tuple(columns), written, _find_replicas(holders, number), bytes_by_rank)


def _check_sizes(specs: Mapping[str, Spec]) -> None:
    total = 0
    for key, spec in specs.items():
        total += prod(n for n in spec.global_shape if n)
        if total > _MAX_ELEMENTS:
            raise InvalidShardingError(
                f"{key!r} {spec.global_shape}: with it the state has more than {_MAX_ELEMENTS} elements, more than a "
                f"checkpoint can have; is its global shape wrong?"
            )


def _distinct_boxes(specs: Mapping[str, Spec], given: GivenShards, rank: Int32Array) -> Iterator[_Distinct]:
    dims = np.array([len(s.global_shape) for s in specs.values()], np.int64)
    ndims = dims[given.tensor]
    ends = np.cumsum(2 * ndims)
    if (int(ends[-1]) if len(ends) else 0) != len(given.boxes):
        raise ValueError(f"{len(given.boxes)} numbers of boxes for {len(ndims)} shards")
    for ndim in np.unique(ndims).tolist():
        rows = np.flatnonzero(ndims == ndim)
        boxes = np.empty((len(rows), 2 * ndim), np.int64)
        for d in range(2 * ndim):
            boxes[:, d] = given.boxes[ends[rows] - 2 * ndim + d]
        filled = (boxes[:, ndim:] > 0).all(axis=1)
        if not filled.all():
            rows, boxes = rows[filled], boxes[filled]
        yield _distinct(specs, dims, given.tensor[rows], boxes, rows, rank)


def _distinct(
    specs: Mapping[str, Spec],
    dims: Int64Array,
    tensor: Int32Array,
    boxes: Int64Array,
    rows: Int64Array,
    rank: Int32Array,
) -> _Distinct:
    """Of the shards `rows`, all of one number of dimensions, with their tensors and boxes."""
    ndim = boxes.shape[1] // 2
    wholes = np.zeros((len(dims), ndim), np.int64)
    same = dims == ndim
    wholes[same] = [s.global_shape for s, is_same in zip(specs.values(), same, strict=True) if is_same]
    for d in range(ndim):
        outside = (boxes[:, d] < 0) | (boxes[:, ndim + d] > wholes[:, d][tensor] - boxes[:, d])
        if outside.any():
            i = int(np.flatnonzero(outside)[0])
            key = list(specs)[int(tensor[i])]
            raise InvalidShardingError(
                f"{key!r}: offset and shape {boxes[i].reshape(2, -1).tolist()} of rank {rank[rows[i]]} are not inside "
                f"the global shape {specs[key].global_shape}"
            )
    # The first elements of two boxes, counted through all tensors, are the same only if the boxes are, or overlap.
    volumes = np.array([prod(s.global_shape) for s in specs.values()], np.int64)
    position = (np.cumsum(volumes) - volumes)[tensor] + first_elements(tensor, boxes, wholes)
    order = np.argsort(position, kind="stable")
    position = position[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = position[1:] != position[:-1]
    for d in range(ndim, 2 * ndim):
        extent = boxes[:, d][order]
        is_first[1:] |= extent[1:] != extent[:-1]
    first = np.flatnonzero(is_first)
    counts = np.diff(np.append(first, len(order)))
    return _Distinct(tensor[order[first]], boxes[order[first]], rows[order], counts)


@dataclass(frozen=True, slots=True)
class _Holders:
    """Who has which box: the ranks of box i are `counts[i]` entries of `rank`, after those of the boxes before it."""

    specs: Mapping[str, Spec]
    boxes: list[Int64Array]  # one array for each number of dimensions
    tensor: Int32Array
    counts: Int64Array
    rank: Int32Array
    world_size: int

    def key(self, chunk: int) -> str:
        return list(self.specs)[int(self.tensor[chunk])]

    def box(self, chunk: int) -> Box:
        for boxes in self.boxes:
            if chunk < len(boxes):
                offset, shape = boxes[chunk].reshape(2, -1).tolist()
                return Box(tuple(offset), tuple(shape))
            chunk -= len(boxes)
        raise IndexError(chunk)

    def ranks_of(self, chunks: Int64Array) -> list[int]:
        ends = np.cumsum(self.counts)
        return sorted({r for c in chunks for r in self.rank[ends[c] - self.counts[c] : ends[c]].tolist()})


def _choose_writers(holders: _Holders, sizes: Int64Array, usable: BoolArray | None) -> tuple[Int64Array, Int64Array]:
    """For each box an entry of holders.rank: the only rank that can write it, or, from large to small boxes, that of
    the least bytes so far. And the bytes of each rank."""
    entries = np.arange(len(holders.rank)) if usable is None else np.flatnonzero(usable)
    counts = holders.counts
    if usable is not None:
        counts = np.bincount(np.repeat(np.arange(len(counts)), counts)[entries], minlength=len(counts))
        _check_writable(holders, counts)
    rank = holders.rank[entries]
    first = np.cumsum(counts) - counts
    chosen = first.copy()
    load = np.zeros(holders.world_size, np.int64)
    single = counts == 1
    np.add.at(load, rank[first[single]], sizes[single])
    shared = np.flatnonzero(~single)
    shared = shared[np.argsort(-sizes[shared], kind="stable")]
    loads = load.tolist()
    for low in range(0, len(shared), _BATCH):
        batch = shared[low : low + _BATCH]
        _spread(batch, rank, first, counts, sizes, loads, chosen)
    return entries[chosen], np.array(loads, np.int64)


def _spread(
    boxes: Int64Array,
    rank: Int32Array,
    first: Int64Array,
    counts: Int64Array,
    sizes: Int64Array,
    loads: list[int],
    chosen: Int64Array,
) -> None:
    """Give each of the boxes, in this order, to the least loaded of its ranks, the first of equals."""
    ends = np.cumsum(counts[boxes])
    begins = ends - counts[boxes]
    held = rank[np.repeat(first[boxes] - begins, counts[boxes]) + np.arange(ends[-1])].tolist()
    picked = []
    for low, high, size in zip(begins.tolist(), ends.tolist(), sizes[boxes].tolist(), strict=True):
        mine = held[low:high]
        best = min(mine, key=loads.__getitem__)
        loads[best] += size
        picked.append(mine.index(best))
    chosen[boxes] = first[boxes] + picked


def _check_writable(holders: _Holders, counts: Int64Array) -> None:
    gone = np.flatnonzero(counts == 0)
    if len(gone):
        chunk = int(gone[0])
        key = holders.key(chunk)
        spec, ranks = holders.specs[key], holders.ranks_of(gone[:1])
        raise InvalidShardingError(
            f"{key!r} {spec.global_shape}: {region_of(spec, holders.box(chunk))} can no longer be written: "
            f"{rank_list(ranks)}, which gave them, {'have' if len(ranks) > 1 else 'has'} changed them since."
        )


def _by_rank(rank: Int32Array, number: Int32Array, world_size: int) -> tuple[Int64Array, ByRank]:
    """The order by rank, then number, and the numbers in it."""
    order = np.argsort(rank.astype(np.int64) << 32 | number, kind="stable")
    starts = np.zeros(world_size + 1, np.int64)
    starts[1:] = np.cumsum(np.bincount(rank, minlength=world_size))
    return order, ByRank(starts, number[order])


def _find_replicas(holders: _Holders, number: Int32Array) -> Replicas:
    chunk = np.repeat(np.arange(len(holders.counts), dtype=np.int32), holders.counts)
    several = np.flatnonzero(holders.counts[chunk] > 1)
    order, shards = _by_rank(holders.rank[several], number[several], holders.world_size)
    chunk = chunk[several]  # Still by chunk, then rank.
    entry = np.empty(len(order), np.int32)
    entry[order] = np.arange(len(order), dtype=np.int32)
    begins = np.flatnonzero(np.diff(chunk, prepend=-1))
    first = np.repeat(entry[begins], np.diff(np.append(begins, len(chunk))))
    return Replicas(shards, chunk[order], first[order])


def _check_tiling(groups: Sequence[_Distinct], holders: _Holders) -> None:
    specs, base = list(holders.specs.items()), 0
    unfilled = {t for t, (_, spec) in enumerate(specs) if prod(spec.global_shape)}
    for g in groups:
        ndim = g.boxes.shape[1] // 2
        numbers, row = np.unique(g.tensor, return_inverse=True)
        wholes = np.array([specs[t][1].global_shape for t in numbers.tolist()], np.int64).reshape(len(numbers), ndim)
        untiled = numbers[find_untiled(row.astype(np.int32), g.boxes, wholes)]
        for t in untiled.tolist():
            low, high = np.searchsorted(g.tensor, [t, t + 1]).tolist()
            overlap = find_overlap(g.boxes[low:high, :ndim], g.boxes[low:high, ndim:])
            if overlap:
                raise _overlap_error(holders, base + low + overlap[0], base + low + overlap[1])
        unfilled -= set(numbers.tolist()) - set(untiled.tolist())
        base += len(g.tensor)
    for t in sorted(unfilled):
        raise _hole_error(holders, t)


def _overlap_error(holders: _Holders, i: int, j: int) -> InvalidShardingError:
    key, a, b = holders.key(i), holders.box(i), holders.box(j)
    spec, common = holders.specs[key], intersect(a, b)
    mine, others = (rank_list(holders.ranks_of(np.array([n]))) for n in (i, j))
    return InvalidShardingError(
        f"{key!r} {spec.global_shape}: {a} of {mine} and {b} of {others} overlap: "
        f"{region_of(spec, common or a)} are in both. Shards of one key must not overlap unless they are the same box."
    )


def _hole_error(holders: _Holders, tensor: int) -> InvalidShardingError:
    key, spec = list(holders.specs.items())[tensor]
    chunks = np.flatnonzero(holders.tensor == tensor)
    given = holders.ranks_of(chunks)
    hole = first_hole(spec.global_shape, [holders.box(c) for c in chunks.tolist()]) or Box.whole(spec.global_shape)
    absent = sorted(set(range(holders.world_size)) - set(given))
    verb, whose = ("are", "their") if len(absent) > 1 else ("is", "its")
    hint = f"{verb} {rank_list(absent)} missing it from {whose} state?"
    if not absent:
        hint = "is a shard's offset or shape wrong?"
    return InvalidShardingError(
        f"{key!r} {spec.global_shape}: {region_of(spec, hole)} are in no shard.\n"
        f"  {rank_list(given, 'Rank') or 'No rank'} gave shards; {hint}"
    )


def region_of(spec: Spec, box: Box) -> str:
    """ "rows 4096-6143" where whole rows are meant, "elements [0:4, 2:3]" otherwise."""
    if box.shape[1:] == spec.global_shape[1:] and box.shape:
        return f"rows {box.offset[0]}-{box.end[0] - 1}"
    return f"elements {box}"


def rank_list(ranks: Sequence[int], word: str = "rank") -> str:
    """ "ranks 0, 1, 2 and 5 more"; nothing for none."""
    if not ranks:
        return ""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"{word}{'s' if len(ranks) > 1 else ''} {shown}"
