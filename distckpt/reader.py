"""Reading: stored ranges -> checked blocks -> target boxes. Decides what is read together; nothing unchecked is copied.

A shard file is opened by checking, against the index, its length, its header and its checksum table; every block
that is read is checked against that table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod

import msgspec
import numpy as np
from torch import Tensor

from distckpt._C import crc32c
from distckpt.chunk_table import PAGE_BYTES, Chunks, check_pages, decode_record
from distckpt.errors import CorruptionError
from distckpt.index import Index, ShardFile, TensorEntry, check_locations
from distckpt.planner import Copy
from distckpt.shard_file import BLOCK_BYTES, DTYPES, MAX_HEADER_BYTES, PER_RANK_ENTRY, Chunk, decode_header
from distckpt.storage import ReadFile, Storage, Target, read_checked
from distckpt.transport import carrier


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
        ranges = block_ranges([(start, start + size)], self._expected.checksum_start)
        self.copy(ranges, [(start, data, 0, (size,), (1,), (1,), 1)])
        return bytes(data)


def block_ranges(extents: Iterable[tuple[int, int]], end: int) -> list[tuple[int, int]]:
    """The blocks that hold bytes of the extents (begin, end; ascending by begin), as ranges that do not touch."""
    ranges: list[tuple[int, int]] = []
    for low, high in extents:
        begin = low // BLOCK_BYTES * BLOCK_BYTES
        stop = min(-(-high // BLOCK_BYTES) * BLOCK_BYTES, end)
        if ranges and begin <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(ranges[-1][1], stop))
        else:
            ranges.append((begin, stop))
    return ranges


@dataclass(frozen=True, slots=True)
class TargetMemory:
    """A tensor on the host as bytes: item (i, ...) lies at start + sum(i * strides) of `data`."""

    data: memoryview
    strides: tuple[int, ...]
    item_bytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> TargetMemory:
        elements = carrier(tensor)
        item = elements.element_size()
        span = 1 + sum((n - 1) * s for n, s in zip(elements.shape, elements.stride(), strict=True))
        flat = elements.as_strided((span,), (1,)).numpy().view(np.uint8)
        return cls(flat.data, tuple(s * item for s in elements.stride()), item)


@dataclass(slots=True)
class _Region:
    """One copy with its extent [low, high) in the file."""

    copy: Copy
    low: int
    high: int
    strides: tuple[int, ...]


def fill_targets(
    storage: Storage,
    directory: str,
    index: Index,
    copies: Sequence[Copy],
    targets: Sequence[Tensor],
    entries: Sequence[str],
) -> int:
    """Do the copies (in order of file and position) into the targets, tensors on the host; returns the bytes read.

    entries[i] is the key of targets[i]. Raises CorruptionError or OSError; the targets are then undefined.
    """
    bytes_read = 0
    memories = [TargetMemory.of(t) for t in targets]
    for number, group in groupby(copies, key=lambda c: c.file):
        with CheckedFile(storage, directory, index.files[number]) as file:
            regions = [_region(c, memories[c.target].item_bytes) for c in group]
            _check_entries(file, index, regions, entries)
            regions.sort(key=lambda r: r.low)
            ranges = block_ranges([(r.low, r.high) for r in regions], index.files[number].checksum_start)
            file.copy(ranges, [_target(region, memories[region.copy.target]) for region in regions])
            bytes_read += file.bytes_read
    return bytes_read


def _region(copy: Copy, item_bytes: int) -> _Region:
    strides = tuple(prod(copy.chunk_shape[d + 1 :]) * item_bytes for d in range(len(copy.chunk_shape)))
    low = copy.chunk_start + sum(o * s for o, s in zip(copy.chunk_offset, strides, strict=True))
    high = low + sum((n - 1) * s for n, s in zip(copy.shape, strides, strict=True)) + item_bytes
    return _Region(copy, low, high, strides)


def _check_entries(file: CheckedFile, index: Index, regions: Sequence[_Region], keys: Sequence[str]) -> None:
    """The chunk table and the file's own header must speak of the same bytes."""
    by_start = {file.header.start_of(name): name for name, e in file.header.entries.items() if prod(e.shape)}
    for region in regions:
        copy, key = region.copy, keys[region.copy.target]
        name = by_start.get(copy.chunk_start, "")
        entry = file.header.entries.get(name)
        tensor = index.tensors[key]
        dtype = DTYPES[tensor.dtype]
        is_whole = copy.chunk_shape == tensor.global_shape
        expected = Chunk(key, tensor.dtype, copy.chunk_origin, copy.chunk_shape, is_whole).entry
        shape = (*copy.chunk_shape, *dtype.trailing)
        if entry is None or (name, entry.dtype, entry.shape) != (expected, dtype.stored, shape):
            found = "nothing" if entry is None else f"{entry.dtype} {list(entry.shape)} {name!r}"
            raise CorruptionError(
                f"{index.files[copy.file].name}: the index and chunk table have {dtype.stored} {list(shape)} "
                f"{expected!r} at byte {copy.chunk_start}, the file's own header {found}"
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
