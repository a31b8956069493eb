"""Reading: stored ranges -> checked blocks -> target boxes. Decides what is read together; nothing unchecked is copied.

A shard file is opened by checking, against the index, its length, its header and its checksum table; every block
that is read is checked against that table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod

import msgspec
import numpy as np
import numpy.typing as npt
from torch import Tensor

from distckpt._C import Memory, copy_chunk, crc32c, crc32c_blocks
from distckpt.chunk_table import PAGE_BYTES, Chunks, check_pages, decode_record
from distckpt.errors import CorruptionError
from distckpt.index import Index, ShardFile, TensorEntry, check_locations
from distckpt.planner import Copy
from distckpt.shard_file import BLOCK_BYTES, DTYPES, MAX_HEADER_BYTES, PER_RANK_ENTRY, Chunk, decode_header
from distckpt.storage import ReadFile, Storage
from distckpt.transport import carrier

WINDOW_BLOCKS = 8


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

    def blocks(self, first: int, stop: int, buffer: Memory) -> memoryview:
        """Blocks first..stop-1, checked. The view is valid until the buffer is used again."""
        start = first * BLOCK_BYTES
        end = min(stop * BLOCK_BYTES, self._expected.checksum_start)
        window = memoryview(buffer)[: end - start]
        try:
            self._file.read_into(start, window)
        except EOFError as error:
            raise CorruptionError(f"{self._file.name}: {error}") from error
        self.bytes_read += end - start
        found = np.empty(stop - first, np.uint32)
        crc32c_blocks(window, BLOCK_BYTES, found)
        bad = np.flatnonzero(found != self._table[first:stop])
        if len(bad):
            block = first + int(bad[0])
            raise CorruptionError(
                f"{self._file.name}, block {block} (bytes {block * BLOCK_BYTES}-"
                f"{min((block + 1) * BLOCK_BYTES, self._expected.checksum_start) - 1}): crc32c is "
                f"{found[bad[0]]:08x}, checksum table says {self._table[block]:08x}."
            )
        return window

    def read(self, start: int, size: int) -> bytes:
        """Any bytes before the checksum table, checked."""
        first, stop = start // BLOCK_BYTES, -(-(start + size) // BLOCK_BYTES)
        buffer = Memory(max(1, (stop - first) * BLOCK_BYTES))
        window = self.blocks(first, stop, buffer)
        return bytes(window[start - first * BLOCK_BYTES :][:size])


@dataclass(frozen=True, slots=True)
class TargetMemory:
    """A tensor on the host as bytes: item (i, ...) lies at start + sum(i * strides) of `data`."""

    data: npt.NDArray[np.uint8]
    strides: tuple[int, ...]
    item_bytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> TargetMemory:
        elements = carrier(tensor)
        item = elements.element_size()
        span = 1 + sum((n - 1) * s for n, s in zip(elements.shape, elements.stride(), strict=True))
        flat = elements.as_strided((span,), (1,)).numpy().view(np.uint8)
        return cls(flat, tuple(s * item for s in elements.stride()), item)


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
    buffer = Memory(WINDOW_BLOCKS * BLOCK_BYTES)
    for number, group in groupby(copies, key=lambda c: c.file):
        with CheckedFile(storage, directory, index.files[number]) as file:
            regions = [_region(c, memories[c.target].item_bytes) for c in group]
            _check_entries(file, index, regions, entries)
            for first, window_regions in _windows(regions):
                stop = min(first + WINDOW_BLOCKS, -(-max(r.high for r in window_regions) // BLOCK_BYTES))
                window = file.blocks(first, stop, buffer)
                for region in window_regions:
                    _copy(window, first * BLOCK_BYTES, region, memories[region.copy.target])
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


def _windows(regions: list[_Region]) -> Iterator[tuple[int, list[_Region]]]:
    """Runs of up to WINDOW_BLOCKS blocks that hold bytes of regions, each with the regions that have bytes in it."""
    pending = sorted(regions, key=lambda r: r.low)
    active: list[_Region] = []
    position = 0
    block = 0
    while position < len(pending) or active:
        if not active:
            block = max(block, pending[position].low // BLOCK_BYTES)
        end = (block + WINDOW_BLOCKS) * BLOCK_BYTES
        while position < len(pending) and pending[position].low < end:
            active.append(pending[position])
            position += 1
        yield block, active
        block += WINDOW_BLOCKS
        active = [r for r in active if r.high > end]


def _copy(window: memoryview, window_start: int, region: _Region, target: TargetMemory) -> None:
    copy = region.copy
    copy_chunk(
        window,
        window_start,
        region.low,
        target.data,
        sum(o * s for o, s in zip(copy.target_offset, target.strides, strict=True)),
        copy.shape,
        region.strides,
        target.strides,
        target.item_bytes,
    )


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
