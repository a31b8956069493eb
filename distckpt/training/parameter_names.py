"""Names of parameters as the author of a model wrote them, without what wrappers put into them.

DistributedDataParallel adds "module.", torch.compile "_orig_mod.", activation checkpointing
"_checkpoint_wrapped_module.". They are recognised by the type of the module: the name may be the author's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch.distributed
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from distckpt.errors import UnsupportedTypeError

# (module that defines it, its class, where it keeps what it wraps); looked up only if that module has been imported.
_LATE_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "CheckpointWrapper", "_checkpoint_wrapped_module"),
)


def wrapped_name(module: nn.Module) -> str | None:
    """Under which name a wrapper keeps what it wraps; None of a module that is no wrapper.

    Raises UnsupportedTypeError for FSDP1, whose parameters are pieces of flat ones.
    """
    if isinstance(module, (DistributedDataParallel, DataParallel)):
        return "module"
    for home, kind, name in _LATE_WRAPPERS:
        if isinstance(module, getattr(sys.modules.get(home), kind, ())):
            return name
    if isinstance(module, getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())):
        raise UnsupportedTypeError(
            "a FullyShardedDataParallel keeps pieces of flat parameters, which have no names of their own. Use "
            "fully_shard (FSDP2), or store them with ShardedTensor.from_flat_range"
        )
    return None


def unwrapped(module: nn.Module) -> nn.Module:
    """What is inside all wrappers around it."""
    while (name := wrapped_name(module)) is not None:
        module = module.get_submodule(name)
    return module


def author_class(module: nn.Module) -> str:
    """The class that its author wrote, by name: fully_shard and the like put a subclass of their own in its place."""
    kind = type(module)
    while len(kind.__bases__) > 1 and kind.__bases__[0].__module__.startswith("torch.distributed."):
        kind = kind.__bases__[-1]
    return kind.__qualname__


def class_name(part: object) -> str:
    """Of a scheduler or scaler, with those that it is composed of."""
    parts = getattr(part, "_schedulers", None)
    inside = f"({', '.join(map(class_name, parts))})" if isinstance(parts, (list, tuple)) else ""
    return f"{type(part).__qualname__}{inside}"


def classes_of(parts: Iterable[object]) -> dict[str, dict[str, str]]:
    """The classes of several by number, as they are recorded."""
    return {str(place): {"class": class_name(part)} for place, part in enumerate(parts)}


def author_names(model: nn.Module) -> Callable[[str], str]:
    """What makes, of the name of a parameter, buffer or submodule, the name without the wrappers on the way to it."""
    wrappers = {id(module): name for module in model.modules() if (name := wrapped_name(module)) is not None}
    if not wrappers:
        return lambda name: name

    def author_name(name: str) -> str:
        current: nn.Module | None = model
        kept: list[str] = []
        for segment in name.split("."):
            wrapped = None if current is None else wrappers.get(id(current))
            while current is not None and wrapped is not None and segment not in (wrapped, *current._modules):
                current = current._modules[wrapped]  # Some wrappers leave themselves out of the names already.
                wrapped = wrappers.get(id(current))
            if segment != wrapped:
                kept.append(segment)
            current = None if current is None else current._modules.get(segment)
        return ".".join(kept)

    return author_name


def parameters_of(models: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of all models, each parameter under its first name; models: prefix -> module."""
    seen: set[int] = set()
    for prefix, model in models.items():
        author_name = author_names(model)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield joined(prefix, author_name(name)), parameter


def joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def buffers_of_others(model: nn.Module) -> set[int]:
    """Ids of the buffers that rank 0 of a DistributedDataParallel gives to this rank ahead of every forward pass.

    Until then they may differ from rank to rank; what counts is rank 0's.
    """
    found: set[int] = set()
    for module in model.modules():
        if (
            isinstance(module, DistributedDataParallel)
            and module.broadcast_buffers
            and torch.distributed.get_rank(module.process_group) != 0
        ):
            found |= {id(buffer) for buffer in module.buffers()}
    return found
