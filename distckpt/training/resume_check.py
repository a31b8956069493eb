"""Whether a resume really is one: the first steps after it, held against the last ones before the save.

Decides a verdict and nothing else: what follows from it is the caller's business. What it can see, measured by the
simulations in its tests: another learning rate and repeated data for certain; fresh or shuffled weights as a jump of
the loss, once the loss has moved away from its start by many deviations of its noise. What it sees badly: an optimizer
whose state is fresh while the weights are right. The loss then moves by less than its noise (none of 300 such resumes
of small trainings was noticed), so a missing optimizer state has to be an error of the load.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

import msgspec
import torch

from distckpt.decoding import decode_builtins
from distckpt.errors import CheckpointError

Number: TypeAlias = "float | torch.Tensor"
Status: TypeAlias = Literal["pass", "warn", "fail", "not checked"]
_Stored: TypeAlias = float | Literal["nan", "inf", "-inf"]

HISTORY_STEPS = 32
COMPARED_STEPS = 5
MAX_STORED_STEPS = 4096

_LEARNING_RATE_TOLERANCE = 1e-6  # relative: a schedule may keep it in single precision
_LEAST_RECORDED = 6  # losses, to know what their noise is
_LEAST_COMPARED = 3
# In deviations of the recorded noise.
_WARN_FROM = 5.0
_FAIL_FROM = 10.0
_MEDIAN_TO_DEVIATION = 1.4826  # of a normal distribution
_STEP_TO_STEP = 1.5 / math.sqrt(2)  # a change is the difference of two noises; half as much again if they are alike
_FEW = 6  # records: an estimate from so few is made twice as large
_NOISE_FLOOR = 1e-3  # of the level: a loss without noise still moves a little
_GRAD_NORM_FLOOR = 0.05  # of a logarithm


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of the optimizer as the loop saw it. batch: hash_batch of what it trained on, of its first micro-batch.

    learning_rates: of each parameter group, as this step used them. None, or no rates: not known.
    """

    step: int
    loss: float | None = None
    grad_norm: float | None = None
    learning_rates: tuple[float, ...] = ()
    batch: str | None = None


@dataclass(frozen=True, slots=True)
class ResumeVerdict:
    """What the first steps after a resume say of it. reasons: one sentence each, the worst first; none if it passes.

    "not checked": nothing that can be compared was recorded. compared_steps: how many steps were looked at.
    """

    status: Status
    reasons: tuple[str, ...] = ()
    compared_steps: int = 0

    def __str__(self) -> str:
        return self.status + (f": {'; '.join(self.reasons)}" if self.reasons else "")


class _StoredStep(msgspec.Struct, frozen=True, array_like=True):
    """What of a StepRecord is known without asking a device. has_loss, has_grad_norm: whether there was one."""

    step: int
    has_loss: bool
    has_grad_norm: bool
    learning_rates: Annotated[list[float], msgspec.Meta(max_length=MAX_STORED_STEPS)]


