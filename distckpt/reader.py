"""Reading: stored ranges -> checked blocks -> target boxes. Decides what is read together; nothing unchecked is copied.

A shard file is opened by checking, against the index, its length, its header and its checksum table; every block
that is read is checked against that table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import msgspec
import numpy as np
from torch import Tensor

from distckpt._C import crc32c
from distckpt.chunk_table import PAGE_BYTES, Boxes, Grids, Hits, check_pages, decode_records
from distckpt.errors import CorruptionError
from distckpt.geometry import Box, Int64Array, strides_of
from distckpt.index import Index, ShardFile, check_locations
from distckpt.planner import Copies, plan_load
from distckpt.shard_file import (
    BLOCK_BYTES,
    DTYPES,
    MAX_HEADER_BYTES,
    PER_RANK_ENTRY,
    decode_header,
    entry_of_part,
    escape_key,
)
from distckpt.storage import ReadFile, Storage, Target, read_checked
from distckpt.transport import carrier

# Of a chunk in the header of its file: first byte in the file, name, safetensors dtype and shape.
ExpectedEntry: TypeAlias = tuple[int, str, str, tuple[int, ...]]


class CheckedFile:
    """A shard file whose header and checksum table agree with the index. A context manager.

    Raises CorruptionError on entry when they do not, OSError when it cannot be read.
    """

    def __init__(self, storage: Storage, directory: str, expected: ShardFile) -> None:
        self._expected = expected
        self._file: ReadFile = storage.open(f"{directory}/{expected.name}")
        self.bytes_read = 0
        try:
            self._check()
        except EOFError as error:
            self._file.close()
            raise CorruptionError(f"{self._file.name}: {error}") from error
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> CheckedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def _check(self) -> None:
        file, expected = self._file, self._expected
        if file.size_bytes != expected.size_bytes:
            raise CorruptionError(f"{file.name}: {file.size_bytes} bytes, the index says {expected.size_bytes}")
        blocks = -(-expected.checksum_start // BLOCK_BYTES)
        if expected.size_bytes - expected.checksum_start != 4 * blocks or expected.header_bytes > MAX_HEADER_BYTES + 8:
            raise CorruptionError(f"{file.name}: the index gives it a header or checksum table of impossible size")
        header = self._read_checked(0, expected.header_bytes, expected.header_crc, "header")
        table = self._read_checked(expected.checksum_start, 4 * blocks, expected.table_crc, "checksum table")
        self._table = np.frombuffer(table, "<u4")
        self.header = decode_header(header, file_name=file.name, file_bytes=expected.size_bytes)
        entry = self.header.entries.get(PER_RANK_ENTRY)
        if entry is None or (self.header.start_of(PER_RANK_ENTRY), *entry.shape) != expected.per_rank:
            raise CorruptionError(f"{file.name}: {PER_RANK_ENTRY} is not where the index says: {expected.per_rank}")

    def _read_checked(self, start: int, size: int, crc: int, what: str) -> bytes:
        data = bytearray(size)
        self._file.read_into(start, data)
        self.bytes_read += size
        found = crc32c(data)
        if found != crc:
            raise CorruptionError(f"{self._file.name}: {what}: crc32c is {found:08x}, the index says {crc:08x}")
        return bytes(data)

    def check_entries(self, expected: Iterable[ExpectedEntry]) -> None:
        """Raises CorruptionError unless the header has these entries: the chunk table and the header of a file must
        speak of the same bytes."""
        found = {
            self.header.data_start + e.data_offsets[0]: (name, e.dtype, e.shape)
            for name, e in self.header.entries.items()
            if e.data_offsets[0] != e.data_offsets[1]
        }
        for start, *entry in expected:
            if found.get(start) != tuple(entry):
                name, dtype, shape = entry
                there = found.get(start)
                is_ = "nothing" if there is None else f"{there[1]} {list(there[2])} {there[0]!r}"
                raise CorruptionError(
                    f"{self._expected.name}: the index and chunk table have {dtype} {list(shape)} {name!r} at byte "
                    f"{start}, the file's own header {is_}"
                )

    def copy(self, ranges: Sequence[tuple[int, int]], targets: Sequence[Target]) -> None:
        """Read ranges of whole blocks, check them, and copy what the targets want. Raises CorruptionError, OSError."""
        end = self._expected.checksum_start
        bad = read_checked(self._file, ranges, BLOCK_BYTES, end, self._table, targets)
        self.bytes_read += sum(stop - begin for begin, stop in ranges)
        if bad is None:
            return
        block, found = bad
        where = f"bytes {block * BLOCK_BYTES}-{min((block + 1) * BLOCK_BYTES, end) - 1}"
        is_ = "the file ends in it" if found is None else f"crc32c is {found:08x}"
        raise CorruptionError(
            f"{self._file.name}, block {block} ({where}): {is_}, checksum table says {self._table[block]:08x}."
        )

    def read(self, start: int, size: int) -> bytes:
        """Any bytes before the checksum table, checked."""
        data = bytearray(size)
        extent = np.array([start]), np.array([start + size])
        ranges = merged_ranges(*extent, BLOCK_BYTES, self._expected.checksum_start)
        self.copy(ranges, [(start, data, 0, (size,), (1,), (1,), 1)])
        return bytes(data)


def merged_ranges(low: Int64Array, high: Int64Array, unit: int, end: int) -> list[tuple[int, int]]:
    """The whole units (blocks, pages) that hold bytes of the extents low..high, ascending by low, as ranges that do
    not touch. The last unit ends at `end`."""
    if not len(low):
        return []
    begin, stop = low // unit * unit, np.minimum(-(-high // unit) * unit, end)
    reach = np.maximum.accumulate(stop)
    first = np.flatnonzero(np.concatenate([[True], begin[1:] > reach[:-1]]))
    last = np.append(first[1:], len(low)) - 1
    return list(zip(begin[first].tolist(), reach[last].tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class TargetMemory:
    """A tensor on the host as bytes: item (i, ...) lies at start + sum(i * strides) of `data`."""

    data: memoryview
    strides: tuple[int, ...]
    item_bytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> TargetMemory:
        elements = carrier(tensor)
        array = elements.numpy()
        if array.flags.c_contiguous:
            flat = array.reshape(-1)
        else:  # Over what lies between its elements, too; it is not written.
            span = 1 + sum((n - 1) * s for n, s in zip(elements.shape, elements.stride(), strict=True))
            flat = elements.as_strided((span,), (1,)).numpy()
        return cls(flat.view(np.uint8).data, array.strides, array.itemsize)


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """What a file's own header must have at a byte where the index and the chunk table say that a chunk starts."""

    start: int
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FileReads:
    """What is to be read of one file. Ranges are of whole blocks, ascending, and do not touch."""

    file: int  # number into index.files
    ranges: list[tuple[int, int]]
    targets: list[Target]  # in order of chunk_start
    entries: list[StoredEntry]


