"""Another learning rate on purpose: what follows is what had followed with that rate from the start."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from distckpt import MismatchError
from distckpt.training.learning_rate import (
    check_learning_rate,
    learning_rates,
    note_initial_rates,
    override_learning_rate,
)

Optimizer = torch.optim.Optimizer
Run = tuple[Optimizer, Any]

# Each with the rate that "lr" stands for.
SCHEDULERS: dict[str, Callable[[Optimizer, float], Any]] = {
    "LambdaLR": lambda o, _: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o, _: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o, _: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o, _: lr_scheduler.MultiStepLR(o, [3, 7], 0.5),
    "ConstantLR": lambda o, _: lr_scheduler.ConstantLR(o, 0.5, 7),
    "LinearLR": lambda o, _: lr_scheduler.LinearLR(o, 0.1, total_iters=8),
    "ExponentialLR": lambda o, _: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o, _: lr_scheduler.PolynomialLR(o, 12),
    "CosineAnnealingLR": lambda o, _: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingLR to a rate": lambda o, _: lr_scheduler.CosineAnnealingLR(o, 8, eta_min=0.001),
    "CosineAnnealingWarmRestarts": lambda o, _: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, eta_min=0.001),
    "OneCycleLR": lambda o, lr: lr_scheduler.OneCycleLR(o, max_lr=[g["lr"] for g in o.param_groups], total_steps=20),
    "CyclicLR": lambda o, lr: lr_scheduler.CyclicLR(
        o, [g["lr"] for g in o.param_groups], [10 * g["lr"] for g in o.param_groups], 3, cycle_momentum=False
    ),
    "SequentialLR": lambda o, _: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 9, eta_min=0.001)], [3]
    ),
    "SequentialLR that goes on with a LambdaLR": lambda o, _: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.LambdaLR(o, lambda step: 0.9**step)], [8]
    ),
    "ChainedScheduler": lambda o, _: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, total_iters=8), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o, _: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=2, eps=0),
}


def begun(make: Callable[[Optimizer, float], Any], lr: float) -> Run:
    optimizer = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.ones(1))]}, {"params": [nn.Parameter(torch.ones(1))], "lr": lr / 2}],
        lr=lr,
        momentum=0.9,
    )
    scheduler = make(optimizer, lr)
    note_initial_rates([scheduler])
    return optimizer, scheduler


def rates(run: Run, steps: int) -> list[float]:
    optimizer, scheduler = run
    found = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step(*((1.0,) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else ()))
        found += [float(rate) for rate in learning_rates([optimizer])]
    return found


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedule_goes_on_as_if_it_had_begun_with_the_other_rate(make: Any, steps: int) -> None:
    run, other = begun(make, 0.1), begun(make, 0.04)
    rates(run, steps)
    rates(other, steps)
    factor = check_learning_rate({"lr": 0.04}, [run[0]], [run[1]])
    assert factor == pytest.approx(0.4)
    override_learning_rate([run[0]], [run[1]], factor)
    assert learning_rates([run[0]]) == pytest.approx(learning_rates([other[0]]))
    assert list(run[1].get_last_lr()) == pytest.approx(list(other[1].get_last_lr()))
    assert rates(run, 9) == pytest.approx(rates(other, 9))


def test_tensor_that_groups_share_is_scaled_once() -> None:
    rate = torch.tensor(0.5)
    optimizer = torch.optim.Adam([{"params": [nn.Parameter(torch.ones(1))]} for _ in range(2)], lr=rate)
    override_learning_rate([optimizer], [], 0.5)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.25, 0.25]
    assert optimizer.param_groups[0]["lr"] is rate


@pytest.mark.parametrize("lr", ["fast", "0.1", True, 0, -1.0, math.nan, math.inf, None, [0.1]])
def test_what_is_no_rate_is_an_error(lr: object) -> None:
    run = begun(SCHEDULERS["StepLR"], 0.1)
    with pytest.raises(MismatchError, match="expected a finite number above 0"):
        check_learning_rate({"lr": lr}, [run[0]], [run[1]])


def test_job_without_a_rate_has_none_to_change() -> None:
    assert check_learning_rate({"epochs": 3}, [], []) is None
    with pytest.raises(MismatchError, match="no optimizer of this job has a learning rate"):
        check_learning_rate({"lr": 0.1}, [object()], [])


def test_rate_that_was_0_cannot_be_scaled() -> None:
    with pytest.raises(MismatchError, match="that was 0 at first"):
        check_learning_rate({"lr": 0.1}, [torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.0)], [])


class Own(lr_scheduler.LRScheduler):
    def get_lr(self) -> list[float | Tensor]:
        return [0.1, 0.1]


class OwnStep(lr_scheduler.StepLR):
    def get_lr(self) -> list[float | Tensor]:
        return [0.1, 0.1]


@pytest.mark.parametrize(
    "make",
    [
        lambda o, _: object(),
        lambda o, _: Own(o),
        lambda o, _: OwnStep(o, 3),
        lambda o, _: torch.optim.swa_utils.SWALR(o, swa_lr=0.01),
        lambda o, _: lr_scheduler.SequentialLR(o, [lr_scheduler.StepLR(o, 3), OwnStep(o, 3)], [3]),
    ],
)
def test_scheduler_that_is_not_known_to_scale_is_refused(make: Any) -> None:
    optimizer, scheduler = begun(make, 0.1)
    with pytest.raises(MismatchError, match=r"is not known to scale with 'lr'\. Resume without that override"):
        check_learning_rate({"lr": 0.1}, [optimizer], [scheduler])


def test_end_that_is_a_rate_is_refused_beside_other_schedulers() -> None:
    optimizer, scheduler = begun(SCHEDULERS["CosineAnnealingLR to a rate"], 0.1)
    step = lr_scheduler.StepLR(optimizer, 3)
    for schedulers in ([scheduler, step], [lr_scheduler.ChainedScheduler([scheduler, step])]):
        with pytest.raises(MismatchError, match=r"with eta_min=0.001 beside other schedulers"):
            check_learning_rate({"lr": 0.1}, [optimizer], schedulers)


def test_all_ranks_scale_by_what_is_stored_whatever_groups_they_have() -> None:
    stored = {"groups": {"a": {"lr": 0.02, "initial_lr": 0.1}, "b": {"lr": 0.2, "initial_lr": 0.4}}, "group_of": {}}
    run = begun(SCHEDULERS["StepLR"], 7.0)

    def factor(section: object, arguments: object = None) -> float | None:
        return check_learning_rate({"lr": 0.05}, [run[0]], [run[1]], stored=section, arguments=arguments)

    assert factor(stored) == pytest.approx(0.125)
    assert factor({"one": stored, "two": {"groups": {}}}) == pytest.approx(0.125)
    assert factor(stored, {"lr": 0.1}) == pytest.approx(0.5)
    assert factor(stored, {"lr": 0.3}) == pytest.approx(0.125)
    assert factor(None, {"lr": "x"}) == pytest.approx(0.05 / 7)
