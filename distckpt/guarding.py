"""Guarding: optimizers whose steps wait for a lazy snapshot. Decides which memory such a snapshot may copy later.

That is the memory which nothing but the step of a guarded optimizer changes: its parameters and its state.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class Guards:
    """The guarded optimizers of one Checkpointer. It keeps none of them alive, and they do not keep it."""

    def __init__(self, before_step: Callable[[], None]) -> None:
        """before_step: a bound method."""
        self._before_step = weakref.WeakMethod(before_step)
        self._guarded: list[tuple[weakref.ref[torch.optim.Optimizer], torch.utils.hooks.RemovableHandle]] = []

    def add(self, optimizer: torch.optim.Optimizer) -> None:
        """Call before_step ahead of its every step. Raises TypeError for what has no step hooks."""
        if any(known() is optimizer for known, _ in self._guarded):
            return
        before_step = self._before_step

        def call(*_: object) -> None:
            method = before_step()
            if method is not None:
                method()

        try:
            hook = optimizer.register_step_pre_hook(call)
        except AttributeError as error:
            raise TypeError(
                f"guard: a {type(optimizer).__qualname__} has no hook ahead of its step, as torch optimizers have; "
                f"guard the optimizers that it wraps, or use snapshot='eager'"
            ) from error
        self._guarded.append((weakref.ref(optimizer), hook))

    def memory(self) -> frozenset[int]:
        """Addresses of the storages that only a guarded step changes."""
        storages = (tensor.untyped_storage() for tensor in self._tensors())
        return frozenset(storage.data_ptr() for storage in storages if storage.nbytes())

    def _tensors(self) -> Iterator[Tensor]:
        """Parameters and state tensors. Of other wrappers than DTensor nothing: they are copied at once."""
        for known, _ in self._guarded:
            optimizer = known()
            if optimizer is None:
                continue
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            states = [v for state in optimizer.state.values() if isinstance(state, dict) for v in state.values()]
            for value in (*parameters, *states):
                local = value.to_local() if hasattr(value, "to_local") else value  # of a DTensor
                if type(local) in (Tensor, torch.nn.Parameter) and local.layout == torch.strided:
                    yield local.detach()

    def remove(self) -> None:
        for _, hook in self._guarded:
            hook.remove()
        self._guarded = []
