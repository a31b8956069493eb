"""Guarding: optimizers whose steps wait for a lazy snapshot. Decides which memory such a snapshot may copy later.

That is the memory which nothing but the step of a guarded optimizer changes: its parameters and its state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class Guards:
    """The guarded optimizers of one Checkpointer."""

    def __init__(self, before_step: Callable[[], None]) -> None:
        self._before_step = before_step
        self._optimizers: list[torch.optim.Optimizer] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def add(self, optimizer: torch.optim.Optimizer) -> None:
        """Call before_step ahead of its every step. Raises TypeError for what has no step hooks."""
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"guard: a {type(optimizer).__qualname__} is no torch.optim.Optimizer and has no hook before its step; "
                f"guard the optimizers that it wraps, or use snapshot='eager'"
            )
        if any(known is optimizer for known in self._optimizers):
            return
        self._optimizers.append(optimizer)
        self._hooks.append(optimizer.register_step_pre_hook(lambda *_: self._before_step()))

    def __len__(self) -> int:
        return len(self._optimizers)

    def memory(self) -> frozenset[int]:
        """Addresses of the storages that only a guarded step changes."""
        storages = (tensor.untyped_storage() for tensor in self._tensors())
        return frozenset(storage.data_ptr() for storage in storages if storage.nbytes())

    def _tensors(self) -> Iterator[Tensor]:
        """Parameters and state tensors. Of other wrappers than DTensor nothing: they are copied at once."""
        for optimizer in self._optimizers:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            states = [value for state in optimizer.state.values() for value in state.values()]
            for value in (*parameters, *states):
                local = value.to_local() if hasattr(value, "to_local") else value  # of a DTensor
                if type(local) in (Tensor, torch.nn.Parameter):
                    yield local.detach()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._optimizers, self._hooks = [], []
