"""Rebuilding: an index and a chunk table made again from what the shard files say of themselves. Changes nothing.

A save whose index was lost and one that was never committed look alike; who calls this knows which it is. Since the
index that held the checksums of headers and checksum tables is gone, every block of every file is read and checked
against the file's own table: damaged data never gets a new checksum that blesses it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from distckpt._C import crc32c
from distckpt.assembling import join_records
from distckpt.checkpoint_files import CheckedFile, OnBytes, decode_per_rank
from distckpt.chunk_table import Chunks, decode_records, encode_record
from distckpt.commit import iteration_directory
from distckpt.decoding import decode_json
from distckpt.errors import CheckpointError, CorruptionError
from distckpt.garbage import postponed_collection
from distckpt.geometry import MAX_DIMS, is_tiling
from distckpt.index import (
    MAX_BYTES,
    ChunkTable,
    Index,
    OnChange,
    PerRankEntry,
    ShardFile,
    Spec,
    TensorEntry,
    decode_index,
    encode_index,
)
from distckpt.metrics import Metrics
from distckpt.shard_file import (
    ALIGNMENT,
    CHECKSUM_ENTRY,
    DTYPES,
    FORMAT,
    FORMAT_VERSION,
    MAX_HEADER_BYTES,
    PER_RANK_ENTRY,
    Header,
    decode_header,
    key_of_entry,
)
from distckpt.storage import ReadFile, Storage

_MAX_DIGITS = 18  # of an offset: fewer than 2^63 in any case
_NAME = re.compile(r"shard-(\d{5,})(?:\.(\d+))?-of-(\d{5,})-([0-9a-f]{32})\.safetensors")


class _PerRank(msgspec.Struct, frozen=True):
    axes: tuple[str, ...]
    on_change: OnChange


class _Metadata(msgspec.Struct, frozen=True, kw_only=True):
    """What a header says of its save; per_rank is in a rank's first file only, what follows it in that of rank 0."""

    save_id: str
    iteration: int
    rank: int
    files: int
    mesh: dict[str, tuple[int, int]]
    tensors: dict[str, Spec]
    per_rank: dict[str, _PerRank] = {}
    writers: tuple[int, ...] | None = None
    empty_tensors: dict[str, Spec] | None = None
    values: dict[str, msgspec.Raw] | None = None
    metadata: msgspec.Raw = msgspec.Raw(b"null")
    metrics: Metrics = {}


@dataclass(frozen=True, slots=True)
class _Found:
    """One shard file that is sound in itself."""

    file: ShardFile
    header: Header
    metadata: _Metadata
    per_rank_keys: Sequence[str]


@dataclass(slots=True)
class _Pieces:
    """The chunks of one tensor, gathered from all files."""

    offsets: list[tuple[int, ...]] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)


def rebuild_index(
    storage: Storage, iteration: int, save_id: str, *, on_bytes: OnBytes = lambda _: None
) -> tuple[Index, bytes]:
    """The index (its epoch and commit_seq are 0) and the content of the chunk table of a save.

    Raises CorruptionError when a file is missing or damaged, or does not say enough of itself; CheckpointError for a
    format that is newer than this package; OSError.
    """
    directory = iteration_directory(iteration)
    matches = [match for match in map(_NAME.fullmatch, storage.list(directory)) if match and match[4] == save_id]
    if not matches:
        raise CorruptionError(f"{directory}: it has no shard file of save {save_id}")
    worlds = {int(match[3]) for match in matches}
    if len(worlds) > 1:
        raise CorruptionError(f"{directory}: files of save {save_id} name different numbers of ranks: {sorted(worlds)}")
    matches.sort(key=lambda match: (int(match[1]), int(match[2] or 0)))
    found: list[_Found] = []
    damaged: list[CorruptionError] = []
    for match in matches:
        try:
            found.append(_read_file(storage, match, iteration, on_bytes))
        except CorruptionError as error:  # It may be what a write that failed, and was made again, has left.
            damaged.append(error)
    try:
        leader = _leader(found, directory)
        _check_complete(found, leader, directory)
    except CorruptionError as error:
        raise CorruptionError("; ".join(map(str, [error, *damaged]))) from error
    tensors, table, content = _chunk_table(found, dict(leader.empty_tensors or {}), save_id)
    index = Index(
        format=FORMAT,
        version=FORMAT_VERSION,
        save_id=save_id,
        epoch=0,
        commit_seq=0,
        iteration=iteration,
        parent=None,
        created_unix_s=time.time() - storage.age_s(f"{directory}/{matches[0][0]}"),
        world_size=worlds.pop(),
        mesh={axis: size for axis, (_, size) in leader.mesh.items()},
        tensors=tensors,
        values=leader.values or {},
        metadata=leader.metadata,
        metrics=leader.metrics,
        per_rank=_per_rank(found),
        files=tuple(one.file for one in found),
        chunk_table=table,
    )
    return _as_readers_see_it(index, content, directory), content


