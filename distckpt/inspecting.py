"""Inspecting: what lies under a root and in one checkpoint, as records. No torch; reads no tensor, prints nothing.

What the index says needs the index alone. Where chunks lie is read from the chunk table, of the tensors that are asked
for, and kept as columns: a million chunks become objects only where each is to be shown.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import translate

import msgspec
import numpy as np

from distckpt.cataloging import (
    CheckpointEntry,
    IncompleteSave,
    entry_of,
    incomplete_saves,
    survey,
    tag_holders,
)
from distckpt.checkpoint_files import read_chunks, read_per_rank, rows_of
from distckpt.chunk_table import Boxes, Grids, Hits
from distckpt.commit import Commit, list_commits, read_tracker, tracker_warning
from distckpt.errors import CheckpointNotFoundError, CorruptionError
from distckpt.garbage import postponed_collection
from distckpt.geometry import BoolArray, Box, Int64Array
from distckpt.index import Index, MeshCoordinates, ShardFile, TensorEntry, check_locations
from distckpt.json_value import is_container
from distckpt.planner import plan_load
from distckpt.shard_file import DTYPES
from distckpt.storage import Storage

_BATCH_BYTES = 4 << 20  # records that are decoded at a time: a chunk of 12 bytes there takes some 200 in memory
_MATRIX = 1 << 24  # entries at a time of the table that tells which rank holds which tensor
ORDERS = ("key", "size", "shape", "dtype", "chunks")


class RootFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A root. tracker: the iteration that it names, None if it names none; tracker_warning: what is wrong with that.
    checkpoints: newest commit first."""

    location: str
    bytes: int
    tracker: int | None
    tracker_warning: str | None
    checkpoints: list[CheckpointEntry]
    incomplete: list[IncompleteSave]


class Section(msgspec.Struct, frozen=True):
    """What stands under one name at the top of the state. per_rank: values that differ by rank."""

    name: str
    tensors: int
    values: int
    per_rank: int
    bytes: int


class DtypeShare(msgspec.Struct, frozen=True):
    dtype: str
    tensors: int
    bytes: int


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """What the index says that a checkpoint consists of.

    tensor_bytes: of all tensors, each counted once; file_bytes: of the shard files, checksums and headers too.
    dtypes: most bytes first. writers: ranks that have files. largest_rank, largest_bytes: the one whose files are the
    largest (None if there are none), and their bytes.
    """

    tensors: int
    values: int
    per_rank: int
    tensor_bytes: int
    dtypes: list[DtypeShare]
    sections: list[Section]
    files: int
    file_bytes: int
    writers: int
    largest_rank: int | None
    largest_bytes: int


class TensorFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor. partition, owner, blocks, container: as in the index. ranks: those whose files hold some of it."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    partition: tuple[str | None, ...] | None
    owner: str | None
    blocks: tuple[int, ...] | None
    container: str | None
    chunks: int
    ranks: tuple[int, ...]


class RankFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One rank that has files. mesh: axis -> its coordinate. bytes: of its files; tensor_bytes, tensors and chunks: of
    the tensors that were asked for."""

    rank: int
    mesh: MeshCoordinates
    files: list[str]
    bytes: int
    tensors: int
    chunks: int
    tensor_bytes: int


class ChunkFacts(msgspec.Struct, frozen=True):
    """One chunk of a tensor: its box, and where it lies. mesh: coordinates of the rank. start: its first byte in the
    file."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    rank: int
    mesh: MeshCoordinates
    file: str
    start: int
    bytes: int


class ValueFacts(msgspec.Struct, frozen=True):
    """A value that all ranks share, as tagged JSON."""

    key: str
    bytes: int
    value: msgspec.Raw


class PerRankFacts(msgspec.Struct, frozen=True):
    """A value that differs by rank. axes: (name, size) of those whose coordinates tell which. holders: how many."""

    key: str
    axes: tuple[tuple[str, int], ...]
    on_change: str
    holders: int


class HeldValue(msgspec.Struct, frozen=True):
    """What one rank holds of a value that differs by rank: the coordinates that it is for, its file, tagged JSON."""

    coordinates: tuple[int, ...]
    rank: int
    file: str
    value: msgspec.Raw


