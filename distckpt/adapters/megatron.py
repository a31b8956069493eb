"""Megatron-core's sharded state dict as ours, recognised by its fields: megatron is never imported.

ShardedTensor and ShardedTensorFactory become ShardedTensors of their own keys, ShardedObject a value under its
unique key, LocalNonpersistentObject is left alone.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from distckpt.errors import InvalidShardingError
from distckpt.sharded_tensor import ShardedTensor
from distckpt.state_dict import Adapted

_PACKAGE = "megatron.core.dist_checkpointing"


class _MegatronTensor(Protocol):
    key: str
    data: Tensor | None
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    local_shape: tuple[int, ...]
    replica_id: int | tuple[int, ...]
    prepend_axis_num: int
    allow_shape_mismatch: bool


def adapt_megatron(key: str, value: object) -> Adapted | None:
    """See the module. Raises InvalidShardingError for a ShardedTensor without data."""
    for kind in type(value).__mro__:
        if kind.__module__.startswith(_PACKAGE) and kind.__name__ in _KINDS:
            return _KINDS[kind.__name__](value)
    return None


def _tensor(value: _MegatronTensor) -> Adapted:
    if value.data is None:
        raise InvalidShardingError(f"{value.key!r}: a Megatron ShardedTensor without data; give it its local tensor")
    flat_range = getattr(value, "flattened_range", None)
    local = value.data if flat_range is None else value.data.new_empty(()).expand(value.local_shape)
    part = ShardedTensor(
        value.key,
        local,
        global_shape=value.global_shape,
        global_offset=value.global_offset,
        replica_id=value.replica_id,
        allow_shape_mismatch=value.allow_shape_mismatch,
    )
    if flat_range is not None:
        part = ShardedTensor.from_flat_range(value.key, value.data, of=part, flat_range=flat_range)

    def loaded(_: object) -> None:
        value.data = part.data  # Another tensor when the target was on the meta device.

    return Adapted(shards=[part], own_key=True, on_loaded=loaded)


class _MegatronFactory(Protocol):
    data: Tensor

    def build(self) -> object: ...

    def merge_fn(self, state: object) -> Tensor: ...


def _factory(value: _MegatronFactory) -> Adapted:
    def merge(state: object) -> None:
        assert isinstance(state, dict)
        merged = value.merge_fn(_plain(state["built"]))
        value.data.detach().copy_(merged.view_as(value.data))

    return Adapted(state={"built": value.build()}, on_loaded=merge)


def _plain(state: object) -> object:
    """The state with each Megatron ShardedTensor replaced by its data, as a merge function expects it."""
    if isinstance(state, dict):
        return {k: _plain(v) for k, v in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_plain(v) for v in state)
    return state.data if _is_megatron_tensor(state) else state  # type: ignore[attr-defined]


def _is_megatron_tensor(value: object) -> bool:
    return any(k.__name__ == "ShardedTensor" and k.__module__.startswith(_PACKAGE) for k in type(value).__mro__)


class _MegatronObject(Protocol):
    data: object
    unique_key: str


def _object(value: _MegatronObject) -> Adapted:
    stream = value.data if isinstance(value.data, io.BytesIO) else None

    def loaded(stored: object) -> None:
        value.data = io.BytesIO(stored) if isinstance(stored, bytes) and stream is not None else stored

    return Adapted(value=(value.unique_key, stream.getvalue() if stream else value.data), on_loaded=loaded)


def _local(value: object) -> Adapted:
    return Adapted(skip=True)


_KINDS: dict[str, Callable[[Any], Adapted]] = {
    "ShardedTensor": _tensor,
    "ShardedTensorFactory": _factory,
    "ShardedObject": _object,
    "LocalNonpersistentObject": _local,
}
