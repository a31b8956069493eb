"""The index: commit record and global metadata of one checkpoint. Decides what it says and when it is sound.

A checkpoint exists if and only if a valid index does. An index is one line of JSON, which people and jq can read,
then one line with its CRC32C. Everything read is treated as hostile: sizes, products, names and references
are checked before they are used. No torch, no I/O.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Annotated, Literal, TypeAlias, TypeVar

import msgspec
import numpy as np

from distckpt.checked_json import checked_body, decode_body, encode_record
from distckpt.chunk_table import Hits
from distckpt.errors import CheckpointError, CorruptionError
from distckpt.garbage import postponed_collection
from distckpt.geometry import MAX_DIMS, Int64Array
from distckpt.metrics import Metrics
from distckpt.shard_file import DTYPES, FORMAT, FORMAT_VERSION

T = TypeVar("T")
MAX_INDEX_BYTES = 1 << 30
MAX_BYTES = 1 << 62
MAX_NATURAL = 2**63 - 1

Natural: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=MAX_NATURAL)]
UInt32: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
OnChange: TypeAlias = Literal["exact", "reseed", "skip"]
SaveId: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
MeshCoordinates: TypeAlias = dict[str, int]
Mesh: TypeAlias = Mapping[str, tuple[int, int]]  # axis -> (a rank's coordinate, size)

_FILE_NAME = re.compile(r"(shard-\d{5,}(\.\d+)?-of-\d{5,}|chunks)-[0-9a-f]{32}\.(safetensors|bin)")


class Spec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What all shards of one key have in common.

    partition: mesh axis that splits each dimension, None where none does. owner: mesh axis whose coordinate holds
    it. blocks: number of sub-blocks of each dimension that are split one by one (fused QKV, SwiGLU).
    container: escaped path of the container in which the ShardedTensor stood; None when the key is its own path.
    given_as: what the leaf was; tells a reader without a template what to make of it.
    """

    dtype: str
    global_shape: tuple[Natural, ...]
    partition: tuple[str | None, ...] | None = None
    owner: str | None = None
    blocks: tuple[int, ...] | None = None
    container: str | None = None
    given_as: Literal["tensor", "sharded", "numpy"] = "tensor"

    @property
    def size_bytes(self) -> int:
        return prod(self.global_shape) * DTYPES[self.dtype].item_bytes


class TensorEntry(Spec, frozen=True, kw_only=True, omit_defaults=True):
    """One tensor; `record` is where its record lies in the chunk table: (start, bytes)."""

    record: tuple[Natural, Natural]

    @property
    def spec(self) -> Spec:
        """The same without where its chunks lie."""
        return Spec(**{name: getattr(self, name) for name in Spec.__struct_fields__})


class ShardFile(msgspec.Struct, frozen=True, kw_only=True):
    """One shard file. `header_crc` covers the first header_bytes, `table_crc` the bytes from checksum_start on.

    per_rank: where the JSON of what differs by rank lies: (start, bytes).
    """

    name: str
    size_bytes: Natural
    header_bytes: Natural
    header_crc: UInt32
    checksum_start: Natural
    table_crc: UInt32
    per_rank: tuple[Natural, Natural]
    rank: Natural
    mesh: MeshCoordinates


class ChunkTable(msgspec.Struct, frozen=True, kw_only=True):
    """The chunk table file. `trailer_crc` covers the bytes from records_bytes on."""

    name: str
    size_bytes: Natural
    records_bytes: Natural
    trailer_crc: UInt32


class PerRankEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A value that differs by rank: the mesh axes that key it, and the file number for each of their coordinates.

    axes: (name, size) in order. holders: (coordinates in that order, file number).
    """

    axes: tuple[tuple[str, Natural], ...]
    on_change: OnChange
    holders: tuple[tuple[tuple[Natural, ...], Natural], ...]


class Index(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One committed checkpoint. metrics: of its save; others may be in its labels."""

    format: str
    version: int
    save_id: SaveId
    epoch: Natural
    commit_seq: Natural
    iteration: Natural
    parent: SaveId | None
    created_unix_s: float
    world_size: Natural
    mesh: MeshCoordinates
    tensors: dict[str, TensorEntry]
    values: dict[str, msgspec.Raw]
    metadata: msgspec.Raw
    per_rank: dict[str, PerRankEntry]
    files: tuple[ShardFile, ...]
    chunk_table: ChunkTable
    metrics: Metrics = {}