def read_root(storage: Storage) -> RootFacts:
    """All that a root has. Raises OSError for what may not be read."""
    commits = list_commits(storage)
    records = survey(storage, commits)
    holders, now_unix_s = tag_holders(records), time.time()
    entries = [entry_of(record, holders, now_unix_s, storage) for record in records]
    incomplete = incomplete_saves(storage)
    return RootFacts(
        location=storage.location,
        bytes=sum(entry.bytes for entry in entries) + sum(save.bytes for save in incomplete),
        tracker=read_tracker(storage),
        tracker_warning=tracker_warning(storage, commits[0]) if commits else None,
        checkpoints=entries,
        incomplete=incomplete,
    )


def read_entry(storage: Storage, commit: Commit) -> CheckpointEntry:
    """What a catalog says of one checkpoint. Raises CheckpointNotFoundError if it is gone, OSError."""
    records = survey(storage, list_commits(storage))
    found = [record for record in records if record.commit == commit]
    if not found:
        raise CheckpointNotFoundError(f"{commit.name}: it was removed meanwhile")
    return entry_of(found[0], tag_holders(records), time.time(), storage)


def contents_of(index: Index) -> Contents:
    dtypes: dict[str, list[int]] = {}
    for tensor in index.tensors.values():
        share = dtypes.setdefault(tensor.dtype, [0, 0])
        share[0] += 1
        share[1] += tensor.size_bytes
    shares = [DtypeShare(dtype, *share) for dtype, share in dtypes.items()]
    by_rank: dict[int, int] = {}
    for file in index.files:
        by_rank[file.rank] = by_rank.get(file.rank, 0) + file.size_bytes
    largest = max(by_rank, key=lambda rank: by_rank[rank], default=None)
    return Contents(
        tensors=len(index.tensors),
        values=sum(not is_container(bytes(value)) for value in index.values.values()),
        per_rank=len(index.per_rank),
        tensor_bytes=sum(share.bytes for share in shares),
        dtypes=sorted(shares, key=lambda share: (-share.bytes, share.dtype)),
        sections=sections_of(index),
        files=len(index.files),
        file_bytes=sum(by_rank.values()),
        writers=len(by_rank),
        largest_rank=largest,
        largest_bytes=0 if largest is None else by_rank[largest],
    )


def sections_of(index: Index) -> list[Section]:
    """By name. A tensor with a key of its own counts where it stood."""
    counts: dict[str, list[int]] = {}
    for key, tensor in index.tensors.items():
        home = key if tensor.container is None else tensor.container
        count = counts.setdefault(home.partition("/")[0] or "/", [0, 0, 0, 0])
        count[0] += 1
        count[3] += tensor.size_bytes
    values = [key for key, value in index.values.items() if not is_container(bytes(value))]
    for place, keys in ((1, values), (2, index.per_rank)):
        for key in keys:
            counts.setdefault(key.partition("/")[0], [0, 0, 0, 0])[place] += 1
    return [Section(name, *counts[name]) for name in sorted(counts)]


def keys_matching(keys: Iterable[str], globs: Sequence[str]) -> list[str]:
    """Those that match any of the globs (`*` also matches `/` and `.`), in their order; all if no glob is given."""
    if not globs:
        return list(keys)
    pattern = re.compile("|".join(map(translate, globs)))
    return [key for key in keys if pattern.match(key)]


def natural_order(key: str) -> tuple[tuple[int, str], ...]:
    """To sort by: layers.9 before layers.10."""
    parts = re.split(r"([0-9]+)", key)
    return tuple((0, part) if i % 2 == 0 else _number(part) for i, part in enumerate(parts))


def _number(digits: str) -> tuple[int, str]:
    digits = digits.lstrip("0")
    return len(digits), digits