class StepHistory:
    """The last steps of a run, bounded, and the hash of its very first batch.

    Recording waits for no device: tensors are copied where they are, and become numbers when the history is read or
    stored. The numbers are those that this rank gave. A DTensor is made whole first, on all ranks that have a part.
    """

    def __init__(self, steps: int = HISTORY_STEPS) -> None:
        if not 1 <= steps <= MAX_STORED_STEPS:
            raise ValueError(f"steps={steps}: expected 1 to {MAX_STORED_STEPS}")
        self._steps: deque[_HeldStep] = deque(maxlen=steps)
        self._first_batch: str | None = None
        self._has_begun = False

    def record(
        self,
        step: int,
        *,
        loss: Number | None = None,
        grad_norm: Number | None = None,
        learning_rates: Iterable[Number] = (),
        batch: str | None = None,
    ) -> None:
        """One step that the optimizer has made. The caller may change the tensors afterwards."""
        if not self._has_begun:
            self._first_batch, self._has_begun = batch, True
        rates = tuple(_held(rate) for rate in learning_rates)
        self._steps.append(_HeldStep(step, _held(loss), _held(grad_norm), rates, batch))

    @property
    def first_batch(self) -> str | None:
        return self._first_batch

    def records(self) -> tuple[StepRecord, ...]:
        """Oldest first, as numbers: waits for the devices."""
        return tuple(held.read() for held in self._steps)

    def steps(self) -> list[object]:
        """What of the steps is known without asking a device, oldest first, as JSON values; see restore()."""
        return [
            msgspec.to_builtins(
                _StoredStep(held.step, held.loss is not None, held.grad_norm is not None, held.finite_rates())
            )
            for held in self._steps
        ]

    def numbers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses and gradient norms, (steps,) each, float64, oldest first; NaN where there is none, and at the end.

        They are where the losses are, and waited for by whoever reads them.
        """
        size = self._steps.maxlen or 0
        return _stacked([held.loss for held in self._steps], size), _stacked([h.grad_norm for h in self._steps], size)

    def batches(self) -> list[str | None]:
        """Hashes of the steps' batches, oldest first."""
        return [held.batch for held in self._steps]

    def restore(
        self,
        steps: object,
        losses: Sequence[float],
        grad_norms: Sequence[float],
        batches: object,
        first_batch: object,
    ) -> None:
        """The history that gave these. batches, first_batch: None if they are not known.

        Raises CheckpointError for what is no history.
        """
        try:
            stored = decode_builtins(steps, Annotated[list[_StoredStep], msgspec.Meta(max_length=MAX_STORED_STEPS)])
            hashes = decode_builtins(batches, list[str | None] | None) or [None] * len(stored)
            self._first_batch = decode_builtins(first_batch, str | None)
        except msgspec.ValidationError as error:
            raise CheckpointError(f"this is no stored history of steps: {error}") from error
        if not (len(hashes) == len(stored) <= min(len(losses), len(grad_norms))):
            raise CheckpointError(
                f"this is no stored history of steps: {len(stored)} of them, {len(losses)} losses, {len(grad_norms)} "
                f"gradient norms, {len(hashes)} batches"
            )
        self._steps.clear()
        for one, loss, norm, batch in zip(stored, losses, grad_norms, hashes, strict=False):
            has = (loss if one.has_loss else None, norm if one.has_grad_norm else None)
            self._steps.append(_HeldStep(one.step, *has, tuple(one.learning_rates), batch))
        self._has_begun = bool(stored)


def _stacked(values: Sequence[Number | None], size: int) -> torch.Tensor:
    device = next((value.device for value in values if isinstance(value, torch.Tensor)), torch.device("cpu"))
    stacked = torch.full((size,), math.nan, dtype=torch.float64, device=device)
    for place, value in enumerate(values):
        if value is not None:
            stacked[place] = value
    return stacked


@dataclass(frozen=True, slots=True)
class _HeldStep:
    step: int
    loss: Number | None
    grad_norm: Number | None
    learning_rates: tuple[Number | None, ...]
    batch: str | None

    def finite_rates(self) -> list[float]:
        return [rate for rate in self.read_rates() if math.isfinite(rate)]

    def read_rates(self) -> tuple[float, ...]:
        return tuple(float(rate) for rate in self.learning_rates if rate is not None)

    def read(self) -> StepRecord:
        return StepRecord(self.step, _read(self.loss), _read(self.grad_norm), self.read_rates(), self.batch)


def _held(value: Number | None) -> Number | None:
    """A copy of a tensor's own: loops add up their losses in place."""
    if not isinstance(value, torch.Tensor):
        return None if value is None else float(value)
    whole = getattr(value, "full_tensor", None)
    return (value if whole is None else whole()).detach().clone()


def _read(value: Number | None) -> float | None:
    return None if value is None else float(value)