def encode_index(index: Index) -> bytes:
    """Two lines; see distckpt.checked_json."""
    return encode_record(index)


class _Version(msgspec.Struct):
    format: str
    version: int


class FileSize(msgspec.Struct, frozen=True):
    """A file that an index names."""

    name: str
    size_bytes: Natural


class IndexHead(msgspec.Struct, frozen=True, kw_only=True):
    """Which checkpoint an index is of, after which it was saved, and what a list of checkpoints tells of it."""

    save_id: SaveId
    parent: SaveId | None
    epoch: Natural
    commit_seq: Natural
    iteration: Natural
    created_unix_s: float
    world_size: Natural
    mesh: MeshCoordinates
    metadata: msgspec.Raw
    files: tuple[FileSize, ...]
    chunk_table: FileSize
    metrics: Metrics = {}

    @property
    def size_bytes(self) -> int:
        """Of the files that the index names."""
        return sum(file.size_bytes for file in self.files) + self.chunk_table.size_bytes


def names_in(index: Index | IndexHead) -> list[str]:
    """Of the files that an index names. Of a head nothing has checked them."""
    return [index.chunk_table.name, *(file.name for file in index.files)]


@postponed_collection()
def decode_index(data: bytes, *, name: str) -> Index:
    """Decode and validate. Raises CorruptionError for damage, CheckpointError for a version that is too new."""
    index = _decode(data, Index, name)
    why = _find_fault(index)
    if why:
        raise CorruptionError(f"{name}: {why}")
    return index


def decode_index_head(data: bytes, *, name: str) -> IndexHead:
    """What an undamaged index is of, without what it says of its tensors. Raises as decode_index does."""
    return _decode(data, IndexHead, name)


def _decode(data: bytes, kind: type[T], name: str) -> T:
    if len(data) > MAX_INDEX_BYTES:
        raise CorruptionError(f"{name}: {len(data)} bytes are more than an index may have ({MAX_INDEX_BYTES})")
    body = checked_body(data, name=name)
    version = decode_body(body, _Version, name=name)
    if version.format != FORMAT:
        raise CorruptionError(f"{name}: format is {version.format!r}, expected {FORMAT!r}")
    if version.version != FORMAT_VERSION:
        raise CheckpointError(
            f"{name}: format version {version.version}; this package reads version {FORMAT_VERSION}. "
            f"Use a newer distckpt."
        )
    return decode_body(body, kind, name=name)


def _find_fault(index: Index) -> str | None:
    """What is wrong with a decoded index, or None."""
    table = index.chunk_table
    names = [f.name for f in index.files] + [table.name]
    for name in names:
        if not _FILE_NAME.fullmatch(name) or index.save_id not in name:
            return f"file name {name!r} is not one that save {index.save_id} writes"
    if len(set(names)) != len(names):
        return "two files of one name"
    if table.records_bytes > table.size_bytes:
        return f"chunk table: records of {table.records_bytes} bytes in a file of {table.size_bytes}"
    for file in index.files:
        start, size = file.per_rank
        if not (8 <= file.header_bytes <= start and start + size <= file.checksum_start <= file.size_bytes):
            return f"{file.name}: its parts do not lie in order inside {file.size_bytes} bytes"
    twice = sorted(index.tensors.keys() & index.values.keys())
    if twice:
        return f"{twice[0]!r} is a tensor and a value"
    fault = _find_tensor_fault(index)
    if fault:
        return fault
    for key, per_rank in index.per_rank.items():
        sizes = [size for _, size in per_rank.axes]
        if len(dict(per_rank.axes)) != len(sizes):
            return f"per-rank value {key!r}: an axis comes twice in {per_rank.axes}"
        if len(dict(per_rank.holders)) != len(per_rank.holders):
            return f"per-rank value {key!r}: coordinates come twice in its holders"
        for coordinates, number in per_rank.holders:
            if len(coordinates) != len(sizes) or any(c >= n for c, n in zip(coordinates, sizes, strict=True)):
                return f"per-rank value {key!r}: coordinates {coordinates} are not inside {sizes}"
            if number >= len(index.files):
                return f"per-rank value {key!r} is in file {number} of {len(index.files)}"
    return None


