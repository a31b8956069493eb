"""Where the chunks of tensors lie, by tensor and by file. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from distckpt.chunk_table import Boxes, Grids, Hits, take_hits
from distckpt.geometry import Box, Int64Array
from distckpt.index import Index, check_locations
from distckpt.planner import plan_load
from distckpt.shard_file import DTYPES


@dataclass(frozen=True, slots=True)
class LocatedChunks:
    """All chunks of some tensors of one checkpoint, which count as in the list that was given: so do their shapes, and
    how many bytes an item of each has."""

    shapes: Sequence[tuple[int, ...]]
    item_bytes: Int64Array
    groups: Sequence[ChunkGroup]

    @classmethod
    def of(cls, index: Index, keys: Sequence[str], chunks: Sequence[Grids | Boxes]) -> LocatedChunks:
        """Raises CorruptionError for chunks that lie where none can."""
        entries = [index.tensors[key] for key in keys]
        boxes = [Box.whole(entry.global_shape) for entry in entries]
        groups = []
        for copies in plan_load(chunks, np.arange(len(boxes)), boxes):
            check_locations(index, keys, copies.target, copies.hits)
            order = np.lexsort((copies.hits.starts, copies.hits.files, copies.target))
            hits = take_hits(copies.hits, order)
            groups.append(ChunkGroup(copies.target[order], hits, np.argsort(hits.files, kind="stable")))
        item_bytes = np.array([DTYPES[entry.dtype].item_bytes for entry in entries], np.int64)
        return cls([box.shape for box in boxes], item_bytes, groups)

    def of_tensor(self, number: int) -> Hits:
        """By file and place. None of a tensor without elements."""
        for group in self.groups:
            low, high = np.searchsorted(group.tensor, (number, number + 1)).tolist()
            if low < high:
                return take_hits(group.hits, slice(low, high))
        none: Int64Array = np.zeros(0, np.int64)
        no_rows = none.reshape(0, len(self.shapes[number]))
        return Hits(none, none, none, none, no_rows, no_rows)

    def of_file(self, number: int) -> Iterator[tuple[Int64Array, Hits]]:
        """The tensor of each chunk, and the chunks; for each number of dimensions."""
        for group in self.groups:
            low, high = np.searchsorted(group.hits.files, (number, number + 1), sorter=group.by_file).tolist()
            if low < high:
                rows = group.by_file[low:high]
                yield group.tensor[rows], take_hits(group.hits, rows)


@dataclass(frozen=True, slots=True)
class ChunkGroup:
    """Chunks of tensors of one number of dimensions, by tensor, file and place. by_file: their numbers, by file."""

    tensor: Int64Array
    hits: Hits
    by_file: Int64Array
