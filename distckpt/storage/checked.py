"""Checked transfers: writing that sums blocks on the way, reading that checks them and copies what is wanted.

A backend whose files offer these operations does them as it can best; for all others they are made of the port's
plain writes and reads, through a window of memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

from distckpt._C import Memory, Targets, crc32c_blocks
from distckpt.storage.port import ReadFile, WriteFile

WINDOW_BYTES = 8 << 20
Sums: TypeAlias = npt.NDArray[np.uint32]

# What is written: memory, or what makes it, a piece at a time, when its turn comes. Each piece is gone with the next.
Part: TypeAlias = Buffer | Callable[[], Iterable[Buffer]]

# chunk_start in the file, target memory, target_start, shape, source strides, target strides, item size
Target: TypeAlias = tuple[int, Buffer, int, tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


@runtime_checkable
class CheckedWriteFile(Protocol):
    """A WriteFile that sums what it writes, as `write_checked` does."""

    def write_checked(
        self, parts: Sequence[Buffer], block_bytes: int, sums: Buffer, *, max_bytes_per_s: float
    ) -> None: ...


@runtime_checkable
class CheckedReadFile(Protocol):
    """A ReadFile that checks what it reads, as `read_checked` does."""

    def read_checked(
        self,
        ranges: Sequence[tuple[int, int]],
        block_bytes: int,
        end: int,
        expected: Buffer,
        targets: Sequence[Target],
    ) -> tuple[int, int | None] | None: ...


@runtime_checkable
class CachedReadFile(Protocol):
    """A ReadFile of whose content the host may keep a copy in memory."""

    def drop_cache(self) -> None: ...


def drop_cache(file: ReadFile) -> None:
    """Have later reads of a file come from the storage itself, as far as the host lets go of what it remembers."""
    if isinstance(file, CachedReadFile):
        file.drop_cache()


def write_checked(
    file: WriteFile, parts: Sequence[Part], block_bytes: int, sums: Sums, *, max_bytes_per_s: float = 0.0
) -> None:
    """Write the parts one after the other from offset 0, and after them `sums`, the CRC32C of each block_bytes of
    them, filled on the way. WINDOW_BYTES is a multiple of block_bytes. max_bytes_per_s: 0 is no limit."""
    in_memory = [part for part in parts if not callable(part)]
    if isinstance(file, CheckedWriteFile) and len(in_memory) == len(parts):
        file.write_checked(in_memory, block_bytes, sums.data, max_bytes_per_s=max_bytes_per_s)
        return
    window = memoryview(Memory(WINDOW_BYTES))
    position = filled = block = 0
    started = time.monotonic()
    for piece in _pieces(parts):
        view = memoryview(piece).cast("B")
        while len(view):
            size = min(len(view), WINDOW_BYTES - filled)
            window[filled : filled + size] = view[:size]
            view, filled = view[size:], filled + size
            if filled == WINDOW_BYTES:
                block = _sum(window, block_bytes, sums, block)
                file.write(position, window)
                position, filled = position + filled, 0
                if max_bytes_per_s:
                    time.sleep(max(0.0, started + position / max_bytes_per_s - time.monotonic()))
    _sum(window[:filled], block_bytes, sums, block)
    file.write(position, bytes(window[:filled]) + sums.tobytes())


def _pieces(parts: Sequence[Part]) -> Iterator[Buffer]:
    for part in parts:
        if callable(part):
            yield from part()
        else:
            yield part


def _sum(window: memoryview, block_bytes: int, sums: Sums, block: int) -> int:
    stop = block - (-len(window) // block_bytes)
    crc32c_blocks(window, block_bytes, sums[block:stop])
    return stop


def read_checked(
    file: ReadFile,
    ranges: Sequence[tuple[int, int]],
    block_bytes: int,
    end: int,
    expected: Sums,
    targets: Sequence[Target],
) -> tuple[int, int | None] | None:
    """Read ranges of whole blocks, check each against `expected`, and copy what targets want of it.

    end: where the last block ends. Targets are in the order of chunk_start. Returns None, or a block that is wrong and
    its checksum (None where the file ends in or soon after it); nothing of that block has been copied.
    """
    if isinstance(file, CheckedReadFile):
        return file.read_checked(ranges, block_bytes, end, expected.data, targets)
    memory = memoryview(Memory(WINDOW_BYTES))
    wanted = Targets(targets)
    for begin, stop in ranges:
        for at in range(begin, stop, WINDOW_BYTES):
            window = memory[: min(stop - at, WINDOW_BYTES)]
            try:
                file.read_into(at, window)
            except EOFError:
                return at // block_bytes, None
            first, count = at // block_bytes, -(-len(window) // block_bytes)
            found = np.empty(count, np.uint32)
            crc32c_blocks(window, block_bytes, found)
            bad = np.flatnonzero(found != expected[first : first + count])
            if len(bad):
                return first + int(bad[0]), int(found[bad[0]])
            wanted.copy_from(window, at)
    return None
