"""Boxes: the only geometry there is. Decides what overlaps, what is covered, what a flat range is; no I/O, no tensors.

A `Box` is a half-open hyper-rectangle of a global tensor, in elements. Shards, stored chunks and load targets
are boxes; saving, loading and resharding are their intersections.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

BoolArray: TypeAlias = npt.NDArray[np.bool_]
Int32Array: TypeAlias = npt.NDArray[np.int32]
Int64Array: TypeAlias = npt.NDArray[np.int64]
MAX_DIMS = 32  # NumPy 1, and what torch exchanges with NumPy, have no more


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """offset and shape, one integer per dimension; a 0-d box holds one element."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.offset) != len(self.shape):
            raise ValueError(f"box with offset {self.offset} but shape {self.shape}: the ranks differ")
        if self.offset and (min(self.offset) < 0 or min(self.shape) < 0):
            raise ValueError(f"box with a negative offset {self.offset} or shape {self.shape}")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        return cls((0,) * len(shape), tuple(shape))

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(o + s for o, s in zip(self.offset, self.shape, strict=True))

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def is_inside(self, shape: Sequence[int]) -> bool:
        """Whether the box lies in a tensor of this global shape."""
        return len(self.shape) == len(shape) and all(e <= n for e, n in zip(self.end, shape, strict=True))

    def __str__(self) -> str:
        return "[" + ", ".join(f"{o}:{e}" for o, e in zip(self.offset, self.end, strict=True)) + "]"


def intersect(a: Box, b: Box) -> Box | None:
    """What a and b have in common; None when that is nothing."""
    offset = tuple(map(max, a.offset, b.offset))
    shape = tuple(min(x, y) - o for x, y, o in zip(a.end, b.end, offset, strict=True))
    return Box(offset, shape) if all(s > 0 for s in shape) else None


def flat_range_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Elements start..stop-1, in C order, of a tensor of `shape`, as boxes in that same order.

    There are at most 2 * ndim - 1 of them, and each one's elements, in C order, are contiguous in the range.
    """
    total = prod(shape)
    if not 0 <= start <= stop <= total:
        raise ValueError(f"flat range {start}:{stop} is not inside a tensor of shape {tuple(shape)} ({total} elements)")
    return list(_flat_range_boxes((), tuple(shape), start, stop))


def _flat_range_boxes(at: tuple[int, ...], shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The same inside the sub-tensor `shape` whose leading indices are `at`."""
    if start == stop:
        return
    if not shape:
        yield Box(at, (1,) * len(at))
        return
    ones = (1,) * len(at)
    row = prod(shape[1:])
    first, head = divmod(start, row)
    last, tail = divmod(stop, row)
    if first == last:
        yield from _flat_range_boxes((*at, first), shape[1:], head, tail)
        return
    if head:
        yield from _flat_range_boxes((*at, first), shape[1:], head, row)
        first += 1
    if first < last:
        yield Box((*at, first, *(0,) * (len(shape) - 1)), (*ones, last - first, *shape[1:]))
    if tail:
        yield from _flat_range_boxes((*at, last), shape[1:], 0, tail)


def bands(box: Box, max_elements: int) -> Iterator[Box]:
    """The box in parts of at most max_elements (one, if that is less), in C order of their elements.

    A part is a range along one dimension, all of the dimensions after it, and one index of those before. So of a whole
    tensor each part has, in C order, one contiguous range of every box that it meets.
    """
    yield from _bands((), box, max(1, max_elements))


