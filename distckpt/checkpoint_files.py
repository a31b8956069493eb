"""The files of one checkpoint, opened and checked against its index. Copies only what has passed. No torch.

A shard file is opened by checking its length, its header and its checksum table against the index; every block that
is read is checked against that table. Of the chunk table only the pages that are asked for are read.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import msgspec
import numpy as np
from typing_extensions import Self

from distckpt._C import crc32c
from distckpt.chunk_table import PAGE_BYTES, Boxes, Grids, Hits, check_pages, decode_records
from distckpt.decoding import decode_json
from distckpt.errors import CorruptionError
from distckpt.extents import Extents
from distckpt.garbage import postponed_collection
from distckpt.geometry import Int64Array
from distckpt.index import Index, ShardFile
from distckpt.shard_file import (
    BLOCK_BYTES,
    DTYPES,
    MAX_HEADER_BYTES,
    PER_RANK_ENTRY,
    Header,
    decode_header,
    entry_of_part,
    escape_key,
)
from distckpt.storage import ReadFile, Storage, Target, drop_cache, read_checked

_DAMAGE = (errno.ENOENT, errno.ESTALE, errno.EIO, errno.ENODATA, errno.ENXIO, errno.EUCLEAN, errno.EBADMSG)

OnBytes: TypeAlias = Callable[[int], None]  # told how many bytes were read, or written, since it was told last

# Of a chunk in the header of its file: first byte in the file, name, safetensors dtype and shape.
ExpectedEntry: TypeAlias = tuple[int, str, str, tuple[int, ...]]


def is_damage(error: BaseException) -> bool:
    """Whether it is the checkpoint that is at fault, and not this process or its rights (EMFILE, EACCES, ...)."""
    return isinstance(error, CorruptionError) or (isinstance(error, OSError) and error.errno in _DAMAGE)


class BlockFile:
    """A file of which each block has a checksum in the table at its end. A context manager.

    who_says: what names its length, and the checksum of the table. past_cache: read what lies on the storage, not what
    this host remembers of it. Raises CorruptionError on entry when it is not what is said, OSError when it cannot be
    read.
    """

    def __init__(
        self,
        storage: Storage,
        name: str,
        size_bytes: int,
        checksum_start: int,
        table_crc: int,
        who_says: str,
        *,
        past_cache: bool,
    ) -> None:
        self._end = checksum_start
        self._who_says = who_says
        self._file: ReadFile = storage.open(name)
        self.bytes_read = 0
        try:
            if past_cache:
                drop_cache(self._file)
            check_length(self._file, size_bytes, who_says)
            self._check(size_bytes, table_crc)
        except EOFError as error:
            self._file.close()
            raise CorruptionError(f"{self._file.name}: {error}") from error
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def _check(self, size_bytes: int, table_crc: int) -> None:
        table = self._read_checked(self._end, size_bytes - self._end, table_crc, "checksum table")
        self.table = np.frombuffer(table, "<u4")  # of blocks

    def _read_checked(self, start: int, size: int, crc: int, what: str) -> bytes:
        data = bytearray(size)
        self._file.read_into(start, data)
        self.bytes_read += size
        found = crc32c(data)
        if found != crc:
            raise CorruptionError(f"{self._file.name}: {what}: crc32c is {found:08x}, {self._who_says} says {crc:08x}")
        return bytes(data)

    def copy(self, ranges: Sequence[tuple[int, int]], targets: Sequence[Target]) -> None:
        """Read ranges of whole blocks, check them, and copy what the targets want. Raises CorruptionError, OSError."""
        fault = self._find_fault(ranges, targets)
        if fault is not None:
            raise CorruptionError(fault[1])

    def faults(self, ranges: Iterable[tuple[int, int]]) -> Iterator[str]:
        """What is wrong with each damaged block of the ranges of whole blocks. Raises OSError."""
        for begin, stop in ranges:
            while begin < stop:
                fault = self._find_fault([(begin, stop)], ())
                if fault is None:
                    break
                block, message = fault
                yield message
                begin = (block + 1) * BLOCK_BYTES

    def _find_fault(self, ranges: Sequence[tuple[int, int]], targets: Sequence[Target]) -> tuple[int, str] | None:
        """Read and copy; the first block that is not what the table says, and how."""
        end = self._end
        bad = read_checked(self._file, ranges, BLOCK_BYTES, end, self.table, targets)
        read_to = end if bad is None else (bad[0] + 1) * BLOCK_BYTES  # It ends at the first that is bad.
        self.bytes_read += sum(max(0, min(stop, read_to) - begin) for begin, stop in ranges)
        if bad is None:
            return None
        block, found = bad
        where = f"bytes {block * BLOCK_BYTES}-{min((block + 1) * BLOCK_BYTES, end) - 1}"
        is_ = "the file ends in it" if found is None else f"crc32c is {found:08x}"
        return block, (
            f"{self._file.name}, block {block} ({where}): {is_}, checksum table says {self.table[block]:08x}."
        )

    def read_window(self, begin: int, window: memoryview) -> int:
        """Fill a window of whole blocks with the file's bytes from `begin`, a block's start, on; how many there are
        before the checksum table. Raises as copy does."""
        size = max(0, min(len(window), self._end - begin))
        if size:
            self.copy([(begin, begin + size)], [(begin, window, 0, (size,), (1,), (1,), 1)])
        return size

    def read_stored(self, begin: int, window: memoryview) -> int:
        """The same of the whole file: the checksum table, which has been checked, is among its bytes."""
        data = BlockFile.read_window(self, begin, window)
        rest = self.table.tobytes()[max(0, begin - self._end) :] if begin + len(window) > self._end else b""
        size = min(len(window), data + len(rest))
        window[data:size] = rest[: size - data]
        return size

    @property
    def data_bytes(self) -> int:
        """How many there are before the checksum table."""
        return self._end


class CheckedFile(BlockFile):
    """A shard file whose header and checksum table agree with the index. Raises as a BlockFile does."""

    def __init__(self, storage: Storage, directory: str, expected: ShardFile, *, past_cache: bool = False) -> None:
        self._expected = expected
        super().__init__(
            storage,
            f"{directory}/{expected.name}",
            expected.size_bytes,
            expected.checksum_start,
            expected.table_crc,
            "the index",
            past_cache=past_cache,
        )

    def _check(self, size_bytes: int, table_crc: int) -> None:
        file, expected = self._file, self._expected
        blocks = -(-expected.checksum_start // BLOCK_BYTES)
        if size_bytes - expected.checksum_start != 4 * blocks or expected.header_bytes > MAX_HEADER_BYTES + 8:
            raise CorruptionError(f"{file.name}: the index gives it a header or checksum table of impossible size")
        header = self._read_checked(0, expected.header_bytes, expected.header_crc, "header")
        super()._check(size_bytes, table_crc)
        self.header = decode_header(header, file_name=file.name, file_bytes=size_bytes)
        entry = self.header.entries.get(PER_RANK_ENTRY)
        if entry is None or (self.header.start_of(PER_RANK_ENTRY), *entry.shape) != expected.per_rank:
            raise CorruptionError(f"{file.name}: {PER_RANK_ENTRY} is not where the index says: {expected.per_rank}")

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

    def drop_header(self) -> None:
        """Let go of what the header says, once that was checked: headers of many files are long together."""
        self.header = Header({}, {}, self.header.data_start)

    def read_window(self, begin: int, window: memoryview) -> int:
        """Of the whole file, as read_stored: the index vouches for its checksum table."""
        return self.read_stored(begin, window)

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
    extents = Extents.joined(low // unit * unit, np.minimum(-(-high // unit) * unit, end))
    return list(zip(extents.lows.tolist(), extents.highs.tolist(), strict=True))


def check_length(file: ReadFile, size_bytes: int, who_says: str = "the index") -> None:
    """Raises CorruptionError unless the file has size_bytes."""
    if file.size_bytes != size_bytes:
        raise CorruptionError(f"{file.name}: {file.size_bytes} bytes, {who_says} says {size_bytes}")


@postponed_collection()
def read_chunks(
    storage: Storage, directory: str, index: Index, keys: Sequence[str], *, past_cache: bool = False
) -> list[Grids | Boxes]:
    """The stored chunks of tensors, numbered as in `keys`. past_cache: as of CheckedFile.

    Raises CorruptionError or OSError.
    """
    table = index.chunk_table
    file = storage.open(f"{directory}/{table.name}")
    try:
        if past_cache:
            drop_cache(file)
        return _read_chunks(file, index, keys)
    except EOFError as error:
        raise CorruptionError(f"{file.name}: {error}") from error
    finally:
        file.close()


def _read_chunks(file: ReadFile, index: Index, keys: Sequence[str]) -> list[Grids | Boxes]:
    table = index.chunk_table
    check_length(file, table.size_bytes)
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


def rows_of(columns: Int64Array) -> Iterable[tuple[int, ...]]:
    """The rows of an (n, ndim) array."""
    return zip(*columns.T.tolist(), strict=True) if columns.shape[1] else [()] * len(columns)


def expected_entries(index: Index, keys: Sequence[str], tensor: Int64Array, chunks: Hits) -> Iterator[ExpectedEntry]:
    """The entries of chunks, of keys[tensor[i]] each, in the headers of their files."""
    used = np.unique(tensor).tolist()
    of_tensor = {t: (escape_key(keys[t]), index.tensors[keys[t]]) for t in used}
    columns = (tensor.tolist(), chunks.starts.tolist(), rows_of(chunks.offsets), rows_of(chunks.shapes))
    for t, start, offset, shape in zip(*columns, strict=True):
        name, entry = of_tensor[t]
        dtype = DTYPES[entry.dtype]
        if shape != entry.global_shape:
            name = entry_of_part(name, offset)
        yield start, name, dtype.stored, (*shape, *dtype.trailing)


def check_files_hold(storage: Storage, directory: str, index: Index, size_bytes: int) -> None:
    """Before memory is taken for so many bytes of its tensors: that there are files which can hold them.

    Raises CorruptionError or OSError. The index itself has been checked to name files of as many bytes as its tensors.
    """
    for expected in index.files:
        if size_bytes <= 0:
            return
        file = storage.open(f"{directory}/{expected.name}")
        try:
            check_length(file, expected.size_bytes)
        finally:
            file.close()
        size_bytes -= expected.size_bytes


def read_per_rank(storage: Storage, directory: str, index: Index, number: int) -> dict[str, msgspec.Raw]:
    """The per-rank values in a shard file: key -> encoded value. Raises CorruptionError or OSError."""
    start, size = index.files[number].per_rank
    with CheckedFile(storage, directory, index.files[number]) as file:
        return decode_per_rank(file.read(start, size), index.files[number].name)


def decode_per_rank(text: bytes, file_name: str) -> dict[str, msgspec.Raw]:
    """The per-rank values of a file: key -> encoded value. Raises CorruptionError."""
    try:
        return decode_json(text, dict[str, msgspec.Raw])
    except (msgspec.DecodeError, RecursionError) as error:
        raise CorruptionError(f"{file_name}: per-rank values: {error}") from error
