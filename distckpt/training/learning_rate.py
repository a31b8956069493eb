"""The learning rate on purpose: another one than the checkpoint's, for optimizers and their schedulers.

A stored rate and all that was derived from it are multiplied by one factor, the same on all ranks, which makes of a
schedule what it had been with the other rate from the start. Lower ends that are given as rates (eta_min) stay.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from distckpt.errors import MismatchError
from distckpt.training.group_options import check_options

_ANNEALING = (lr_scheduler.CosineAnnealingLR, lr_scheduler.CosineAnnealingWarmRestarts)
_COMPOSED = (lr_scheduler.SequentialLR, lr_scheduler.ChainedScheduler)
_KNOWN = (
    lr_scheduler.LambdaLR,
    lr_scheduler.MultiplicativeLR,
    lr_scheduler.StepLR,
    lr_scheduler.MultiStepLR,
    lr_scheduler.ConstantLR,
    lr_scheduler.LinearLR,
    lr_scheduler.ExponentialLR,
    lr_scheduler.PolynomialLR,
    lr_scheduler.CyclicLR,
    lr_scheduler.OneCycleLR,
    lr_scheduler.ReduceLROnPlateau,
    *_ANNEALING,
    *_COMPOSED,
)
_RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # of a group; the last two are OneCycleLR's
_RATE_LISTS = ("base_lrs", "max_lrs", "_last_lr")  # of a scheduler


def learning_rates(optimizers: Iterable[object]) -> tuple[float | Tensor, ...]:
    """Those in force, of each parameter group of torch optimizers."""
    return tuple(cast("float | Tensor", group["lr"]) for group in _groups(optimizers))


def _groups(optimizers: Iterable[object]) -> Iterator[dict[str, object]]:
    for optimizer in optimizers:
        if isinstance(optimizer, Optimizer):
            yield from (group for group in optimizer.param_groups if "lr" in group)


def note_initial_rates(schedulers: Iterable[object]) -> None:
    """ReduceLROnPlateau keeps no rate of the beginning; schedulers that do keep it in the groups."""
    for scheduler in schedulers:
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            for group in scheduler.optimizer.param_groups:
                rate = group["lr"]
                group.setdefault("initial_lr", rate.clone() if isinstance(rate, Tensor) else rate)


def check_groups(schedulers: Iterable[object]) -> None:
    """After a load. Raises MismatchError for a scheduler whose stored state is of another number of groups than its
    optimizer has: its next step would fail, or leave a group out."""
    for scheduler in schedulers:
        rates, optimizer = getattr(scheduler, "base_lrs", None), getattr(scheduler, "optimizer", None)
        if isinstance(rates, list) and isinstance(optimizer, Optimizer) and len(rates) != len(optimizer.param_groups):
            raise MismatchError(
                f"scheduler: a {type(scheduler).__qualname__} of {len(rates)} parameter groups is stored, and its "
                f"optimizer has {len(optimizer.param_groups)}; the state has been changed. Keep the groups, or make "
                f"the scheduler after the load, and leave its section out"
            )


def follow_schedulers(schedulers: Iterable[object]) -> None:
    """Give groups the rates that their schedulers are at, where one of the two has begun anew and the other goes on."""
    for scheduler in schedulers:
        rates, optimizer = getattr(scheduler, "_last_lr", None), getattr(scheduler, "optimizer", None)
        if isinstance(rates, list) and isinstance(optimizer, Optimizer) and len(rates) == len(optimizer.param_groups):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate


def unset_overrides(overrides: Mapping[str, object], optimizers: Iterable[object]) -> list[str]:
    """Warnings of overrides that look like options of an optimizer, which are recorded and not set."""
    options = {name for group in _groups(optimizers) for name in group} | {"learning_rate"}
    return [
        f"overrides: {name!r} is recorded, and not set: only 'lr' is. What is stored goes on"
        for name in overrides
        if name != "lr" and name.rpartition(".")[2] in options
    ]


def check_learning_rate(
    overrides: Mapping[str, object],
    optimizers: Iterable[object],
    schedulers: Iterable[object],
    *,
    stored: object = None,
    arguments: object = None,
) -> float | None:
    """By what rates are to be multiplied after a load; None if they stay. Changes nothing.

    stored: the section "optimizer" of Contents.tree; None if it is not loaded. arguments: those that are recorded. What
    becomes overrides["lr"] is the recorded argument "lr", if a group has that rate, else the highest rate of a group;
    OneCycleLR's is its peak, others' the first. All ranks find the same, whatever groups they have.

    Raises MismatchError for what is no rate, or where scaling is not known to be right.
    """
    if "lr" not in overrides:
        return None
    peak = overrides["lr"]
    if isinstance(peak, bool) or not isinstance(peak, (int, float)) or not math.isfinite(peak) or peak <= 0:
        raise MismatchError(f"overrides: 'lr' is {peak!r:.60}; expected a finite number above 0")
    own = list(_groups(optimizers))
    if not own:
        raise MismatchError("overrides: 'lr' is given, but no optimizer of this job has a learning rate in its groups")
    _check_schedulers(list(schedulers))
    rates = [_rate(group) for group in (_stored_groups(stored) or own)]
    recorded = arguments.get("lr") if isinstance(arguments, dict) else None
    is_recorded = isinstance(recorded, (int, float)) and any(math.isclose(rate, recorded) for rate in rates)
    before = float(recorded) if is_recorded and isinstance(recorded, (int, float)) else max(rates)
    if before <= 0:
        raise MismatchError("overrides: 'lr' cannot be scaled from a learning rate that was 0 at first")
    return peak / before


def _stored_groups(stored: object) -> list[dict[str, object]]:
    """Of all optimizers in a stored section, one or several."""
    if not isinstance(stored, dict):
        return []
    found = [stored] if "groups" in stored else [one for one in stored.values() if isinstance(one, dict)]
    groups = [group for one in found if isinstance(one.get("groups"), dict) for group in one["groups"].values()]
    checked = [check_options(group, "optimizer/groups") for group in groups]
    return [group for group in checked if "lr" in group]


def _rate(group: Mapping[str, object]) -> float:
    rate = group.get("max_lr", group.get("initial_lr", group["lr"]))
    if not isinstance(rate, (int, float, Tensor)):
        raise MismatchError(f"overrides: 'lr' cannot be scaled from the learning rate {rate!r:.60}")
    return float(rate)


def _check_schedulers(schedulers: list[object]) -> None:
    """Raises MismatchError for those that would not be what they had been with another rate."""
    owners = [id(getattr(scheduler, "optimizer", scheduler)) for scheduler in schedulers]
    for scheduler, owner in zip(schedulers, owners, strict=True):
        is_chained = isinstance(scheduler, lr_scheduler.ChainedScheduler) or owners.count(owner) > 1
        for part in _parts(scheduler):
            kind = type(part)
            if not isinstance(part, _KNOWN) or _formulas(kind) not in map(_formulas, _KNOWN):
                raise MismatchError(
                    f"overrides: a {kind.__qualname__} is not known to scale with 'lr'. Resume without that override, "
                    f"and set the rates in optimizer and scheduler then"
                )
            if is_chained and isinstance(part, _ANNEALING) and part.eta_min != 0:
                raise MismatchError(
                    f"overrides: a {kind.__qualname__} with eta_min={part.eta_min} beside other schedulers does not "
                    f"scale with 'lr'. Resume without that override, and set the rates in optimizer and scheduler then"
                )


def _formulas(kind: type) -> tuple[object, object]:
    """What makes the rates: a subclass may have its own."""
    return getattr(kind, "get_lr", None), getattr(kind, "step", None)


def _parts(scheduler: object) -> Iterator[object]:
    """A scheduler and those that it is composed of."""
    yield scheduler
    if isinstance(scheduler, _COMPOSED):
        for part in scheduler._schedulers:
            yield from _parts(part)


def override_learning_rate(optimizers: Iterable[object], schedulers: Iterable[object], factor: float) -> None:
    """Multiply all rates, after a load, by what check_learning_rate() has returned."""
    schedulers = list(schedulers)
    floors = {id(group): floor for scheduler in schedulers for group, floor in _floors(_running(scheduler), factor)}
    scaled: set[int] = set()  # Groups may share a tensor, and schedulers a list.
    for group in _groups(optimizers):
        for name in _RATES:
            rate = group.get(name)
            if isinstance(rate, Tensor):
                if id(rate) not in scaled:
                    rate.copy_(torch.as_tensor(_scaled(rate, factor, floors.get(id(group)) if name == "lr" else None)))
                    scaled.add(id(rate))
            elif isinstance(rate, (int, float)):
                group[name] = _scaled(rate, factor, floors.get(id(group)) if name == "lr" else None)
    for part in (part for scheduler in schedulers for part in _parts(scheduler)):
        for name in _RATE_LISTS:
            rates = getattr(part, name, None)
            if isinstance(rates, list) and id(rates) not in scaled:
                rates[:] = [rate * factor for rate in rates]
                scaled.add(id(rates))
    for scheduler in schedulers:
        for part in {id(part): part for part in (scheduler, _running(scheduler))}.values():
            rates, optimizer = getattr(part, "_last_lr", None), getattr(part, "optimizer", None)
            if isinstance(rates, list) and isinstance(optimizer, Optimizer):
                in_force = learning_rates([optimizer])
                rates[:] = [rate.clone() if isinstance(rate, Tensor) else rate for rate in in_force]


def _running(scheduler: object) -> object:
    """The one of a sequence whose turn it is."""
    while isinstance(scheduler, lr_scheduler.SequentialLR):
        scheduler = scheduler._schedulers[bisect_right(scheduler._milestones, scheduler.last_epoch)]
    return scheduler


def _floors(scheduler: object, factor: float) -> Iterator[tuple[dict[str, object], tuple[float, float]]]:
    """(group, (eta_min, what the way down to it is multiplied by)) of a schedule that ends at another rate than 0."""
    if isinstance(scheduler, _ANNEALING) and scheduler.eta_min != 0:
        for group, base in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
            way = float(base) - scheduler.eta_min
            if way != 0:
                yield group, (scheduler.eta_min, (float(base) * factor - scheduler.eta_min) / way)


def _scaled(rate: float | Tensor, factor: float, floor: tuple[float, float] | None) -> float | Tensor:
    if floor is None:
        return rate * factor
    eta_min, of_way = floor
    return eta_min + (rate - eta_min) * of_way