def _bands(at: tuple[int, ...], box: Box, max_elements: int) -> Iterator[Box]:
    """The same below the leading indices `at`."""
    dim, ones = len(at), (1,) * len(at)
    if dim == len(box.shape):
        yield Box(at, ones)
        return
    row = prod(box.shape[dim + 1 :])
    if 0 < max_elements < row:
        for index in range(box.offset[dim], box.end[dim]):
            yield from _bands((*at, index), box, max_elements)
        return
    step = max(1, max_elements // row) if row else max(1, box.shape[dim])
    for first in range(box.offset[dim], box.end[dim], step):
        count = min(step, box.end[dim] - first)
        yield Box((*at, first, *box.offset[dim + 1 :]), (*ones, count, *box.shape[dim + 1 :]))


def subtract(a: Box, b: Box) -> list[Box]:
    """What of a is not in b, as disjoint boxes in C order of their first elements."""
    common = intersect(a, b)
    if common is None:
        return [a]
    before: list[Box] = []
    after: list[Box] = []
    offset, shape = list(a.offset), list(a.shape)
    for d in range(len(shape)):
        for pieces, begin, end in (
            (before, a.offset[d], common.offset[d]),
            (after, common.end[d], a.end[d]),
        ):
            if begin < end:
                pieces.append(Box((*offset[:d], begin, *offset[d + 1 :]), (*shape[:d], end - begin, *shape[d + 1 :])))
        offset[d], shape[d] = common.offset[d], common.shape[d]
    return before + after[::-1]


def first_hole(shape: Sequence[int], boxes: Sequence[Box]) -> Box | None:
    """A largest-possible box of the first elements that no box covers; None when all are covered."""
    remaining = [Box.whole(shape)] if prod(shape) else []
    for box in boxes:
        remaining = [piece for rest in remaining for piece in subtract(rest, box)]
    return min(remaining, default=None)


def find_overlap(offsets: Int64Array, shapes: Int64Array) -> tuple[int, int] | None:
    """Two rows whose boxes share an element; None when there are none. (n, ndim) arrays of non-empty boxes."""
    count, ndim = offsets.shape
    if count < 2:
        return None
    if ndim == 0:
        return 0, 1
    cuts = grid_cuts(offsets, shapes)
    if cuts is not None:  # Every box is one cell of a grid: only equal offsets can overlap.
        _, first, counts = np.unique(offsets, axis=0, return_index=True, return_counts=True)
        if counts.max() == 1:
            return None
        i = int(first[counts > 1][0])
        j = next(j for j in range(count) if j != i and (offsets[j] == offsets[i]).all())
        return min(i, j), max(i, j)
    order = np.lexsort(offsets.T[::-1])
    ends = offsets + shapes
    active: list[int] = []
    for i in map(int, order):
        active = [j for j in active if ends[j, 0] > offsets[i, 0]]
        if active:
            others = np.array(active)
            hit = ((offsets[others] < ends[i]) & (offsets[i] < ends[others])).all(axis=1)
            if hit.any():
                j = int(others[hit][0])
                return min(i, j), max(i, j)
        active.append(i)
    return None


def find_untiled(tensor: Int32Array, boxes: Int64Array, wholes: Int64Array) -> list[int]:
    """Which of many tensors of one number of dimensions their boxes do not tile, as rows of `wholes`, ascending.

    wholes: (t, ndim) global shapes. boxes: (n, 2 * ndim) offsets and shapes, non-empty and inside their tensors;
    tensor: (n,) rows of `wholes`, ascending. Sorted by offset in C order, too, it is found faster.
    """
    ndim = wholes.shape[1]
    start, size = first_elements(tensor, boxes, wholes), boxes[:, ndim:].prod(axis=1)
    # A box whose first and last elements are as far apart as it has elements is a range of the flattened tensor.
    last = start + ((boxes[:, ndim:] - 1) * strides_of(wholes)[tensor]).sum(axis=1)
    begins = np.flatnonzero(np.diff(tensor, prepend=-1))
    expected = np.zeros(len(tensor), np.int64)
    expected[1:] = (start + size)[:-1]
    expected[begins] = 0
    is_next = (start == expected) & (last - start + 1 == size)
    covered = np.zeros(len(wholes), np.int64)
    covered[tensor[begins]] = np.add.reduceat(size, begins) if len(begins) else 0
    in_sequence = np.ones(len(wholes), bool)
    in_sequence[tensor[~is_next]] = False
    is_full = covered == wholes.prod(axis=1)
    untiled = []
    edges = np.searchsorted(tensor, np.arange(len(wholes) + 1, dtype=np.int32)).tolist()
    for t in np.flatnonzero(~(is_full & in_sequence)).tolist():
        mine = boxes[edges[t] : edges[t + 1]]
        if not is_full[t] or not is_tiling(mine[:, :ndim], mine[:, ndim:], wholes[t].tolist()):
            untiled.append(t)
    return untiled


def strides_of(shapes: Int64Array) -> Int64Array:
    """(n, ndim) shapes of arrays in C order -> how many elements apart neighbours along each dimension lie."""
    strides = np.ones_like(shapes)
    strides[:, :-1] = shapes[:, :0:-1].cumprod(axis=1)[:, ::-1]
    return strides


def first_elements(tensor: Int32Array, boxes: Int64Array, wholes: Int64Array) -> Int64Array:
    """Where in its flattened tensor the first element of each box lies; arguments as in find_untiled, unsorted."""
    strides = strides_of(wholes)
    first = np.zeros(len(tensor), np.int64)
    for d in range(wholes.shape[1]):  # One dimension at a time: as few temporary columns as there can be.
        first += boxes[:, d] * strides[:, d][tensor]
    return first


def is_tiling(offsets: Int64Array, shapes: Int64Array, global_shape: Sequence[int]) -> bool:
    """Whether every element of a tensor is in exactly one of the boxes: (n, ndim) arrays of non-empty boxes inside it.

    Of a grid each cell must be there once. Other boxes are compared by corners: those of a box, with signs that
    alternate along each dimension, are the mixed difference of its indicator function, which determines that
    function. So the boxes tile the tensor if and only if the sums of their signed corners are those of the tensor.
    Time is n log n whatever the boxes are, 2 ** d corners a box.
    """
    whole = np.array(global_shape, np.int64)
    if not len(offsets) or int(shapes.prod(axis=1).sum()) != prod(global_shape):
        return prod(global_shape) == 0 and not len(offsets)
    cut = np.flatnonzero(((offsets != 0) | (shapes != whole)).any(axis=0)).tolist()
    grid = _grid_cells(offsets, shapes)
    if grid is not None:
        cuts, cells = grid
        return prod(map(len, cuts)) == len(offsets) == len(np.unique(_cell_numbers(cuts, cells)))
    if len(cut) > _MAX_CORNER_DIMS:
        return find_overlap(offsets, shapes) is None
    corner, sign = np.zeros(1, np.int64), np.ones(1, np.int64)
    corner, sign = np.tile(corner, len(offsets) + 1), np.append(np.tile(sign, len(offsets)), -1)
    for d in cut:
        low, high = np.append(offsets[:, d], 0), np.append(offsets[:, d] + shapes[:, d], whole[d])
        repeats = len(corner) // len(low)
        position = np.concatenate([np.tile(low, repeats), np.tile(high, repeats)])
        _, position = np.unique(position, return_inverse=True)
        _, corner = np.unique(np.tile(corner, 2) * (int(position.max()) + 1) + position, return_inverse=True)
        sign = np.concatenate([sign, -sign])
    return not np.bincount(corner, weights=sign).any()


_MAX_CORNER_DIMS = 8


def grid_cuts(offsets: Int64Array, shapes: Int64Array) -> list[Int64Array] | None:
    """The start offsets per dimension when every box is one cell of the grid they span, else None.

    Cells may be missing; the last cell of each dimension ends where its boxes end.
    """
    if len(offsets) > _MAX_KNOWN_BOXES:
        grid = _grid_cells(offsets, shapes)
        return None if grid is None else grid[0]
    cuts = _known_cuts(offsets.shape, offsets.tobytes(), shapes.tobytes())
    return None if cuts is None else [np.frombuffer(starts, np.int64) for starts in cuts]


_MAX_KNOWN_BOXES = 128


@lru_cache(maxsize=256)
def _known_cuts(shape: tuple[int, int], offsets: bytes, shapes: bytes) -> list[bytes] | None:
    """The same of few boxes: the tensors of a model are cut alike by the thousands."""
    grid = _grid_cells(*(np.frombuffer(boxes, np.int64).reshape(shape) for boxes in (offsets, shapes)))
    return None if grid is None else [starts.tobytes() for starts in grid[0]]


def _grid_cells(offsets: Int64Array, shapes: Int64Array) -> tuple[list[Int64Array], list[Int64Array]] | None:
    """The same, and per dimension which cell each box is."""
    cuts: list[Int64Array] = []
    cells: list[Int64Array] = []
    for d in range(offsets.shape[1]):
        starts, cell = np.unique(offsets[:, d], return_inverse=True)
        ends = offsets[:, d] + shapes[:, d]
        if not (np.append(starts[1:], ends.max())[cell] == ends).all():
            return None
        cuts.append(starts.astype(np.int64))
        cells.append(cell)
    return cuts, cells


def _cell_numbers(cuts: Sequence[Int64Array], cells: Sequence[Int64Array]) -> Int64Array:
    """Numbers of cells in C order, for a grid that has no more cells than an array can."""
    number = np.zeros(len(cells[0]) if cells else 1, np.int64)
    for starts, cell in zip(cuts, cells, strict=True):
        number = number * len(starts) + cell
    return number


def boxes_of(offsets: Int64Array, shapes: Int64Array) -> list[Box]:
    return [Box(tuple(o), tuple(s)) for o, s in zip(offsets.tolist(), shapes.tolist(), strict=True)]


def index_runs_boxes(runs: Sequence[Sequence[tuple[int, int]]]) -> Iterator[tuple[Box, Box]]:
    """(global box, local box) pairs of a local tensor whose dimension d is the concatenation of the global
    ranges runs[d] (start, stop): the product of the runs. Empty runs give nothing."""
    placed: list[list[tuple[int, int, int]]] = []
    for dimension in runs:
        position, row = 0, []
        for start, stop in dimension:
            if start < stop:
                row.append((start, position, stop - start))
                position += stop - start
        placed.append(row)
    for combination in product(*placed):
        shape = tuple(n for _, _, n in combination)
        yield Box(tuple(g for g, _, _ in combination), shape), Box(tuple(p for _, p, _ in combination), shape)
