"""Assembling: what the ranks planned and wrote, as one index and one chunk table. Pure; writes nothing itself."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from distckpt._C import crc32c
from distckpt.chunk_table import Chunks, encode_record, encode_whole, page_checksums
from distckpt.garbage import postponed_collection
from distckpt.geometry import Int64Array
from distckpt.index import ChunkTable, Index, PerRankEntry, ShardFile, Spec, TensorEntry
from distckpt.metrics import Metrics
from distckpt.planner import SavePlan
from distckpt.shard_file import FORMAT, FORMAT_VERSION


class Written(msgspec.Struct, frozen=True):
    """What one rank wrote: its files, where the shards of its share lie (file int32, start int64), and checksums over
    samples of those of its shards that are replicated (uint32). peak_rss_bytes, device_bytes: as of SaveReport."""

    files: list[ShardFile]
    file_of: bytes
    start_of: bytes
    samples: bytes
    seconds: dict[str, float]
    peak_rss_bytes: int = 0
    device_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Commitment:
    """Who saves what: the facts of an index that are in no plan. `metadata` is encoded JSON."""

    save_id: str
    epoch: int
    commit_seq: int
    iteration: int
    parent: str | None
    world_size: int
    metadata: bytes
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JoinedRecords:
    """What an index says of chunks: the bytes of the chunk table and the tensors that they are of."""

    content: bytes
    records_bytes: int
    trailer_crc: int
    tensors: dict[str, TensorEntry]

    def table(self, save_id: str) -> ChunkTable:
        """The table as the index names it."""
        return ChunkTable(
            name=f"chunks-{save_id}.bin",
            size_bytes=len(self.content),
            records_bytes=self.records_bytes,
            trailer_crc=self.trailer_crc,
        )


@dataclass(frozen=True, slots=True)
class ChunkRecords(JoinedRecords):
    """Those of a save. digest: of the files and places that the ranks told."""

    plan: SavePlan
    digest: bytes


def join_records(specs: Mapping[str, Spec], records: Mapping[str, bytes]) -> JoinedRecords:
    """The chunk table of tensors, from the record of each, in that order."""
    positions = np.cumsum([0] + [len(record) for record in records.values()]).tolist()
    body = b"".join(records.values())
    trailer = page_checksums(body)
    tensors = {
        key: TensorEntry(**msgspec.structs.asdict(specs[key]), record=(at, len(record)))
        for (key, record), at in zip(records.items(), positions, strict=False)
    }
    return JoinedRecords(body + trailer, len(body), crc32c(trailer), tensors)


@postponed_collection()
def chunk_records(plan: SavePlan, ranks: Sequence[Written], earlier: ChunkRecords | None = None) -> ChunkRecords:
    """The records of a save whose files are all written. They are `earlier`, of another save, if that had the same plan
    and its chunks lay where they lie now, as they do while headers keep their length."""
    locations = _locations(plan, ranks)
    digest = hashlib.blake2b(b"".join(column.tobytes() for column in locations), digest_size=16).digest()
    if earlier is not None and earlier.plan is plan and earlier.digest == digest:
        return earlier
    joined = join_records(plan.specs, _records(plan, *locations))
    return ChunkRecords(joined.content, joined.records_bytes, joined.trailer_crc, joined.tensors, plan, digest)


@postponed_collection()
def index_of(
    who: Commitment,
    plan: SavePlan,
    values: Mapping[str, bytes],
    ranks: Sequence[Written],
    records: ChunkRecords,
) -> Index:
    """The index of a save whose files are all written. values: the joined ones."""
    files = [file for written in ranks for file in written.files]
    first_file = {file.rank: number for number, file in reversed(list(enumerate(files)))}
    return Index(
        format=FORMAT,
        version=FORMAT_VERSION,
        save_id=who.save_id,
        epoch=who.epoch,
        commit_seq=who.commit_seq,
        iteration=who.iteration,
        parent=who.parent,
        created_unix_s=time.time(),
        world_size=who.world_size,
        mesh=plan.mesh,
        tensors=records.tensors,
        values=raw_json(values),
        metadata=msgspec.Raw(who.metadata),
        metrics=who.metrics,
        per_rank={
            key: PerRankEntry(
                axes=entry.axes,
                on_change=entry.on_change,
                holders=tuple((at, first_file[rank]) for at, rank in entry.holders),
            )
            for key, entry in plan.per_rank.items()
        },
        files=tuple(files),
        chunk_table=records.table(who.save_id),
    )


def raw_json(encoded: Mapping[str, bytes]) -> dict[str, msgspec.Raw]:
    """Values that are JSON already, to be put into a larger JSON as they are."""
    return {key: msgspec.Raw(text) for key, text in encoded.items()}


def _records(plan: SavePlan, starts: Int64Array, file_of: Int64Array, start_of: Int64Array) -> dict[str, bytes]:
    """Each tensor's chunk table record, by key, in the order of the plan."""
    records: dict[int, bytes] = {}
    keys = list(plan.specs)
    for columns in plan.columns:
        at = starts[columns.writer] + columns.place
        file, start = file_of[at], start_of[at]
        ndim = columns.boxes.shape[1] // 2
        tensors, at = np.unique(columns.tensor, return_index=True)
        ends = np.append(at, len(columns.tensor))[1:]
        bounds = (tensors.tolist(), at.tolist(), ends.tolist(), file[at].tolist(), start[at].tolist())
        for t, low, high, first_file, first_start in zip(*bounds, strict=True):
            if high - low == 1:
                records[t] = encode_whole(first_file, first_start, plan.specs[keys[t]].global_shape)
                continue
            boxes = columns.boxes[low:high]
            chunks = Chunks(boxes[:, :ndim], boxes[:, ndim:], file[low:high], start[low:high])
            records[t] = encode_record(chunks, plan.specs[keys[t]].global_shape)
    for t, spec in enumerate(plan.specs.values()):
        if t not in records:
            records[t] = encode_record(_no_chunks(len(spec.global_shape)), spec.global_shape)
    return {key: records[t] for t, key in enumerate(keys)}


def _locations(plan: SavePlan, ranks: Sequence[Written]) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Number of the file in the index and first byte in it of every chunk, by writer, then place; and where among
    them each writer's begin. Raises ValueError if a rank tells of other chunks than it was to write."""
    for rank, written in enumerate(ranks):
        count = len(plan.shards_of(rank))
        if (len(written.file_of), len(written.start_of)) != (4 * count, 8 * count):
            raise ValueError(f"rank {rank} was to write {count} shards, but wrote {len(written.start_of) // 8}")
    counts = np.array([len(written.start_of) // 8 for written in ranks], np.int64)
    files = np.array([len(written.files) for written in ranks], np.int64)
    file_of = np.frombuffer(b"".join(written.file_of for written in ranks), np.int32).astype(np.int64)
    file_of += np.repeat(np.cumsum(files) - files, counts)
    start_of = np.frombuffer(b"".join(written.start_of for written in ranks), np.int64)
    return np.cumsum(counts) - counts, file_of, start_of


def _no_chunks(ndim: int) -> Chunks:
    empty = np.zeros((0, ndim), np.int64)
    return Chunks(empty, empty, np.zeros(0, np.int64), np.zeros(0, np.int64))
