"""Elements: stored bytes as numpy arrays, of every type that a tensor may have, and rounding into others. No torch.

Decides which numpy type stands for an element type, and how numbers are rounded. What numpy has no type for is
ml_dtypes'; what neither knows stays parts that are known: a complex32 two float16, a pair of float4 its byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

from distckpt.shard_file import DTYPES

NumpyDType: TypeAlias = np.dtype[np.generic]
Elements: TypeAlias = npt.NDArray[np.generic]

_ML_DTYPES: Mapping[str, NumpyDType] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
_PARTS: Mapping[str, tuple[NumpyDType, tuple[int, ...]]] = {
    "complex32": (np.dtype("<f2"), (2,)),
    "float4_e2m1fn_x2": (np.dtype("u1"), ()),
}
FLOATS = frozenset(("float64", "float32", "float16", *_ML_DTYPES))
_SCALES = frozenset(("float8_e8m0fnu",))  # Powers of two alone: neither zero nor a sign.


def numpy_dtype(dtype: str) -> NumpyDType | None:
    """The numpy type, little-endian, of a name in DTYPES; None where neither numpy nor ml_dtypes has it.

    Raises ValueError for a name that is none.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if dtype in _PARTS:
        return None
    return _ML_DTYPES[dtype] if dtype in _ML_DTYPES else np.dtype(dtype).newbyteorder("<")


def is_of_numpy(dtype: str) -> bool:
    """Whether numpy has the type without ml_dtypes."""
    return numpy_dtype(dtype) is not None and dtype not in _ML_DTYPES


def view_elements(data: Buffer, dtype: str, shape: Sequence[int]) -> Elements:
    """Bytes, in C order, as an array of this shape that shares their memory.

    Where numpy_dtype() has none: a complex32 is a last dimension of two float16, a pair of float4 a uint8. Raises
    ValueError if there are not as many bytes.
    """
    known = numpy_dtype(dtype)
    numpy_type, trailing = _PARTS[dtype] if known is None else (known, ())
    elements: Elements = np.frombuffer(memoryview(data), np.uint8).view(numpy_type).reshape((*shape, *trailing))
    return elements


def can_convert(from_dtype: str, to_dtype: str) -> bool:
    """Whether convert() takes numbers of the one type to the other."""
    return from_dtype == to_dtype or (from_dtype in FLOATS and to_dtype in FLOATS - _SCALES)


def convert(array: Elements, to_dtype: str) -> Elements:
    """Floating-point numbers as those of another type: the nearest, of two as near the even one, rounded once.

    What the type cannot hold becomes an infinity, or NaN where it has none: compare what is finite before and after.
    An array that is of the type already is returned as it is. Raises ValueError for what is no floating-point type, and
    for float8_e8m0fnu, which has neither zero nor sign.
    """
    target = numpy_dtype(to_dtype)
    if target is not None and array.dtype == target:
        return array
    source = _name_of(array.dtype)
    if target is None or source is None or not can_convert(source, to_dtype):
        raise ValueError(f"cannot convert {array.dtype} to {to_dtype}: only floating-point types are converted")
    with np.errstate(over="ignore", invalid="ignore"):  # The caller looks at what came of it.
        if source == "float64" and to_dtype in _ML_DTYPES:
            array = _odd_float32(array)
        elif source == "float8_e8m0fnu":
            array = array.astype(np.float32)
        return array.astype(target)


def overflows(before: Elements, after: Elements) -> bool:
    """Whether numbers that were finite before they were converted are none any more."""
    return bool(np.count_nonzero(np.isfinite(before)) != np.count_nonzero(np.isfinite(after)))


def _name_of(dtype: NumpyDType) -> str | None:
    return next((name for name in FLOATS if numpy_dtype(name) == dtype), None)


def _odd_float32(array: Elements) -> Elements:
    """float64 as float32 rounded to odd: what is then rounded to far fewer digits is as if it was rounded once
    (Boldo and Melquiond, 2008)."""
    nearest = array.astype(np.float32)
    back = nearest.astype(np.float64)
    bits = nearest.view(np.uint32)
    is_inexact = np.isfinite(array) & (back != array)
    bits -= (is_inexact & (np.abs(back) > np.abs(array))).astype(np.uint32)  # Towards zero, from infinity too.
    bits |= is_inexact.astype(np.uint32)
    return nearest
