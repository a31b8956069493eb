"""Values of leaves: what counts as one; small ones, with the tensors in them, as JSON and back. No keys, no I/O."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from math import prod
from typing import Protocol, TypeGuard, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from distckpt.errors import CorruptionError, UnsupportedTypeError
from distckpt.geometry import MAX_DIMS
from distckpt.json_value import MAX_DEPTH, ArrayValue, decode_value, encode_value
from distckpt.per_rank import PerRank
from distckpt.shard_file import DTYPES
from distckpt.sharded_tensor import PLAIN_TENSOR_TYPES, ShardedTensor, dtype_name, torch_dtype


@runtime_checkable
class Stateful(Protocol):
    """An object that keeps its own state: a module, an optimizer, a scheduler."""

    def state_dict(self) -> Mapping[str, object]: ...

    def load_state_dict(self, state_dict: Mapping[str, object]) -> object: ...


PLAIN_VALUE_TYPES = (bool, int, float, complex, str, bytes, bytearray, np.generic)
_NUMPY = "numpy."


def encode_leaf(value: object, key: str) -> bytes:
    """The JSON of a value: plain, or of a PerRank with its tensors, arrays and objects' states."""
    return encode_value(_to_value(value, key, 0), key)


def decode_leaf(encoded: bytes, key: str) -> object:
    """The value again. Raises CorruptionError for anything `encode_leaf` does not write."""
    return _from_value(decode_value(encoded, key), key)


def _to_value(value: object, key: str, depth: int) -> object:
    if value is None or isinstance(value, PLAIN_VALUE_TYPES):
        return value
    if depth > MAX_DEPTH:
        raise UnsupportedTypeError(f"{key!r}: nested more than {MAX_DEPTH} deep (or containing itself)")
    if isinstance(value, Tensor):
        if type(value) not in PLAIN_TENSOR_TYPES:
            raise UnsupportedTypeError(f"{key!r}: a PerRank may not hold a {type(value).__qualname__}")
        check_storable(value, key)
        data = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        raw = data.reshape(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b""
        return ArrayValue(dtype_name(value.dtype, key), tuple(value.shape), raw)
    if isinstance(value, np.ndarray):
        if type(value) is not np.ndarray:
            raise UnsupportedTypeError(f"{key!r}: a PerRank may not hold a {type(value).__qualname__}")
        native = value.astype(value.dtype.newbyteorder("="), order="C")
        if native.dtype.name not in DTYPES or native.ndim > MAX_DIMS:
            raise UnsupportedTypeError(f"{key!r}: {value.ndim}-d arrays of dtype {value.dtype} cannot be stored")
        return ArrayValue(_NUMPY + native.dtype.name, value.shape, native.tobytes())
    if type(value) in (dict, OrderedDict):
        return {k: _to_value(v, key, depth + 1) for k, v in value.items()}  # type: ignore[attr-defined]
    if type(value) in (list, tuple):
        return type(value)(_to_value(v, key, depth + 1) for v in value)  # type: ignore[call-arg,attr-defined]
    if isinstance(value, (ShardedTensor, PerRank)):
        raise UnsupportedTypeError(f"{key!r}: a PerRank may not hold a {type(value).__name__}")
    if is_stateful(value):
        return _to_value(dict(value.state_dict()), key, depth + 1)
    return value


def _from_value(value: object, key: str) -> object:
    if isinstance(value, ArrayValue):
        name = value.dtype.removeprefix(_NUMPY)
        if name not in DTYPES or prod(value.shape) * DTYPES[name].item_bytes != len(value.data):
            raise CorruptionError(f"{key!r}: {value.dtype} {value.shape} in {len(value.data)} bytes")
        if name != value.dtype:
            if name not in np.sctypeDict:
                raise CorruptionError(f"{key!r}: NumPy has no {name}")
            return np.frombuffer(value.data, np.dtype(name)).reshape(value.shape).copy()
        tensor = torch.empty(value.shape, dtype=torch_dtype(name, key))
        if tensor.numel():
            tensor.reshape(-1).view(torch.uint8).copy_(torch.frombuffer(bytearray(value.data), dtype=torch.uint8))
        return tensor
    if type(value) is dict:
        return {k: _from_value(v, key) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_from_value(v, key) for v in value)  # type: ignore[call-arg,attr-defined]
    return value


def check_storable(tensor: Tensor, key: str) -> None:
    """Raises UnsupportedTypeError for a tensor that is not a dense block of elements."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else str(tensor.layout)
        raise UnsupportedTypeError(f"{key!r}: a {kind} tensor cannot be stored; store the dense tensors it is made of")
    if tensor.dim() > MAX_DIMS:
        raise UnsupportedTypeError(f"{key!r}: {tensor.dim()} dimensions, at most {MAX_DIMS} can be stored")


def is_plain_value(value: object) -> bool:
    """Whether a list, tuple or dict holds nothing but what JSON values are made of."""
    seen: set[int] = set()  # A container may hold itself, which is for those to refuse who store it.
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict) or type(item) in (list, tuple):
            if id(item) not in seen:
                seen.add(id(item))
                pending += item.values() if isinstance(item, dict) else item  # type: ignore[arg-type]
        elif not (item is None or isinstance(item, PLAIN_VALUE_TYPES)):
            return False
    return True


def is_stateful(value: object) -> TypeGuard[Stateful]:
    return isinstance(value, Stateful) and not isinstance(value, type)
