"""A model as a section of the training state: its tensors under the names that its author gave them.

Decides what of a model is stored, and puts back what cannot be filled in place. A model that gives a
sharded_state_dict(), as Megatron's do, is taken at its word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from distckpt.errors import UnsupportedTypeError
from distckpt.training.parameter_names import author_names, buffers_of_others, joined, wrapped_name
from distckpt.training.sharded_optimizer import kinds_of, local_values

State = dict[str, object]


@runtime_checkable
class Sharded(Protocol):
    """What knows how it is sharded: a nested state of ShardedTensors that are, or refer to, its own tensors."""

    def sharded_state_dict(self) -> State: ...


def model_state(models: Mapping[str, nn.Module], *, to_save: bool, trainable_only: bool = False) -> State:
    """The tensors of all models, themselves, by name; models: prefix -> module.

    to_save: leave out what another rank stores for this one. trainable_only: parameters that require gradients,
    buffers of modules that have such parameters of their own, and batch statistics, which change where all is frozen.
    """
    state: State = {}
    for prefix, model in models.items():
        if isinstance(model, Sharded):
            if trainable_only:
                raise UnsupportedTypeError(
                    f"a {type(model).__qualname__} says itself what it stores (sharded_state_dict); leave out of that "
                    f"what is frozen, and pass no base"
                )
            _add(state, {joined(prefix, name): value for name, value in model.sharded_state_dict().items()})
            continue
        left_out = buffers_of_others(model) if to_save else set()
        kept = _trainable(model) if trainable_only else None
        author_name = author_names(model)
        for name, value in model.state_dict(keep_vars=True).items():
            if id(value) not in left_out and (kept is None or id(value) in kept):
                _add(state, {joined(prefix, author_name(name)): value})
    return state


def _add(state: State, more: State) -> None:
    taken = sorted(state.keys() & more.keys())
    if taken:
        raise UnsupportedTypeError(
            f"model: two tensors have the name {taken[0]!r}; give the models names of which none begins another's"
        )
    state |= more


def _trainable(model: nn.Module) -> set[int]:
    """Ids: some wrappers leave themselves out of the names in a state_dict(), and not out of those of modules."""
    kept: set[int] = set()
    for module in model.modules():
        own = {id(parameter) for parameter in module.parameters(recurse=False) if parameter.requires_grad}
        if own or isinstance(module, nn.modules.batchnorm._NormBase):
            own |= {id(buffer) for buffer in module.buffers(recurse=False)}
        kept |= own
    return kept


def put_back(models: Mapping[str, nn.Module], state: Mapping[str, object]) -> None:
    """After a load: give the modules what was not filled in place: what stood on the meta device, and what state_dict()
    shows that is not their own memory (values, tensors that hooks or get_extra_state() make)."""
    for prefix, model in models.items():
        if isinstance(model, Sharded):
            _put_back_objects(model, prefix, state)
            continue
        own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        memory = {
            tensor.untyped_storage().data_ptr() for tensor in map(_local, (*model.parameters(), *model.buffers()))
        }
        others: dict[str, object] = {}
        author_name = author_names(model)
        for name, present in model.state_dict(keep_vars=True).items():
            key = joined(prefix, author_name(name))
            if key not in state:
                continue
            if id(present) in own:
                if present.is_meta:
                    _set_tensor(model, name, state[key])
            elif not isinstance(present, Tensor) or _local(present).untyped_storage().data_ptr() not in memory:
                others[name] = state[key]
        if others:
            model.load_state_dict(others, strict=False)


def _local(tensor: Tensor) -> Tensor:
    local = getattr(tensor, "to_local", None)  # of a DTensor
    return tensor if local is None else local()


def _set_tensor(model: nn.Module, name: str, tensor: object) -> None:
    """By its name in state_dict(), from which some wrappers leave themselves out."""
    module = model
    *path, last = name.split(".")
    for segment in path:
        while segment not in module._modules and (wrapped := wrapped_name(module)) is not None:
            module = module.get_submodule(wrapped)
        module = module.get_submodule(segment)
    while last not in module._parameters and last not in module._buffers and (wrapped := wrapped_name(module)):
        module = module.get_submodule(wrapped)
    setattr(module, last, tensor)


def _put_back_objects(model: nn.Module, prefix: str, state: Mapping[str, object]) -> None:
    """What a model that says itself how it is sharded has beside tensors, which are filled in place."""
    assert isinstance(model, Sharded)
    loaded = {name: state.get(joined(prefix, name)) for name in model.sharded_state_dict()}
    objects = {name: local_values(value) for name, value in loaded.items() if "ShardedObject" in kinds_of(value)}
    if objects:
        model.load_state_dict(objects, strict=False)


def first_on_meta(state: Mapping[str, object]) -> str | None:
    """The name of a tensor on the meta device."""
    return next((name for name, value in state.items() if isinstance(value, torch.Tensor) and value.is_meta), None)