def rebuild_table(storage: Storage, index: Index, *, on_bytes: OnBytes = lambda _: None) -> tuple[Index, bytes]:
    """The content of the chunk table of a sound index, and that index with the places of its records. Raises as
    rebuild_index does."""
    directory = iteration_directory(index.iteration)
    found = []
    for file in index.files:
        match = _NAME.fullmatch(file.name)
        if match is None:
            raise CorruptionError(f"{file.name}: not the name of a shard file")
        one = _read_file(storage, match, index.iteration, on_bytes)
        if one.file != file:
            raise CorruptionError(f"{directory}/{file.name}: it is not the file that the index names")
        found.append(one)
    specs: dict[str, Spec] = {key: Spec(**_spec_fields(entry)) for key, entry in index.tensors.items()}
    tensors, table, content = _chunk_table(found, specs, index.save_id)
    rebuilt = msgspec.structs.replace(index, tensors=tensors, chunk_table=table)
    return _as_readers_see_it(rebuilt, content, directory), content


def _spec_fields(entry: TensorEntry) -> dict[str, Any]:
    return {name: value for name, value in msgspec.structs.asdict(entry).items() if name != "record"}


def _as_readers_see_it(index: Index, content: bytes, directory: str) -> Index:
    """What was made of headers must pass what any index must pass. Raises CorruptionError."""
    index = decode_index(encode_index(index), name=f"{directory}: the index made again")
    places = [entry.record for entry in index.tensors.values()]
    shapes = [entry.global_shape for entry in index.tensors.values()]
    decode_records(content, places, shapes, list(index.tensors), where=f"{directory}: the chunk table made again")
    return index


def _read_file(storage: Storage, match: re.Match[str], iteration: int, on_bytes: OnBytes) -> _Found:
    """match: of its name."""
    name = f"{iteration_directory(iteration)}/{match[0]}"
    file = storage.open(name)
    try:
        header_bytes = _read_header(file)
        header = decode_header(header_bytes, file_name=name, file_bytes=file.size_bytes)
        table_start = header.start_of(CHECKSUM_ENTRY)
        table = bytearray(file.size_bytes - table_start)
        file.read_into(table_start, table)
    except EOFError as error:
        raise CorruptionError(f"{name}: {error}") from error
    finally:
        file.close()
    metadata = _decode_metadata(header.metadata, name)
    says = (metadata.save_id, metadata.iteration, metadata.rank)
    if says != (match[4], iteration, int(match[1])):
        raise CorruptionError(f"{name}: its header is of save {says[0]}, iteration {says[1]}, rank {says[2]}")
    entry = header.entries.get(PER_RANK_ENTRY)
    if entry is None:
        raise CorruptionError(f"{name}: it has no {PER_RANK_ENTRY}")
    directory, _, own_name = name.rpartition("/")
    described = ShardFile(
        name=own_name,
        size_bytes=header.data_start + header.entries[CHECKSUM_ENTRY].data_offsets[1],
        header_bytes=len(header_bytes),
        header_crc=crc32c(header_bytes),
        checksum_start=table_start,
        table_crc=crc32c(table),
        per_rank=(header.start_of(PER_RANK_ENTRY), entry.data_offsets[1] - entry.data_offsets[0]),
        rank=metadata.rank,
        mesh={axis: at for axis, (at, _) in metadata.mesh.items()},
    )
    with CheckedFile(storage, directory, described, past_cache=True) as checked:
        for problem in checked.faults([(0, table_start)]):
            raise CorruptionError(problem)
        on_bytes(checked.bytes_read)
        keys = list(decode_per_rank(checked.read(*described.per_rank), name))
    return _Found(described, header, metadata, keys)


def _read_header(file: ReadFile) -> bytes:
    length = bytearray(8)
    file.read_into(0, length)
    size = int.from_bytes(length, "little")
    if size > MAX_HEADER_BYTES or (size + 8) % ALIGNMENT or size + 8 > file.size_bytes:
        raise CorruptionError(f"{file.name}: its header has an impossible length, {size} of {file.size_bytes} bytes")
    header = bytearray(8 + size)
    file.read_into(0, header)
    return bytes(header)


def _decode_metadata(texts: Mapping[str, str], name: str) -> _Metadata:
    """Every value of `__metadata__` is a text: those that are not plain words or numbers are JSON."""
    if texts.get("format") != FORMAT or not texts.get("version", "").isdecimal():
        raise CorruptionError(f"{name}: its header does not say that it is {FORMAT}, version {FORMAT_VERSION}")
    if texts["version"] != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{name}: format version {texts['version']}; this package reads version {FORMAT_VERSION}. "
            f"Use a newer distckpt."
        )
    plain = {"format", "version", "save_id"}
    fields = {key: msgspec.Raw(text.encode()) for key, text in texts.items() if key not in plain}
    fields["save_id"] = msgspec.Raw(msgspec.json.encode(texts.get("save_id")))
    try:
        return decode_json(msgspec.json.encode(fields), _Metadata)
    except (msgspec.DecodeError, RecursionError) as error:
        raise CorruptionError(f"{name}: what its header says of the save: {error}") from error


