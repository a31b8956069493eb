"""Moments: what numpy says of all numbers at once, and no worse when there are many, or large ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt import moments
from distckpt.elements import numpy_dtype, view_elements
from distckpt.moments import Moments, add_numbers, are_numbers
from distckpt.shard_file import DTYPES


def moments_of(*parts: np.ndarray) -> Moments:
    found = Moments()
    for part in parts:
        add_numbers(found, part)
    return found


@given(st.lists(st.lists(st.floats(allow_subnormal=False), max_size=6), max_size=5))
def test_parts_have_the_moments_of_the_whole(parts: list[list[float]]) -> None:
    found = moments_of(*(np.array(part, np.float64) for part in parts))
    numbers = np.array([x for part in parts for x in part])
    finite = numbers[np.isfinite(numbers)]
    assert (found.count, found.finite) == (len(numbers), len(finite))
    assert (found.nans, found.infinities) == (np.isnan(numbers).sum(), np.isinf(numbers).sum())
    assert found.zeros == (numbers == 0).sum()
    if not len(finite):
        assert (found.mean, found.std, found.norm, found.smallest, found.largest) == (None,) * 5
        return
    assert (found.smallest, found.largest) == (finite.min(), finite.max())
    peak = float(np.abs(finite).max()) or 1.0
    scaled = [math.ldexp(x, -math.frexp(peak)[1]) for x in finite]  # So that numpy's sums do not overflow.
    unit = 2.0 ** math.frexp(peak)[1] if math.frexp(peak)[1] < 1024 else math.inf
    for mine, theirs in (
        (found.mean, np.mean(scaled)),
        (found.std, np.std(scaled)),
        (found.norm, np.linalg.norm(scaled)),
    ):
        assert mine is not None
        if math.isfinite(unit):
            assert mine == pytest.approx(theirs * unit, rel=1e-12, abs=1e-12 * peak)


def test_large_and_small_numbers_neither_overflow_nor_vanish() -> None:
    assert moments_of(np.array([3e200, 4e200])).norm == pytest.approx(5e200)
    assert moments_of(np.array([3e-200]), np.array([4e-200])).norm == pytest.approx(5e-200)
    assert moments_of(np.array([1e-300]), np.array([3e200, 4e200])).norm == pytest.approx(5e200)
    assert moments_of(np.array([1e200, 3e200])).std == pytest.approx(1e200)
    assert moments_of(np.array([1.7e308])).mean == pytest.approx(1.7e308)


def test_a_small_deviation_from_a_large_mean_is_kept() -> None:
    random = np.random.default_rng(0)
    numbers = 1e8 + random.normal(size=300_000)
    found = moments_of(*np.array_split(numbers, 7))
    assert found.std == pytest.approx(numbers.std(), rel=1e-9)
    assert found.mean == pytest.approx(numbers.mean(), rel=1e-15)


def test_half_precision_is_summed_in_double() -> None:
    numbers = np.full(200_000, 0.1, np.float16)
    found = moments_of(numbers)
    assert found.mean == pytest.approx(float(np.float16(0.1)), rel=1e-14)
    assert found.std == pytest.approx(0.0, abs=1e-12)


def test_extremes_of_integers_are_exact() -> None:
    found = moments_of(np.array([2**63 - 1, -(2**63), 2**63 - 2], np.int64))
    assert (found.smallest, found.largest) == (-(2**63), 2**63 - 1)
    found = moments_of(np.array([2**64 - 1, 2**64 - 2], np.uint64))
    assert (found.smallest, found.largest) == (2**64 - 2, 2**64 - 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_has_moments_or_says_that_it_has_none(dtype: str) -> None:
    assert are_numbers(dtype) == (dtype != "float4_e2m1fn_x2")
    if not are_numbers(dtype):
        return
    known = numpy_dtype(dtype)
    values = np.array([1, 0, 1, 1]) if dtype == "bool" else np.array([1, 2, 4, 2])
    data = values.astype(known) if known else np.stack([values, 0 * values], 1).astype(np.float16)
    found = moments_of(view_elements(data.tobytes(), dtype, (4,)))
    assert (found.smallest, found.largest, found.mean) == (values.min(), values.max(), values.mean())
    assert found.zeros == (values == 0).sum()


def test_complex_numbers_have_the_moments_of_their_magnitudes() -> None:
    for data, dtype in (
        (np.array([3 + 4j, 0, np.nan], np.complex64).tobytes(), "complex64"),
        (np.array([3, 4, 0, 0, np.nan, 0], np.float16).tobytes(), "complex32"),
    ):
        found = moments_of(view_elements(data, dtype, (3,)))
        assert (found.smallest, found.largest, found.norm, found.zeros, found.nans) == (0, 5, 5, 1, 1)


def test_pieces_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    whole = moments_of(numbers)
    monkeypatch.setattr(moments, "_PIECE_ELEMENTS", 13)
    parts = moments_of(numbers)
    assert parts.std == pytest.approx(whole.std, rel=1e-13)
    assert parts.norm == pytest.approx(whole.norm, rel=1e-13)
    assert (parts.smallest, parts.largest) == (whole.smallest, whole.largest)
