"""Differences of numbers: how far the elements of two arrays are apart, whatever their types are. Pure; no torch.

Of one type, elements differ if their bits do: -0.0 and 0.0 differ, by 0; NaNs of the same bits do not. Of two types
they differ if their values do, and NaN is like NaN. Distances are taken in float64, those of integers of 64 bits are
exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from distckpt.elements import FLOATS, Elements, view_elements
from distckpt.geometry import BoolArray, Int64Array
from distckpt.shard_file import DTYPES

Float64Array: TypeAlias = npt.NDArray[np.float64]
Uint8Array: TypeAlias = npt.NDArray[np.uint8]
Number: TypeAlias = int | float | tuple[float, float]  # A complex number is its two parts.

_SAME_ELEMENTS = 1 << 16  # whose bits are compared at a time
_PIECE_ELEMENTS = 1 << 13  # that are subtracted at a time: float64 of more would be fresh pages of memory every time
_COMPLEX = frozenset(("complex128", "complex64", "complex32"))
_WIDE_INTEGERS = frozenset(("int64", "uint64"))
_NO_NUMBERS = frozenset(("float4_e2m1fn_x2",))  # of which only the bytes are known


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Numbers are equal if they are at most atol + rtol * (the larger magnitude of the two) apart."""

    rtol: float = 0.0
    atol: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if not 0 <= value < np.inf:
                raise ValueError(f"{name}={value}: expected a number of at least 0")


@dataclass(slots=True)
class Differences:
    """What elements of two tensors that were compared so far differ by.

    differing: how many do. outside: how many of those by more than the tolerance; all of them if there is none. nans:
    how many of those because one is NaN, or both are, with other bits. max_abs, max_rel: over those that are not NaN;
    relative to the larger magnitude of the two; None where there are no numbers to subtract. first: the flat index of
    the first that is outside, and both elements. same_bits: whether all bytes are the same.
    """

    differing: int = 0
    outside: int = 0
    nans: int = 0
    max_abs: int | float | None = 0
    max_rel: float | None = 0.0
    first: tuple[int, Number, Number] | None = None
    same_bits: bool = True


def are_comparable(dtype_a: str, dtype_b: str) -> bool:
    """Whether elements of the two types can be compared: by bits, or as numbers."""
    return dtype_a == dtype_b or not {dtype_a, dtype_b} & _NO_NUMBERS


def add_differences(
    found: Differences,
    at: int,
    a: Uint8Array,
    b: Uint8Array,
    dtype_a: str,
    dtype_b: str,
    tolerance: Tolerance | None = None,
) -> None:
    """Compare the elements of two memories, of which the first has the flat index `at`, and add what is found.

    Every call goes on behind the one before. The memories hold equally many elements. dtype_a, dtype_b: as
    are_comparable() takes them.
    """
    is_one_type = dtype_a == dtype_b
    dtype_a, dtype_b = ("uint8" if dtype == "bool" else dtype for dtype in (dtype_a, dtype_b))  # Whatever bytes it has.
    items = [DTYPES[dtype].item_bytes for dtype in (dtype_a, dtype_b)]
    count = len(a) // items[0]
    if not is_one_type and count:
        found.same_bits = False
    step = _SAME_ELEMENTS if is_one_type else _PIECE_ELEMENTS
    for begin in range(0, count, step):
        stop = min(begin + step, count)
        part_a, part_b = (memory[begin * n : stop * n] for memory, n in zip((a, b), items, strict=True))
        if is_one_type:
            where = np.flatnonzero(_bits_differ(part_a, part_b, items[0]))
            if not len(where):
                continue
            found.same_bits = False
        else:
            where = np.flatnonzero(_values_differ(part_a, part_b, dtype_a, dtype_b))
        x, y = (
            view_elements(part.data, dtype, (stop - begin,)) for part, dtype in ((part_a, dtype_a), (part_b, dtype_b))
        )
        for first in range(0, len(where), _PIECE_ELEMENTS):
            some = where[first : first + _PIECE_ELEMENTS]
            _add(found, at + begin, some, x[some], y[some], (dtype_a, dtype_b), tolerance)


