"""Reading order: in which order tensors are gone through, so that every file is read from its begin to its end. No I/O.

Also how much is begun meanwhile: a block of which some bytes are used now and some later is kept in between, and who
keeps all of these reads every byte once.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from distckpt.geometry import Int64Array, strides_of
from distckpt.located_chunks import ChunkGroup, LocatedChunks
from distckpt.shard_file import BLOCK_BYTES


def reading_order(located: LocatedChunks) -> list[int]:
    """The numbers of all tensors; those without elements first. Of the tensors that may come next, the one in the first
    file, at the first byte does; so it is, too, where files go through tensors in orders that contradict each other."""
    tensor, file, start = _joined([(group.tensor, group.hits.files, group.hits.starts) for group in located.groups], 3)
    by_place = np.lexsort((start, file))
    tensor, file, start = tensor[by_place], file[by_place], start[by_place]
    places = [(0, 0)] * len(located.shapes)
    numbers, firsts = np.unique(tensor, return_index=True)
    for number, *at in zip(numbers.tolist(), file[firsts].tolist(), start[firsts].tolist(), strict=True):
        places[number] = (at[0], at[1])
    is_next = (file[1:] == file[:-1]) & (tensor[1:] != tensor[:-1])
    pairs = np.unique(tensor[:-1][is_next] * len(places) + tensor[1:][is_next])
    before, after = pairs // len(places), pairs % len(places)
    return list(_sorted_topologically(places, before, after))


def _sorted_topologically(places: Sequence[tuple[int, int]], before: Int64Array, after: Int64Array) -> Iterator[int]:
    """Numbers, each of `after` later than the one of `before`, which ascend; by place where that leaves a choice."""
    bounds = np.searchsorted(before, np.arange(len(places) + 1)).tolist()
    later, waits_for = after.tolist(), np.bincount(after, minlength=len(places)).tolist()
    by_place = sorted((place, number) for number, place in enumerate(places))
    ready = [one for one in by_place if not waits_for[one[1]]]  # A heap, as it is sorted.
    in_circles = iter(by_place)
    is_given = [False] * len(places)
    while (one := heapq.heappop(ready) if ready else next(in_circles, None)) is not None:
        _, number = one
        if is_given[number]:
            continue
        is_given[number] = True
        yield number
        for other in later[bounds[number] : bounds[number + 1]]:
            waits_for[other] -= 1
            if not waits_for[other]:
                heapq.heappush(ready, (places[other], other))


def begun_blocks(located: LocatedChunks, order: Sequence[int]) -> int:
    """How many blocks are begun at a time, at most, by who goes through tensors in this order, each in C order, in
    steps of any size."""
    numbers = np.array(order, np.int64)
    position = np.zeros(len(located.shapes), np.int64)
    position[numbers] = np.cumsum([0, *(prod(located.shapes[number]) for number in order)])[:-1]
    spans = [span for group in located.groups for span in _spans(located, group, position)]
    file, block, first, last = _joined(spans, 4)
    by_block = np.lexsort((block, file))
    file, block = file[by_block], block[by_block]
    is_new = np.ones(len(file), bool)
    is_new[1:] = (file[1:] != file[:-1]) | (block[1:] != block[:-1])
    rows = np.flatnonzero(is_new)
    if not len(rows):
        return 0
    first, last = np.minimum.reduceat(first[by_block], rows), np.maximum.reduceat(last[by_block], rows)
    # One is begun before the positions from first + 1 to last: before another begins at a position, it has ended there.
    where, change = np.concatenate([first, last]), np.repeat([1, -1], len(rows))
    return int(change[np.lexsort((change, where))].cumsum().max())


def _spans(located: LocatedChunks, group: ChunkGroup, position: Int64Array) -> Iterator[tuple[Int64Array, ...]]:
    """(file, block, first, last): the blocks of each chunk, and where the first and the last of its elements in them
    come. Those in its midst, of which one is begun at a time, count as one. position: of each tensor's first element.
    """
    hits, tensor = group.hits, group.tensor
    item_bytes = located.item_bytes[tensor]
    begin, end = hits.starts, hits.starts + hits.shapes.prod(axis=1) * item_bytes
    numbers, number = np.unique(tensor, return_inverse=True)
    shapes = np.array([located.shapes[n] for n in numbers.tolist()], np.int64).reshape(len(numbers), -1)
    strides, inner = strides_of(shapes)[number], strides_of(hits.shapes)

    def position_of(byte: Int64Array, rows: Int64Array) -> Int64Array:
        element = ((byte - begin[rows]) // item_bytes[rows])[:, None]
        at = hits.offsets[rows] + element // inner[rows] % hits.shapes[rows]
        found: Int64Array = position[tensor[rows]] + (at * strides[rows]).sum(axis=1)
        return found

    head, tail = begin // BLOCK_BYTES, (end - 1) // BLOCK_BYTES
    for block, low, high in (
        (head, begin, np.minimum(end, (head + 1) * BLOCK_BYTES)),
        (head + 1, (head + 1) * BLOCK_BYTES, tail * BLOCK_BYTES),
        (tail, np.maximum(tail, head + 1) * BLOCK_BYTES, end),
    ):
        rows = np.flatnonzero(low < high)
        yield hits.files[rows], block[rows], position_of(low[rows], rows), position_of(high[rows] - 1, rows)


def _joined(columns: Sequence[tuple[Int64Array, ...]], count: int) -> list[Int64Array]:
    none: Int64Array = np.zeros(0, np.int64)
    return [np.concatenate([none, *(one[i] for one in columns)]) for i in range(count)]
