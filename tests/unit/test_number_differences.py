"""Differences of numbers: what exact arithmetic says, for every type and across types."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt import number_differences
from distckpt.elements import convert, numpy_dtype, view_elements
from distckpt.number_differences import Differences, Tolerance, add_differences, are_comparable, number_of
from distckpt.shard_file import DTYPES

NUMBERS = sorted(DTYPES.keys() - {"float4_e2m1fn_x2"})
INTEGERS = [name for name in NUMBERS if "int" in name or name == "bool"]


def memory_of(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def differences(
    a: bytes, b: bytes, dtype_a: str, dtype_b: str | None = None, tolerance: Tolerance | None = None
) -> Differences:
    found = Differences()
    add_differences(found, 0, memory_of(a), memory_of(b), dtype_a, dtype_b or dtype_a, tolerance)
    return found


def of_values(
    a: Sequence[complex], b: Sequence[complex], dtype_a: str, dtype_b: str | None = None, **tolerance: float
) -> Differences:
    data = []
    for values, dtype in ((a, dtype_a), (b, dtype_b or dtype_a)):
        known = numpy_dtype(dtype)
        assert known is not None
        data.append(np.array(values, known).tobytes())
    return differences(data[0], data[1], dtype_a, dtype_b, Tolerance(**tolerance) if tolerance else None)


def numbers(data: bytes, dtype: str) -> list[tuple[float, float] | float | int]:
    return [number_of(x, dtype) for x in view_elements(data, dtype, (len(data) // DTYPES[dtype].item_bytes,))]


@given(st.data())
def test_every_type_is_compared_as_exact_arithmetic_says(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(NUMBERS))
    count, item_bytes = data.draw(st.integers(1, 6)), DTYPES[dtype].item_bytes
    bits = st.binary(min_size=item_bytes, max_size=item_bytes)
    if dtype == "bool":
        bits = st.sampled_from([b"\0", b"\1"])
    a = [data.draw(bits) for _ in range(count)]
    b = [data.draw(st.one_of(st.just(one), bits)) for one in a]
    found = differences(b"".join(a), b"".join(b), dtype)
    differing = [i for i in range(count) if a[i] != b[i]]
    assert found.differing == found.outside == len(differing)
    assert found.same_bits == (not differing)
    assert (found.first and found.first[0]) == (differing[0] if differing else None)
    x, y = numbers(b"".join(a), dtype), numbers(b"".join(b), dtype)
    parts = [[v if isinstance(v, tuple) else (v,) for v in (x[i], y[i])] for i in differing]
    is_nan = [any(math.isnan(v) for side in pair for v in side) for pair in parts]
    assert found.nans == sum(is_nan)
    apart = [_distance(*pair) for pair, nan in zip(parts, is_nan, strict=True) if not nan]
    assert found.max_abs == (pytest.approx(max(apart), rel=1e-15) if apart else 0)
    if apart and dtype in INTEGERS:
        assert isinstance(found.max_abs, int)
        assert found.max_abs == max(apart)


def _distance(x: Sequence[float], y: Sequence[float]) -> float | int:
    parts = [0 if u == v else u - v for u, v in zip(x, y, strict=True)]
    return abs(parts[0]) if len(parts) == 1 else math.hypot(*parts)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**64 - 1))
def test_integers_of_64_bits_and_a_sign_or_none_are_exactly_apart(signed: int, unsigned: int) -> None:
    for a, b, dtypes in (([signed], [unsigned], ("int64", "uint64")), ([unsigned], [signed], ("uint64", "int64"))):
        found = of_values(a, b, *dtypes)
        assert found.max_abs == abs(signed - unsigned)
        assert found.differing == (signed != unsigned)


def test_the_largest_of_many_differences_is_exact() -> None:
    found = of_values([2**63 - 1, 0, -(2**63)], [-(2**63), 7, 2**63 - 1], "int64")
    assert (found.max_abs, found.differing) == (2**64 - 1, 3)
    assert of_values([2**64 - 1], [2**64 - 2], "uint64").max_abs == 1


@given(
    st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=5),
    st.lists(st.floats(allow_nan=False, width=32), min_size=5, max_size=5),
    st.sampled_from([0.0, 1e-3, 0.5]),
    st.sampled_from([0.0, 1e-6, 10.0]),
)
def test_a_tolerance_is_that_of_its_definition(a: list[float], b: list[float], rtol: float, atol: float) -> None:
    b = b[: len(a)]
    found = of_values(a, b, "float32", rtol=rtol, atol=atol)
    outside = [
        i
        for i, (x, y) in enumerate(zip(a, b, strict=True))
        if math.isfinite(x) and math.isfinite(y)
        if x != y and not abs(Fraction(x) - Fraction(y)) <= atol + rtol * max(abs(x), abs(y))
    ]
    outside += [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y and math.inf in (abs(x), abs(y))]
    assert found.outside == len(outside)
    assert (found.first and found.first[0]) == (min(outside) if outside else None)


def test_zeros_of_two_signs_differ_by_bits_and_by_no_tolerance() -> None:
    found = of_values([0.0], [-0.0], "float32")
    assert (found.differing, found.outside, found.max_abs, found.max_rel) == (1, 1, 0.0, 0.0)
    assert of_values([0.0], [-0.0], "float32", atol=0.0).outside == 0


def test_nans_of_the_same_bits_are_the_same_and_others_are_counted() -> None:
    nans = np.array([0x7FC00000, 0x7FC00000, 0x7FC00001, 0x3F800000], np.uint32)
    others = np.array([0x7FC00000, 0x3F800000, 0x7FC00000, 0x7FC00000], np.uint32)
    found = differences(nans.tobytes(), others.tobytes(), "float32", tolerance=Tolerance(atol=1e9))
    assert (found.differing, found.outside, found.nans, found.max_abs) == (3, 3, 3, 0.0)
    assert found.first is not None
    assert found.first[0] == 1


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 0x7F800001), ("bfloat16", 0x7F81), ("float16", 0x7C01)])
def test_a_signalling_nan_is_a_nan_without_a_warning(dtype: str, bits: int) -> None:
    nan = bits.to_bytes(DTYPES[dtype].item_bytes, "little")
    found = differences(nan, bytes(len(nan)), dtype)
    assert (found.differing, found.nans) == (1, 1)
    assert found.first is not None
    assert math.isnan(found.first[1])  # type: ignore[arg-type]
    assert differences(nan, bytes(2), dtype, "int16").nans == 1


def test_infinities_are_apart_from_all_others_whatever_the_tolerance() -> None:
    found = of_values([np.inf, np.inf, 1.0], [np.inf, -np.inf, np.inf], "float32", rtol=10.0, atol=10.0)
    assert (found.differing, found.outside, found.max_abs, found.max_rel) == (2, 2, np.inf, np.inf)
    infinite = of_values([complex(np.inf, 1)], [complex(np.inf, 5)], "complex64", rtol=10.0)
    assert (infinite.max_abs, infinite.outside) == (4.0, 1)


@pytest.mark.parametrize("dtype_b", ["bfloat16", "float16", "float64", "complex64", "float8_e5m2"])
def test_tensors_of_two_types_are_compared_by_value(dtype_b: str) -> None:
    values = [0.5, -2.0, 0.0, 1.0]
    found = of_values(values, values, "float32", dtype_b)
    assert (found.differing, found.same_bits, found.first) == (0, False, None)
    found = of_values(values, [0.5, -2.0, 0.25, 2.0], "float32", dtype_b)
    assert (found.differing, found.max_abs, found.max_rel) == (2, 1.0, 1.0)
    nan = of_values([np.nan, np.nan], [np.nan, 1.0], "float32", dtype_b)
    assert (nan.differing, nan.nans) == (1, 1)


def test_what_rounding_took_is_the_difference() -> None:
    exact = np.array([1.001, 3.14159, -1e-3], np.float32)
    rounded = convert(exact, "bfloat16")
    found = differences(exact.tobytes(), rounded.tobytes(), "float32", "bfloat16")
    expected = np.abs(exact.astype(np.float64) - rounded.astype(np.float64))
    assert (found.differing, found.max_abs) == (3, expected.max())
    assert found.max_rel is not None
    assert 0 < found.max_rel < 2**-8


def test_bytes_of_no_numbers_are_counted_and_not_subtracted() -> None:
    found = differences(b"\x01\x02\x03", b"\x01\x04\x05", "float4_e2m1fn_x2")
    assert (found.differing, found.max_abs, found.max_rel, found.first) == (2, None, None, (1, 2, 4))
    assert not are_comparable("float4_e2m1fn_x2", "uint8")
    assert are_comparable("float4_e2m1fn_x2", "float4_e2m1fn_x2")


def test_a_bool_of_another_byte_is_seen() -> None:
    assert differences(b"\x00\x01", b"\x00\x02", "bool").first == (1, 1, 2)


def test_parts_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    a = random.normal(size=1000).astype(np.float32)
    b = np.where(random.random(1000) < 0.1, a * np.float32(1.5), a)
    whole = differences(a.tobytes(), b.tobytes(), "float32")
    monkeypatch.setattr(number_differences, "_PIECE_ELEMENTS", 7)
    monkeypatch.setattr(number_differences, "_SAME_ELEMENTS", 50)
    parts = Differences()
    for begin in range(0, 1000, 111):
        x, y = (memory_of(n[begin : begin + 111].tobytes()) for n in (a, b))
        add_differences(parts, begin, x, y, "float32", "float32")
    assert parts == whole
    assert whole.first is not None
    assert whole.first[0] == np.flatnonzero(a != b)[0]
    assert whole.differing == (a != b).sum()


@pytest.mark.parametrize("tolerance", [{"rtol": -1.0}, {"atol": math.nan}, {"rtol": math.inf}])
def test_a_tolerance_that_is_none_is_refused(tolerance: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected a number of at least 0"):
        Tolerance(**tolerance)
