"""Differences of values: where two stored JSON values are not the same, and what stands there. Pure; no torch."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from distckpt.errors import CorruptionError
from distckpt.json_value import MAX_DEPTH, decode_value, is_container
from distckpt.number_differences import Tolerance


class ValueDifference(msgspec.Struct, frozen=True, kw_only=True):
    """A place where two stored values are not the same. path: key, and "/name" or "[number]" for each step into it.
    a, b: as JSON, in the tagged form in which they are stored; None where there is nothing on that side. coordinates:
    of a per-rank value, by mesh axis. problem: why they could not be compared.
    """

    path: str
    a: msgspec.Raw | None = None
    b: msgspec.Raw | None = None
    coordinates: dict[str, int] | None = None
    problem: str | None = None


def differing_paths(
    path: str, a: bytes, b: bytes, tolerance: Tolerance | None = None
) -> Iterator[tuple[str, msgspec.Raw | None, msgspec.Raw | None]]:
    """(path, a, b) of each place where two encoded values differ. Types count: 1 is not 1.0, nor a list a tuple.

    Numbers that are no integers may differ by the tolerance. Raises CorruptionError for what is no value.
    """
    if a == b:
        return
    for side, value in (("A", a), ("B", b)):
        if not is_container(value):
            decode_value(value, f"{path!r} in {side}")
    try:
        yield from _walk(path, msgspec.json.decode(a), msgspec.json.decode(b), tolerance, 0)
    except RecursionError as error:
        raise CorruptionError(f"{path!r}: not a stored value: {error}") from error


def _walk(
    path: str, a: object, b: object, tolerance: Tolerance | None, depth: int
) -> Iterator[tuple[str, msgspec.Raw | None, msgspec.Raw | None]]:
    if depth > 2 * MAX_DEPTH:
        raise RecursionError("nested too deep")
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() == b.keys() == {"%tuple"}:
            yield from _walk(path, a["%tuple"], b["%tuple"], tolerance, depth + 1)
            return
        if not any(key.startswith("%") for key in (*a, *b)):
            for key in dict.fromkeys((*a, *b)):
                inner = f"{path}/{key}"
                if key not in a or key not in b:
                    yield inner, _raw(a, key), _raw(b, key)
                else:
                    yield from _walk(inner, a[key], b[key], tolerance, depth + 1)
            return
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from _walk(f"{path}[{i}]", one, other, tolerance, depth + 1)
        return
    encoded = msgspec.json.encode(a), msgspec.json.encode(b)
    if encoded[0] != encoded[1] and not (tolerance is not None and _are_near(*encoded, tolerance)):
        yield path, msgspec.Raw(encoded[0]), msgspec.Raw(encoded[1])


def _raw(values: dict[str, object], key: str) -> msgspec.Raw | None:
    return msgspec.Raw(msgspec.json.encode(values[key])) if key in values else None


def _are_near(a: bytes, b: bytes, tolerance: Tolerance) -> bool:
    if is_container(a) or is_container(b):
        return False
    x, y = decode_value(a, "A"), decode_value(b, "B")
    if type(x) is not type(y) or not isinstance(x, float | np.floating) or not isinstance(y, float | np.floating):
        return False
    apart, size = abs(float(x) - float(y)), max(abs(float(x)), abs(float(y)))
    return bool(apart < np.inf and apart <= tolerance.atol + tolerance.rtol * size)