def _find_tensor_fault(index: Index) -> str | None:
    records_bytes = index.chunk_table.records_bytes
    known: dict[object, int] = {}  # Many tensors are few kinds, of which each is looked at once.
    size_bytes = 0
    for key, entry in index.tensors.items():
        start, size = entry.record
        if start + size > records_bytes:
            return f"tensor {key!r}: its record {start}+{size} is outside the chunk table's {records_bytes} bytes"
        kind = entry.dtype, entry.global_shape, entry.partition, entry.blocks
        if kind not in known:
            fault = find_spec_fault(entry)
            if fault:
                return f"tensor {key!r}: {fault}"
            known[kind] = entry.size_bytes
        size_bytes += known[kind]
    stored = sum(f.per_rank[0] - f.header_bytes for f in index.files)
    return None if size_bytes <= stored else f"the tensors take more bytes than the {stored} that the files hold"


def find_spec_fault(spec: Spec) -> str | None:
    """What is wrong with what is said of a tensor, or None."""
    if spec.dtype not in DTYPES:
        return f"unknown dtype {spec.dtype!r}"
    if len(spec.global_shape) > MAX_DIMS:  # Before the product, which is slow to compute when there are many.
        return f"{len(spec.global_shape)} dimensions, at most {MAX_DIMS} expected"
    if prod(n for n in spec.global_shape if n) * 16 > MAX_BYTES:
        return f"global shape {spec.global_shape} is too large"
    for name, labels in (("partition", spec.partition), ("blocks", spec.blocks)):
        if labels is not None and len(labels) != len(spec.global_shape):
            return f"{name} {labels} for {len(spec.global_shape)} dimensions"
    if any(n < 1 or extent % n for n, extent in zip(spec.blocks or (), spec.global_shape, strict=False)):
        return f"blocks {spec.blocks} do not divide {spec.global_shape}"
    return None


def check_locations(index: Index, keys: Sequence[str], tensor: Int64Array, chunks: Hits) -> None:
    """Raises CorruptionError unless every chunk is aligned and lies in the data part of a file there is.

    tensor: (h,) which of `keys` each of the chunks is of.
    """
    count = len(index.files)
    beyond = np.flatnonzero(chunks.files >= count)
    if len(beyond):
        i = int(beyond[0])
        raise CorruptionError(f"tensor {keys[tensor[i]]!r}: a chunk is in file {chunks.files[i]} of {count}")
    # Only of what is asked about, which may be one tensor of a million.
    asked, at = np.unique(tensor, return_inverse=True)
    item_bytes = np.array([DTYPES[index.tensors[keys[t]].dtype].item_bytes for t in asked.tolist()], np.int64)[at]
    asked, at = np.unique(chunks.files, return_inverse=True)
    files = [index.files[number] for number in asked.tolist()]
    first = np.array([file.header_bytes for file in files], np.int64)[at]
    last = np.array([file.per_rank[0] for file in files], np.int64)[at]
    sizes = chunks.shapes.prod(axis=1) * item_bytes
    bad = (chunks.starts < first) | (chunks.starts > last - sizes) | (chunks.starts % item_bytes != 0)
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise CorruptionError(
            f"tensor {keys[tensor[i]]!r}: a chunk of {sizes[i]} bytes at {chunks.starts[i]} of "
            f"{index.files[int(chunks.files[i])].name}, whose data lies at {first[i]}-{last[i]}"
        )
