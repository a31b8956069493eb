"""Boxes against brute force: sets of the elements they hold."""

from __future__ import annotations

from itertools import pairwise, product
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.geometry import (
    Box,
    bands,
    boxes_of,
    find_overlap,
    find_untiled,
    first_hole,
    flat_range_boxes,
    grid_cuts,
    index_runs_boxes,
    intersect,
    subtract,
)

PATIENT = settings(deadline=None)
Elements = set[tuple[int, ...]]


def elements(box: Box) -> list[tuple[int, ...]]:
    """In C order."""
    return list(product(*(range(o, e) for o, e in zip(box.offset, box.end, strict=True))))


def columns(boxes: list[Box], ndim: int) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.array([b.offset for b in boxes], np.int64).reshape(len(boxes), ndim)
    return offsets, np.array([b.shape for b in boxes], np.int64).reshape(len(boxes), ndim)


shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...], *, empty: bool = True) -> Box:
    offset, extent = [], []
    for n in shape:
        a = draw(st.integers(0, n if empty else n - 1))
        b = draw(st.integers(a if empty else a + 1, n))
        offset.append(a)
        extent.append(b - a)
    return Box(tuple(offset), tuple(extent))


@st.composite
def many_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    shape = draw(shapes)
    return shape, draw(st.lists(boxes_in(shape, empty=False), max_size=8))


