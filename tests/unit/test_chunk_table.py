"""The chunk table: records round-trip in few bytes, and what does not tile its tensor is refused."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Sequence
from math import prod
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt import CorruptionError
from distckpt.chunk_table import (
    PAGE_BYTES,
    Boxes,
    Chunks,
    Grids,
    check_pages,
    decode_records,
    encode_record,
    encode_whole,
    page_checksums,
)
from distckpt.geometry import is_tiling

Shape = tuple[int, ...]


def chunks_of(boxes: Sequence[tuple[Shape, Shape]], ndim: int) -> Chunks:
    """Chunks of (offset, shape) boxes, in files and at starts that tell them apart."""
    offsets = np.array([o for o, _ in boxes], np.int64).reshape(len(boxes), ndim)
    shapes = np.array([s for _, s in boxes], np.int64).reshape(len(boxes), ndim)
    return Chunks(offsets, shapes, np.arange(len(boxes)) % 3, 4096 + 64 * np.arange(len(boxes)))


def decode_record(record: bytes, shape: Shape, *, where: str) -> Chunks:
    """All chunks of one record."""
    (group,) = decode_records(record, [(0, len(record))], [shape], ["w"], where=where)
    return all_of(group, 0, shape)


def all_of(group: Grids | Boxes, row: int, shape: Shape) -> Chunks:
    whole = np.array([shape], np.int64).reshape(1, len(shape))
    boxes = int(prod(shape) > 0)  # Nothing meets a box of nothing.
    hits = group.meeting(np.full(boxes, row), 0 * whole[:boxes], whole[:boxes])
    return Chunks(hits.offsets, hits.shapes, hits.files, hits.starts)


def described(chunks: Chunks) -> set[tuple[Shape, Shape, int, int]]:
    columns = (chunks.offsets.tolist(), chunks.shapes.tolist(), chunks.files.tolist(), chunks.starts.tolist())
    return {(tuple(o), tuple(s), f, at) for o, s, f, at in zip(*columns, strict=True)}


@st.composite
def grids(draw: st.DrawFn) -> tuple[Shape, list[tuple[Shape, Shape]]]:
    shape = tuple(draw(st.lists(st.integers(1, 9) | st.sampled_from([300, 7_000]), max_size=2)))
    shape += draw(st.sampled_from([(), (3,), (2**33,)]))
    pieces = []
    for n in shape:
        starts = sorted({0, *draw(st.lists(st.integers(0, n - 1), max_size=3))})
        pieces.append([(a, b - a) for a, b in zip(starts, [*starts[1:], n], strict=True)])
    boxes = [(tuple(o for o, _ in cell), tuple(n for _, n in cell)) for cell in itertools.product(*pieces)]
    return shape, draw(st.permutations(boxes))


@st.composite
def partitions(draw: st.DrawFn) -> tuple[Shape, list[tuple[Shape, Shape]]]:
    """Any boxes that tile a tensor: it is cut in two again and again."""
    shape = tuple(draw(st.lists(st.integers(1, 12) | st.just(2**20), min_size=1, max_size=3)))
    boxes = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 8))):
        offset, size = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        d = draw(st.integers(0, len(shape) - 1))
        if size[d] == 1:
            boxes.append((offset, size))
            continue
        cut = draw(st.integers(1, size[d] - 1))
        for at, n in ((0, cut), (cut, size[d] - cut)):
            boxes.append(((*offset[:d], offset[d] + at, *offset[d + 1 :]), (*size[:d], n, *size[d + 1 :])))
    return shape, boxes


@settings(deadline=None)
@given(grids() | partitions())
def test_records_round_trip(tensor: tuple[Shape, list[tuple[Shape, Shape]]]) -> None:
    shape, boxes = tensor
    chunks = chunks_of(boxes, len(shape))
    record = encode_record(chunks, shape)
    assert described(decode_record(record, shape, where="t")) == described(chunks)


@settings(deadline=None)
@given(grids())
def test_grids_take_few_bytes_a_chunk(tensor: tuple[Shape, list[tuple[Shape, Shape]]]) -> None:
    shape, boxes = tensor
    record = encode_record(chunks_of(boxes, len(shape)), shape)
    assert record[0] == 0
    assert len(record) <= 8 + len(shape) * (8 + 8 * len(boxes)) + 12 * len(boxes)


def test_a_large_grid_takes_about_twelve_bytes_a_chunk() -> None:
    cuts = range(0, 64 * 1024, 64)
    boxes = [((a, b), (64, 64)) for a in cuts for b in range(0, 256, 64)]
    shape = (64 * 1024, 256)
    assert len(encode_record(chunks_of(boxes, 2), shape)) / len(boxes) < 13.1


@pytest.mark.parametrize(("largest", "width"), [(255, 1), (256, 2), (65535, 2), (65536, 4), (2**32 - 1, 4), (2**32, 8)])
def test_integers_are_as_wide_as_the_largest_dimension_needs(largest: int, width: int) -> None:
    shape = (3, largest)
    record = encode_record(chunks_of([((0, 0), shape)], 2), shape)
    assert record[1] == width
    assert len(record) == 8 + 2 * (8 + width) + 12
    assert described(decode_record(record, shape, where="t")) == {((0, 0), shape, 0, 4096)}


def test_scalar_and_empty_tensors_have_records() -> None:
    scalar = chunks_of([((), ())], 0)
    assert described(decode_record(encode_record(scalar, ()), (), where="t")) == described(scalar)
    for shape in ((0,), (3, 0, 2)):
        record = encode_record(chunks_of([], len(shape)), shape)
        assert len(decode_record(record, shape, where="t")) == 0


Tensor = tuple[Shape, list[tuple[Shape, Shape]]]


@settings(deadline=None)
@given(st.lists(grids() | partitions(), max_size=6), st.randoms())
def test_many_records_are_decoded_at_once_and_wherever_they_lie(tensors: list[Tensor], random: Random) -> None:
    records = [encode_record(chunks_of(boxes, len(shape)), shape) for shape, boxes in tensors]
    order = random.sample(range(len(records)), len(records))
    data, places = b"?", {}
    for t in order:
        places[t] = (len(data), len(records[t]))
        data += records[t] + b"?" * random.randrange(3)
    found = {}
    every = [places[t] for t in range(len(records))]
    for group in decode_records(data, every, [s for s, _ in tensors], [str(t) for t in order], where="t"):
        for row, t in enumerate(group.tensors.tolist()):
            found[t] = described(all_of(group, row, tensors[t][0]))
    assert found == {t: described(chunks_of(boxes, len(shape))) for t, (shape, boxes) in enumerate(tensors)}


def test_the_record_that_is_wrong_is_named() -> None:
    good, bad = grid((0, 2), (0,)), grid((0, 3, 2), (0,))
    data = good + bad + good
    places = [(0, len(good)), (len(good), len(bad)), (len(good) + len(bad), len(good))]
    with pytest.raises(CorruptionError, match=r"^t: tensor 'b': chunk table record: cuts are not ascending"):
        decode_records(data, places, [(4, 4)] * 3, ["a", "b", "c"], where="t")


def test_boxes_are_compared_in_batches() -> None:
    """More chunks than are compared at a time, once for each of two boxes."""
    columns = np.arange(600_000)
    offsets = np.concatenate([np.stack([0 * columns, columns], 1), np.stack([1 + columns % 2, columns], 1)])
    shapes = np.concatenate(
        [np.stack([1 + columns % 2, 0 * columns + 1], 1), np.stack([2 - columns % 2, 0 * columns + 1], 1)]
    )
    files = np.arange(len(offsets))
    shape = (3, len(columns))
    data = encode_record(Chunks(offsets, shapes, files, files), shape)
    (group,) = decode_records(data, [(0, len(data))], [shape], ["w"], where="t")
    low = np.array([[0, 7], [0, 599_999], [2, 0]])
    hits = group.meeting(np.zeros(3, np.int64), low, np.array([[3, 8], [1, 600_000], [3, 2]]))
    assert hits.box.tolist() == [0, 0, 1, 2, 2]
    assert hits.files.tolist() == [7, 600_007, 599_999, 600_000, 600_001]


GOLDEN_GRID = (
    "00 01 0200 04000000"  # grid, one byte an integer, two dimensions, four chunks
    "0200000000000000 0200000000000000 00 03 00 02"
    "00000000 01000000 00000000 01000000"
    "0010000000000000 0010000000000000 0c10000000000000 1810000000000000"
)
GOLDEN_BOXES = (
    "01 02 0100 02000000"  # boxes, two bytes an integer, one dimension, two chunks
    "c800 0000 6400 c800"
    "07000000 00000000"
    "0010000000000000 0020000000000000"
)


def test_golden_record_of_a_grid() -> None:
    chunks = Chunks(
        np.array([[3, 2], [0, 0], [0, 2], [3, 0]]),
        np.array([[2, 4], [3, 2], [3, 4], [2, 2]]),
        np.array([1, 0, 1, 0]),
        np.array([0x1018, 0x1000, 0x1000, 0x100C]),
    )
    assert encode_record(chunks, (5, 6)).hex() == GOLDEN_GRID.replace(" ", "")


def test_golden_record_of_boxes() -> None:
    # One dimension is always a grid when written; boxes are read there too.
    chunks = decode_record(bytes.fromhex(GOLDEN_BOXES), (300,), where="t")
    assert described(chunks) == {((200,), (100,), 7, 0x1000), ((0,), (200,), 0, 0x2000)}
    three = chunks_of([((0, 0), (2, 2)), ((0, 2), (1, 1)), ((1, 2), (1, 1))], 2)
    assert encode_record(three, (2, 3)).hex() == (
        "01010200" + "03000000" + "0000" + "0002" + "0102" + "0202" + "0101" + "0101"
        "00000000" + "01000000" + "02000000" + "0010000000000000" + "4010000000000000" + "8010000000000000"
    )


def test_golden_trailer() -> None:
    records = bytes(range(256)) * 300
    trailer = page_checksums(records)
    assert trailer.hex() == "3daf24a265cbb19e"
    check_pages(records, 0, trailer, where="t")
    check_pages(records[PAGE_BYTES:], 1, trailer, where="t")
    assert page_checksums(b"") == b""


def test_a_damaged_page_is_named() -> None:
    records = bytearray(3 * PAGE_BYTES + 5)
    trailer = page_checksums(bytes(records))
    records[-1] ^= 1
    with pytest.raises(CorruptionError, match=r"chunks.bin, page 3: crc32c is .*, the trailer says"):
        check_pages(bytes(records[PAGE_BYTES:]), 1, trailer, where="chunks.bin")


# What is refused


def record(
    kind: int = 0,
    width: int = 1,
    ndim: int = 2,
    count: int = 4,
    *,
    lengths: Sequence[int] = (),
    numbers: Sequence[int] = (),
    places: int | None = None,
    extra: bytes = b"",
) -> bytes:
    """A record of the given parts; `places` chunks have a file and a start."""
    head = bytes([kind, width]) + ndim.to_bytes(2, "little") + count.to_bytes(4, "little")
    body = b"".join(n.to_bytes(8, "little") for n in lengths)
    body += b"".join((n % 256**width).to_bytes(width, "little") for n in numbers)
    n = count if places is None else places
    return head + body + b"".join(i.to_bytes(4, "little") for i in range(n)) + bytes(8 * n) + extra


def grid(*cuts: Sequence[int], width: int = 1, count: int | None = None) -> bytes:
    flat = [c for dimension in cuts for c in dimension]
    n = prod(len(c) for c in cuts) if count is None else count
    return record(0, width, len(cuts), n, lengths=[len(c) for c in cuts], numbers=flat)


def boxes(*pairs: tuple[Shape, Shape], width: int = 1) -> bytes:
    flat = [n for o, _ in pairs for n in o] + [n for _, s in pairs for n in s]
    return record(1, width, len(pairs[0][0]), len(pairs), numbers=flat)


@pytest.mark.parametrize(
    ("data", "shape", "why"),
    [
        (b"", (4, 4), "0 bytes are too few"),
        (grid((0,), (0,))[:7], (4, 4), "7 bytes are too few"),
        (grid((0, 2), (0,))[:-1], (4, 4), "expected"),
        (grid((0, 2), (0,)) + b"\0", (4, 4), "52 bytes, expected 51"),
        (boxes(((0, 0), (4, 4)))[:-1], (4, 4), "expected"),
        (boxes(((0, 0), (4, 4))) + b"\0", (4, 4), "25 bytes, expected 24"),
        (record(2, numbers=[0] * 16), (4, 4), "kind 2"),
        (grid((0,), (0,)).replace(b"\0\1", b"\0\3", 1), (4, 4), "width 3"),
        (grid((0,), (0,)).replace(b"\0\1", b"\0\0", 1), (4, 4), "width 0"),
        (grid((0,)), (4, 4), "1 dimensions for a tensor of 2"),
        (grid((0,), (0,), (0,)), (4, 4), "3 dimensions for a tensor of 2"),
        (grid((0, 2), (0,), count=3), (4, 4), r"\[2, 1\] cuts for 3 chunks"),
        (grid((), (0,)), (4, 4), ""),
        (grid((1,), (0,)), (4, 4), "cuts are not ascending from 0 to below 4"),
        (grid((0, 0), (0,)), (4, 4), "cuts are not ascending"),
        (grid((0, 3, 2), (0,)), (4, 4), "cuts are not ascending"),
        (grid((0, 4), (0,)), (4, 4), "cuts are not ascending from 0 to below 4"),
        (grid((0, 2**63), (0,), width=8), (4, 4), ""),
        (grid((0, 2**63 - 1, 2**63), (0,), width=8), (4, 4), ""),
        (grid((0,), (0,)), (4, 0), "cuts are not ascending from 0 to below 0"),
        (boxes(((0, 0), (4, 3))), (4, 4), "do not tile"),
        (boxes(((0, 0), (4, 2)), ((0, 1), (4, 2))), (4, 4), "do not tile"),
        (boxes(((0, 0), (4, 2)), ((0, 0), (4, 2))), (4, 4), "do not tile"),
        (boxes(((0, 0), (3, 2)), ((0, 2), (2, 2)), ((2, 1), (2, 3))), (4, 4), "do not tile"),
        (boxes(((0, 0), (4, 5))), (4, 4), "a box is empty or outside"),
        (boxes(((1, 0), (4, 4))), (4, 4), "a box is empty or outside"),
        (boxes(((0, 0), (4, 4)), ((4, 0), (0, 4))), (4, 4), "a box is empty or outside"),
        (boxes(((-1, 0), (5, 4)), width=8), (4, 4), "a box is empty or outside"),
        (boxes(((0, 0), (-4, -4)), width=8), (4, 4), "a box is empty or outside"),
        (boxes(((2**63 - 1, 0), (2**63 - 1, 4)), width=8), (4, 4), "a box is empty or outside"),
        (boxes(((0, 0), (4, 4))), (4, 0), "a box is empty or outside"),
        (record(1, 1, 2, 0), (4, 4), "do not tile"),
        (record(1, 1, 0, 2), (), "do not tile"),
        (record(0, 1, 0, 0), (), "cuts for 0 chunks"),
        (record(1, 1, 1, 1, numbers=[0, 0]), (0,), "a box is empty or outside"),
    ],
)
def test_hostile_record(data: bytes, shape: Shape, why: str) -> None:
    with pytest.raises(CorruptionError, match=f"^t: tensor 'w': chunk table record: .*{why}"):
        decode_record(data, shape, where="t")


@settings(deadline=None)
@given(st.data())
def test_boxes_are_good_exactly_when_each_element_is_in_one_of_them(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 3), max_size=3)))
    corner = st.tuples(
        *(st.integers(0, n - 1).flatmap(lambda a, n=n: st.tuples(st.just(a), st.integers(1, n - a))) for n in shape)
    )
    tiles = [
        (tuple(a for a, _ in c), tuple(n for _, n in c)) for c in data.draw(st.lists(corner, min_size=1, max_size=5))
    ]
    covered = np.zeros(shape, np.int64)
    for offset, size in tiles:
        covered[tuple(slice(a, a + n) for a, n in zip(offset, size, strict=True))] += 1
    assert is_tiling(
        *(np.array([t[i] for t in tiles], np.int64).reshape(len(tiles), len(shape)) for i in (0, 1)), shape
    ) == bool((covered == 1).all())


def test_very_many_boxes_that_all_meet_in_one_dimension_are_checked_without_comparing_pairs() -> None:
    columns = np.arange(50_000)
    cut = 1 + columns % 97
    offsets = np.concatenate([np.stack([0 * cut, columns], 1), np.stack([cut, columns], 1)])
    shapes = np.concatenate([np.stack([cut, 0 * cut + 1], 1), np.stack([100 - cut, 0 * cut + 1], 1)])
    count = len(offsets)
    chunks = Chunks(offsets, shapes, np.zeros(count, np.int64), np.zeros(count, np.int64))
    data = encode_record(chunks, (100, 50_000))
    assert data[0] == 1
    assert len(decode_record(data, (100, 50_000), where="t")) == count
    shapes[0, 0] += 1
    with pytest.raises(CorruptionError, match="do not tile"):
        decode_record(encode_record(chunks, (100, 50_000)), (100, 50_000), where="t")


def test_boxes_cut_in_very_many_dimensions_are_checked_too() -> None:
    shape = (2,) * 12
    half = [
        ((0,) * 12, (1, *shape[1:])),
        ((1, *(0,) * 11), (1, 1, *shape[2:])),
        ((1, 1, *(0,) * 10), (1, 1, *shape[2:])),
    ]
    for d in range(2, 11):
        offset, size = half.pop()
        half += [((*offset[:d], at, *offset[d + 1 :]), (*size[:d], 1, *size[d + 1 :])) for at in (0, 1)]
    assert len(decode_record(boxes(*half), shape, where="t")) == len(half)
    with pytest.raises(CorruptionError, match="do not tile"):
        decode_record(boxes(*half[:-1]), shape, where="t")


HUGE = [
    record(0, 1, 2, 2**32 - 1, lengths=(65535, 65537), numbers=[0] * 100, places=0),
    record(0, 1, 2, 4, lengths=(2**63, 2**63), numbers=[0], places=0),
    record(0, 1, 2, 0, lengths=(2**64 - 1, 0), numbers=[0], places=0),
    record(0, 8, 2, 2**32 - 1, lengths=(2**32 - 1, 1), numbers=[0], places=0),
    record(1, 8, 2, 2**32 - 1, numbers=[0] * 100, places=0),
    record(1, 1, 2, 2**31, numbers=[0] * 100, places=0),
    # Few bytes of cuts that would make very many cells; their places are missing.
    record(0, 2, 2, 40_000**2, lengths=(40_000, 40_000), numbers=[*range(40_000)] * 2, places=0),
]


@pytest.mark.parametrize("data", HUGE)
def test_huge_counts_are_refused_before_anything_is_allocated_for_them(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CorruptionError):
            decode_record(data, (50_000, 50_000), where="t")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=300, deadline=None)
@given(partitions() | grids(), st.data())
def test_random_changes_of_a_record_are_refused_or_tile(
    tensor: tuple[Shape, list[tuple[Shape, Shape]]], data: st.DataObject
) -> None:
    shape, tiles = tensor
    changed = bytearray(encode_record(chunks_of(tiles, len(shape)), shape))
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([0, 0, 0, 1, 12]))
    try:
        chunks = decode_record(bytes(changed[: len(changed) - cut]), shape, where="t")
    except CorruptionError:
        return
    assert int(chunks.shapes.prod(axis=1).sum()) == prod(shape)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (255,), (256, 3), (70_000, 2, 9), (2**33,)])
def test_record_of_one_chunk_is_that_of_a_grid_without_cuts(shape: tuple[int, ...]) -> None:
    whole = Chunks(
        np.zeros((1, len(shape)), np.int64),
        np.array([shape], np.int64).reshape(1, -1),
        np.array([3], np.int64),
        np.array([2**40 + 16], np.int64),
    )
    assert encode_whole(3, 2**40 + 16, shape) == encode_record(whole, shape)
