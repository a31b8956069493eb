"""How commands show numbers, shapes and counts of elements."""

from __future__ import annotations

import math
from collections.abc import Sequence

from distckpt.number_differences import Number


def number_text(number: Number, digits: int = 6) -> str:
    """0.0001234; 7; (1+2j) of two parts. digits: at most so many of what is no integer."""
    if isinstance(number, tuple):
        return f"({number[0]:.{digits}g}{number[1]:+.{digits}g}j)"
    return str(number) if isinstance(number, int) else f"{number:.{digits}g}"


def shape_text(shape: Sequence[int]) -> str:
    """[4096, 1024]."""
    return f"[{', '.join(map(str, shape))}]"


def count_text(count: int, shape: Sequence[int]) -> str:
    """How many of a tensor's elements, and which part of them."""
    total = math.prod(shape)
    if count == total:
        return f"{count} (all)"
    part = 100 * count / total
    return f"{count} ({f'{part:.1f}' if part >= 0.1 else f'{part:.1g}'} %)"


def json_number(value: object) -> object:
    """What is not finite as text: JSON has no word for it, and would lose it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return [json_number(one) for one in value] if isinstance(value, (tuple, list)) else value
