"""Extents: held against sets of bytes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distckpt.extents import Extents

ranges = st.tuples(st.integers(0, 30), st.integers(1, 10)).map(lambda one: (one[0], one[0] + one[1]))


def columns(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    array = np.array(pairs, np.int64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


@given(st.lists(ranges), st.lists(st.tuples(st.integers(0, 45), st.integers(0, 45)).map(sorted)))
def test_bytes_are_counted_once_each(given_ranges: list[tuple[int, int]], asked: list[list[int]]) -> None:
    extents = Extents.joined(*columns(given_ranges))
    inside = {byte for low, high in given_ranges for byte in range(low, high)}
    assert (extents.lows[1:] > extents.highs[:-1]).all()
    begin, stop = columns([(one[0], one[1]) for one in asked])
    expected = [len(inside & set(range(*one))) for one in asked]
    assert extents.bytes_in(begin, stop).tolist() == expected
