"""Where the chunks of tensors lie, by tensor and by file. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from distckpt.chunk_table import Boxes, Grids, Hits, take_hits
from distckpt.geometry import Box, Int64Array
from distckpt.index import Index, check_locations
from distckpt.planner import plan_load


@dataclass(frozen=True, slots=True)
class LocatedChunks:
    """All chunks of some tensors of one checkpoint, which count as in the list that was given."""

    ndims: Sequence[int]
    groups: Sequence[_Group]

    @classmethod
    def of(cls, index: Index, keys: Sequence[str], chunks: Sequence[Grids | Boxes]) -> LocatedChunks:
        """Raises CorruptionError for chunks that lie where none can."""
        boxes = [Box.whole(index.tensors[key].global_shape) for key in keys]
        groups = []
        for copies in plan_load(chunks, np.arange(len(boxes)), boxes):
            check_locations(index, keys, copies.target, copies.hits)
            order = np.lexsort((copies.hits.starts, copies.hits.files, copies.target))
            hits = take_hits(copies.hits, order)
            groups.append(_Group(copies.target[order], hits, np.argsort(hits.files, kind="stable")))
        return cls([len(box.shape) for box in boxes], groups)

    def of_tensor(self, number: int) -> Hits:
        """By file and place. None of a tensor without elements."""
        for group in self.groups:
            low, high = np.searchsorted(group.tensor, (number, number + 1)).tolist()
            if low < high:
                return take_hits(group.hits, slice(low, high))
        none: Int64Array = np.zeros(0, np.int64)
        no_rows = none.reshape(0, self.ndims[number])
        return Hits(none, none, none, none, no_rows, no_rows)

    def of_file(self, number: int) -> Iterator[tuple[Int64Array, Hits]]:
        """The tensor of each chunk, and the chunks; for each number of dimensions."""
        for group in self.groups:
            low, high = np.searchsorted(group.hits.files, (number, number + 1), sorter=group.by_file).tolist()
            if low < high:
                rows = group.by_file[low:high]
                yield group.tensor[rows], take_hits(group.hits, rows)

    def first_places(self) -> list[tuple[int, int]]:
        """Where each tensor begins: (file, first byte). (0, 0) for one without elements."""
        places = [(0, 0)] * len(self.ndims)
        for group in self.groups:
            tensors, rows = np.unique(group.tensor, return_index=True)
            found = zip(group.hits.files[rows].tolist(), group.hits.starts[rows].tolist(), strict=True)
            for tensor, place in zip(tensors.tolist(), found, strict=True):
                places[tensor] = place
        return places

    def begun_blocks(self) -> int:
        """How many blocks are begun at a time, at most, by who goes through a tensor in C order: one of each chunk that
        a row meets, another where the chunk before it in its file ends; and one of each file, where the next tensor
        goes on."""
        return max(map(_begun_blocks, self.groups), default=0)


@dataclass(frozen=True, slots=True)
class _Group:
    """Chunks of tensors of one number of dimensions, by tensor, file and place. by_file: their numbers, by file."""

    tensor: Int64Array
    hits: Hits
    by_file: Int64Array


def _begun_blocks(group: _Group) -> int:
    files, tensor = group.hits.files, group.tensor
    is_first = np.ones(len(tensor), bool)
    is_first[1:] = (tensor[1:] != tensor[:-1]) | (files[1:] != files[:-1])
    in_files = int(np.bincount(tensor[is_first]).max())
    if not group.hits.offsets.shape[1]:
        return in_files
    begin = group.hits.offsets[:, 0]
    row = np.concatenate([begin, begin + group.hits.shapes[:, 0]])
    blocks = np.where(is_first, 1, 2)
    change = np.concatenate([blocks, -blocks])
    order = np.lexsort((change, row, np.tile(tensor, 2)))  # Of one row, those that end there before those that begin.
    return max(in_files, int(change[order].cumsum().max()))
