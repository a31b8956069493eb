"""Tensors on the meta device made real. Makes each one once, so that what was tied stays tied; fills nothing."""

from __future__ import annotations

import torch
from torch import Tensor


class RealTensors:
    """The real tensor of each meta tensor that was asked for; a Parameter stays one."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # id -> (meta, real); holding the meta one keeps its id

    def make(self, tensor: Tensor, device: torch.device) -> Tensor:
        if id(tensor) not in self._made:
            real = torch.empty_like(tensor, device=device, requires_grad=False)
            if isinstance(tensor, torch.nn.Parameter):
                real = torch.nn.Parameter(real, tensor.requires_grad)
            self._made[id(tensor)] = tensor, real
        return self._made[id(tensor)][1]


def is_meta_module(module: torch.nn.Module) -> bool:
    """Whether something that the module's state_dict() shows is on the meta device."""
    return any(isinstance(t, Tensor) and t.is_meta for t in module.state_dict().values())


def make_module_real(module: torch.nn.Module, device: torch.device) -> None:
    """Put an empty real tensor in the place of each meta one that the module's state_dict() shows.

    Real tensors are left alone, and so are buffers that no checkpoint holds.
    """
    real = RealTensors()
    stored = {id(t) for t in module.state_dict(keep_vars=True).values() if isinstance(t, Tensor) and t.is_meta}
    for owner in module.modules():
        own = [
            *owner.named_parameters(recurse=False, remove_duplicate=False),
            *owner.named_buffers(recurse=False, remove_duplicate=False),
        ]
        for name, tensor in own:
            if id(tensor) in stored:
                setattr(owner, name, real.make(tensor, device))
