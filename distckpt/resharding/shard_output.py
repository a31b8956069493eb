"""A shard file that is written in pieces, in any order, and can be left and gone on with. No torch.

Who writes a checkpoint anew in the order in which another one lies meets the parts of a file in whatever order that
gives. Pages are written once, when they are whole; sums of parts of a block are joined when they meet.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress

import msgspec
import numpy as np
import numpy.typing as npt

from distckpt._C import crc32c, crc32c_blocks, join_crc32c
from distckpt.index import MeshCoordinates, Natural, ShardFile, UInt32
from distckpt.shard_file import BLOCK_BYTES, FileLayout
from distckpt.storage import Storage, WriteFile

_PAGE = 4096  # the unit of the Storage port's writes


class Fragment(msgspec.Struct, frozen=True, array_like=True):
    """Bytes of a block that are written, and their checksum."""

    begin: Natural
    size: Natural
    crc: UInt32

    @property
    def end(self) -> int:
        return self.begin + self.size


class OutputState(msgspec.Struct, frozen=True):
    """How far a file is. finished: it is whole and durable. sums: uint32, of each block; is_whole: a byte a block,
    whether its sum is known; begun: (block, what is written of it) of the others. pages: those that are not whole:
    (number, how many bytes of it are known, the page)."""

    finished: ShardFile | None = None
    sums: bytes = b""
    is_whole: bytes = b""
    begun: tuple[tuple[Natural, tuple[Fragment, ...]], ...] = ()
    pages: tuple[tuple[Natural, Natural, bytes], ...] = ()

    def fits(self, layout: FileLayout) -> bool:
        """Whether it can be of a file with this layout."""
        if self.finished is not None:
            return self.finished.size_bytes == layout.size_bytes
        count = layout.block_count
        return (
            (len(self.sums), len(self.is_whole)) == (4 * count, count)
            and all(block < count and all(part.end <= BLOCK_BYTES for part in parts) for block, parts in self.begun)
            and all(
                n * _PAGE < layout.size_bytes and len(data) == _PAGE and known < _PAGE for n, known, data in self.pages
            )
        )


class ShardOutput:
    """One shard file under way. put() may be called from several threads, everything else from one, while none puts.

    name: of the file in the storage. state: how far it was at its last sync(), None for a new file.
    Raises OSError everywhere; the file is then abandoned, and what was written since the last sync() does not count.
    """

    def __init__(
        self,
        storage: Storage,
        name: str,
        layout: FileLayout,
        state: OutputState | None,
        *,
        rank: int,
        mesh: MeshCoordinates,
    ) -> None:
        self.name = name
        self.finished = None if state is None else state.finished
        self._storage = storage
        self._layout = layout
        self._rank = rank
        self._mesh = mesh
        self._lock = threading.Lock()
        self._sums = np.zeros(layout.block_count, np.uint32)
        self._is_whole = np.zeros(layout.block_count, bool)
        self._begun: dict[int, list[Fragment]] = {}
        self._pages: dict[int, _Page] = {}
        self._file: WriteFile | None = None
        if state is None:
            self._begin()
        elif self.finished is None:
            self._go_on(state)

    def _begin(self) -> None:
        layout = self._layout
        self._storage.remove(self.name)  # Of an earlier try, of which nothing is known.
        self._file = self._storage.create(self.name, size_hint=layout.size_bytes)
        self.put(0, memoryview(layout.header))
        self.put(layout.per_rank_start, memoryview(layout.per_rank))

    def _go_on(self, state: OutputState) -> None:
        self._sums[:] = np.frombuffer(state.sums, np.uint32)
        self._is_whole[:] = np.frombuffer(state.is_whole, bool)
        self._begun = {block: list(fragments) for block, fragments in state.begun}
        self._pages = {number: _Page(bytearray(data), known) for number, known, data in state.pages}
        self._file = self._storage.reopen(self.name)

    def put(self, offset: int, data: memoryview) -> None:
        """Write bytes that belong at `offset`, which come once. Aligned as the offset is modulo 4096, most of them are
        written from where they lie."""
        if not len(data):
            return
        sums, fragments = _sum(offset, data)
        with self._lock:
            first = -(-offset // BLOCK_BYTES)
            self._sums[first : first + len(sums)] = sums
            self._is_whole[first : first + len(sums)] = True
            for block, fragment in fragments:
                self._add(block, fragment)
            self._write(offset, data)

    @property
    def is_filled(self) -> bool:
        """Whether all of it was put."""
        return bool(self._is_whole.all())

    def sync(self) -> OutputState:
        """Make the whole pages of what was put durable, and tell how far the file is. The others are in the state: so
        nothing that is durable is ever written again, by this process or one that went on with the file."""
        if self.finished is not None:
            return OutputState(self.finished)
        self._open_file().sync()
        pages = tuple((number, page.known, bytes(page.data)) for number, page in sorted(self._pages.items()))
        begun = tuple((block, tuple(fragments)) for block, fragments in sorted(self._begun.items()))
        return OutputState(None, self._sums.tobytes(), self._is_whole.tobytes(), begun, pages)

    def finish(self) -> ShardFile:
        """Once all of it was put: add the checksum table, and make the file whole and durable."""
        layout, file = self._layout, self._open_file()
        self._write(layout.checksum_start, memoryview(self._sums.tobytes()))
        for number, page in sorted(self._pages.items()):
            file.write(number * _PAGE, page.data)
        file.finish(layout.size_bytes)
        self._file = None
        self.finished = ShardFile(
            name=self.name.rpartition("/")[2],
            size_bytes=layout.size_bytes,
            header_bytes=len(layout.header),
            header_crc=crc32c(layout.header),
            checksum_start=layout.checksum_start,
            table_crc=crc32c(self._sums),
            per_rank=(layout.per_rank_start, layout.per_rank_bytes),
            rank=self._rank,
            mesh=self._mesh,
        )
        return self.finished

    def abandon(self) -> None:
        """Let go of the file as it is. Never raises."""
        if self._file is not None:
            with suppress(OSError):
                self._file.abandon()

    def _open_file(self) -> WriteFile:
        if self._file is None:
            raise ValueError(f"{self.name}: already finished")
        return self._file

    def _write(self, offset: int, data: memoryview) -> None:
        file, end = self._open_file(), offset + len(data)
        begin, stop = -(-offset // _PAGE) * _PAGE, end // _PAGE * _PAGE
        if begin < stop:
            file.write(begin, data[begin - offset : stop - offset])
        for low, high in ((offset, min(begin, end)), (max(stop, offset), end)) if begin <= stop else ((offset, end),):
            if low < high:
                page = self._page(low // _PAGE)
                page.add(low % _PAGE, data[low - offset : high - offset])
                if page.known == _PAGE:
                    file.write(low // _PAGE * _PAGE, page.data)
                    del self._pages[low // _PAGE]

    def _page(self, number: int) -> _Page:
        if number not in self._pages:
            self._pages[number] = _Page(bytearray(_PAGE), 0)
        return self._pages[number]

    def _add(self, block: int, new: Fragment) -> None:
        """Note that a part of a block is written; parts that meet become one."""
        parts = self._begun.pop(block, [])
        before = next((part for part in parts if part.end == new.begin), None)
        after = next((part for part in parts if part.begin == new.end), None)
        for neighbour in (before, after):
            if neighbour is not None:
                parts.remove(neighbour)
                first, second = sorted((neighbour, new), key=lambda part: part.begin)
                crc = join_crc32c(first.crc, second.crc, second.size)
                new = Fragment(first.begin, first.size + second.size, crc)
        if new.size == min(BLOCK_BYTES, self._layout.checksum_start - block * BLOCK_BYTES):
            self._sums[block], self._is_whole[block] = new.crc, True
        else:
            self._begun[block] = [*parts, new]


class _Page:
    """A page that is not whole: what is known of it, and how many bytes that are."""

    __slots__ = ("data", "known")

    def __init__(self, data: bytearray, known: int) -> None:
        self.data = data
        self.known = known

    def add(self, begin: int, data: memoryview) -> None:
        self.data[begin : begin + len(data)] = data
        self.known += len(data)


def _sum(offset: int, data: memoryview) -> tuple[npt.NDArray[np.uint32], list[tuple[int, Fragment]]]:
    """The checksums of the blocks that lie whole in data, and (block, fragment) of its first and last other bytes."""
    first, last = -(-offset // BLOCK_BYTES), (offset + len(data)) // BLOCK_BYTES
    fragments = list(_edges(offset, data, first, last))
    sums = np.zeros(max(0, last - first), np.uint32)
    if len(sums):
        begin = first * BLOCK_BYTES - offset
        crc32c_blocks(data[begin : begin + len(sums) * BLOCK_BYTES], BLOCK_BYTES, sums)
    return sums, fragments


def _edges(offset: int, data: memoryview, first: int, last: int) -> Iterator[tuple[int, Fragment]]:
    stop = offset + len(data)
    if first > last:  # All of it lies inside one block.
        yield last, Fragment(offset - last * BLOCK_BYTES, len(data), crc32c(data))
        return
    if offset < first * BLOCK_BYTES:
        size = first * BLOCK_BYTES - offset
        yield first - 1, Fragment(BLOCK_BYTES - size, size, crc32c(data[:size]))
    if last * BLOCK_BYTES < stop:
        size = stop - last * BLOCK_BYTES
        yield last, Fragment(0, size, crc32c(data[len(data) - size :]))