@dataclass(slots=True)
class ResumeCheck:
    """Is told the steps after a resume, and has a verdict after each; settled after `steps` of them, or by a failure.

    recorded, first_batch: StepHistory's, from the checkpoint. learning_rates: those in force at the save, which the
    next step must use; none if not known. at_epoch_start: the resume begins an epoch, so that data that are not
    shuffled rightly start with the run's first batch; where recorded batches repeat each other, batches tell nothing.
    """

    recorded: Sequence[StepRecord]
    first_batch: str | None = None
    learning_rates: tuple[float, ...] = ()
    at_epoch_start: bool = False
    steps: int = COMPARED_STEPS
    _told: list[StepRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: expected at least 1")

    def tell(self, record: StepRecord) -> ResumeVerdict:
        """The next step after the resume; further ones change nothing once it is settled."""
        if not self.is_settled:
            self._told.append(record)
        return self.verdict()

    @property
    def is_settled(self) -> bool:
        return len(self._told) >= self.steps or self.verdict().status == "fail"

    def verdict(self) -> ResumeVerdict:
        """As far as is known by now."""
        return judge_resume(
            self.recorded,
            self._told,
            first_batch=self.first_batch,
            learning_rates=self.learning_rates,
            at_epoch_start=self.at_epoch_start,
        )


def judge_resume(
    recorded: Sequence[StepRecord],
    told: Sequence[StepRecord],
    *,
    first_batch: str | None = None,
    learning_rates: tuple[float, ...] = (),
    at_epoch_start: bool = False,
) -> ResumeVerdict:
    """ResumeCheck's verdict, as a function of the last steps before the save and the first ones told after it."""
    if not told or (not recorded and not learning_rates):
        return ResumeVerdict("not checked", ("nothing was recorded",) if told else ("no step was made yet",))
    failures = [
        *_wrong_steps(recorded, told),
        *_wrong_learning_rate(learning_rates, told[0]),
        *([] if at_epoch_start else _repeated_data(recorded, first_batch, told[0])),
    ]
    warnings: list[str] = []
    _judge_losses(recorded, told, failures, warnings)
    _judge_grad_norms(recorded, told, warnings)
    status: Status = "fail" if failures else "warn" if warnings else "pass"
    return ResumeVerdict(status, (*failures, *warnings), len(told))


def _wrong_steps(recorded: Sequence[StepRecord], told: Sequence[StepRecord]) -> list[str]:
    numbers = [*(record.step for record in recorded[-1:]), *(record.step for record in told)]
    return [
        f"step {after} follows step {before}: expected {before + 1}"
        for before, after in itertools.pairwise(numbers)
        if after != before + 1
    ][:1]


def _wrong_learning_rate(in_force: tuple[float, ...], first: StepRecord) -> list[str]:
    used = first.learning_rates
    if not in_force or not used:
        return []
    if len(used) == len(in_force) and all(
        math.isclose(one, other, rel_tol=_LEARNING_RATE_TOLERANCE) for one, other in zip(used, in_force, strict=True)
    ):
        return []
    shown = [", ".join(f"{rate:.6g}" for rate in rates) for rates in (used, in_force)]
    return [f"step {first.step} used the learning rate {shown[0]}, but {shown[1]} was in force at the save"]


def _repeated_data(recorded: Sequence[StepRecord], first_batch: str | None, first: StepRecord) -> list[str]:
    last = {record.batch: record.step for record in recorded if record.batch is not None}
    if first.batch is None or not recorded:
        return []
    if len(last) < sum(record.batch is not None for record in recorded) or len({*last, first_batch} - {None}) < 2:
        return []  # They repeat each other, as far as is known: the data are that few.
    if first.batch == first_batch:
        return [f"step {first.step} trained on the run's very first batch: the data starts from the beginning"]
    if first.batch in last:
        return [f"step {first.step} trained on the batch of step {last[first.batch]} again: data is repeated"]
    return []


def _judge_losses(
    recorded: Sequence[StepRecord], told: Sequence[StepRecord], failures: list[str], warnings: list[str]
) -> None:
    before = [(record.step, record.loss) for record in recorded if record.loss is not None]
    after = [(record.step, record.loss) for record in told if record.loss is not None]
    was_finite = all(math.isfinite(loss) for _, loss in before)
    for step, loss in after:
        if not math.isfinite(loss):
            (failures if was_finite else warnings).append(f"the loss of step {step} is {loss}")
            break
    jump = _jump(before, after, floor=_NOISE_FLOOR)
    if jump is not None and jump.deviations >= _WARN_FROM:
        (failures if jump.deviations >= _FAIL_FROM else warnings).append(
            f"the loss is {jump.found:.4g} after the resume, where {jump.expected:.4g} was to be expected: "
            f"{jump.deviations:.0f} deviations of {jump.deviation:.2g} more"
        )


def _judge_grad_norms(recorded: Sequence[StepRecord], told: Sequence[StepRecord], warnings: list[str]) -> None:
    """In logarithms: norms are positive, and differ by factors."""
    before, after = (
        [(record.step, record.grad_norm) for record in records if record.grad_norm is not None]
        for records in (recorded, told)
    )
    if before and all(math.isfinite(norm) for _, norm in before):
        for step, norm in after:
            if not math.isfinite(norm):
                warnings.append(f"the gradient norm of step {step} is {norm}")
                break
    logs = [[(step, math.log(norm)) for step, norm in some if norm > 0] for some in (before, after)]
    jump = _jump(*logs, floor=0.0, least_deviation=_GRAD_NORM_FLOOR)
    if jump is not None and jump.deviations >= _WARN_FROM:
        found, expected = math.exp(jump.found), math.exp(jump.expected)
        warnings.append(
            f"the gradient norm is {found:.3g} after the resume, where {expected:.3g} was to be expected: "
            f"{jump.deviations:.0f} deviations more"
        )


@dataclass(frozen=True, slots=True)
class _Jump:
    """How far the values after the resume lie above what those before it lead to expect."""

    expected: float
    found: float
    deviation: float

    @property
    def deviations(self) -> float:
        return (self.found - self.expected) / self.deviation


def _jump(
    before: Sequence[tuple[int, float]],
    after: Sequence[tuple[int, float]],
    *,
    floor: float,
    least_deviation: float = 1e-12,
) -> _Jump | None:
    """None if there are too few to tell.

    Medians throughout, so that a single spike on either side changes little: the trend is the median slope between all
    pairs (Theil 1950, Sen 1968). The deviation is that of the residuals, or of the changes from step to step where the
    residuals are those of a curve that is no line; it is made larger for few records. A trend that falls is not
    expected to go on, as losses level off; one that rises is.
    """
    before = [(step, value) for step, value in before if math.isfinite(value)]
    values = [value for _, value in after if math.isfinite(value)]
    if len(before) < _LEAST_RECORDED or len(values) < _LEAST_COMPARED:
        return None
    slopes = [
        (value_b - value_a) / (step_b - step_a)
        for (step_a, value_a), (step_b, value_b) in itertools.combinations(before, 2)
        if step_a != step_b
    ]
    slope = statistics.median(slopes) if slopes else 0.0
    last, middle = before[-1][0], statistics.median(step for step, _ in after)
    level = statistics.median(value - slope * (step - last) for step, value in before)
    residual = statistics.median(abs(value - slope * (step - last) - level) for step, value in before)
    deviation = min(residual, _STEP_TO_STEP * _median_change([value for _, value in before])) * _MEDIAN_TO_DEVIATION
    deviation = max(deviation * (1 + _FEW / len(before)), floor * abs(level), least_deviation)
    recent = statistics.median(value for _, value in before[-COMPARED_STEPS:])
    expected = max(level + max(0.0, slope) * (middle - last), recent)
    return _Jump(expected, statistics.median(values), deviation)


def _median_change(values: Sequence[float]) -> float:
    """How far the changes from one value to the next lie from their median."""
    changes = [after - before for before, after in itertools.pairwise(values)]
    middle = statistics.median(changes)
    return statistics.median(abs(change - middle) for change in changes)
