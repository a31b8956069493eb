"""Reading: which stored ranges fill which boxes. Decides what is read together; reads nothing itself. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from typing_extensions import Buffer

from distckpt.checkpoint_files import (
    CheckedFile,
    ExpectedEntry,
    expected_entries,
    merged_ranges,
    read_chunks,
    rows_of,
)
from distckpt.chunk_table import Boxes, Grids, Hits
from distckpt.garbage import postponed_collection
from distckpt.geometry import Box, Int64Array, strides_of
from distckpt.index import Index, check_locations
from distckpt.located_chunks import LocatedChunks
from distckpt.planner import Copies, plan_load
from distckpt.shard_file import BLOCK_BYTES
from distckpt.storage import Storage, Target


@dataclass(frozen=True)
class StoredTensors:
    """Tensors of one checkpoint and where their chunks lie. number: of each key in `keys`, by which `chunks` count."""

    index: Index
    keys: Sequence[str]
    number: Mapping[str, int]
    chunks: Sequence[Grids | Boxes]

    @classmethod
    def read(cls, storage: Storage, directory: str, index: Index, keys: Sequence[str]) -> StoredTensors:
        """Raises CorruptionError or OSError."""
        number = {key: i for i, key in enumerate(keys)}
        return cls(index, keys, number, read_chunks(storage, directory, index, keys))

    @cached_property
    def located(self) -> LocatedChunks:
        """For those who go through all of them. Raises CorruptionError for chunks that lie where none can."""
        return LocatedChunks.of(self.index, self.keys, self.chunks)

    def chunks_of(self, key: str) -> Hits:
        """By file and place. Raises as `located`."""
        return self.located.of_tensor(self.number[key])


@dataclass(frozen=True, slots=True)
class Wanted:
    """A box of a stored tensor, and the memory on the host that takes it: its item (i, ...) at
    start + sum(i * strides) of `data`, in bytes."""

    key: str
    box: Box
    data: Buffer
    start: int
    strides: tuple[int, ...]
    item_bytes: int


@dataclass(frozen=True, slots=True)
class FileReads:
    """What to read of one shard file: ranges of whole blocks, what to copy from them, in order of position, where each
    of that begins and ends, and which entries the file's own header must have for that to be right."""

    file: int
    ranges: list[tuple[int, int]]
    lows: Int64Array
    highs: Int64Array
    targets: list[Target]
    entries: list[ExpectedEntry]


@postponed_collection()
def plan_reads(stored: StoredTensors, wanted: Sequence[Wanted]) -> list[FileReads]:
    """What to read to fill all that is wanted, by file. Raises CorruptionError for chunks that lie where none can."""
    index, keys = stored.index, stored.keys
    tensor = np.array([stored.number[w.key] for w in wanted], np.int64)
    file, low, high = ([np.zeros(0, np.int64)] for _ in range(3))
    targets: list[Target] = []
    entries: list[ExpectedEntry] = []
    for copies in plan_load(stored.chunks, tensor, [w.box for w in wanted]):
        of_tensor = tensor[copies.target]
        check_locations(index, keys, of_tensor, copies.hits)
        entries += expected_entries(index, keys, of_tensor, copies.hits)
        from_bytes, to_bytes, of_copies = _regions(copies, wanted)
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
        reads.append(FileReads(of_file, ranges, lows[mine], highs[mine], [targets[i] for i in rows], unique))
    return reads


def _regions(copies: Copies, wanted: Sequence[Wanted]) -> tuple[Int64Array, Int64Array, list[Target]]:
    """Where in its file each copy begins and ends, and what to copy."""
    hits = copies.hits
    mine = [wanted[i] for i in copies.target.tolist()]
    items = [w.item_bytes for w in mine]
    ndim = copies.low.shape[1]
    source_strides = strides_of(hits.shapes) * np.array(items, np.int64)[:, None]
    target_strides = np.array([w.strides for w in mine], np.int64).reshape(len(mine), ndim)
    target_low = np.array([w.box.offset for w in mine], np.int64).reshape(len(mine), ndim)
    low = hits.starts + ((copies.low - hits.offsets) * source_strides).sum(axis=1)
    high = low + ((copies.shape - 1) * source_strides).sum(axis=1) + items
    target_start = ((copies.low - target_low) * target_strides).sum(axis=1) + np.array(
        [w.start for w in mine], np.int64
    )
    columns = zip(
        low.tolist(),
        [w.data for w in mine],
        target_start.tolist(),
        rows_of(copies.shape),
        rows_of(source_strides),
        rows_of(target_strides),
        items,
        strict=True,
    )
    return low, high, list(columns)


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
