"""Planning: who writes which box, and which stored bytes fill which target. Pure functions on plain records.

Never does I/O, never touches tensors, never talks to other ranks. One rank's own shards are objects; what is as
long as the world is columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import prod

import msgspec
import numpy as np
import numpy.typing as npt

from distckpt.chunk_table import Chunks
from distckpt.errors import InvalidShardingError
from distckpt.geometry import Box, Int64Array, boxes_of, find_overlap, first_hole, intersect, is_tiling
from distckpt.index import Mesh, MeshCoordinates, OnChange, Spec
from distckpt.json_value import is_container, is_empty_list
from distckpt.shard_file import DTYPES


class PerRankItem(msgspec.Struct, frozen=True):
    """A value that differs by rank, as one rank announces it. `digest` is of its encoded value."""

    axes: tuple[str, ...]
    on_change: OnChange
    digest: int


class RankShards(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank has to save: its message to the planner.

    specs: (key, spec) of its tensors, each pair once. Its shards are columns, one entry a shard: `tensor` int32,
    number into specs; `boxes` int64, offset then shape, ragged; `samples` uint32, a checksum over samples of its bytes.
    values: key -> encoded JSON value. mesh: axis -> (coordinate, size).
    """

    specs: list[tuple[str, Spec]]
    tensor: bytes
    boxes: bytes
    samples: bytes
    values: dict[str, bytes]
    per_rank: dict[str, PerRankItem]
    mesh: dict[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class PerRankPlan:
    """axes: (name, size); holders: (coordinates, writing rank)."""

    axes: tuple[tuple[str, int], ...]
    on_change: OnChange
    holders: tuple[tuple[tuple[int, ...], int], ...]


@dataclass(frozen=True, slots=True)
class ChunkColumns:
    """Chunks of the tensors of one number of dimensions, sorted by tensor, then offset.

    tensor, writer and shard (its number in the writer's message) are (n,); boxes is (n, 2 * ndim).
    """

    tensor: Int64Array
    boxes: Int64Array
    writer: Int64Array
    shard: Int64Array


@dataclass(frozen=True, slots=True)
class SavePlan:
    """What is to be written by whom: rank 0's view of one save."""

    specs: dict[str, Spec]  # sorted by key; ChunkColumns.tensor counts in it
    columns: tuple[ChunkColumns, ...]
    values: dict[str, bytes]
    per_rank: dict[str, PerRankPlan]
    mesh: MeshCoordinates
    bytes_by_rank: Int64Array

    def shards_of(self, rank: int) -> npt.NDArray[np.int32]:
        """Numbers of the shards that `rank` writes, in the order of its message."""
        mine = [c.shard[c.writer == rank] for c in self.columns]
        return np.sort(np.concatenate(mine)).astype(np.int32) if mine else np.zeros(0, np.int32)

    def per_rank_keys_of(self, rank: int) -> list[str]:
        return [key for key, plan in self.per_rank.items() if any(r == rank for _, r in plan.holders)]


def plan_save(ranks: Sequence[RankShards]) -> SavePlan:
    """Join what all ranks have into one checkpoint.

    Every key has one spec; its boxes tile the global tensor; equal boxes are replicas, whose samples agree, and are
    written once, by the least loaded rank that has them. Raises InvalidShardingError naming key, rows and ranks.
    """
    mesh = join_mesh([message.mesh for message in ranks])
    specs = _join_specs(ranks)
    values = _join_values(ranks, specs)
    per_rank = _join_per_rank(ranks)
    rows = _gather_rows(ranks, specs)
    bytes_by_rank = np.zeros(len(ranks), np.int64)
    columns = tuple(_assign(r, specs, bytes_by_rank) for r in rows)
    _check_tiling(specs, columns, rows, len(ranks))
    return SavePlan(specs, columns, values, per_rank, mesh, bytes_by_rank)


def join_mesh(ranks: Sequence[Mesh]) -> MeshCoordinates:
    """The sizes of the mesh of which every rank gave its place. Raises InvalidShardingError naming axis and ranks."""
    sizes = {axis: size for axis, (_, size) in ranks[0].items()}
    for rank, mesh in enumerate(ranks):
        found = {axis: size for axis, (_, size) in mesh.items()}
        if found != sizes:
            raise InvalidShardingError(
                f"mesh is {sizes} on rank 0 but {found} on rank {rank}; pass one mesh everywhere"
            )
        outside = {axis: at for axis, (at, size) in mesh.items() if not 0 <= at < size}
        if outside:
            raise InvalidShardingError(f"rank {rank}: mesh coordinates {outside} are outside the sizes {sizes}")
    return sizes


def check_places(ranks: Sequence[Mesh]) -> None:
    """Raises InvalidShardingError for a mesh axis that has a coordinate at which no rank stands.

    A single process may take any place: it may be a tool that looks at a job's checkpoint from there.
    """
    for axis, size in join_mesh(ranks).items() if len(ranks) > 1 else ():
        absent = sorted(set(range(size)) - {mesh[axis][0] for mesh in ranks})
        if absent:
            raise InvalidShardingError(
                f"mesh axis {axis!r} has size {size}, but no rank has coordinate {absent[0]}; each rank "
                f"must give its own (coordinate, size)"
            )


def _join_specs(ranks: Sequence[RankShards]) -> dict[str, Spec]:
    first: dict[str, tuple[Spec, int]] = {}
    containers: dict[str, str | None] = {}
    sharded: set[str] = set()
    for rank, message in enumerate(ranks):
        for key, spec in message.specs:
            known, by = first.setdefault(key, (spec, rank))
            if spec.given_as == "sharded":
                sharded.add(key)
            if known is spec:
                containers[key] = spec.container
                continue
            containers[key] = _common_container(containers[key], spec.container)
            differing = [f for f in _SHARED_FIELDS if getattr(spec, f) != getattr(known, f)]
            if differing:
                raise InvalidShardingError(
                    f"{key!r} is {_describe(known, differing)} on rank {by} but {_describe(spec, differing)} on rank "
                    f"{rank}. One key is one tensor: give shards their global shape, different tensors different keys."
                )
    return {
        key: msgspec.structs.replace(
            first[key][0],
            container=containers[key],
            given_as="sharded" if key in sharded else first[key][0].given_as,
        )
        for key in sorted(first)
    }


_SHARED_FIELDS = ("dtype", "global_shape", "partition", "owner", "blocks")


def _describe(spec: Spec, differing: Sequence[str]) -> str:
    labels = "".join(f", {f}={getattr(spec, f)!r}" for f in differing if f not in ("dtype", "global_shape"))
    return f"{spec.dtype} {spec.global_shape}{labels}"


def _common_container(a: str | None, b: str | None) -> str | None:
    """The innermost container that holds both; None (the key is its own path) wins."""
    if a is None or b is None or a == b:
        return a if a == b else None
    common = takewhile(lambda pair: pair[0] == pair[1], zip(a.split("/"), b.split("/"), strict=False))
    return "/".join(segment for segment, _ in common)


def _join_values(ranks: Sequence[RankShards], specs: Mapping[str, Spec]) -> dict[str, bytes]:
    first: dict[str, tuple[bytes, int]] = {}
    for rank, message in enumerate(ranks):
        for key, value in message.values.items():
            known, by = first.setdefault(key, (value, rank))
            if known != value:
                raise InvalidShardingError(
                    f"value {key!r} is {_shorten(known)} on rank {by} but {_shorten(value)} on rank {rank}. "
                    f"Values are shared by all ranks; wrap what differs by rank in PerRank."
                )
            if key in specs:
                raise InvalidShardingError(
                    f"{key!r} is a tensor on one rank and the value {_shorten(value)} on rank {rank}"
                )
    for rank, message in enumerate(ranks):
        twice = [key for key in message.per_rank if key in specs or key in first]
        if twice:
            raise InvalidShardingError(f"{twice[0]!r} is a PerRank on rank {rank} and something else on another")
    homes = {
        home for spec in specs.values() if spec.container for home in (spec.container, *_ancestors(spec.container))
    }
    # A rank may have none of the shards of a list; where that is, the others' shards say.
    first = {key: known for key, known in first.items() if not (key in homes and is_empty_list(known[0]))}
    paths = [key for key, spec in specs.items() if spec.container is None] + list(first)
    leaves = {key for key in paths if key not in first or not is_container(first[key][0])}
    for key in paths:
        for parent in _ancestors(key):
            if parent in leaves:
                raise InvalidShardingError(
                    f"{parent!r} is a leaf of the state on one rank and the container of {key!r} on another"
                )
    return {key: first[key][0] for key in sorted(first)}


def _ancestors(key: str) -> Iterator[str]:
    while "/" in key:
        key = key.rpartition("/")[0]
        yield key


def _shorten(value: bytes) -> str:
    text = value.decode()
    return text if len(text) <= 80 else text[:77] + "..."


def _join_per_rank(ranks: Sequence[RankShards]) -> dict[str, PerRankPlan]:
    kinds: dict[str, PerRankItem] = {}
    holders: dict[str, dict[tuple[int, ...], tuple[int, int]]] = {}
    for rank, message in enumerate(ranks):
        for key, item in message.per_rank.items():
            known = kinds.setdefault(key, item)
            if (known.axes, known.on_change) != (item.axes, item.on_change):
                raise InvalidShardingError(
                    f"PerRank {key!r} has axes {item.axes}, on_change={item.on_change!r} on rank {rank}, "
                    f"but {known.axes}, {known.on_change!r} on another rank"
                )
            coordinates = tuple(message.mesh[axis][0] for axis in item.axes)
            by, digest = holders.setdefault(key, {}).setdefault(coordinates, (rank, item.digest))
            if digest != item.digest:
                raise InvalidShardingError(
                    f"PerRank {key!r} differs between ranks {by} and {rank}, which share the coordinates "
                    f"{dict(zip(item.axes, coordinates, strict=True))}; add the axis that tells them apart to its axes"
                )
    return {
        key: PerRankPlan(
            axes=tuple((axis, ranks[0].mesh[axis][1]) for axis in kinds[key].axes),
            on_change=kinds[key].on_change,
            holders=tuple((at, rank) for at, (rank, _) in sorted(holders[key].items())),
        )
        for key in sorted(kinds)
    }


@dataclass(frozen=True, slots=True)
class _Rows:
    """All ranks' shards of one number of dimensions: (n,) each, boxes (n, 2 * ndim)."""

    tensor: Int64Array
    boxes: Int64Array
    rank: Int64Array
    shard: Int64Array
    sample: Int64Array


def _gather_rows(ranks: Sequence[RankShards], specs: Mapping[str, Spec]) -> list[_Rows]:
    number = {key: i for i, key in enumerate(specs)}
    dims = np.array([len(s.global_shape) for s in specs.values()], np.int64)
    parts: dict[int, list[_Rows]] = {}
    for rank, message in enumerate(ranks):
        to_global = np.array([number[key] for key, _ in message.specs], np.int64)
        tensor = to_global[np.frombuffer(message.tensor, np.int32)]
        ndims = dims[tensor]
        flat = np.frombuffer(message.boxes, np.int64)
        starts = np.cumsum(2 * ndims) - 2 * ndims
        samples = np.frombuffer(message.samples, np.uint32).astype(np.int64)
        for ndim in map(int, np.unique(ndims)):
            at = np.flatnonzero(ndims == ndim)
            boxes = flat[starts[at][:, None] + np.arange(2 * ndim)]
            filled = (boxes[:, ndim:] > 0).all(axis=1)
            at, boxes = at[filled], boxes[filled]
            parts.setdefault(ndim, []).append(_Rows(tensor[at], boxes, np.full(len(at), rank), at, samples[at]))
    return [
        _Rows(*(np.concatenate([getattr(p, field) for p in part]) for field in _Rows.__slots__))
        for _, part in sorted(parts.items())
    ]


def _assign(rows: _Rows, specs: Mapping[str, Spec], bytes_by_rank: Int64Array) -> ChunkColumns:
    """One writer per box: the least loaded rank that has it. Adds to bytes_by_rank."""
    order = np.lexsort((rows.rank, *rows.boxes.T[::-1], rows.tensor))
    tensor, boxes, rank, sample = rows.tensor[order], rows.boxes[order], rows.rank[order], rows.sample[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = (tensor[1:] != tensor[:-1]) | (boxes[1:] != boxes[:-1]).any(axis=1)
    first = np.flatnonzero(is_first)
    group = np.cumsum(is_first) - 1
    differs = np.flatnonzero(sample != sample[first][group])
    if len(differs):
        i = int(differs[0])
        key = list(specs)[int(tensor[i])]
        raise InvalidShardingError(
            f"{key!r} {specs[key].global_shape}: {_region(specs[key], _box(boxes[i]))} differ between rank "
            f"{rank[first[group[i]]]} and rank {rank[i]}. A plain tensor, or one box given by several ranks, must hold "
            f"the same values on all of them; is it a shard without its ShardedTensor, or a name that two stages share?"
        )
    ndim = boxes.shape[1] // 2
    item_bytes = np.array([DTYPES[s.dtype].item_bytes for s in specs.values()], np.int64)
    sizes = boxes[first][:, ndim:].prod(axis=1) * item_bytes[tensor[first]]
    counts = np.diff(np.append(first, len(order)))
    chosen = first.copy()
    single = counts == 1
    np.add.at(bytes_by_rank, rank[first[single]], sizes[single])
    shared = np.flatnonzero(~single)
    for g in shared[np.argsort(-sizes[shared], kind="stable")]:
        holders = np.arange(first[g], first[g] + counts[g])
        chosen[g] = holders[np.argmin(bytes_by_rank[rank[holders]])]
        bytes_by_rank[rank[chosen[g]]] += sizes[g]
    return ChunkColumns(tensor[first], boxes[first], rank[chosen], rows.shard[order][chosen])


def _check_tiling(
    specs: Mapping[str, Spec], columns: Iterable[ChunkColumns], rows: Iterable[_Rows], world_size: int
) -> None:
    keys = list(specs)
    volumes = np.array([prod(s.global_shape) for s in specs.values()], np.int64)
    covered = np.zeros(len(keys), np.int64)
    for chunks, group in zip(columns, rows, strict=True):
        ndim = chunks.boxes.shape[1] // 2
        np.add.at(covered, chunks.tensor, chunks.boxes[:, ndim:].prod(axis=1))
        tensors, starts, counts = np.unique(chunks.tensor, return_index=True, return_counts=True)
        for t, start, count in zip(tensors[counts > 1], starts[counts > 1], counts[counts > 1], strict=True):
            boxes = chunks.boxes[start : start + count]
            if is_tiling(boxes[:, :ndim], boxes[:, ndim:], specs[keys[t]].global_shape):
                continue
            overlap = find_overlap(boxes[:, :ndim], boxes[:, ndim:])
            if overlap:
                raise _overlap_error(keys[t], specs[keys[t]], chunks, start + overlap[0], start + overlap[1], group)
    for t in np.flatnonzero(covered != volumes):
        raise _hole_error(keys[t], specs[keys[t]], int(t), columns, rows, world_size)


def _overlap_error(key: str, spec: Spec, chunks: ChunkColumns, i: int, j: int, rows: _Rows) -> InvalidShardingError:
    a, b = _box(chunks.boxes[i]), _box(chunks.boxes[j])
    common = intersect(a, b)
    holders = [
        sorted(set(rows.rank[(rows.tensor == chunks.tensor[n]) & (rows.boxes == chunks.boxes[n]).all(axis=1)].tolist()))
        for n in (i, j)
    ]
    return InvalidShardingError(
        f"{key!r} {spec.global_shape}: {a} of {_rank_list(holders[0])} and {b} of {_rank_list(holders[1])} overlap: "
        f"{_region(spec, common or a)} are in both. Shards of one key must not overlap unless they are the same box."
    )


def _hole_error(
    key: str, spec: Spec, tensor: int, columns: Iterable[ChunkColumns], rows: Iterable[_Rows], world_size: int
) -> InvalidShardingError:
    boxes: list[Box] = []
    given: set[int] = set()
    for chunks, group in zip(columns, rows, strict=True):
        mine = chunks.boxes[chunks.tensor == tensor]
        ndim = chunks.boxes.shape[1] // 2
        boxes += boxes_of(mine[:, :ndim], mine[:, ndim:])
        given |= set(group.rank[group.tensor == tensor].tolist())
    hole = first_hole(spec.global_shape, boxes) or Box.whole(spec.global_shape)
    absent = sorted(set(range(world_size)) - given)
    verb, whose = ("are", "their") if len(absent) > 1 else ("is", "its")
    hint = f"{verb} {_rank_list(absent)} missing it from {whose} state?"
    if not absent:
        hint = "is a shard's offset or shape wrong?"
    return InvalidShardingError(
        f"{key!r} {spec.global_shape}: {_region(spec, hole)} are in no shard.\n"
        f"  {_rank_list(sorted(given), 'Rank') or 'No rank'} gave shards; {hint}"
    )


def _box(row: Int64Array) -> Box:
    offset, shape = row.reshape(2, -1).tolist()
    return Box(tuple(offset), tuple(shape))


def _region(spec: Spec, box: Box) -> str:
    """ "rows 4096-6143" where whole rows are meant, "elements [0:4, 2:3]" otherwise."""
    if box.shape[1:] == spec.global_shape[1:] and box.shape:
        return f"rows {box.offset[0]}-{box.end[0] - 1}"
    return f"elements {box}"


def _rank_list(ranks: Sequence[int], word: str = "rank") -> str:
    if not ranks:
        return ""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"{word}{'s' if len(ranks) > 1 else ''} {shown}"


@dataclass(frozen=True, slots=True)
class Copy:
    """One region to bring from a stored chunk into a target; numbers of elements, but for chunk_start (bytes)."""

    file: int
    chunk_start: int
    chunk_origin: tuple[int, ...]  # of the chunk in the global tensor
    chunk_shape: tuple[int, ...]
    chunk_offset: tuple[int, ...]  # of the region in the chunk
    target: int
    target_offset: tuple[int, ...]  # of the region in the target's box
    shape: tuple[int, ...]


def plan_load(targets: Sequence[tuple[Box, Chunks]]) -> list[Copy]:
    """What fills every target box from the chunks that are stored of its tensor, in order of file and position.

    Target boxes lie inside the stored global shape; then the copies cover them, since stored chunks tile it.
    """
    copies: list[Copy] = []
    for number, (box, chunks) in enumerate(targets):
        low = np.maximum(chunks.offsets, np.array(box.offset, np.int64))
        high = np.minimum(chunks.offsets + chunks.shapes, np.array(box.end, np.int64))
        hits = np.flatnonzero((low < high).all(axis=1))
        copies += [_copy(number, box, chunks, i, low[i], high[i]) for i in hits.tolist()]
    return sorted(copies, key=lambda c: (c.file, c.chunk_start))


def _copy(target: int, box: Box, chunks: Chunks, i: int, low: Int64Array, high: Int64Array) -> Copy:
    """From chunk i into the target: the region low..high of the global tensor."""
    return Copy(
        file=int(chunks.files[i]),
        chunk_start=int(chunks.starts[i]),
        chunk_origin=tuple(chunks.offsets[i].tolist()),
        chunk_shape=tuple(chunks.shapes[i].tolist()),
        chunk_offset=tuple((low - chunks.offsets[i]).tolist()),
        target=target,
        target_offset=tuple((low - np.array(box.offset, np.int64)).tolist()),
        shape=tuple((high - low).tolist()),
    )
