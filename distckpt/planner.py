"""Planning: who writes which box, and which stored bytes fill which target. Pure functions on plain records.

Never does I/O, never touches tensors, never talks to other ranks. One rank's own shards are objects; what is as
long as the world is columns. What a plan is made of stays the same from save to save (RankShards); what changes at
every one (RankValues, samples) is checked against the plan apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import msgspec
import numpy as np

from distckpt.chunk_table import Boxes, Grids, Hits
from distckpt.decoding import decode_msgpack, msgpack_decoder
from distckpt.errors import InvalidShardingError
from distckpt.geometry import Box, Int32Array, Int64Array
from distckpt.index import Mesh, MeshCoordinates, OnChange, Spec
from distckpt.json_value import is_container, is_empty_list
from distckpt.placement import ByRank, ChunkColumns, GivenShards, Replicas, place_shards, region_of


class PerRankKind(msgspec.Struct, frozen=True):
    """How a value that differs by rank is kept: the mesh axes that key it, and what a load does when they changed."""

    axes: tuple[str, ...]
    on_change: OnChange


class RankShards(msgspec.Struct, frozen=True, kw_only=True):
    """The structure of what one rank has to save; the same at every save until its state changes.

    specs: `encode_specs` of (key, spec) of its tensors, each pair once. Its shards are columns, one entry a shard:
    `tensor` int32, number into specs; `boxes` int64, offset then shape, ragged. mesh: axis -> (coordinate, size).
    available: int32, ascending, the shards that the rank can still write, as others have changed; None is all.
    """

    specs: bytes
    tensor: bytes
    boxes: bytes
    per_rank: dict[str, PerRankKind]
    mesh: dict[str, tuple[int, int]]
    available: bytes | None = None


class RankValues(msgspec.Struct, frozen=True):
    """What else one rank has to save, which may change at every save.

    values: `encode_values` of key -> encoded JSON value. per_rank: key -> digest of the encoded PerRank value.
    """

    values: bytes
    per_rank: dict[str, int]


def encode_specs(specs: Sequence[tuple[str, Spec]]) -> bytes:
    """Specs as RankShards has them. Equal lists are equal bytes."""
    return msgspec.msgpack.encode(specs)


def encode_values(values: Mapping[str, bytes]) -> bytes:
    """Values as RankValues has them. Equal values, whatever their order, are equal bytes."""
    return msgspec.msgpack.encode(dict(sorted(values.items())))


@dataclass(frozen=True, slots=True)
class PerRankPlan:
    """axes: (name, size); holders: (coordinates, writing rank). writer: (world,) which rank writes the value that each
    rank has, -1 where it has none."""

    axes: tuple[tuple[str, int], ...]
    on_change: OnChange
    holders: tuple[tuple[tuple[int, ...], int], ...]
    writer: Int32Array


@dataclass(frozen=True, slots=True)
class _TensorPaths:
    """Where tensors stand in the state. leaves: paths of those that are their own path. above: each container above
    one of them -> it. homes: containers of the others, and those above."""

    leaves: frozenset[str]
    above: Mapping[str, str]
    homes: frozenset[str]


@dataclass(frozen=True, slots=True)
class SavePlan:
    """What is to be written by whom: rank 0's view of saves of one structure."""

    specs: dict[str, Spec]  # sorted by key; ChunkColumns.tensor counts in it
    columns: tuple[ChunkColumns, ...]
    per_rank: dict[str, PerRankPlan]
    mesh: MeshCoordinates
    bytes_by_rank: Int64Array
    _written: ByRank
    _replicas: Replicas
    _paths: _TensorPaths

    def shards_of(self, rank: int) -> Int32Array:
        """Numbers of the shards that `rank` writes, in the order of its message."""
        return self._written.of(rank)

    def per_rank_keys_of(self, rank: int) -> list[str]:
        """Keys of the PerRank values that `rank` writes."""
        return [key for key, plan in self.per_rank.items() if plan.writer[rank] == rank]

    def writers(self) -> list[int]:
        """The ranks that have a file, ascending: those that write something, and rank 0."""
        columns = [columns.writer for columns in self.columns]
        values = [plan.writer[plan.writer >= 0] for plan in self.per_rank.values()]
        ranks: list[int] = np.unique(np.concatenate([np.zeros(1, np.int32), *columns, *values])).tolist()
        return ranks

    def replicated_of(self, rank: int) -> Int32Array:
        """Numbers of the shards of `rank` whose box is given more than once, by other ranks or twice by itself."""
        return self._replicas.shards.of(rank)


