"""gather against slice assignment: parts of any size at any place, on any number of threads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt import _C

PATTERN = np.random.default_rng(5).integers(1, 256, 5 << 20, dtype=np.uint8)
# Around what memcpy copies, a cache line, and what a thread takes at a time.
SIZES = [0, 1, 63, 64, 8191, 8192, 8193, 8192 + 127, 100_000, (1 << 20) - 1, (1 << 20) + 1]


def gathered(parts: list[np.ndarray], size: int, offsets: list[int]) -> bytes:
    """What the target holds afterwards, by definition."""
    expected = np.zeros(size, np.uint8)
    for part, offset in zip(parts, offsets, strict=True):
        expected[offset : offset + len(part)] = part
    return expected.tobytes()


@settings(database=None, deadline=None, max_examples=100)
@given(
    sizes=st.lists(st.one_of(st.sampled_from(SIZES), st.integers(0, 200_000)), max_size=8),
    gaps=st.lists(st.integers(0, 5000), min_size=9, max_size=9),
    misaligned_by=st.integers(0, 130),
    order=st.randoms(use_true_random=False),
    threads=st.integers(1, 4),
)
def test_every_part_lies_at_its_offset_and_nothing_else_changes(sizes, gaps, misaligned_by, order, threads) -> None:
    parts, offsets, at = [], [], gaps[0]
    for size, gap in zip(sizes, gaps[1:], strict=False):
        parts.append(PATTERN[at % 999 : at % 999 + size])
        offsets.append(at)
        at += size + gap
    pairs = list(zip(parts, offsets, strict=True))
    order.shuffle(pairs)
    parts, offsets = [part for part, _ in pairs], [offset for _, offset in pairs]
    target = np.zeros(at + misaligned_by, np.uint8)[misaligned_by:]
    _C.gather(parts, target, offsets, threads=threads)
    assert target.tobytes() == gathered(parts, at, offsets)


@pytest.mark.parametrize("threads", [1, 2, 7, 1000])
def test_large_part_among_many_small_ones(threads: int) -> None:
    parts = [PATTERN[i : i + 100] for i in range(1000)]
    parts.insert(500, PATTERN)
    offsets = np.cumsum([0] + [len(part) for part in parts])
    target = np.zeros(offsets[-1] + 1, np.uint8)
    _C.gather(parts, target, offsets[:-1], threads=threads)
    assert target.tobytes() == b"".join(map(bytes, parts)) + b"\0"


def test_parts_of_any_type_are_bytes() -> None:
    target = bytearray(31)
    parts = (b"bytes", np.arange(2, dtype=np.float64), memoryview(b"abcd").cast("I"), _C.Memory(2), np.zeros((), "u4"))
    _C.gather(parts, target, (0, 5, 21, 25, 27))
    assert target == b"bytes" + np.arange(2, dtype=np.float64).tobytes() + b"abcd" + bytes(6)


@pytest.mark.parametrize("offsets", [[4, 0], (4, 0), np.array([4, 0]), [np.int32(4), True - 1]])
def test_offsets_are_integers_of_any_kind(offsets) -> None:
    target = bytearray(8)
    _C.gather([b"1234", b"5678"], target, offsets)
    assert target == b"56781234"


def test_parts_may_touch_and_be_the_same_memory() -> None:
    target = bytearray(8)
    _C.gather([PATTERN[:4], PATTERN[:4]], target, [0, 4])
    assert target == bytes(PATTERN[:4]) * 2


def test_no_parts_change_nothing() -> None:
    target = bytearray(b"same")
    _C.gather([], target, [])
    _C.gather([], bytearray(), np.zeros(0, np.int64))
    _C.gather([b"", np.zeros((0, 3))], target, [0, 4])
    assert target == b"same"


@pytest.mark.parametrize(
    ("sizes", "offsets"),
    [
        ([10, 10], [0, 91]),
        ([10, 10], [0, -1]),
        ([10, 101], [0, 0]),
        ([10, 10], [0, 101]),
        ([10, 0], [0, 101]),
        ([10, 0], [0, -1]),
        ([10, 10], [0, (1 << 63) - 5]),
        ([10, 10], [0, -(1 << 63)]),
    ],
)
def test_part_outside_the_target_is_refused_before_anything_is_copied(sizes: list[int], offsets: list[int]) -> None:
    target = np.zeros(100, np.uint8)
    with pytest.raises(ValueError, match=r"part 1, \d+ bytes at offset -?\d+, reaches outside the target of 100"):
        _C.gather([PATTERN[:size] for size in sizes], target, offsets)
    assert not target.any()


@pytest.mark.parametrize("offsets", [[0, 9, 20], [20, 0, 29], [5, 20, 5], [0, 50, 41]])
def test_parts_that_overlap_in_the_target_are_refused_before_anything_is_copied(offsets: list[int]) -> None:
    target = np.zeros(100, np.uint8)
    with pytest.raises(ValueError, match=r"parts \d and \d overlap in the target"):
        _C.gather([PATTERN[:10]] * 3, target, offsets)
    assert not target.any()


@pytest.mark.parametrize("part", [slice(91, 101), slice(239, 249), slice(150, 160), slice(90, 210)])
def test_part_that_shares_memory_with_the_target_is_refused_before_anything_is_copied(part: slice) -> None:
    memory = np.zeros(300, np.uint8)
    with pytest.raises(ValueError, match="part 1 overlaps the target"):
        _C.gather([PATTERN[:10], memory[part]], memory[100:240], [0, 20])
    assert not memory.any()


def test_memory_beside_the_target_is_a_part_like_any_other() -> None:
    memory = PATTERN[:300].copy()
    _C.gather([memory[:50], memory[250:]], memory[100:200], [0, 50])
    assert (memory[100:200] == np.concatenate([PATTERN[:50], PATTERN[250:300]])).all()


@pytest.mark.parametrize("offsets", [[], [0], [0, 20, 40], np.zeros(3, np.int64)])
def test_anything_but_one_offset_a_part_is_refused(offsets) -> None:
    target = np.zeros(100, np.uint8)
    with pytest.raises(ValueError, match=r"2 parts with \d offsets"):
        _C.gather([PATTERN[:10]] * 2, target, offsets)
    assert not target.any()


@pytest.mark.parametrize(
    "offsets",
    [np.zeros(1, np.int32), np.zeros(1, np.uint64), np.zeros(1), np.zeros((1, 1), np.int64), b"\0", [1 << 63], ["0"]],
)
def test_offsets_that_are_no_integers_of_64_bits_are_refused(offsets) -> None:
    with pytest.raises((ValueError, TypeError)):
        _C.gather([b"x"], bytearray(1), offsets)


def test_every_second_offset_of_an_array_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        _C.gather([b"x", b"y"], bytearray(2), np.arange(4)[::2])


@pytest.mark.parametrize("target", [bytes(4), np.zeros(8, np.uint8)[::2], None], ids=["read-only", "strided", "none"])
def test_target_that_cannot_be_filled_is_refused(target) -> None:
    with pytest.raises((ValueError, TypeError)):
        _C.gather([b"abcd"], target, [0])


@pytest.mark.parametrize("part", [np.zeros(8, np.uint8)[::2], None, "text"], ids=["strided", "none", "text"])
def test_part_that_is_no_memory_is_refused(part) -> None:
    target = bytearray(8)
    with pytest.raises((ValueError, TypeError)):
        _C.gather([b"abcd", part], target, [0, 4])
    assert target == bytes(8)


@pytest.mark.parametrize("threads", [0, -1, 1 << 63])
def test_no_threads_are_refused(threads: int) -> None:
    with pytest.raises(ValueError, match=r"threads|overflows"):
        _C.gather([b"a"], bytearray(1), [0], threads=threads)
