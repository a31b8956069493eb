"""The learning rate on purpose: another one than the checkpoint's, for optimizers and their schedulers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer

from distckpt.errors import MismatchError


def learning_rates(optimizers: Iterable[object]) -> tuple[float | Tensor, ...]:
    """Those in force, of each parameter group of torch optimizers."""
    return tuple(
        group["lr"]
        for optimizer in optimizers
        if isinstance(optimizer, Optimizer)
        for group in optimizer.param_groups
        if "lr" in group
    )


def override_learning_rate(optimizers: Iterable[object], schedulers: Iterable[object], peak: float) -> None:
    """Make `peak` what the first group's rate was set to at first; other rates and schedules keep their ratio to it.

    Exact for schedules that multiply their base rate, as torch's do, but for those with an absolute lower end.
    """
    groups = [
        group
        for optimizer in optimizers
        if isinstance(optimizer, Optimizer)
        for group in optimizer.param_groups
        if "lr" in group
    ]
    if not groups:
        raise MismatchError("overrides: 'lr' is given, but no optimizer of this job has a learning rate in its groups")
    before = float(groups[0].get("initial_lr", groups[0]["lr"]))
    if before == 0:
        raise MismatchError("overrides: 'lr' cannot be scaled from a learning rate that was 0 at first")
    factor = peak / before
    for group in groups:
        for name in ("lr", "initial_lr"):
            if isinstance(group.get(name), Tensor):
                group[name].mul_(factor)
            elif name in group:
                group[name] *= factor
    for scheduler in schedulers:
        for name in ("base_lrs", "_last_lr"):
            rates = getattr(scheduler, name, None)
            if isinstance(rates, list):
                rates[:] = [rate * factor for rate in rates]
