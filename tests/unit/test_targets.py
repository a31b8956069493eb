"""A region of Targets against numpy: any shape, any cut of the source into windows, any target strides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt import _C

ITEM_SIZES = (1, 2, 4, 8, 16)
MAX_63 = (1 << 63) - 1


@dataclass(frozen=True)
class Case:
    """A box of a C-ordered chunk of a file, and an array of the box's shape somewhere in a target."""

    chunk: np.ndarray  # The chunk's items.
    box: tuple[slice, ...]
    memory: np.ndarray  # One-dimensional bytes; the target's array is a view of it.
    target: np.ndarray
    chunk_start: int

    @property
    def item_size(self) -> int:
        return self.chunk.itemsize

    @property
    def source_strides(self) -> tuple[int, ...]:
        return self.chunk.strides

    @property
    def first_item(self) -> int:
        """File offset of the box's first item."""
        inside = sum(cut.start * stride for cut, stride in zip(self.box, self.source_strides, strict=True))
        return self.chunk_start + inside

    @property
    def target_start(self) -> int:
        return self.target.__array_interface__["data"][0] - self.memory.__array_interface__["data"][0]

    def copy(self, window: bytes | np.ndarray, window_start: int) -> int:
        target = self.memory, self.target_start
        strides = self.source_strides, self.target.strides
        region = (self.first_item, *target, self.target.shape, *strides, self.item_size)
        return _C.Targets([region]).copy_from(window, window_start)

    def items_inside(self, begin: int, end: int) -> np.ndarray:
        """Which items of the box lie wholly in [begin, end) of the file."""
        offsets = self.chunk_start + self.item_size * np.arange(self.chunk.size)
        inside = (offsets >= begin) & (offsets + self.item_size <= end)
        return inside.reshape(self.chunk.shape)[self.box]


def random_items(shape: tuple[int, ...], item_size: int, seed: int) -> np.ndarray:
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, item_size), dtype=np.uint8)
    return raw.view(f"V{item_size}").reshape(shape)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    item_size = draw(st.sampled_from(ITEM_SIZES))
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    cuts = []
    for size in shape:
        start = draw(st.integers(0, size))
        cuts.append(slice(start, draw(st.integers(start, size))))
    # The target: a box-shaped view of a larger array, its axes permuted, some of them stepped or reversed.
    box_shape = [cut.stop - cut.start for cut in cuts]
    axes = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from((1, 1, 2, 3, -1, -2))) for _ in shape]
    margins = [draw(st.integers(0, 2)) for _ in shape]
    stored_shape = [box_shape[a] * abs(steps[a]) + margins[a] for a in axes]
    before = draw(st.integers(0, 3))
    memory = np.full(before + math.prod(stored_shape) * item_size + 3, 0xA5, dtype=np.uint8)
    stored = memory[before : len(memory) - 3].view(f"V{item_size}").reshape(stored_shape)
    view = stored.transpose(np.argsort(axes)) if shape else stored
    for axis, (size, step) in enumerate(zip(box_shape, steps, strict=True)):
        selected = (slice(None),) * axis
        view = view[(*selected, slice(0, size * abs(step), abs(step)))]
        if step < 0:
            view = view[(*selected, slice(None, None, -1))]
    chunk = random_items(shape, item_size, draw(st.integers(0, 9)))
    return Case(chunk, tuple(cuts), memory, view, draw(st.integers(0, 100)))


def file_of(case: Case, tail: int = 20) -> np.ndarray:
    """The file's bytes: rubbish, the chunk, rubbish."""
    rubbish = np.random.default_rng(3).integers(0, 256, case.chunk_start + tail, dtype=np.uint8)
    chunk = np.frombuffer(case.chunk.tobytes(), np.uint8)
    return np.concatenate([rubbish[: case.chunk_start], chunk, rubbish[case.chunk_start :]])


@settings(database=None, deadline=None, max_examples=300)
@given(cases())
def test_window_around_everything_copies_the_box_and_nothing_else(case: Case) -> None:
    expected = case.memory.copy()
    place = np.ndarray(
        case.target.shape, case.target.dtype, expected.data, case.target_start if case.target.size else 0,
        case.target.strides,
    )  # fmt: skip
    place[...] = case.chunk[case.box]
    assert case.copy(file_of(case), 0) == case.target.size * case.item_size
    np.testing.assert_array_equal(case.memory, expected)


