"""When a checkpoint is due, and when the job is to stop: one question that a loop asks after each step.

Steps are the same on all ranks; clocks, signals and metrics are not. What depends on those is agreed by all ranks, in
one small agreement for all of it, so that all ranks save at the same step. Decides; saves nothing.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import msgspec
import torch
from typing_extensions import Self

from distckpt import CheckpointError, SaveReport, Termination
from distckpt.coordinator import Coordinator, agree, default_coordinator
from distckpt.decoding import decode_builtins

logger = logging.getLogger("distckpt")

Mode: TypeAlias = Literal["min", "max"]
Metric: TypeAlias = "float | torch.Tensor | None"

UNKNOWN_SAVE_S = 300.0  # until one was seen
_SAVE_MARGIN = 1.5
_SPARE_S = 10.0
_REMEMBERED = 16  # saves, and rounds from one agreement to the next


@dataclass(frozen=True, slots=True)
class Due:
    """True if a checkpoint is due, and why. is_best: a metric has improved."""

    reasons: tuple[str, ...] = ()
    is_best: bool = False

    def __bool__(self) -> bool:
        return bool(self.reasons)

    def __str__(self) -> str:
        return ", ".join(self.reasons) or "not due"


class _Facts(msgspec.Struct, frozen=True):
    """What one rank knows."""

    waited_s: float  # since a checkpoint was due last
    metric: float | None
    told: str | None  # by whom, to stop
    late: str | None  # how near the deadline is


class _Decision(msgspec.Struct, frozen=True):
    """What all ranks act on."""

    waited_s: float
    metric: float | None
    told: str | None
    late: str | None


class _State(msgspec.Struct, frozen=True):
    """Of one shape, whatever it holds: a template made before the first value must match what is stored after it."""

    metric: Annotated[str, msgspec.Meta(max_length=1000)] | None
    mode: Mode | None
    best: float | None


@dataclass(frozen=True, slots=True)
class _StepRules:
    """What depends on the step alone, so that all ranks know it."""

    every: int | None
    at: frozenset[int]
    log_spaced: bool | int

    def __post_init__(self) -> None:
        if self.every is not None and (self.every % 1 or self.every < 1):
            raise ValueError(f"every={self.every}: expected a whole number of steps from 1 on")
        if any(step < 0 for step in self.at):
            raise ValueError(f"at={sorted(self.at)}: expected steps, from 0 on")
        if self.log_spaced < 0:
            raise ValueError(f"log_spaced={self.log_spaced}: expected True, or how many in each decade")

    @property
    def is_empty(self) -> bool:
        return self.every is None and not self.at and not self.log_spaced

    def reasons(self, step: int) -> list[str]:
        found = []
        if self.every is not None and step > 0 and step % self.every == 0:
            found.append(f"every {self.every} steps")
        if step in self.at:
            found.append(f"at step {step}")
        if self.log_spaced and (self.every is None or step < self.every) and _is_log_spaced(step, self.log_spaced):
            found.append(f"log-spaced, step {step}")
        return found


class CheckpointSchedule:
    """Whether a checkpoint is due after a step, by any of the rules that are given.

        schedule = CheckpointSchedule(every=1000, log_spaced=True, on_termination=True)
        for step in ...:
            if schedule.is_due(step):
                pending = ckpt.async_save(state, iteration=step)
            if schedule.should_stop:
                break

    every: steps. every_s: seconds since a checkpoint was due last, by rank 0's clock. at: these steps. log_spaced:
    steps that lie ever farther apart, up to `every` if that is given: 1, 2, 4, 8, ... if True, so many in each decade
    if a number. best: a metric and "min" or "max": whenever is_due is given a value better than all before.
    deadline_s, deadline: when the job ends, in seconds from now or as a Unix time (Slurm's SLURM_JOB_END_TIME): the
    last checkpoint is due while there still is time for it. save_takes_s: how long a save takes; learned from saved()
    if not given, 300 s until then. on_termination: True makes a Termination of its own, which listens for SIGTERM from
    now on; or one of yours.

    With every_s, best, a deadline or on_termination, ranks agree: all of them make the schedule and ask is_due after
    the same steps. agree_every: they agree at every so many questions only, and when metrics are given. With none of
    these no rank waits for another. coordinator: one of its own, closed by the caller; default_coordinator() if None,
    and only if one is needed. timeout_s: how long a rank may keep the others waiting. close() puts back the handlers of
    signals.
    """

    def __init__(
        self,
        every: int | None = None,
        *,
        every_s: float | None = None,
        at: Iterable[int] = (),
        log_spaced: bool | int = False,
        best: tuple[str, Mode] | None = None,
        deadline_s: float | None = None,
        deadline: float | None = None,
        save_takes_s: float | None = None,
        on_termination: Termination | bool = False,
        agree_every: int = 1,
        coordinator: Coordinator | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self._rules = _StepRules(every, frozenset(at), log_spaced)
        self._every_s, self._best_of, self._save_takes_s = every_s, best, save_takes_s
        self._agree_every, self._timeout_s = agree_every, timeout_s
        _refuse_unless_positive({"every_s": every_s, "deadline_s": deadline_s, "deadline": deadline})
        _refuse_unless_positive({"save_takes_s": save_takes_s, "timeout_s": timeout_s, "agree_every": agree_every})
        if best is not None and tuple(best)[1:] not in (("min",), ("max",)):
            raise ValueError(f"best={best!r}: expected the name of a metric and 'min' or 'max'")
        if deadline_s is not None and deadline is not None:
            raise ValueError(f"deadline_s={deadline_s}, deadline={deadline}: give one of them")
        per_rank = (every_s, best, deadline_s, deadline, on_termination or None)
        must_agree = any(rule is not None for rule in per_rank)
        if self._rules.is_empty and not must_agree:
            raise ValueError("CheckpointSchedule: no rule is given, so no checkpoint would ever be due")
        now = time.monotonic()
        left_s = deadline - time.time() if deadline is not None else deadline_s
        self._deadline = None if left_s is None else now + left_s
        self._last_due = now
        self._last_agreed: float | None = None
        self._calls = 0
        self._best: float | None = None
        self._stop_reason: str | None = None
        self._saves_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._rounds_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._owns_coordinator = must_agree and coordinator is None
        self._coordinator = default_coordinator() if self._owns_coordinator else coordinator if must_agree else None
        self._own_termination: Termination | None = None
        if on_termination is True:
            self._own_termination = Termination(coordinator=self._coordinator)
            self._own_termination.__enter__()
        self._termination = on_termination if isinstance(on_termination, Termination) else self._own_termination

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Put back what it listens with. Not collective; calling it twice does nothing."""
        if self._own_termination is not None:
            self._own_termination.__exit__()
            self._own_termination = self._termination = None
        if self._owns_coordinator and self._coordinator is not None:
            self._coordinator.close()
            self._owns_coordinator = False

    @property
    def should_stop(self) -> bool:
        """Whether the job is to end, as all ranks have agreed; stays true. A checkpoint is due when it becomes so."""
        return self._stop_reason is not None

    @property
    def stop_reason(self) -> str | None:
        return self._stop_reason

    def is_due(self, step: int, metrics: Mapping[str, Metric] | None = None) -> Due:
        """Whether to save now that `step` steps are done; the same on all ranks.

        metrics: on all ranks after the same steps, or on none; a rank that does not know a value leaves it out. That
        of the lowest rank that knows it counts. Raises DistributedError if a rank does not ask, or asks about another
        step.
        """
        self._calls += 1
        reasons, is_best = self._rules.reasons(step), False
        has_metrics = self._best_of is not None and metrics is not None
        if self._coordinator is not None and (has_metrics or (self._calls - 1) % self._agree_every == 0):
            decision = self._agree(self._coordinator, step, metrics or {})
            is_best = self._improves(decision.metric)
            reasons += self._reasons_of_ranks(decision, is_best)
        if reasons:
            self._last_due = time.monotonic()
        return Due(tuple(reasons), is_best)

    def saved(self, report: SaveReport) -> None:
        """A save has taken this long: by the slowest of the last ones the deadline's is planned."""
        self._saves_s.append(report.total_s)

    def state_dict(self) -> dict[str, object]:
        """The best value so far, as plain JSON values; the same on all ranks."""
        metric, mode = (None, None) if self._best_of is None else self._best_of
        values: dict[str, object] = msgspec.to_builtins(_State(metric, mode, self._best))
        return values

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from the stored best value, if it is of this metric. Raises CheckpointError for what is no state."""
        try:
            stored = decode_builtins(state, _State)
        except msgspec.ValidationError as error:
            raise CheckpointError(f"this is no state of a CheckpointSchedule: {error}") from error
        if (stored.metric, stored.mode) == self._best_of:
            self._best = stored.best
        elif stored.metric is not None and self._best_of is not None:
            logger.warning(
                "the stored best %s (%s) tells nothing of %s (%s): the next value is the best",
                stored.metric,
                stored.mode,
                *self._best_of,
            )

    def _agree(self, coordinator: Coordinator, step: int, metrics: Mapping[str, Metric]) -> _Decision:
        now = time.monotonic()
        if self._last_agreed is not None:
            self._rounds_s.append(now - self._last_agreed)
        self._last_agreed = now

        def local() -> _Facts:
            value = None if self._best_of is None else metrics.get(self._best_of[0])
            metric = None if value is None else float(value)
            known = metric if metric is not None and math.isfinite(metric) else None
            return _Facts(time.monotonic() - self._last_due, known, *self._reasons_to_stop())

        def decide(ranks: Sequence[_Facts]) -> list[_Decision]:
            metric = next((facts.metric for facts in ranks if facts.metric is not None), None)
            told = next((f"rank {rank}: {facts.told}" for rank, facts in enumerate(ranks) if facts.told), None)
            late = next((facts.late for facts in ranks if facts.late), None)
            return [_Decision(ranks[0].waited_s, metric, told, late)] * len(ranks)

        return agree(
            coordinator,
            f"schedule, step {step}",
            local,
            decide,
            message=_Facts,
            decision=_Decision,
            timeout_s=self._timeout_s,
        )

    def _reasons_to_stop(self) -> tuple[str | None, str | None]:
        """What this rank knows: who told it to, and that by its own clock the deadline is near."""
        if self.should_stop:
            return None, None
        told = None if self._termination is None else self._termination.told
        if self._deadline is None:
            return told, None
        left_s, needed_s = self._deadline - time.monotonic(), self._needed_s()
        # The next time that all ranks are asked may be as far away as it was before.
        if left_s - max(self._rounds_s, default=0.0) > needed_s:
            return told, None
        return told, f"the deadline is in {left_s:.0f} s, and a save is given {needed_s:.0f} s"

    def _needed_s(self) -> float:
        if self._save_takes_s is not None:
            return self._save_takes_s
        return _SAVE_MARGIN * max(self._saves_s) + _SPARE_S if self._saves_s else UNKNOWN_SAVE_S

    def _improves(self, metric: float | None) -> bool:
        if metric is None or self._best_of is None:
            return False
        is_min = self._best_of[1] == "min"
        if self._best is not None and not (metric < self._best if is_min else metric > self._best):
            return False
        self._best = metric
        return True

    def _reasons_of_ranks(self, decision: _Decision, is_best: bool) -> list[str]:
        reasons = []
        if self._every_s is not None and decision.waited_s >= self._every_s:
            reasons.append(f"{decision.waited_s:.0f} s since the last one")
        if is_best and self._best_of is not None:
            reasons.append(f"{self._best_of[0]} {decision.metric:.6g} is the best so far")
        stop = decision.told or decision.late
        if stop is not None and not self.should_stop:
            self._stop_reason = stop
            reasons.append(stop)
            if decision.told is not None and self._termination is not None:
                # Whoever asks it hears the same, and its grace begins. A deadline has its own time to save in.
                self._termination.tell(decision.told)
        return reasons


def _is_log_spaced(step: int, per_decade: bool | int) -> bool:
    if step < 1:
        return False
    if per_decade is True:
        return step & (step - 1) == 0
    near = round(per_decade * math.log10(step))
    return any(round(10 ** (exponent / per_decade)) == step for exponent in (near - 1, near, near + 1))


def _refuse_unless_positive(numbers: Mapping[str, float | None]) -> None:
    for name, value in numbers.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value}: expected more than 0")