def _bits_differ(a: Uint8Array, b: Uint8Array, item_bytes: int) -> BoolArray:
    unit = min(item_bytes, 8)
    differ: BoolArray = np.not_equal(a.view(f"u{unit}"), b.view(f"u{unit}"))
    return differ if unit == item_bytes else np.any(differ.reshape(-1, item_bytes // unit), axis=1)


def _values_differ(a: Uint8Array, b: Uint8Array, dtype_a: str, dtype_b: str) -> BoolArray:
    dtypes = dtype_a, dtype_b
    x, y = (
        view_elements(memory.data, dtype, (len(memory) // DTYPES[dtype].item_bytes,))
        for memory, dtype in ((a, dtype_a), (b, dtype_b))
    )
    if _WIDE_INTEGERS.issuperset(dtypes):
        signed, unsigned = (x, y) if dtype_a == "int64" else (y, x)
        return np.less(signed, 0) | np.not_equal(signed.astype(np.uint64), unsigned)
    u, v = _alike(_numbers(x, dtype_a), _numbers(y, dtype_b))
    return _any_part((u != v) & ~(np.isnan(u) & np.isnan(v)))


def _add(
    found: Differences,
    at: int,
    where: Int64Array,
    x: Elements,
    y: Elements,
    dtypes: tuple[str, str],
    tolerance: Tolerance | None,
) -> None:
    """Elements that differ; `where`: their indices, counted from `at`."""
    found.differing += len(where)
    outside = np.ones(len(where), np.bool_)
    if _NO_NUMBERS & set(dtypes):
        found.max_abs = found.max_rel = None
    elif found.max_abs is not None and found.max_rel is not None:
        u, v = _alike(_numbers(x, dtypes[0]), _numbers(y, dtypes[1]))
        is_nan = _any_part(np.isnan(u) | np.isnan(v))
        if is_nan.any():
            u[is_nan] = v[is_nan] = 0.0
        size = np.maximum(_magnitudes(u), _magnitudes(v))
        distance = _magnitudes(_apart(u, v))
        largest: int | float = float(distance.max())
        if _WIDE_INTEGERS.issuperset(dtypes):
            distance, largest = _integers_apart(x, y)
        elif not (FLOATS | _COMPLEX) & set(dtypes):
            largest = int(largest)
        with np.errstate(invalid="ignore", divide="ignore"):
            relative = distance / size
        relative[distance == 0] = 0.0
        relative[np.isinf(distance)] = np.inf
        if tolerance is not None:
            limit = tolerance.atol + tolerance.rtol * np.where(np.isinf(size), 0.0, size)
            outside = is_nan | np.isinf(distance) | (distance > limit)
        found.nans += int(is_nan.sum())
        found.max_abs = max(found.max_abs, largest)
        found.max_rel = max(found.max_rel, float(relative.max()))
    found.outside += int(outside.sum())
    if found.first is None and outside.any():
        i = int(np.argmax(outside))
        found.first = at + int(where[i]), number_of(x[i], dtypes[0]), number_of(y[i], dtypes[1])


def _numbers(elements: Elements, dtype: str) -> Float64Array:
    """(n,) numbers, or (n, 2) parts of complex ones; a copy."""
    if dtype in _COMPLEX and elements.dtype.kind == "c":
        elements = elements.view(f"<f{elements.itemsize // 2}").reshape(-1, 2)
    with np.errstate(invalid="ignore"):  # Signalling NaNs.
        return elements.astype(np.float64)


def _alike(u: Float64Array, v: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Both with as many parts: a real number is a complex one whose other part is 0."""
    if u.ndim < v.ndim:
        u = np.stack([u, np.zeros_like(u)], axis=1)
    elif v.ndim < u.ndim:
        v = np.stack([v, np.zeros_like(v)], axis=1)
    return u, v


def _any_part(mask: BoolArray) -> BoolArray:
    return mask if mask.ndim == 1 else mask[:, 0] | mask[:, 1]


def _apart(u: Float64Array, v: Float64Array) -> Float64Array:
    with np.errstate(invalid="ignore", over="ignore"):
        apart = u - v
    apart[u == v] = 0.0  # Infinities of one sign.
    return apart


def _magnitudes(numbers: Float64Array) -> Float64Array:
    with np.errstate(over="ignore"):
        return np.abs(numbers) if numbers.ndim == 1 else np.hypot(numbers[:, 0], numbers[:, 1])


def _integers_apart(x: Elements, y: Elements) -> tuple[Float64Array, int]:
    """Distances of integers of 64 bits, and the largest, which float64 would round, exactly."""
    swapped: BoolArray = np.greater(y, x)
    first, second = x.astype(np.uint64), y.astype(np.uint64)  # Modulo 2**64, as are their differences.
    apart = np.where(swapped, second - first, first - second)
    if x.dtype == y.dtype:
        return apart.astype(np.float64), int(apart.max(initial=0))
    # A negative and an unsigned one may be 2**64 apart, or more: then what is left modulo 2**64 is less than either.
    signed, unsigned = (x, second) if x.dtype.kind == "i" else (y, first)
    is_more: BoolArray = np.less(signed, 0) & np.less(apart, unsigned)
    largest = int(apart[is_more].max(initial=0)) + (1 << 64) if is_more.any() else int(apart.max(initial=0))
    return apart.astype(np.float64) + np.where(is_more, 2.0**64, 0.0), largest


def number_of(element: np.generic | Elements, dtype: str) -> Number:
    """One element, as view_elements() has it, as Python's number: exact."""
    if dtype in _COMPLEX:
        parts = np.asarray(element)
        pair = (parts.real, parts.imag) if parts.dtype.kind == "c" else (parts[0], parts[1])
        return float(pair[0]), float(pair[1])
    if dtype in FLOATS:
        with np.errstate(invalid="ignore"):  # Signalling NaNs.
            return float(np.asarray(element, np.float64))
    return int(np.asarray(element))
