"""Elements: every type a tensor may have is read as torch wrote it, and rounded as torch rounds."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distckpt.elements import FLOATS, can_convert, convert, numpy_dtype, view_elements
from distckpt.shard_file import DTYPES

TARGETS = sorted(FLOATS - {"float8_e8m0fnu"})


def torch_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def from_torch(tensor: torch.Tensor) -> np.ndarray:
    return view_elements(torch_bytes(tensor), str(tensor.dtype).removeprefix("torch."), tensor.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_has_elements_of_its_size(dtype: str) -> None:
    known = numpy_dtype(dtype)
    assert known is None or known.itemsize == DTYPES[dtype].item_bytes
    item_bytes = DTYPES[dtype].item_bytes
    elements = view_elements(bytes(range(6 * item_bytes)), dtype, (3, 2))
    assert elements.shape == ((3, 2, 2) if dtype == "complex32" else (3, 2))
    assert elements.tobytes() == bytes(range(6 * item_bytes))
    assert {name for name in DTYPES if numpy_dtype(name) is None} == {"complex32", "float4_e2m1fn_x2"}


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown dtype 'float12'"):
        numpy_dtype("float12")


@pytest.mark.parametrize("dtype", sorted(FLOATS))
def test_every_number_of_a_type_is_the_one_that_torch_reads(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16) if DTYPES[dtype].item_bytes > 1 else np.arange(256, dtype=np.uint8)
    count = bits.nbytes // DTYPES[dtype].item_bytes
    read = torch.from_numpy(bits.view(np.uint8)).view(getattr(torch, dtype)).double().numpy()
    with np.errstate(invalid="ignore"):  # Signalling NaNs.
        ours = view_elements(bits.tobytes(), dtype, (count,)).astype(np.float64)
    assert np.array_equal(ours, read, equal_nan=True)


@pytest.mark.parametrize("to_dtype", [name for name in TARGETS if name not in ("float64", "float8_e4m3fn")])
def test_float32_is_rounded_as_torch_rounds(to_dtype: str) -> None:
    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 32, 1 << 17, dtype=np.uint32)
    bits[::2] &= np.uint32(0xFFF8_0000)  # Many that lie half-way between two of a small type.
    bits[::3] = bits[::3] & np.uint32(0x807F_FFFF) | random.integers(100, 150, len(bits[::3])).astype(np.uint32) << 23
    numbers = bits.view(np.float32)
    converted = convert(numbers, to_dtype)
    expected = from_torch(torch.from_numpy(numbers).to(getattr(torch, to_dtype)))
    assert converted.dtype == numpy_dtype(to_dtype)
    same = converted.view(f"u{converted.itemsize}") == expected.view(f"u{converted.itemsize}")
    assert (same | (np.isnan(converted) & np.isnan(expected))).all()


def test_what_a_type_cannot_hold_is_not_finite() -> None:
    numbers = np.array([448.0, 464.0, 465.0, -1e6, np.inf, np.nan], np.float32)
    assert np.isfinite(convert(numbers, "float8_e4m3fn")).tolist() == [True, True, False, False, False, False]
    assert convert(np.array([1e39, -1e39]), "float32").tolist() == [np.inf, -np.inf]
    assert convert(np.array([3.4e38, -3.4e38]), "float16").tolist() == [np.inf, -np.inf]


@given(
    st.integers(-(1 << 53), 1 << 53),
    st.integers(-16, 16),
    st.sampled_from([-1, 0, 1]),
    st.sampled_from(["bfloat16", "float8_e5m2", "float8_e4m3fn", "float16"]),
)
def test_float64_is_rounded_once(mantissa: int, exponent: int, nudge: int, to_dtype: str) -> None:
    """Near the middle between two numbers of the type, which a detour over float32 would take for the middle."""
    dtype = numpy_dtype(to_dtype)
    assert dtype is not None
    below = convert(np.array([mantissa * 2.0 ** (exponent - 53)]), to_dtype)
    above = (below.view(f"u{dtype.itemsize}") + 1).view(dtype)
    ends = [float(below[0]), float(above[0])]
    if not np.isfinite(ends).all():
        return
    middle = np.array([(ends[0] + ends[1]) / 2])
    number = middle if nudge == 0 else np.nextafter(middle, np.inf * nudge)
    found = float(convert(number, to_dtype)[0])
    distances = [abs(Fraction(end) - Fraction(float(number[0]))) for end in ends]
    if distances[0] != distances[1]:
        assert found == ends[distances.index(min(distances))]
    else:
        assert found in ends
        assert convert(np.array([found]), to_dtype).view(f"u{dtype.itemsize}")[0] % 2 == 0


@pytest.mark.parametrize(
    ("array", "to_dtype"),
    [
        (np.zeros(2, np.int32), "float32"),
        (np.zeros(2, np.float32), "int32"),
        (np.zeros(2, np.float32), "float8_e8m0fnu"),
        (np.zeros(2, np.float32), "complex32"),
        (np.zeros(2, np.complex64), "float32"),
    ],
)
def test_what_is_no_floating_point_type_is_not_converted(array: np.ndarray, to_dtype: str) -> None:
    with pytest.raises(ValueError, match="only floating-point types"):
        convert(array, to_dtype)
    assert not can_convert(str(array.dtype), to_dtype)


def test_what_is_of_the_type_already_is_not_copied() -> None:
    array = np.zeros(2, np.float32)
    assert convert(array, "float32") is array
    assert can_convert("int32", "int32")


def test_a_tensor_without_dimensions_is_one_element() -> None:
    assert view_elements(np.float32(2).tobytes(), "float32", ()).tolist() == 2.0
    assert view_elements(bytes(4), "complex32", ()).shape == (2,)