def _leader(found: Sequence[_Found], directory: str) -> _Metadata:
    """What rank 0's first file says, which belongs to no tensor."""
    first = found[0] if found else None
    if first is None or first.metadata.rank != 0:
        raise CorruptionError(f"{directory}: the first file of rank 0 is missing; it holds the values of the state")
    if first.metadata.values is None or first.metadata.writers is None:
        raise CorruptionError(
            f"{first.file.name}: its header does not hold the values of the state, which were too long for it"
        )
    return first.metadata


def _check_complete(found: Sequence[_Found], leader: _Metadata, directory: str) -> None:
    counts: dict[int, int] = {}
    expected: dict[int, int] = {}
    for one in found:
        counts[one.metadata.rank] = counts.get(one.metadata.rank, 0) + 1
        expected[one.metadata.rank] = one.metadata.files
    for rank in leader.writers or ():
        if counts.get(rank, 0) != expected.get(rank, 1):
            raise CorruptionError(
                f"{directory}: {counts.get(rank, 0)} files of rank {rank}, expected {expected.get(rank, 'some')}"
            )


@postponed_collection()
def _chunk_table(
    found: Sequence[_Found], specs: dict[str, Spec], save_id: str
) -> tuple[dict[str, TensorEntry], ChunkTable, bytes]:
    """specs: those that are known without the headers of `found`."""
    pieces: dict[str, _Pieces] = {}
    for number, one in enumerate(found):
        for key, spec in one.metadata.tensors.items():
            if specs.setdefault(key, spec) != spec:
                raise CorruptionError(f"{one.file.name}: {key!r} is {spec}, another file says {specs[key]}")
        _gather(one, number, specs, pieces)
    records = {key: _record(key, specs[key], pieces.get(key, _Pieces())) for key in sorted(specs)}
    joined = join_records(specs, records)
    return joined.tensors, joined.table(save_id), joined.content


def _gather(one: _Found, number: int, specs: Mapping[str, Spec], pieces: dict[str, _Pieces]) -> None:
    for name, entry in one.header.entries.items():
        if name in (PER_RANK_ENTRY, CHECKSUM_ENTRY):
            continue
        key = key_of_entry(name)
        spec = specs.get(key)
        if spec is None or spec.dtype not in DTYPES:
            raise CorruptionError(f"{one.file.name}: its header does not say of what tensor {name!r} is a part")
        dtype = DTYPES[spec.dtype]
        ndim = len(entry.shape) - len(dtype.trailing)
        texts = name.partition("@")[2].split(",") if "@" in name else ["0"] * ndim
        if max(map(len, texts), default=0) > _MAX_DIGITS:
            raise CorruptionError(f"{one.file.name}: {name!r} is at an impossible offset")
        offset = tuple(map(int, texts))
        if (entry.dtype, entry.shape[ndim:], len(offset)) != (dtype.stored, dtype.trailing, len(spec.global_shape)):
            raise CorruptionError(f"{one.file.name}: {name!r} is {entry.dtype} {list(entry.shape)}, its tensor {spec}")
        of_key = pieces.setdefault(key, _Pieces())
        of_key.offsets.append(offset)
        of_key.shapes.append(entry.shape[:ndim])
        of_key.files.append(number)
        of_key.starts.append(one.header.data_start + entry.data_offsets[0])


def _record(key: str, spec: Spec, pieces: _Pieces) -> bytes:
    count, ndim = len(pieces.files), len(spec.global_shape)
    offsets = np.array(pieces.offsets, np.int64).reshape(count, ndim)
    shapes = np.array(pieces.shapes, np.int64).reshape(count, ndim)
    if len(spec.global_shape) > MAX_DIMS or max(spec.global_shape, default=0) > MAX_BYTES:
        raise CorruptionError(f"{key!r}: a global shape of {spec.global_shape} is impossible")
    inside = (offsets <= np.array(spec.global_shape, np.int64) - shapes).all()
    if not inside or not is_tiling(offsets, shapes, spec.global_shape):
        raise CorruptionError(f"{key!r}: the files hold {count} chunks, which are not the whole of {spec.global_shape}")
    chunks = Chunks(offsets, shapes, np.array(pieces.files, np.int64), np.array(pieces.starts, np.int64))
    return encode_record(chunks, spec.global_shape)


def _per_rank(found: Sequence[_Found]) -> dict[str, PerRankEntry]:
    kinds: dict[str, tuple[_PerRank, dict[str, tuple[int, int]]]] = {}
    holders: dict[str, dict[tuple[int, ...], int]] = {}
    for number, one in enumerate(found):
        for key in one.per_rank_keys:
            kind = one.metadata.per_rank.get(key)
            if kind is None or not set(kind.axes) <= one.metadata.mesh.keys():
                raise CorruptionError(f"{one.file.name}: its header does not say by which mesh axes {key!r} differs")
            kinds.setdefault(key, (kind, one.metadata.mesh))
            at = tuple(one.metadata.mesh[axis][0] for axis in kind.axes)
            holders.setdefault(key, {}).setdefault(at, number)
    return {
        key: PerRankEntry(
            axes=tuple((axis, mesh[axis][1]) for axis in kind.axes),
            on_change=kind.on_change,
            holders=tuple(sorted(holders[key].items())),
        )
        for key, (kind, mesh) in sorted(kinds.items())
    }
