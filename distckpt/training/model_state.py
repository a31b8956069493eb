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
from distckpt.training.parameter_names import author_names, buffers_of_others, joined

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
            state |= {joined(prefix, name): value for name, value in model.sharded_state_dict().items()}
            continue
        left_out = buffers_of_others(model) if to_save else set()
        kept = _trainable(model) if trainable_only else None
        author_name = author_names(model)
        for name, value in model.state_dict(keep_vars=True).items():
            if id(value) not in left_out and (kept is None or id(value) in kept):
                state[joined(prefix, author_name(name))] = value
    return state


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
    """After a load: give the modules what was not filled in place: values, and what stood on the meta device."""
    for prefix, model in models.items():
        if isinstance(model, Sharded):
            continue
        values: dict[str, object] = {}
        author_name = author_names(model)
        for name, present in model.state_dict(keep_vars=True).items():
            key = joined(prefix, author_name(name))
            loaded = state.get(key)
            if not isinstance(present, Tensor):
                if key in state:
                    values[name] = loaded
            elif isinstance(loaded, Tensor) and present.is_meta:
                path, _, own_name = name.rpartition(".")
                setattr(model.get_submodule(path), own_name, loaded)
        if values:
            model.load_state_dict(values, strict=False)


def first_on_meta(state: Mapping[str, object]) -> str | None:
    """The name of a tensor on the meta device."""
    return next((name for name, value in state.items() if isinstance(value, torch.Tensor) and value.is_meta), None)
