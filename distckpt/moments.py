"""Moments: mean, deviation, norm and extremes of numbers that come piece by piece. Pure; no torch.

Sums are float64. Pieces are joined pairwise (Chan, Golub and LeVeque, 1979), in units of a power of two that keeps
squares from overflowing or vanishing, so that neither many elements nor large ones spoil them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from distckpt.elements import Elements, numpy_dtype
from distckpt.number_differences import Float64Array

_PIECE_ELEMENTS = 1 << 13  # that are added at a time: float64 of more would be fresh pages of memory every time


@dataclass(slots=True)
class Moments:
    """Of the numbers that were added so far; of complex ones, of their magnitudes.

    zeros, nans, infinities: how many there are. The others are of finite numbers alone. smallest, largest: exact.
    unit: that of mean_units, and its square that of the sums of squares, from the mean and from zero.
    """

    count: int = 0
    zeros: int = 0
    nans: int = 0
    infinities: int = 0
    smallest: int | float | None = None
    largest: int | float | None = None
    finite: int = 0
    unit: float = 0.0
    mean_units: float = 0.0
    spread_units: float = 0.0
    squares_units: float = 0.0

    @property
    def mean(self) -> float | None:
        return self.mean_units * self.unit if self.finite else None

    @property
    def std(self) -> float | None:
        """Of all elements, not estimated from a sample: divided by how many there are."""
        return math.sqrt(self.spread_units / self.finite) * self.unit if self.finite else None

    @property
    def norm(self) -> float | None:
        """The Euclidean norm."""
        return math.sqrt(self.squares_units) * self.unit if self.finite else None


def add_numbers(moments: Moments, elements: Elements) -> None:
    """Add elements of one dimension, as view_elements() has them, of a type that are_numbers() knows."""
    for begin in range(0, len(elements), _PIECE_ELEMENTS):
        _add(moments, elements[begin : begin + _PIECE_ELEMENTS])


def are_numbers(dtype: str) -> bool:
    """Whether more is known of the elements of a type than their bytes."""
    return numpy_dtype(dtype) is not None or dtype == "complex32"


def _add(moments: Moments, elements: Elements) -> None:
    numbers = _real_numbers(elements)
    finite = numbers[np.isfinite(numbers)]
    moments.count += len(numbers)
    moments.zeros += int((numbers == 0).sum())
    moments.nans += int(np.isnan(numbers).sum())
    moments.infinities += int(np.isinf(numbers).sum())
    if not len(finite):
        return
    smallest: int | float = float(finite.min())
    largest: int | float = float(finite.max())
    if elements.dtype.kind in "iub":  # float64 would round those of 64 bits.
        smallest, largest = int(np.min(elements)), int(np.max(elements))
    moments.smallest = smallest if moments.smallest is None else min(moments.smallest, smallest)
    moments.largest = largest if moments.largest is None else max(moments.largest, largest)
    peak = float(np.abs(finite).max())
    unit = 2.0 ** min(max(math.frexp(peak)[1], -1000), 1000) if peak else 0.0
    if unit > moments.unit:
        _set_unit(moments, unit)
    _join(moments, finite / moments.unit if moments.unit else finite)


def _set_unit(moments: Moments, unit: float) -> None:
    ratio = moments.unit / unit
    moments.unit = unit
    moments.mean_units *= ratio
    moments.spread_units *= ratio * ratio
    moments.squares_units *= ratio * ratio


def _join(moments: Moments, scaled: Float64Array) -> None:
    mean = float(scaled.mean())
    count = moments.finite + len(scaled)
    apart = mean - moments.mean_units
    moments.spread_units += float(np.square(scaled - mean).sum()) + apart * apart * moments.finite * len(scaled) / count
    moments.mean_units += apart * len(scaled) / count
    moments.squares_units += float(np.square(scaled).sum())
    moments.finite = count


def _real_numbers(elements: Elements) -> Float64Array:
    """Magnitudes of complex numbers, others as they are."""
    with np.errstate(invalid="ignore", over="ignore"):  # Signalling NaNs.
        if elements.dtype.kind == "c":
            elements = elements.view(f"<f{elements.itemsize // 2}").reshape(-1, 2)
        numbers = elements.astype(np.float64)
        return np.hypot(numbers[:, 0], numbers[:, 1]) if numbers.ndim > 1 else numbers