@settings(database=None, deadline=None, max_examples=300)
@given(cases(), st.data())
def test_window_copies_exactly_the_items_that_lie_wholly_in_it(case: Case, data: st.DataObject) -> None:
    file = file_of(case)
    begin = data.draw(st.integers(0, len(file)))
    end = data.draw(st.integers(begin, len(file)))
    before = case.target.copy()
    rest = case.memory.copy()
    inside = case.items_inside(begin, end)
    assert case.copy(file[begin:end], begin) == np.count_nonzero(inside) * case.item_size
    expected = np.where(inside, case.chunk[case.box], before)
    assert case.target.tobytes() == expected.tobytes()
    case.target[...] = before
    np.testing.assert_array_equal(case.memory, rest)


@settings(database=None, deadline=None, max_examples=200)
@given(cases(), st.data())
def test_windows_cut_at_items_in_any_order_copy_everything_once(case: Case, data: st.DataObject) -> None:
    file = file_of(case)
    items = case.chunk.size
    cuts = sorted({0, items, *data.draw(st.lists(st.integers(0, items), max_size=6))})
    edges = [case.chunk_start + cut * case.item_size for cut in cuts]
    windows = data.draw(st.permutations(list(pairwise(edges))))
    copied = sum(case.copy(file[begin:end], begin) for begin, end in windows)
    assert copied == case.target.size * case.item_size
    assert case.target.tobytes() == case.chunk[case.box].tobytes()


def copy(source=bytes(64), start=0, chunk=0, target=None, at=0, shape=(4, 4), strides=(16, 4), to=(16, 4), item=4):
    """One region, with defaults that fit; what a test names is wrong."""
    target = bytearray(64) if target is None else target
    return _C.Targets([(chunk, target, at, shape, strides, to, item)]).copy_from(source, start)


def test_scalar_is_one_item() -> None:
    target = bytearray(8)
    assert copy(b"xxabcdyy", 10, 12, target, 3, (), (), (), 4) == 4
    assert target == b"\0\0\0abcd\0"


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
def test_region_without_items_copies_nothing(shape: tuple[int, ...]) -> None:
    assert copy(b"", target=bytearray(), shape=shape, strides=(16,) * len(shape), to=(16,) * len(shape)) == 0


def test_window_beside_the_region_copies_nothing() -> None:
    target = bytearray(b"\xa5" * 64)
    assert copy(bytes(10), 1000, target=target) == 0
    assert copy(bytes(10), 0, 1000, target=target) == 0
    assert copy(b"", 8, target=target) == 0
    assert target == b"\xa5" * 64


def test_stride_zero_leaves_the_last_item() -> None:
    target = bytearray(4)
    assert copy(b"aaaabbbbcccc", target=target, shape=(3,), strides=(4,), to=(0,)) == 12
    assert target == b"cccc"


def test_strides_of_single_items_do_not_matter() -> None:
    target = bytearray(16)
    assert copy(bytes(range(16)), target=target, shape=(1, 4, 1), strides=(0, 4, -9), to=(MAX_63, 4, 7)) == 16
    assert target == bytes(range(16))


@pytest.mark.parametrize(
    "arguments",
    [
        {"target": bytearray(63)},
        {"at": 1},
        {"at": -1},
        {"to": (-16, 4)},
        {"to": (16, -4)},
        {"to": (17, 4)},
        {"at": MAX_63},
        {"to": (MAX_63, 4)},
        {"to": (-MAX_63, 4)},
        {"to": (1 << 63, 4)},
        {"to": (16, 4, 1)},
        {"strides": (16,)},
        {"strides": (15, 4)},
        {"strides": (-16, 4)},
        {"strides": (16, 3)},
        {"strides": (0, 4)},
        {"strides": (MAX_63, 4)},
        {"strides": (1 << 64, 4)},
        {"shape": (-1, 4)},
        {"shape": (4, 5)},
        {"shape": (1 << 40, 1 << 40)},
        {"shape": (MAX_63, MAX_63)},
        {"shape": (1 << 63, 4)},
        {"shape": (4,)},
        {"item": 0},
        {"item": -4},
        {"item": MAX_63},
        {"item": 1 << 63},
        {"start": -1},
        {"start": MAX_63},
        {"start": 1 << 63},
        {"chunk": -1},
        {"chunk": MAX_63},
        {"chunk": -(1 << 70)},
        {"target": bytes(64)},
    ],
    ids=str,
)
def test_argument_out_of_range_is_refused_before_memory_is_touched(arguments: dict[str, object]) -> None:
    target = bytearray(b"\xa5" * 64)
    with pytest.raises(ValueError, match=r"must|overflow|outside|writable"):
        copy(**{"target": target, **arguments})
    assert target == b"\xa5" * 64


@pytest.mark.parametrize("arguments", [{"item": 4.0}, {"shape": (4, "4")}, {"source": "text"}, {"shape": 4}], ids=str)
def test_argument_of_another_type_is_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(TypeError):
        copy(**arguments)
