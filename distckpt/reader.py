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
from distckpt.garbage import postponed_collection
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
from distckpt.transport import writable_bytes

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
        item_bytes = tensor.element_size()
        strides = tuple(stride * item_bytes for stride in tensor.stride())
        return cls(writable_bytes(tensor), strides, item_bytes)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A box of a stored tensor, and the tensor on the host that takes it."""

    key: str
    box: Box
    data: Tensor


@dataclass(frozen=True, slots=True)
class FileReads:
    """What to read of one shard file: ranges of whole blocks, what to copy from them, in order of position, and which
    entries the file's own header must have for that to be right."""

    file: int
    ranges: list[tuple[int, int]]
    targets: list[Target]
    entries: list[ExpectedEntry]


@postponed_collection()
def read_chunks(storage: Storage, directory: str, index: Index, keys: Sequence[str]) -> list[Grids | Boxes]:
    """The stored chunks of tensors, numbered as in `keys`. Raises CorruptionError or OSError."""
    table = index.chunk_table
    file = storage.open(f"{directory}/{table.name}")
    try:
        return _read_chunks(file, index, keys)
    except EOFError as error:
        raise CorruptionError(f"{file.name}: {error}") from error
    finally:
        file.close()


def _read_chunks(file: ReadFile, index: Index, keys: Sequence[str]) -> list[Grids | Boxes]:
    table = index.chunk_table
    if file.size_bytes != table.size_bytes:
        raise CorruptionError(f"{file.name}: {file.size_bytes} bytes, the index says {table.size_bytes}")
    trailer_bytes = 4 * -(-table.records_bytes // PAGE_BYTES)
    if table.size_bytes - table.records_bytes != trailer_bytes:  # Before memory is taken for it.
        raise CorruptionError(f"{file.name}: the index gives it a trailer of impossible size")
    trailer = bytearray(trailer_bytes)
    file.read_into(table.records_bytes, trailer)
    if crc32c(trailer) != table.trailer_crc:
        raise CorruptionError(f"{file.name}: the checksum of its trailer is not what the index says")
    places = np.array([index.tensors[key].record for key in keys], np.int64).reshape(-1, 2)
    ordered = places[np.argsort(places[:, 0], kind="stable")]
    ranges = merged_ranges(ordered[:, 0], ordered.sum(axis=1), PAGE_BYTES, table.records_bytes)
    parts = []
    for begin, stop in ranges:
        pages = bytearray(stop - begin)
        file.read_into(begin, pages)
        check_pages(pages, begin // PAGE_BYTES, trailer, where=file.name)
        parts.append(pages)
    begins = np.array([begin for begin, _ in ranges], np.int64)
    shift = begins - np.cumsum([0] + [len(pages) for pages in parts])[:-1]  # Only these pages lie in memory.
    places[:, 0] -= shift[np.searchsorted(begins, places[:, 0], side="right") - 1]
    return decode_records(b"".join(parts), places, [index.tensors[k].global_shape for k in keys], keys, where=file.name)


@postponed_collection()
def plan_reads(
    index: Index, keys: Sequence[str], stored: Sequence[Grids | Boxes], wanted: Sequence[Wanted]
) -> list[FileReads]:
    """What to read to fill all that is wanted, by file. stored: the chunks of the tensors `keys`, as read_chunks
    returns them. Raises CorruptionError for chunks that lie where none can."""
    number = {key: i for i, key in enumerate(keys)}
    tensor = np.array([number[w.key] for w in wanted], np.int64)
    memories = [TargetMemory.of(w.data) for w in wanted]
    file, low, high = ([np.zeros(0, np.int64)] for _ in range(3))
    targets: list[Target] = []
    entries: list[ExpectedEntry] = []
    for copies in plan_load(stored, tensor, [w.box for w in wanted]):
        of_tensor = tensor[copies.target]
        check_locations(index, keys, of_tensor, copies.hits)
        entries += _expected_entries(index, keys, of_tensor, copies.hits)
        from_bytes, to_bytes, of_copies = _regions(copies, wanted, memories)
        for column, more in ((file, copies.hits.files), (low, from_bytes), (high, to_bytes)):
            column.append(more)
        targets += of_copies
    files, lows, highs = (np.concatenate(column) for column in (file, low, high))
    order = np.lexsort((lows, files))
    reads = []
    for begin, stop in pairwise(np.flatnonzero(np.diff(files[order], prepend=-1, append=-1)).tolist()):
        mine = order[begin:stop]
        of_file = int(files[mine[0]])
        ranges = merged_ranges(lows[mine], highs[mine], BLOCK_BYTES, index.files[of_file].checksum_start)
        rows = mine.tolist()
        unique = list(dict.fromkeys(entries[i] for i in rows))
        reads.append(FileReads(of_file, ranges, [targets[i] for i in rows], unique))
    return reads


def _regions(
    copies: Copies, wanted: Sequence[Wanted], memories: Sequence[TargetMemory]
) -> tuple[Int64Array, Int64Array, list[Target]]:
    """Where in its file each copy begins and ends, and what to copy."""
    hits, numbers = copies.hits, copies.target.tolist()
    mine = [memories[i] for i in numbers]
    items = [memory.item_bytes for memory in mine]
    ndim = copies.low.shape[1]
    source_strides = strides_of(hits.shapes) * np.array(items, np.int64)[:, None]
    target_strides = np.array([memory.strides for memory in mine], np.int64).reshape(len(mine), ndim)
    target_low = np.array([wanted[i].box.offset for i in numbers], np.int64).reshape(len(mine), ndim)
    low = hits.starts + ((copies.low - hits.offsets) * source_strides).sum(axis=1)
    high = low + ((copies.shape - 1) * source_strides).sum(axis=1) + items
    target_start = ((copies.low - target_low) * target_strides).sum(axis=1)
    columns = zip(
        low.tolist(),
        [memory.data for memory in mine],
        target_start.tolist(),
        _tuples(copies.shape),
        _tuples(source_strides),
        _tuples(target_strides),
        items,
        strict=True,
    )
    return low, high, list(columns)


def _tuples(rows: Int64Array) -> Iterable[tuple[int, ...]]:
    """The rows of an (n, ndim) array."""
    return zip(*rows.T.tolist(), strict=True) if rows.shape[1] else [()] * len(rows)


def _expected_entries(index: Index, keys: Sequence[str], tensor: Int64Array, chunks: Hits) -> Iterator[ExpectedEntry]:
    """The entries of chunks, of keys[tensor[i]] each, in the headers of their files."""
    used = np.unique(tensor).tolist()
    of_tensor = {t: (escape_key(keys[t]), index.tensors[keys[t]]) for t in used}
    columns = (tensor.tolist(), chunks.starts.tolist(), _tuples(chunks.offsets), _tuples(chunks.shapes))
    for t, start, offset, shape in zip(*columns, strict=True):
        name, entry = of_tensor[t]
        dtype = DTYPES[entry.dtype]
        if shape != entry.global_shape:
            name = entry_of_part(name, offset)
        yield start, name, dtype.stored, (*shape, *dtype.trailing)


@postponed_collection()
def open_checked(storage: Storage, directory: str, index: Index, reads: FileReads) -> CheckedFile:
    """The file of some reads, whose own header speaks of the same bytes as the chunk table. Raises CorruptionError."""
    file = CheckedFile(storage, directory, index.files[reads.file])
    try:
        file.check_entries(reads.entries)
    except BaseException:
        file.close()
        raise
    return file


def check_files_hold(storage: Storage, directory: str, index: Index, size_bytes: int) -> None:
    """Before memory is taken for so many bytes of its tensors: that there are files which can hold them.

    Raises CorruptionError or OSError. The index itself has been checked to name files of as many bytes as its tensors.
    """
    for expected in index.files:
        if size_bytes <= 0:
            return
        file = storage.open(f"{directory}/{expected.name}")
        found = file.size_bytes
        file.close()
        if found != expected.size_bytes:
            raise CorruptionError(f"{file.name}: {found} bytes, the index says {expected.size_bytes}")
        size_bytes -= found


def read_per_rank(storage: Storage, directory: str, index: Index, number: int) -> dict[str, msgspec.Raw]:
    """The per-rank values in a shard file: key -> encoded value. Raises CorruptionError or OSError."""
    start, size = index.files[number].per_rank
    with CheckedFile(storage, directory, index.files[number]) as file:
        text = file.read(start, size)
    try:
        return msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, RecursionError) as error:
        raise CorruptionError(f"{index.files[number].name}: per-rank values: {error}") from error
