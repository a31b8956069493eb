"""Progress as a section of the training state: steps, and what the last of them were, to know a resume by.

Counts, records and asks ResumeCheck; what it finds is made known on all ranks at once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias, TypeGuard

import msgspec
import torch
from torch import Tensor
from torch.optim import Optimizer

from distckpt import PerRank
from distckpt.contents import StoredTensor
from distckpt.coordinator import Coordinator, agree, default_coordinator
from distckpt.errors import CheckpointError, UnsupportedTypeError
from distckpt.training.fingerprint import hash_batch
from distckpt.training.learning_rate import learning_rates
from distckpt.training.resume_check import (
    COMPARED_STEPS,
    MAX_STORED_STEPS,
    ResumeCheck,
    ResumeVerdict,
    Status,
    StepHistory,
)

logger = logging.getLogger("distckpt")
CheckMode: TypeAlias = Literal["warn", "error", "off"]
TIMEOUT_S = 600.0
_SEVERITY = ("not checked", "pass", "warn", "fail")


class ResumeCheckFailed(CheckpointError):
    """The first steps after a resume are not what would have come next; `verdict` says why."""

    def __init__(self, verdict: ResumeVerdict) -> None:
        super().__init__(f"this resume is none: {verdict}. resume_check='warn' goes on all the same")
        self.verdict = verdict


class _Verdict(msgspec.Struct, frozen=True):
    status: Status
    reasons: list[str]


class Progress:
    """How far a run is. mode: what happens when a resume does not look like one. coordinator: default_coordinator() for
    as long as a check takes, if it is None."""

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        mode: CheckMode,
        history_steps: int,
        coordinator: Coordinator | None = None,
    ) -> None:
        if mode not in ("warn", "error", "off"):
            raise ValueError(f"resume_check={mode!r}: expected 'warn', 'error' or 'off'")
        self.step = 0
        self.micro_step = 0
        self.verdict = ResumeVerdict("not checked", ("this run was not resumed",))
        self._mode = mode
        self._optimizers = list(optimizers)
        self._history = StepHistory(history_steps)
        self._used: tuple[float | Tensor, ...] = ()  # learning rates of the last step
        self._batch: str | None = None  # of the step under way
        self._check: ResumeCheck | None = None
        self._unsettled_steps = 0
        self._coordinator = coordinator
        self._owns_coordinator = coordinator is None
        self.has_stepped = False  # the optimizer, since end_step() was called last
        for optimizer in self._optimizers:
            try:
                optimizer.register_step_pre_hook(self._before_step)
            except AttributeError as error:  # As of accelerate: a wrapper that is no whole torch optimizer.
                raise UnsupportedTypeError(
                    f"optimizer: a {type(optimizer).__qualname__} has no hook ahead of its step, as torch optimizers "
                    f"have; pass the one that it wraps (its .optimizer)"
                ) from error

    def _before_step(self, *_: object) -> None:
        self.has_stepped = True
        rates = learning_rates(self._optimizers)
        self._used = tuple(rate.clone() if isinstance(rate, Tensor) else rate for rate in rates)

    def see_batch(self, batch: object) -> None:
        """The loop is given a batch: the first of a step is what the step is known by."""
        if self._batch is None and self._mode != "off":
            self._batch = hash_batch(batch)

    def end_micro_step(self) -> None:
        self.micro_step += 1

    def end_step(
        self,
        loss: float | Tensor | None,
        grad_norm: float | Tensor | None,
        rates: Sequence[float] | None,
    ) -> None:
        """Count and record a step. Raises ResumeCheckFailed on all ranks, DistributedError."""
        self.step += 1
        self.micro_step, self.has_stepped = 0, False
        used = self._used if rates is None else tuple(rates)
        self._history.record(self.step, loss=loss, grad_norm=grad_norm, learning_rates=used, batch=self._batch)
        self._batch = None
        if self._check is not None:
            last = self._history.records()[-1]
            # In order of size: groups and optimizers may be in another order than they were.
            self.verdict = self._check.tell(replace(last, learning_rates=tuple(sorted(last.learning_rates))))
            self._unsettled_steps -= 1
            if self._unsettled_steps == 0:
                self._settle()

    def begin_check(self) -> None:
        """After a load, on all ranks."""
        if self._mode == "off":
            self._check = None
        if self._check is not None and self._coordinator is None:
            self._coordinator = default_coordinator()  # One of its own: a save may be agreed on at the same time.
        if self._check is not None and self._coordinator is not None and self._coordinator.rank > 0:
            # What is stored of losses is rank 0's, and this rank may be shown more difficult data.
            self._check.recorded = [replace(step, loss=None, grad_norm=None) for step in self._check.recorded]
        self._unsettled_steps = COMPARED_STEPS

    def _settle(self) -> None:
        """All ranks learn what any of them has found."""
        assert self._coordinator is not None
        own, self._check = self.verdict, None

        def decide(ranks: Sequence[_Verdict]) -> list[_Verdict]:
            worst = max(ranks, key=lambda verdict: _SEVERITY.index(verdict.status))
            found = [(rank, v) for rank, v in enumerate(ranks) if v.status == worst.status]
            where = "" if len(found) == len(ranks) else f" (rank {', '.join(str(rank) for rank, _ in found[:8])})"
            return [_Verdict(worst.status, [reason + where for reason in found[0][1].reasons])] * len(ranks)

        with_all = agree(
            self._coordinator,
            f"resume check at step {self.step}",
            lambda: _Verdict(own.status, list(own.reasons)),
            decide,
            message=_Verdict,
            decision=_Verdict,
            timeout_s=TIMEOUT_S,
        )
        is_first = self._coordinator.rank == 0
        if self._owns_coordinator:
            self._coordinator.close()
            self._coordinator = None
        self.verdict = ResumeVerdict(with_all.status, tuple(with_all.reasons), own.compared_steps)
        if self.verdict.status == "fail" and self._mode == "error":
            raise ResumeCheckFailed(self.verdict)
        if is_first:
            level = logging.WARNING if self.verdict.status in ("warn", "fail") else logging.INFO
            logger.log(level, "resume check after %d steps: %s", own.compared_steps, self.verdict)

    # The section

    def state(self, rank: int) -> dict[str, object]:
        """To be saved. What rank 0 has seen of losses stands for all; batches differ by rank.

        Losses and gradient norms are tensors, which are copied like all others: nothing waits for a device here.
        """
        batches = {"first": self._history.first_batch, "of_steps": self._history.batches()}
        state: dict[str, object] = {
            "step": self.step,
            "micro_step": self.micro_step,
            "batches": PerRank(batches, on_change="skip"),
        }
        if rank == 0:
            losses, grad_norms = self._history.numbers()
            state |= {"last_steps": self._history.steps(), "losses": losses, "grad_norms": grad_norms}
            state["learning_rates"] = [float(rate) for rate in learning_rates(self._optimizers)]
        return state

    def template(self, stored: object) -> dict[str, object]:
        """To be loaded. stored: the section of Contents.tree. Raises CheckpointError for what is none."""
        template: dict[str, object] = {
            "step": 0,
            "micro_step": 0,
            "last_steps": None,
            "learning_rates": None,
            "batches": PerRank(None, on_change="skip"),
        }
        for name in ("losses", "grad_norms"):
            numbers = stored.get(name) if isinstance(stored, dict) else None
            shape = numbers.global_shape if isinstance(numbers, StoredTensor) else ()
            if len(shape) != 1 or shape[0] > MAX_STORED_STEPS:
                raise CheckpointError(f"progress/{name}: stored is {numbers!r:.100}, expected one number for each step")
            template[name] = torch.empty(shape, dtype=torch.float64)
        return template

    def restore(self, state: Mapping[str, object], *, at_epoch_start: bool) -> None:
        """Go on with what a template was filled with. Raises CheckpointError for what is none of it."""
        step, micro_step, steps, rates = (state[key] for key in ("step", "micro_step", "last_steps", "learning_rates"))
        batches, losses, grad_norms = (state[key] for key in ("batches", "losses", "grad_norms"))
        assert isinstance(batches, PerRank)
        assert isinstance(losses, Tensor)
        assert isinstance(grad_norms, Tensor)
        if not (_is_count(step) and _is_count(micro_step) and isinstance(steps, list)):
            raise CheckpointError(f"progress: step {step!r}, micro_step {micro_step!r}, steps {steps!r:.100}")
        of_rank = batches.value if isinstance(batches.value, dict) else {}
        self._history.restore(
            steps, losses.tolist(), grad_norms.tolist(), of_rank.get("of_steps"), of_rank.get("first")
        )
        self.step, self.micro_step, self._batch, self._used = step, micro_step, None, ()
        self.has_stepped = False
        self.verdict = ResumeVerdict("not checked", ("no step was made yet",))
        self._check = ResumeCheck(
            self._history.records(),
            self._history.first_batch,
            self._comparable(rates),
            at_epoch_start,
        )

    def _comparable(self, rates: object) -> tuple[float, ...]:
        """Stored learning rates; none if the parameters are in other groups now."""
        stored = tuple(sorted(rate for rate in rates if isinstance(rate, float))) if isinstance(rates, list) else ()
        return stored if len(stored) == len(learning_rates(self._optimizers)) else ()

    def expect_learning_rates(self) -> None:
        """They were changed on purpose after the load: the next step is to use those."""
        if self._check is not None:
            self._check.learning_rates = tuple(sorted(float(rate) for rate in learning_rates(self._optimizers)))


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0
