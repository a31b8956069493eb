"""Python values as JSON and back, type for type. Decides how tuples, bytes, NaN and the like are written.

Plain JSON values are themselves. Whatever JSON has no word for is an object with one key that starts with "%":
tuple, dict with other than string keys, Counter, bytes, large integer, NaN or infinity, complex, NumPy scalar, array.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import msgspec
import numpy as np

from distckpt.errors import CorruptionError, UnsupportedTypeError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

MAX_DEPTH = 200
_MAX_DIMS = 32
_MAX_DIGITS = 4000  # hexadecimal, with the sign and "0x"
_NUMPY_SCALARS = frozenset(
    ["bool", "float16", "float32", "float64", "complex64", "complex128"]
    + [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
)  # Not long double, whose bytes are another machine's noise.


EMPTY_DICT = b"{}"
# In place of a list or tuple that has tensors in it, and leaves of its own: its length. Not values.
LIST_MARKER, TUPLE_MARKER = b'{"%list":', b'{"%tuple_of":'


def is_container(value: bytes) -> bool:
    """Whether an encoded value only marks an empty dict, or a list that has tensors in it."""
    return value.startswith((EMPTY_DICT, LIST_MARKER, TUPLE_MARKER))


def is_empty_list(value: bytes) -> bool:
    """Whether an encoded value is a list or tuple of nothing."""
    return value in (b"[]", b'{"%tuple":[]}')


@dataclass(frozen=True, slots=True)
class ArrayValue:
    """A small tensor inside a value: dtype by its table name, shape, little-endian C-order bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def encode_value(value: object, where: str) -> bytes:
    """JSON text. Raises UnsupportedTypeError naming `where` and the type for what would not come back as it was."""
    return msgspec.json.encode(_to_json(value, where, 0))


def decode_value(text: bytes, where: str) -> object:
    """The value again. Raises CorruptionError for anything `encode_value` does not write."""
    try:
        return _from_json(msgspec.json.decode(text), 0)
    except (msgspec.DecodeError, ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise CorruptionError(f"{where}: not a stored value: {error}") from error


def _to_json(value: object, where: str, depth: int) -> Json:
    if depth > MAX_DEPTH:
        raise UnsupportedTypeError(f"{where!r}: nested more than {MAX_DEPTH} deep (or containing itself)")
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return _checked_text(value, where) if isinstance(value, str) else value  # type: ignore[return-value]
    if isinstance(value, int) and kind is int:
        return value if -(2**63) <= value < 2**63 else {"%int": _hex(value, where)}
    if isinstance(value, float) and kind is float:
        return value if math.isfinite(value) else {"%float": str(value)}
    if isinstance(value, list) and kind is list:
        return [_to_json(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
    if kind is dict or kind is OrderedDict:
        return _dict_to_json(value, where, depth)  # type: ignore[arg-type]
    if isinstance(value, Counter):
        return {"%counter": _dict_to_json(dict(value), where, depth)}
    if isinstance(value, tuple) and kind is tuple:
        return {"%tuple": [_to_json(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]}
    if isinstance(value, (bytes, bytearray)):
        return {"%bytearray" if kind is bytearray else "%bytes": base64.b64encode(value).decode()}
    if isinstance(value, complex) and kind is complex:
        return {"%complex": [_to_json(value.real, where, depth), _to_json(value.imag, where, depth)]}
    if isinstance(value, np.generic) and value.dtype.name in _NUMPY_SCALARS:
        little = value.astype(value.dtype.newbyteorder("<"))
        return {"%numpy": [value.dtype.name, base64.b64encode(little.tobytes()).decode()]}
    if isinstance(value, ArrayValue):
        return {"%array": [value.dtype, list(value.shape), base64.b64encode(value.data).decode()]}
    raise UnsupportedTypeError(
        f"{where!r}: a {kind.__module__}.{kind.__qualname__} cannot be stored so that it comes back as it was; "
        f"store tensors, numbers, strings, bytes, lists, tuples and dicts, or give the object a state_dict()"
    )


def _hex(value: int, where: str) -> str:
    digits = hex(value)
    if len(digits) > _MAX_DIGITS:
        raise UnsupportedTypeError(f"{where!r}: an integer of {len(digits.lstrip('-')) - 2} hexadecimal digits")
    return digits


def _checked_text(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UnsupportedTypeError(f"{where!r}: a string with a lone surrogate is not text: {error}") from error
    return value


def _dict_to_json(value: dict[object, object], where: str, depth: int) -> Json:
    if all(type(k) is str and not k.startswith("%") for k in value):
        return {_checked_text(str(k), where): _to_json(v, f"{where}/{k}", depth + 1) for k, v in value.items()}
    pairs: list[Json] = [
        [_to_json(k, f"{where} (a key)", depth + 1), _to_json(v, f"{where}/{k}", depth + 1)] for k, v in value.items()
    ]
    return {"%dict": pairs}


def _from_json(value: object, depth: int) -> object:
    if depth > MAX_DEPTH + 2:
        raise ValueError("nested too deep")
    if isinstance(value, list):
        return [_from_json(v, depth + 1) for v in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("%"):
        if any(k.startswith("%") for k in value):
            raise ValueError("a tag among plain keys")
        return {k: _from_json(v, depth + 1) for k, v in value.items()}
    if len(value) != 1:
        raise ValueError(f"tag {tag!r} beside other keys")
    return _from_tag(tag, value[tag], depth)


def _from_tag(tag: str, body: object, depth: int) -> object:
    if tag in ("%int", "%float", "%bytes", "%bytearray"):
        if not isinstance(body, str):
            raise ValueError(f"{tag} of a {type(body).__name__}")
        if tag == "%int":
            if len(body) > _MAX_DIGITS:
                raise ValueError("integer of more than 4000 digits")
            return int(body, 16)
        if tag == "%float":
            return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[body]
        data = base64.b64decode(body, validate=True)
        return bytearray(data) if tag == "%bytearray" else data
    if tag == "%counter":
        counts = _from_json(body, depth)
        if not isinstance(counts, dict):
            raise ValueError("%counter of something else than a dict")
        return Counter(counts)
    if not isinstance(body, list):
        raise ValueError(f"{tag} of a {type(body).__name__}")
    if tag == "%tuple":
        return tuple(_from_json(v, depth + 1) for v in body)
    if tag == "%dict":
        return {_from_json(k, depth + 1): _from_json(v, depth + 1) for k, v in body}
    if tag == "%complex":
        real, imag = (_from_json(v, depth + 1) for v in body)
        if not isinstance(real, float) or not isinstance(imag, float):
            raise ValueError("%complex of something else than two numbers")
        return complex(real, imag)
    if tag == "%numpy":
        name, text = body
        if name not in _NUMPY_SCALARS:
            raise ValueError(f"a NumPy scalar of dtype {name!r}")
        dtype = np.dtype(name)
        data = base64.b64decode(text, validate=True)
        if len(data) != dtype.itemsize:
            raise ValueError(f"a NumPy {name} in {len(data)} bytes")
        return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype)[0]
    if tag == "%array":
        name, shape, text = body
        if len(shape) > _MAX_DIMS or not all(type(n) is int and 0 <= n < 2**62 for n in shape) or prod(shape) >= 2**62:
            raise ValueError(f"an array of shape {str(shape)[:100]}")
        if not isinstance(name, str):
            raise ValueError(f"an array of dtype {name!r}")
        return ArrayValue(name, tuple(shape), base64.b64decode(text, validate=True))
    raise ValueError(f"unknown tag {tag!r}")
