"""Gradients as a section of the training state: those of a step under way, between whose batches a job was saved.

Under DistributedDataParallel each rank has gradients of its own until the last batch of a step, and they are stored so;
a step that was begun on so many ranks ends on as many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distckpt import ShardedTensor
from distckpt.contents import StoredTensor
from distckpt.errors import CheckpointError, MismatchError
from distckpt.training.parameter_names import parameters_of


def gradient_state(models: Mapping[str, nn.Module], micro_step: int) -> dict[str, object]:
    """To be saved. Raises CheckpointError if there are none: they would be lost."""
    state: dict[str, object] = {}
    places = _places(models)
    for name, parameter in parameters_of(models):
        if parameter.grad is not None:
            state[name] = _of_rank(name, parameter.grad, places[id(parameter)])
    if not state:
        raise CheckpointError(
            f"{micro_step} batches of a step are accumulated, and no parameter has a gradient: they are kept elsewhere "
            f"(by fully_shard after set_requires_gradient_sync(False), as main_grad by Megatron), and would be lost. "
            f"Save after the optimizer's step"
        )
    return state


def gradient_template(
    models: Mapping[str, nn.Module], stored: Mapping[str, object]
) -> tuple[dict[str, object], Callable[[], None]]:
    """To be loaded, and what gives the parameters their gradients then; those for which none is stored have none.

    stored: the section of Contents.tree. Raises MismatchError if the step was begun on another number of ranks.
    """
    template: dict[str, object] = {}
    gradients: dict[int, Tensor] = {}
    places = _places(models)
    for name, parameter in parameters_of(models):
        place = places[id(parameter)]
        found = stored.get(name if place is None else _key(name))
        expected = tuple(parameter.shape) if place is None else (place[1], *parameter.shape)
        if isinstance(found, StoredTensor) and found.global_shape == expected:
            gradients[id(parameter)] = gradient = torch.empty_like(parameter, requires_grad=False)
            template[name] = _of_rank(name, gradient, place)
    if len(template) < len(stored):
        ranks = [n for key, tensor in stored.items() if (n := _ranks_of(key, tensor))]
        where = f" on {max(ranks)} ranks" if ranks else ""
        raise MismatchError(
            f"gradients: a step was under way{where}, and of its {len(stored)} gradients this job can take "
            f"{len(template)}: resume it as it was, or from a checkpoint that was saved between two steps",
            unexpected=("gradients",),
        )

    def restore() -> None:
        for _, parameter in parameters_of(models):
            parameter.grad = gradients.get(id(parameter))

    return template, restore


def clear_gradients(models: Mapping[str, nn.Module]) -> None:
    """No step was under way."""
    for _, parameter in parameters_of(models):
        parameter.grad = None


def _places(models: Mapping[str, nn.Module]) -> dict[int, tuple[int, int] | None]:
    """id of each parameter -> (rank, ranks) of the DistributedDataParallel that it is in, if that has several."""
    places: dict[int, tuple[int, int] | None] = {id(parameter): None for _, parameter in parameters_of(models)}
    for wrapper in _data_parallel(models):
        group = wrapper.process_group
        place = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        places |= {id(parameter): place if place[1] > 1 else None for parameter in wrapper.parameters()}
    return places


def _data_parallel(models: Mapping[str, nn.Module]) -> Iterator[DistributedDataParallel]:
    for model in models.values():
        yield from (module for module in model.modules() if isinstance(module, DistributedDataParallel))


def _key(name: str) -> str:
    return f"gradients.{name}"


def _ranks_of(key: object, stored: object) -> int:
    """How many ranks have a gradient of their own; 0 if they share one."""
    if not isinstance(stored, StoredTensor) or not str(key).startswith(_key("")):
        return 0
    return stored.global_shape[0] if stored.global_shape else 0


def _of_rank(name: str, gradient: Tensor, place: tuple[int, int] | None) -> object:
    """The gradient, or, if each rank has its own, this rank's row of all."""
    if place is None:
        return gradient
    rank, ranks = place
    shape, nowhere = tuple(gradient.shape), (0,) * gradient.dim()
    return ShardedTensor(_key(name), gradient, global_shape=(ranks, *shape), global_offset=(rank, *nowhere))
