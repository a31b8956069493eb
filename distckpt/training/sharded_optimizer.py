"""An optimizer that says itself how it is sharded, by Megatron's convention: what is asked of it, and given back to it.

    sharded_state_dict(model's, is_loading=...)   nested ShardedTensors, and values that are common to all ranks
    load_state_dict(loaded)                       the same with local tensors in the places of the ShardedTensors

is_loading has a fresh optimizer make the moments that are to be filled. Common values that it has only once it has
made a step, such as the count of steps, are added from what is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from distckpt.contents import StoredTensor
from distckpt.training.nested import with_items
from distckpt.training.optimizer_state import emptied

State = dict[str, object]
_KINDS = ("ShardedTensor", "ShardedTensorFactory", "ShardedObject")
_HOMES = ("distckpt.sharded_tensor", "megatron.core.dist_checkpointing")


@runtime_checkable
class ShardedOptimizer(Protocol):
    def sharded_state_dict(self, model_state: State, is_loading: bool = False) -> State: ...

    def load_state_dict(self, state: State) -> object: ...


def sharded_optimizer_template(optimizer: ShardedOptimizer, model_state: State, stored: Mapping[str, object]) -> State:
    """What a load fills. stored: the optimizer's part of Contents.tree."""
    state = optimizer.sharded_state_dict(model_state, is_loading=True)
    _add_common(state, stored)
    return state


def _add_common(state: object, stored: object) -> None:
    if isinstance(state, dict) and isinstance(stored, dict):
        for key, value in stored.items():
            if key in state:
                _add_common(state[key], value)
            elif not _has_shards(value):  # These stand under keys of their own.
                state[key] = emptied(value)
    elif isinstance(state, list) and isinstance(stored, list):
        for own, value in zip(state, stored, strict=False):
            _add_common(own, value)


def _has_shards(stored: object) -> bool:
    if isinstance(stored, StoredTensor):
        return stored.is_sharded
    items = stored.values() if isinstance(stored, dict) else stored if isinstance(stored, (list, tuple)) else ()
    return any(_has_shards(item) for item in items)


def local_values(state: object) -> object:
    """The nested state with what each ShardedTensor or ShardedObject refers to in its place."""
    if isinstance(state, dict):
        return {key: local_values(value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return with_items(state, local_values)
    kinds = kinds_of(state)
    if "LocalNonpersistentObject" in kinds:
        return state.unwrap()  # type: ignore[attr-defined]
    return state.data if kinds.intersection(_KINDS) else state  # type: ignore[attr-defined]


def kinds_of(value: object) -> set[str]:
    """What Megatron, or this package, would call it: megatron is never imported."""
    return {kind.__name__ for kind in type(value).__mro__ if kind.__module__.startswith(_HOMES)}