@st.composite
def grids_with_missing_cells(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    shape = draw(shapes)
    cells = []
    for n in shape:
        cuts = [0, *sorted(draw(st.sets(st.integers(1, n - 1)))), n] if n > 1 else [0, n]
        cells.append([(a, b - a) for a, b in pairwise(cuts)])
    grid = [Box(tuple(o for o, _ in cell), tuple(s for _, s in cell)) for cell in product(*cells)]
    kept = draw(st.lists(st.sampled_from(grid), min_size=1, unique=True))
    return shape, kept


@st.composite
def flat_ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = draw(shapes)
    start = draw(st.integers(0, prod(shape)))
    return shape, start, draw(st.integers(start, prod(shape)))


# Box


def test_a_box_without_dimensions_holds_one_element() -> None:
    assert Box((), ()).size == 1
    assert Box.whole(()) == Box((), ())
    assert Box((), ()).is_inside(())


@pytest.mark.parametrize(("offset", "shape"), [((0,), (1, 2)), ((-1,), (1,)), ((0,), (-1,)), ((), (1,))])
def test_a_box_that_is_none_is_refused(offset: tuple[int, ...], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="box with"):
        Box(offset, shape)


def test_a_box_reads_as_slices() -> None:
    assert str(Box((0, 3), (2, 4))) == "[0:2, 3:7]"


def test_inside_means_every_dimension_and_their_number() -> None:
    assert Box((1, 0), (2, 3)).is_inside((3, 3))
    assert not Box((2, 0), (2, 3)).is_inside((3, 3))
    assert not Box((0,), (2,)).is_inside((3, 3))


# Two boxes


@PATIENT
@given(st.data())
def test_intersect_is_what_both_have(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    a, b = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    common = intersect(a, b)
    assert (set(elements(common)) if common else set()) == set(elements(a)) & set(elements(b))
    assert common is None or common.size > 0
    assert intersect(b, a) == common


@PATIENT
@given(st.data())
def test_subtract_is_disjoint_complete_and_in_order(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    a, b = data.draw(boxes_in(shape, empty=False)), data.draw(boxes_in(shape))
    pieces = subtract(a, b)
    found = [e for piece in pieces for e in elements(piece)]
    assert len(found) == len(set(found))
    assert set(found) == set(elements(a)) - set(elements(b))
    assert pieces == sorted(pieces)
    assert len(pieces) <= 2 * len(shape)


# Holes and overlaps


@PATIENT
@given(many_boxes())
def test_first_hole_starts_at_the_first_element_that_is_not_covered(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = case
    missing = set(elements(Box.whole(shape))) - {e for box in boxes for e in elements(box)}
    hole = first_hole(shape, boxes)
    if hole is None:
        assert not missing
    else:
        assert hole.offset == min(missing)
        assert set(elements(hole)) <= missing


@given(st.data())
def test_bands_are_the_elements_of_a_box_in_order(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    box, most = data.draw(boxes_in(shape, empty=False)), data.draw(st.integers(-1, 40))
    found = list(bands(box, most))
    assert [element for band in found for element in elements(band)] == elements(box)
    assert all(band.size <= max(1, most) for band in found)
    other = data.draw(boxes_in(shape, empty=False))
    order = {element: i for i, element in enumerate(elements(other))}
    for band in bands(Box.whole(shape), most):
        inside = [order[element] for element in elements(band) if element in order]
        assert inside == list(range(min(inside, default=0), min(inside, default=0) + len(inside)))


def test_first_hole_of_whole_rows_is_one_box() -> None:
    assert first_hole((8, 3), [Box((0, 0), (2, 3)), Box((5, 0), (3, 3))]) == Box((2, 0), (3, 3))


def test_a_tensor_without_elements_has_no_hole() -> None:
    assert first_hole((3, 0), []) is None


def check_overlap(shape: tuple[int, ...], boxes: list[Box]) -> None:
    pairs = {(i, j) for j in range(len(boxes)) for i in range(j) if set(elements(boxes[i])) & set(elements(boxes[j]))}
    found = find_overlap(*columns(boxes, len(shape)))
    assert (found is not None) == bool(pairs)
    assert found is None or found in pairs


@PATIENT
@given(many_boxes())
def test_overlaps_of_any_boxes_are_found(case: tuple[tuple[int, ...], list[Box]]) -> None:
    check_overlap(*case)


@PATIENT
@given(grids_with_missing_cells(), st.data())
def test_cells_of_a_grid_do_not_overlap_unless_one_comes_twice(
    case: tuple[tuple[int, ...], list[Box]], data: st.DataObject
) -> None:
    shape, cells = case
    assert find_overlap(*columns(cells, len(shape))) is None
    twice = data.draw(st.integers(0, len(cells) - 1))
    at = data.draw(st.integers(0, len(cells)))
    check_overlap(shape, [*cells[:at], cells[twice], *cells[at:]])


@PATIENT
@given(grids_with_missing_cells(), st.data())
def test_a_box_among_cells_of_a_grid_is_found(case: tuple[tuple[int, ...], list[Box]], data: st.DataObject) -> None:
    shape, cells = case
    check_overlap(shape, [*cells, data.draw(boxes_in(shape, empty=False))])


@PATIENT
@given(st.data())
def test_boxes_of_flat_ranges_overlap_where_the_ranges_do(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    bounds = st.integers(0, prod(shape))
    ranges = data.draw(st.lists(st.tuples(bounds, bounds).map(sorted), max_size=4))
    check_overlap(shape, [box for start, stop in ranges for box in flat_range_boxes(shape, start, stop)])


@PATIENT
@given(grids_with_missing_cells())
def test_boxes_of_any_flat_cuts_of_a_grid_tile_it(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, cells = case
    boxes = [
        Box(tuple(o + i for o, i in zip(cell.offset, piece.offset, strict=True)), piece.shape)
        for cell in cells
        for start, stop in ((0, cell.size // 3), (cell.size // 3, cell.size))
        for piece in flat_range_boxes(cell.shape, start, stop)
    ]
    check_overlap(shape, boxes)
    assert {e for box in boxes for e in elements(box)} == {e for cell in cells for e in elements(cell)}


# Grids


@PATIENT
@given(grids_with_missing_cells())
def test_cells_of_a_grid_have_cuts(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, cells = case
    cuts = grid_cuts(*columns(cells, len(shape)))
    starts = [sorted({cell.offset[d] for cell in cells}) for d in range(len(shape))]
    if cuts is not None:
        assert [c.tolist() for c in cuts] == starts
    complete = sum(cell.size for cell in cells) == prod(shape)
    assert cuts is not None or not complete


@PATIENT
@given(many_boxes().filter(lambda case: len(case[1]) > 0))
def test_boxes_with_cuts_lie_between_them(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = case
    cuts = grid_cuts(*columns(boxes, len(shape)))
    for d in range(len(shape)):
        starts = sorted({b.offset[d] for b in boxes})
        following = dict(zip(starts, [*starts[1:], max(b.end[d] for b in boxes)], strict=True))
        fits = all(b.end[d] == following[b.offset[d]] for b in boxes)
        assert cuts is None or fits
        if not fits:
            assert cuts is None


def test_uneven_cells_have_cuts_and_two_lengths_from_one_start_have_none() -> None:
    uneven = [Box((0, 0), (1, 5)), Box((1, 0), (3, 5))]
    cuts = grid_cuts(*columns(uneven, 2))
    assert cuts is not None
    assert [c.tolist() for c in cuts] == [[0, 1], [0]]
    assert grid_cuts(*columns([Box((0,), (1,)), Box((0,), (2,)), Box((2,), (1,))], 1)) is None


@PATIENT
@given(many_boxes())
def test_boxes_of_gives_the_boxes_back(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = case
    assert boxes_of(*columns(boxes, len(shape))) == boxes


# Flat ranges


@PATIENT
@given(flat_ranges())
def test_a_flat_range_is_few_boxes_in_its_own_order(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    boxes = flat_range_boxes(shape, start, stop)
    everything = elements(Box.whole(shape))
    assert [e for box in boxes for e in elements(box)] == everything[start:stop]
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert all(box.size for box in boxes)


def test_most_boxes_of_a_flat_range_in_four_dimensions() -> None:
    assert len(flat_range_boxes((4, 4, 4, 4), 1 + 4 + 16 + 64, 256 - 1 - 4 - 16)) == 7


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 7)])
def test_a_flat_range_outside_the_tensor_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=rf"flat range {start}:{stop} is not inside a tensor of shape \(2, 3\)"):
        flat_range_boxes((2, 3), start, stop)


# Runs


@PATIENT
@given(st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)).map(sorted), max_size=3), max_size=3))
def test_runs_place_every_local_element_at_its_index(ranges: list[list[list[int]]]) -> None:
    """Runs of a dimension may touch but not overlap: shift each behind the ones before it."""
    runs = [[(10 * i + a, 10 * i + b) for i, (a, b) in enumerate(dimension)] for dimension in ranges]
    local = list(product(*([n for a, b in dimension for n in range(a, b)] for dimension in runs)))
    shape = tuple(sum(b - a for a, b in dimension) for dimension in runs)
    expected = dict(zip(elements(Box.whole(shape)), local, strict=True))
    found = {
        here: there
        for outer, inner in index_runs_boxes(runs)
        for here, there in zip(elements(inner), elements(outer), strict=True)
    }
    assert found == expected


@settings(deadline=None)
@given(st.data())
def test_untiled_tensors_are_those_that_their_boxes_do_not_tile(data: st.DataObject) -> None:
    """Of several tensors at once, as of each alone: flat ranges, grids, any other boxes, and boxes missing."""
    ndim = data.draw(st.integers(0, 3))
    wholes, rows = [], []
    for t in range(data.draw(st.integers(1, 4))):
        whole = data.draw(st.tuples(*[st.integers(0, 4)] * ndim))
        wholes.append(whole)
        boxes = [Box.whole(whole)] if prod(whole) else []
        for _ in range(data.draw(st.integers(0, 4)) if boxes and ndim else 0):
            box = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
            d = data.draw(st.integers(0, ndim - 1))
            cut = data.draw(st.integers(1, box.shape[d] - 1)) if box.shape[d] > 1 else 0
            for at, n in ((0, cut), (cut, box.shape[d] - cut)):
                offset, shape = list(box.offset), list(box.shape)
                offset[d], shape[d] = offset[d] + at, n
                boxes += [Box(tuple(offset), tuple(shape))] if n else []
        change = data.draw(st.sampled_from(["none", "none", "drop", "twice"])) if boxes else "none"
        if change != "none":
            i = data.draw(st.integers(0, len(boxes) - 1))
            boxes[i : i + 1] = [] if change == "drop" else [boxes[i], data.draw(st.sampled_from(boxes))]
        rows += [(t, *box.offset, *box.shape) for box in sorted(boxes)]
    table = np.array(rows, np.int64).reshape(len(rows), 1 + 2 * ndim)
    expected = []
    for t, whole in enumerate(wholes):
        covered = np.zeros(whole, np.int64)
        for row in table[table[:, 0] == t, 1:]:
            covered[tuple(slice(a, a + n) for a, n in row.reshape(2, ndim).T.tolist())] += 1
        expected += [] if bool((covered == 1).all()) else [t]
    shapes = np.array(wholes, np.int64).reshape(len(wholes), ndim)
    assert find_untiled(table[:, 0].astype(np.int32), table[:, 1:], shapes) == expected