@dataclass(slots=True)
class _Region:
    """One copy with its extent [low, high) in the file."""

    key: str
    box: Box
    data: Tensor


def plan_reads(index: Index, copies: Sequence[Copy], targets: Sequence[Tensor], keys: Sequence[str]) -> list[FileReads]:
    """What does the copies (in order of file and position) into the targets, tensors on the host, file by file.

    keys[i] is the key of targets[i].
    """
    memories = [TargetMemory.of(t) for t in targets]
    reads = []
    for number, group in groupby(copies, key=lambda c: c.file):
        regions = sorted((_region(c, memories[c.target].item_bytes) for c in group), key=lambda r: r.low)
        ranges = block_ranges([(r.low, r.high) for r in regions], index.files[number].checksum_start)
        wanted = [_target(region, memories[region.copy.target]) for region in regions]
        entries = [_entry(region.copy, index, keys[region.copy.target]) for region in regions]
        reads.append(FileReads(number, ranges, wanted, entries))
    return reads


def open_checked(storage: Storage, directory: str, index: Index, reads: FileReads) -> CheckedFile:
    """The file of some reads, whose header speaks of the same bytes as the chunk table. Raises CorruptionError."""
    file = CheckedFile(storage, directory, index.files[reads.file])
    try:
        _check_entries(file, index.files[reads.file].name, reads.entries)
    except BaseException:
        file.close()
        raise
    return file


def _region(copy: Copy, item_bytes: int) -> _Region:
    strides = tuple(prod(copy.chunk_shape[d + 1 :]) * item_bytes for d in range(len(copy.chunk_shape)))
    low = copy.chunk_start + sum(o * s for o, s in zip(copy.chunk_offset, strides, strict=True))
    high = low + sum((n - 1) * s for n, s in zip(copy.shape, strides, strict=True)) + item_bytes
    return _Region(copy, low, high, strides)