@postponed_collection()
def list_tensors(
    storage: Storage, commit: Commit, index: Index, keys: Sequence[str], *, order: str = "key", top: int | None = None
) -> list[TensorFacts]:
    """Tensors in one of ORDERS (key, dtype: ascending; the others: the largest first), the first `top` of them.

    Reads the chunk table of those alone. Raises CorruptionError, OSError; ValueError for an unknown order.
    """
    if order not in ORDERS:
        raise ValueError(f"--sort {order}: expected one of {', '.join(ORDERS)}")
    if order == "chunks":
        counts = [n for part in placements(storage, commit, index, keys) for n in part.chunk_counts.tolist()]
        rows = sorted((-count, natural_order(key), key) for count, key in zip(counts, keys, strict=True))
        ordered = [key for _, _, key in rows][:top]
    else:
        first = _order_of(index.tensors, order)
        ordered = sorted(keys, key=lambda key: (first(key), natural_order(key)))[:top]
    facts = []
    for part in placements(storage, commit, index, ordered):
        columns = zip(part.keys, part.chunk_counts.tolist(), part.ranks_of_tensors(), strict=True)
        facts += [_tensor_facts(key, index.tensors[key], count, ranks) for key, count, ranks in columns]
    return facts


def _order_of(tensors: dict[str, TensorEntry], order: str) -> Callable[[str], object]:
    if order == "size":
        return lambda key: -tensors[key].size_bytes
    if order == "shape":
        return lambda key: (*(-extent for extent in tensors[key].global_shape), 1)
    if order == "dtype":
        return lambda key: tensors[key].dtype
    return lambda key: 0


