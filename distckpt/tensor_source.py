"""A source of tensors: boxes of a checkpoint's tensors, brought into memory step by step. No torch.

Who goes through a checkpoint in order (a reshard, a comparison, an export) asks for what comes next, and takes a fixed
amount of memory for it. Files are read by whole blocks, each of which is checked; a block of which a step needs a part
is kept for the next, so that every byte is read once as long as the blocks that are begun fit into the cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from typing_extensions import Self

from distckpt._C import Memory, Targets
from distckpt.checkpoint_files import CheckedFile, expected_entries
from distckpt.extents import Extents
from distckpt.garbage import postponed_collection
from distckpt.reader import FileReads, StoredTensors, Wanted, plan_reads
from distckpt.shard_file import BLOCK_BYTES
from distckpt.storage import Storage, Target

MEMORY_BYTES = 256 << 20  # what those who go through a checkpoint take, if nothing else is said
OPEN_FILES = 128  # at a time: a process may have 1,024 open, and each is opened twice to be read directly


class TensorSource:
    """The tensors of one checkpoint. A context manager; one thread at a time.

    keys: what will be asked for; all if None. cache_bytes: for blocks that are begun, beside what is filled.
    max_open_files: at a time. A checkpoint that vanishes meanwhile raises FileNotFoundError.
    """

    def __init__(
        self,
        storage: Storage,
        directory: str,
        stored: StoredTensors,
        keys: Iterable[str] | None = None,
        *,
        cache_bytes: int,
        max_open_files: int = OPEN_FILES,
    ) -> None:
        self.stored = stored
        self._is_wanted = np.ones(len(stored.keys), bool)
        if keys is not None:
            self._is_wanted[:] = False
            self._is_wanted[[stored.number[key] for key in keys]] = True
        self._storage = storage
        self._directory = directory
        self._max_open_files = max_open_files
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()  # The one that was used last is last.
        self._blocks = _BegunBlocks(max(1, cache_bytes // BLOCK_BYTES))
        self._closed_bytes_read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._files:
            self._close_oldest()

    @property
    def bytes_read(self) -> int:
        """From storage, headers and checksum tables included."""
        return self._closed_bytes_read + sum(file.checked.bytes_read for file in self._files.values())

    def fill(self, wanted: Sequence[Wanted]) -> None:
        """Fill memory with boxes of tensors. Raises CorruptionError or OSError; the memory is then undefined."""
        for reads in plan_reads(self.stored, wanted):
            self._read(self._file(reads.file), reads)

    def _read(self, file: _OpenFile, reads: FileReads) -> None:
        """One file's part: from the blocks that are begun already, then the others; those that are not wanted whole are
        kept."""
        targets = Targets(reads.targets)
        held = self._blocks.of(reads.file)
        ranges = []
        for begin, stop in reads.ranges:
            inside = [at for at in held if begin <= at < stop]
            for low, high in pairwise([begin - BLOCK_BYTES, *inside, stop]):
                if low + BLOCK_BYTES < high:
                    ranges.append((low + BLOCK_BYTES, high))
        for at in held:
            self._blocks.take(reads.file, at, targets)
        copies: list[Target] = [
            (at, self._blocks.add(reads.file, at, left, size), 0, (size,), (1,), (1,), 1)
            for at, size, left in self._begun(file, reads, held)[-self._blocks.capacity :]
        ]
        try:
            file.checked.copy(ranges, sorted([*reads.targets, *copies], key=lambda target: target[0]))
        except BaseException:
            self._blocks.forget(reads.file)  # They may hold nothing of the file.
            raise

    def _begun(self, file: _OpenFile, reads: FileReads, held: Sequence[int]) -> list[tuple[int, int, int]]:
        """The blocks of which these reads leave something that will be asked for: (first byte, size, bytes left)."""
        extents = Extents.joined(reads.lows, reads.highs)
        ends = np.concatenate([extents.lows, extents.highs])
        at = np.setdiff1d(ends[ends % BLOCK_BYTES != 0] // BLOCK_BYTES * BLOCK_BYTES, held)
        stop = np.minimum(at + BLOCK_BYTES, file.checked.data_bytes)
        left = file.wanted.bytes_in(at, stop) - extents.bytes_in(at, stop)
        rows = np.flatnonzero(left > 0)
        return list(zip(at[rows].tolist(), (stop - at)[rows].tolist(), left[rows].tolist(), strict=True))

    @postponed_collection()
    def _open(self, number: int) -> _OpenFile:
        """A file whose own header speaks of the same bytes as the chunk table. The header is not kept: those of many
        files are long together."""
        stored = self.stored
        item_bytes = stored.located.item_bytes
        lows, highs = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        file = CheckedFile(self._storage, self._directory, stored.index.files[number])
        try:
            for tensor, chunks in stored.located.of_file(number):
                file.check_entries(expected_entries(stored.index, stored.keys, tensor, chunks))
                rows = np.flatnonzero(self._is_wanted[tensor])
                lows.append(chunks.starts[rows])
                highs.append(lows[-1] + chunks.shapes[rows].prod(axis=1) * item_bytes[tensor[rows]])
        except BaseException:
            file.close()
            raise
        file.drop_header()
        return _OpenFile(file, Extents.joined(np.concatenate(lows), np.concatenate(highs)))

    def _file(self, number: int) -> _OpenFile:
        file = self._files.pop(number, None)
        if file is None:
            while len(self._files) >= self._max_open_files:
                self._close_oldest()
            file = self._open(number)
        self._files[number] = file
        return file

    def _close_oldest(self) -> None:
        _, file = self._files.popitem(last=False)
        self._closed_bytes_read += file.checked.bytes_read
        file.checked.close()


@dataclass(frozen=True, slots=True)
class _OpenFile:
    """wanted: what will be asked for of it."""

    checked: CheckedFile
    wanted: Extents


class _BegunBlocks:
    """Whole blocks of files of which not every byte has been used; those that were begun first go first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._memory = memoryview(Memory(capacity * BLOCK_BYTES))
        self._free = list(range(capacity))
        self._blocks: dict[tuple[int, int], _BegunBlock] = {}

    def of(self, file: int) -> list[int]:
        """Where in the file the blocks begin that are held of it, ascending."""
        return sorted(at for number, at in self._blocks if number == file)

    def add(self, file: int, at: int, left_bytes: int, size: int) -> memoryview:
        """Memory for a block of the file, of which left_bytes will be taken. At most `capacity` are added before they
        are filled."""
        if not self._free:
            self._remove(next(iter(self._blocks)))
        slot = self._free.pop()
        block = _BegunBlock(slot, left_bytes, self._memory[slot * BLOCK_BYTES :][:size])
        self._blocks[file, at] = block
        return block.data

    def take(self, file: int, at: int, targets: Targets) -> None:
        """Copy what targets want of a block, which goes once all was taken."""
        block = self._blocks[file, at]
        block.left_bytes -= targets.copy_from(block.data, at)
        if block.left_bytes <= 0:
            self._remove((file, at))

    def forget(self, file: int) -> None:
        for at in self.of(file):
            self._remove((file, at))

    def _remove(self, place: tuple[int, int]) -> None:
        self._free.append(self._blocks.pop(place).slot)


@dataclass(slots=True)
class _BegunBlock:
    slot: int
    left_bytes: int
    data: memoryview