def plan_save(ranks: Sequence[RankShards]) -> SavePlan:
    """Join what all ranks have into one checkpoint.

    Every key has one spec; its boxes tile the global tensor; equal boxes are replicas, and are written once, by the
    least loaded rank that can. Raises InvalidShardingError naming key, rows and ranks.
    """
    mesh = join_mesh([message.mesh for message in ranks])
    specs, numbers = _join_specs(ranks)
    per_rank = _join_per_rank(ranks)
    for key, plan in per_rank.items():
        if key in specs:
            raise _two_kinds(key, plan)
    paths = _tensor_paths(specs)
    placement = place_shards(specs, _gather_shards(ranks, numbers))
    return SavePlan(
        specs=specs,
        columns=placement.columns,
        per_rank=per_rank,
        mesh=mesh,
        bytes_by_rank=placement.bytes_by_rank,
        _written=placement.written,
        _replicas=placement.replicas,
        _paths=paths,
    )


def check_replicas(plan: SavePlan, samples: Sequence[bytes]) -> None:
    """Check that replicas hold the same. samples[r]: uint32 checksums over samples of the bytes of each of
    plan.replicated_of(r). Raises InvalidShardingError naming key, region and ranks."""
    replicas = plan._replicas
    counts = [len(of_rank) // 4 for of_rank in samples]
    if counts != np.diff(replicas.shards.starts).tolist():
        raise ValueError(f"{sum(counts)} samples for {len(replicas.chunk)} replicated shards")
    found = np.frombuffer(b"".join(samples), np.uint32)
    differs = np.flatnonzero(found != found[replicas.first])
    if len(differs):
        i = int(differs[0])
        ranks = np.searchsorted(replicas.shards.starts, [replicas.first[i], i], side="right") - 1
        raise _replica_error(plan, int(replicas.chunk[i]), *ranks.tolist())


def _replica_error(plan: SavePlan, chunk: int, first: int, other: int) -> InvalidShardingError:
    for columns in plan.columns:
        if chunk < len(columns.tensor):
            break
        chunk -= len(columns.tensor)
    key, spec = list(plan.specs.items())[int(columns.tensor[chunk])]
    offset, shape = columns.boxes[chunk].reshape(2, -1).tolist()
    return InvalidShardingError(
        f"{key!r} {spec.global_shape}: {region_of(spec, Box(tuple(offset), tuple(shape)))} differ between rank "
        f"{first} and rank {other}. A plain tensor, or one box given by several ranks, must hold the same values on "
        f"all of them; is it a shard without its ShardedTensor, or a name that two stages share?"
    )


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


def _join_specs(ranks: Sequence[RankShards]) -> tuple[dict[str, Spec], list[Int32Array]]:
    """The specs of all ranks by key, sorted; and for each rank which of them each of its pairs is.

    Equal messages are looked at once, and equal pairs are decoded once, so that the work is that of what differs.
    """
    joint = _JointSpecs()
    by_message: dict[bytes, Int32Array] = {}
    for rank, message in enumerate(ranks):
        if message.specs not in by_message:
            by_message[message.specs] = joint.add(message.specs, rank)
    keys = sorted(joint.specs)
    number = {key: i for i, key in enumerate(keys)}
    sorted_number = np.array([number[key] for key in joint.specs], np.int32)
    by_message = {message: sorted_number[numbers] for message, numbers in by_message.items()}
    return {key: joint.specs[key][0] for key in keys}, [by_message[message.specs] for message in ranks]


class _JointSpecs:
    """What the ranks that were added say of each key: its spec, and who was first to say so. Keys are numbered in
    order of appearance."""

    def __init__(self) -> None:
        self.specs: dict[str, tuple[Spec, int]] = {}
        self._number: dict[str, int] = {}
        self._number_of_pair: dict[bytes, int] = {}

    def add(self, encoded: bytes, rank: int) -> Int32Array:
        """The numbers of the keys of encoded specs."""
        pairs = [bytes(pair) for pair in decode_msgpack(encoded, list[msgspec.Raw])]
        decoder = msgpack_decoder(tuple[str, Spec])
        known = self._number_of_pair
        for pair in pairs:
            if pair not in known:
                key, spec = decoder.decode(pair)
                self._join(key, spec, rank)
                known[pair] = self._number.setdefault(key, len(self._number))
        return np.array([known[pair] for pair in pairs], np.int32)

    def _join(self, key: str, spec: Spec, rank: int) -> None:
        if key not in self.specs:
            self.specs[key] = spec, rank
            return
        known, by = self.specs[key]
        differing = [f for f in _SHARED_FIELDS if getattr(spec, f) != getattr(known, f)]
        if differing:
            raise InvalidShardingError(
                f"{key!r} is {_describe(known, differing)} on rank {by} but {_describe(spec, differing)} on rank "
                f"{rank}. One key is one tensor: give shards their global shape, different tensors different keys."
            )
        container = _common_container(known.container, spec.container)
        given_as = "sharded" if spec.given_as == "sharded" else known.given_as
        self.specs[key] = msgspec.structs.replace(known, container=container, given_as=given_as), by


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


def _tensor_paths(specs: Mapping[str, Spec]) -> _TensorPaths:
    leaves = frozenset(key for key, spec in specs.items() if spec.container is None)
    above = {parent: key for key in leaves for parent in _ancestors(key)}
    homes = {spec.container for spec in specs.values() if spec.container}
    homes |= {parent for home in homes for parent in _ancestors(home)}
    for parent in sorted(leaves & above.keys()):
        raise _leaf_and_container(parent, above[parent])
    return _TensorPaths(leaves, above, frozenset(homes))


def join_values(plan: SavePlan, ranks: Sequence[RankValues]) -> dict[str, bytes]:
    """The shared values of all ranks, sorted by key; and check that PerRank values agree where they must.

    Raises InvalidShardingError naming key and ranks.
    """
    first: dict[str, tuple[bytes, int]] = {}
    seen: set[bytes] = set()
    for rank, message in enumerate(ranks):
        if message.values in seen:
            continue
        seen.add(message.values)
        for key, value in decode_msgpack(message.values, dict[str, bytes]).items():
            known, by = first.setdefault(key, (value, rank))
            if known != value:
                raise InvalidShardingError(
                    f"value {key!r} is {_shorten(known)} on rank {by} but {_shorten(value)} on rank {rank}. "
                    f"Values are shared by all ranks; wrap what differs by rank in PerRank."
                )
    for key, (value, rank) in first.items():
        if key in plan.specs:
            raise InvalidShardingError(
                f"{key!r} is a tensor on one rank and the value {_shorten(value)} on rank {rank}"
            )
        if key in plan.per_rank:
            raise _two_kinds(key, plan.per_rank[key])
    _check_digests(plan, ranks)
    # A rank may have none of the shards of a list; where that is, the others' shards say.
    values = {k: first[k][0] for k in sorted(first) if not (k in plan._paths.homes and is_empty_list(first[k][0]))}
    _check_paths(values, plan._paths)
    return values


def _check_paths(values: Mapping[str, bytes], tensors: _TensorPaths) -> None:
    """Refuse a leaf of the state that is a container of others."""
    leaves = {key for key, value in values.items() if not is_container(value)}
    for key in leaves & tensors.above.keys():
        raise _leaf_and_container(key, tensors.above[key])
    for key in values:
        for parent in _ancestors(key):
            if parent in leaves or parent in tensors.leaves:
                raise _leaf_and_container(parent, key)


def _leaf_and_container(leaf: str, below: str) -> InvalidShardingError:
    return InvalidShardingError(
        f"{leaf!r} is a leaf of the state on one rank and the container of {below!r} on another"
    )


def _two_kinds(key: str, plan: PerRankPlan) -> InvalidShardingError:
    rank = min(rank for _, rank in plan.holders)
    return InvalidShardingError(f"{key!r} is a PerRank on rank {rank} and something else on another")


def _ancestors(key: str) -> Iterator[str]:
    while "/" in key:
        key = key.rpartition("/")[0]
        yield key


def _shorten(value: bytes) -> str:
    text = value.decode()
    return text if len(text) <= 80 else text[:77] + "..."


def _join_per_rank(ranks: Sequence[RankShards]) -> dict[str, PerRankPlan]:
    kinds: dict[str, tuple[PerRankKind, int]] = {}
    holders: dict[str, dict[tuple[int, ...], int]] = {}
    writers: dict[str, Int32Array] = {}
    for rank, message in enumerate(ranks):
        for key, kind in message.per_rank.items():
            known, by = kinds.setdefault(key, (kind, rank))
            if known != kind:
                raise InvalidShardingError(
                    f"PerRank {key!r} has axes {kind.axes}, on_change={kind.on_change!r} on rank {rank}, "
                    f"but {known.axes}, {known.on_change!r} on rank {by}"
                )
            coordinates = tuple(message.mesh[axis][0] for axis in kind.axes)
            writer = holders.setdefault(key, {}).setdefault(coordinates, rank)
            writers.setdefault(key, np.full(len(ranks), -1, np.int32))[rank] = writer
    return {
        key: PerRankPlan(
            axes=tuple((axis, ranks[0].mesh[axis][1]) for axis in kinds[key][0].axes),
            on_change=kinds[key][0].on_change,
            holders=tuple(sorted(holders[key].items())),
            writer=writers[key],
        )
        for key in sorted(kinds)
    }


def _check_digests(plan: SavePlan, ranks: Sequence[RankValues]) -> None:
    for key, per_rank in plan.per_rank.items():
        for rank, writer in enumerate(per_rank.writer.tolist()):
            if writer >= 0 and ranks[rank].per_rank[key] != ranks[writer].per_rank[key]:
                at = next(at for at, by in per_rank.holders if by == writer)
                coordinates = {axis: c for (axis, _), c in zip(per_rank.axes, at, strict=True)}
                raise InvalidShardingError(
                    f"PerRank {key!r} differs between ranks {writer} and {rank}, which share the coordinates "
                    f"{coordinates}; add the axis that tells them apart to its axes"
                )


def _gather_shards(ranks: Sequence[RankShards], numbers: Sequence[Int32Array]) -> GivenShards:
    """All ranks' shards. numbers: which tensor each of a rank's pairs of key and spec is."""
    tensor = [of_pair[np.frombuffer(message.tensor, np.int32)] for message, of_pair in zip(ranks, numbers, strict=True)]
    available = None
    if any(message.available is not None for message in ranks):
        parts = [np.full(len(t), message.available is None) for message, t in zip(ranks, tensor, strict=True)]
        for message, part in zip(ranks, parts, strict=True):
            if message.available is not None:
                part[np.frombuffer(message.available, np.int32)] = True
        available = np.concatenate(parts)
    return GivenShards(
        counts=np.array([len(t) for t in tensor], np.int64),
        tensor=np.concatenate(tensor),
        boxes=np.frombuffer(b"".join(message.boxes for message in ranks), np.int64),
        available=available,
    )


@dataclass(frozen=True, slots=True)
class Copies:
    """Regions to bring from stored chunks into targets, all of one number of dimensions; (h,) or (h, ndim).

    target: its number. hits: the chunks. low, shape: offset and shape of the
    region in the global tensor.
    """

    target: Int64Array
    hits: Hits
    low: Int64Array
    shape: Int64Array


def plan_load(stored: Sequence[Grids | Boxes], tensor: Int64Array, boxes: Sequence[Box]) -> list[Copies]:
    """What fills every box from the chunks that are stored of its tensor, (k,) by the numbers that `stored` gives them.

    The boxes lie inside the stored global shapes; then the copies cover them, since stored chunks tile them.
    """
    copies = []
    is_filled = np.array([box.size > 0 for box in boxes], bool)
    for group in stored:
        # By bisection: who asks for one tensor at a time does not pay for all.
        rows = np.minimum(np.searchsorted(group.tensors, tensor), len(group.tensors) - 1)
        targets = np.flatnonzero(is_filled & (group.tensors[rows] == tensor))
        if len(targets):
            mine = [boxes[i] for i in targets.tolist()]
            low = np.array([box.offset for box in mine], np.int64)
            high = np.array([box.end for box in mine], np.int64)
            hits = group.meeting(rows[targets], low, high)
            start = np.maximum(hits.offsets, low[hits.box])
            shape = np.minimum(hits.offsets + hits.shapes, high[hits.box]) - start
            copies.append(Copies(targets[hits.box], hits, start, shape))
    return copies