def _entry(copy: Copy, index: Index, key: str) -> StoredEntry:
    tensor = index.tensors[key]
    dtype = DTYPES[tensor.dtype]
    is_whole = copy.chunk_shape == tensor.global_shape
    name = Chunk(key, tensor.dtype, copy.chunk_origin, copy.chunk_shape, is_whole).entry
    return StoredEntry(copy.chunk_start, name, dtype.stored, (*copy.chunk_shape, *dtype.trailing))


def _check_entries(file: CheckedFile, file_name: str, expected: Sequence[StoredEntry]) -> None:
    by_start = {file.header.start_of(name): name for name, e in file.header.entries.items() if prod(e.shape)}
    for wanted in expected:
        name = by_start.get(wanted.start, "")
        entry = file.header.entries.get(name)
        if entry is None or (name, entry.dtype, entry.shape) != (wanted.name, wanted.dtype, wanted.shape):
            found = "nothing" if entry is None else f"{entry.dtype} {list(entry.shape)} {name!r}"
            raise CorruptionError(
                f"{file_name}: the index and chunk table have {wanted.dtype} {list(wanted.shape)} "
                f"{wanted.name!r} at byte {wanted.start}, the file's own header {found}"
            )


def _target(region: _Region, memory: TargetMemory) -> Target:
    copy = region.copy
    start = sum(o * s for o, s in zip(copy.target_offset, memory.strides, strict=True))
    return (region.low, memory.data, start, copy.shape, region.strides, memory.strides, memory.item_bytes)


class ChunkTableReader:
    """The chunk table of one checkpoint, read record by record and checked by page. A context manager."""

    def __init__(self, storage: Storage, directory: str, index: Index) -> None:
        table = index.chunk_table
        self._index = index
        self._file = storage.open(f"{directory}/{table.name}")
        try:
            if self._file.size_bytes != table.size_bytes:
                raise CorruptionError(
                    f"{self._file.name}: {self._file.size_bytes} bytes, the index says {table.size_bytes}"
                )
            trailer = bytearray(table.size_bytes - table.records_bytes)
            self._file.read_into(table.records_bytes, trailer)
            if crc32c(trailer) != table.trailer_crc or len(trailer) != 4 * -(-table.records_bytes // PAGE_BYTES):
                raise CorruptionError(f"{self._file.name}: the checksum of its trailer is not what the index says")
        except EOFError as error:
            self._file.close()
            raise CorruptionError(f"{self._file.name}: {error}") from error
        except BaseException:
            self._file.close()
            raise
        self._trailer = bytes(trailer)
        self._first, self._pages = 0, b""

    def __enter__(self) -> ChunkTableReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def chunks(self, key: str) -> Chunks:
        """The stored chunks of a tensor. Cheapest in the order of keys. Raises CorruptionError."""
        entry: TensorEntry = self._index.tensors[key]
        start, size = entry.record
        first = start // PAGE_BYTES
        stop = -(-(start + size) // PAGE_BYTES)
        held = (
            len(self._pages) // PAGE_BYTES if len(self._pages) % PAGE_BYTES == 0 else len(self._pages) // PAGE_BYTES + 1
        )
        if not (self._first <= first and stop <= self._first + held):
            end = min(stop * PAGE_BYTES, self._index.chunk_table.records_bytes)
            pages = bytearray(end - first * PAGE_BYTES)
            try:
                self._file.read_into(first * PAGE_BYTES, pages)
            except EOFError as error:
                raise CorruptionError(f"{self._file.name}: {error}") from error
            check_pages(bytes(pages), first, self._trailer, where=self._file.name)
            self._first, self._pages = first, bytes(pages)
        record = self._pages[start - self._first * PAGE_BYTES :][:size]
        chunks = decode_record(record, entry.global_shape, where=f"{self._file.name}: tensor {key!r}")
        check_locations(self._index, key, chunks)
        return chunks


def read_per_rank(storage: Storage, directory: str, index: Index, number: int) -> dict[str, msgspec.Raw]:
    """The per-rank values in a shard file: key -> encoded value. Raises CorruptionError or OSError."""
    start, size = index.files[number].per_rank
    with CheckedFile(storage, directory, index.files[number]) as file:
        text = file.read(start, size)
    try:
        return msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, RecursionError) as error:
        raise CorruptionError(f"{index.files[number].name}: per-rank values: {error}") from error