def _tensor_facts(key: str, entry: TensorEntry, chunks: int, ranks: tuple[int, ...]) -> TensorFacts:
    return TensorFacts(
        key=key,
        dtype=entry.dtype,
        shape=entry.global_shape,
        bytes=entry.size_bytes,
        partition=entry.partition,
        owner=entry.owner,
        blocks=entry.blocks,
        container=entry.container,
        chunks=chunks,
        ranks=ranks,
    )


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the chunks of tensors lie. stored: as the chunk table has them; groups: of each part of that which of
    `keys` a chunk is of, ascending, and the chunk."""

    index: Index
    keys: Sequence[str]
    stored: Sequence[Grids | Boxes]
    groups: list[tuple[Int64Array, Hits]]

    @classmethod
    @postponed_collection()
    def read(cls, storage: Storage, commit: Commit, index: Index, keys: Sequence[str]) -> Placement:
        """Raises CorruptionError, also for chunks that lie where none can, or OSError."""
        stored = read_chunks(storage, commit.directory, index, keys)
        boxes = [Box.whole(index.tensors[key].global_shape) for key in keys]
        groups = []
        for copies in plan_load(stored, np.arange(len(keys)), boxes):
            check_locations(index, keys, copies.target, copies.hits)
            groups.append((copies.target, copies.hits))
        return cls(index, keys, stored, groups)

    @property
    def chunk_counts(self) -> Int64Array:
        """Of each tensor."""
        counts = np.zeros(len(self.keys), np.int64)
        for tensor, _ in self.groups:
            counts += np.bincount(tensor, minlength=len(self.keys))
        return counts

    def holders(self) -> Iterator[tuple[list[int], BoolArray]]:
        """The ranks that have files, ascending, and for one run of tensors after the other which holds some of each:
        (tensors, ranks)."""
        ranks, column = np.unique(np.array([file.rank for file in self.index.files], np.int64), return_inverse=True)
        step = max(1, _MATRIX // max(1, len(ranks)))
        for begin in range(0, len(self.keys), step):
            stop = min(begin + step, len(self.keys))
            holds = np.zeros((stop - begin, len(ranks)), bool)
            for tensor, hits in self.groups:
                low, high = np.searchsorted(tensor, [begin, stop]).tolist()
                holds[tensor[low:high] - begin, column[hits.files[low:high]]] = True
            yield ranks.tolist(), holds

    def ranks_of_tensors(self) -> Iterator[tuple[int, ...]]:
        """Of each tensor the ranks whose files hold some of it, ascending; of many tensors they are the same."""
        known: dict[bytes, tuple[int, ...]] = {}
        for ranks, holds in self.holders():
            for row in holds:
                alike = row.tobytes()
                if alike not in known:
                    known[alike] = tuple(ranks[at] for at in np.flatnonzero(row).tolist())
                yield known[alike]

    def sizes(self, tensor: Int64Array, hits: Hits) -> Int64Array:
        """Bytes of the chunks of a group."""
        items = np.array([DTYPES[self.index.tensors[key].dtype].item_bytes for key in self.keys], np.int64)
        sizes: Int64Array = hits.shapes.prod(axis=1) * items[tensor]
        return sizes

    def chunks(self, top: int | None = None) -> list[ChunkFacts]:
        """Of all its tensors, in C order of each; the first `top` of each number of dimensions."""
        facts = []
        for tensor, hits in self.groups:
            sizes = self.sizes(tensor, hits)[:top].tolist()
            files = [self.index.files[number] for number in hits.files[:top].tolist()]
            columns = (
                rows_of(hits.offsets[:top]),
                rows_of(hits.shapes[:top]),
                files,
                hits.starts[:top].tolist(),
                sizes,
            )
            facts += [
                ChunkFacts(offset, shape, file.rank, file.mesh, file.name, start, size)
                for offset, shape, file, start, size in zip(*columns, strict=True)
            ]
        return facts


def placements(storage: Storage, commit: Commit, index: Index, keys: Sequence[str]) -> Iterator[Placement]:
    """The placement of tensors, in their order, some of them at a time: there may be many millions of chunks.

    Raises CorruptionError or OSError.
    """
    batch: list[str] = []
    record_bytes = 0
    for key in keys:
        size = index.tensors[key].record[1]
        if batch and record_bytes + size > _BATCH_BYTES:
            yield Placement.read(storage, commit, index, batch)
            batch, record_bytes = [], 0
        batch.append(key)
        record_bytes += size
    if batch:
        yield Placement.read(storage, commit, index, batch)


def list_ranks(index: Index, parts: Iterable[Placement]) -> list[RankFacts]:
    """What each rank that has files holds of the tensors whose placement is given."""
    files: dict[int, list[ShardFile]] = {}
    for file in index.files:
        files.setdefault(file.rank, []).append(file)
    ordered = sorted(files)
    column = np.searchsorted(ordered, [file.rank for file in index.files])
    chunks, tensor_bytes, tensors = np.zeros((3, len(ordered)), np.int64)
    for part in parts:
        for tensor, hits in part.groups:
            of_rank = column[hits.files]
            chunks += np.bincount(of_rank, minlength=len(ordered))
            np.add.at(tensor_bytes, of_rank, part.sizes(tensor, hits))
        for _, holds in part.holders():
            tensors += holds.sum(axis=0)
    return [
        RankFacts(
            rank=rank,
            mesh=files[rank][0].mesh,
            files=[file.name for file in files[rank]],
            bytes=sum(file.size_bytes for file in files[rank]),
            tensors=int(tensors[at]),
            chunks=int(chunks[at]),
            tensor_bytes=int(tensor_bytes[at]),
        )
        for at, rank in enumerate(ordered)
    ]


def list_values(index: Index, globs: Sequence[str] = ()) -> list[ValueFacts]:
    """What all ranks share; marks of empty dicts and of lists that have tensors in them are no values."""
    keys = sorted(keys_matching(index.values, globs), key=natural_order)
    encoded = [(key, bytes(index.values[key])) for key in keys]
    return [ValueFacts(key, len(text), msgspec.Raw(text)) for key, text in encoded if not is_container(text)]


def list_per_rank(index: Index, globs: Sequence[str] = ()) -> list[PerRankFacts]:
    keys = sorted(keys_matching(index.per_rank, globs), key=natural_order)
    found = [(key, index.per_rank[key]) for key in keys]
    return [PerRankFacts(key, entry.axes, entry.on_change, len(entry.holders)) for key, entry in found]


def held_values(storage: Storage, commit: Commit, index: Index, key: str, top: int | None = None) -> list[HeldValue]:
    """A value that differs by rank, of each (of the first `top`) of its holders: read from their files, and checked.

    Raises CorruptionError or OSError.
    """
    found = []
    for coordinates, number in sorted(index.per_rank[key].holders)[:top]:
        file = index.files[number]
        values = read_per_rank(storage, commit.directory, index, number)
        if key not in values:
            raise CorruptionError(f"{commit.directory}/{file.name}: per-rank value {key!r} is not in it")
        found.append(HeldValue(coordinates, file.rank, file.name, values[key]))
    return found
