"""A resume that is none is found by its first steps; one that is honest passes, noise and all."""

from __future__ import annotations

import copy
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import nn

from distckpt import CheckpointError, ResumableSampler
from distckpt.training.fingerprint import hash_batch
from distckpt.training.resume_check import ResumeCheck, ResumeVerdict, StepHistory, StepRecord, judge_resume

RECORDED = 32
TOLD = 5

CURVES: dict[str, Callable[[int], float]] = {
    "exponential": lambda step: 2 + 9 * math.exp(-step / 200),
    "power law": lambda step: 1.7 + 9 * (step + 1) ** -0.3,
    "flat": lambda step: 2.5,
    "steep": lambda step: 0.01 + 3 * math.exp(-step / 15),
    "rising": lambda step: 1 + step / 500,
}


class Noise:
    """Of deviation 1, of one kind, from a seed."""

    def __init__(self, kind: str, seed: str) -> None:
        self._kind, self._random, self._last = kind, random.Random(seed), 0.0

    def draw(self) -> float:
        normal = self._random.gauss
        if self._kind == "none":
            return 0.0
        if self._kind == "heavy tails":  # Student's t of three degrees of freedom
            return normal(0, 1) / math.sqrt(sum(normal(0, 1) ** 2 for _ in range(3)) / 3)
        if self._kind == "skewed":
            return math.exp(normal(0, 0.6)) - 1.2
        if self._kind == "correlated":
            self._last = 0.7 * self._last + math.sqrt(1 - 0.7**2) * normal(0, 1)
            return self._last
        return normal(0, 1)


def simulate(curve: Callable[[int], float], noise: Noise, scale: float, first: int, count: int) -> list[StepRecord]:
    return [
        StepRecord(step, loss=curve(step) * (1 + scale * noise.draw()), grad_norm=math.exp(0.3 * noise.draw()))
        for step in range(first, first + count)
    ]


def test_honest_resumes_of_simulated_runs_pass_in_99_of_100_cases() -> None:
    found: Counter[str] = Counter()
    for name, curve in CURVES.items():
        for kind in ("normal", "heavy tails", "skewed", "correlated", "none"):
            for scale in (0.002, 0.05):
                for case in range(20):
                    first = (8, 20, 60, 200, 1000)[case % 5]
                    noise = Noise(kind, f"{name} {kind} {scale} {case}")
                    steps = simulate(curve, noise, scale, first - min(first, RECORDED), min(first, RECORDED) + TOLD)
                    found[judge_resume(steps[:-TOLD], steps[-TOLD:]).status] += 1
    assert found["pass"] >= 0.99 * found.total(), found
    assert found["fail"] == 0


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "skewed", "correlated"])
def test_fresh_weights_of_simulated_runs_are_found_once_the_loss_has_come_down(kind: str) -> None:
    """By 30 deviations here: from 11 to 3.2 or less, with a noise of 5 %."""
    missed = 0
    curve = CURVES["exponential"]
    for case in range(100):
        noise = Noise(kind, f"{kind} {case}")
        first = 400 + 10 * case
        recorded = simulate(curve, noise, 0.05, first, RECORDED)
        afresh = simulate(lambda step, start=first + RECORDED: curve(step - start), noise, 0.05, first + RECORDED, TOLD)
        missed += judge_resume(recorded, afresh).status != "fail"
    assert missed <= 2


class Job:
    """A tiny training that can be stopped, copied, and spoilt."""

    def __init__(self, seed: int, optimizer: str) -> None:
        torch.manual_seed(seed)
        self.inputs = torch.randn(512, 8)
        target = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        with torch.no_grad():
            self.targets = 3 * target(self.inputs) + 0.05 * torch.randn(512, 1)
        self.make_model = lambda: nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
        self.model = self.make_model()
        self.optimizer = {
            "sgd": lambda: torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9),
            "adam": lambda: torch.optim.Adam(self.model.parameters(), lr=0.01),
        }[optimizer]()
        self.sampler = ResumableSampler(512, 16, seed=seed)
        self.step = 0

    def run(self, steps: int) -> list[StepRecord]:
        history = StepHistory(steps)
        for _ in range(steps):
            indices = next(iter(self.sampler))
            batch = (self.inputs[indices], self.targets[indices])
            loss = nn.functional.mse_loss(self.model(batch[0]), batch[1])
            self.optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1e9)
            rates = [group["lr"] for group in self.optimizer.param_groups]
            self.optimizer.step()
            self.sampler.advance()
            history.record(self.step, loss=loss, grad_norm=norm, learning_rates=rates, batch=hash_batch(batch))
            self.step += 1
        return list(history.records())

    def put_weights(self, weights: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, other in zip(self.model.parameters(), weights, strict=True):
                parameter.copy_(other)


def fresh_weights(job: Job) -> None:
    job.put_weights(list(job.make_model().parameters()))


def shuffled_weights(job: Job) -> None:
    job.put_weights([one.flatten()[torch.randperm(one.numel())].view_as(one) for one in job.model.parameters()])


def data_from_the_start(job: Job) -> None:
    job.sampler.load_state_dict(job.sampler.state_dict() | {"epoch": 0, "consumed_samples": 0})


def data_of_some_steps_ago(job: Job) -> None:
    state = job.sampler.state_dict()
    job.sampler.load_state_dict(state | {"consumed_samples": job.sampler.consumed_samples - 64})


def other_learning_rate(job: Job) -> None:
    for group in job.optimizer.param_groups:
        group["lr"] *= 1.01


def skipped_step(job: Job) -> None:
    job.step += 1


def judge(job: Job, recorded: Sequence[StepRecord], first_batch: str | None) -> ResumeVerdict:
    check = ResumeCheck(recorded, first_batch, recorded[-1].learning_rates)
    for record in job.run(TOLD):
        verdict = check.tell(record)
        if check.is_settled:
            return verdict
    raise AssertionError("never settled")


SPOILERS: dict[Callable[[Job], None], str] = {
    fresh_weights: "the loss is",
    shuffled_weights: "the loss is",
    data_from_the_start: "the data starts from the beginning",
    data_of_some_steps_ago: "data is repeated",
    other_learning_rate: "was in force at the save",
    skipped_step: "step 151 follows step 149: expected 150",
}


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """So small a model waits longer for a second thread than it saves by it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_real_trainings_pass_if_honest_and_fail_for_each_way_not_to_resume(optimizer: str) -> None:
    for seed in range(3):
        job = Job(seed, optimizer)
        records = job.run(150)
        recorded = records[-RECORDED:]
        honest = judge(copy.deepcopy(job), recorded, records[0].batch)
        assert honest == ResumeVerdict("pass", (), TOLD)
        for spoil, reason in SPOILERS.items():
            spoilt = copy.deepcopy(job)
            spoil(spoilt)
            verdict = judge(spoilt, recorded, records[0].batch)
            assert verdict.status == "fail", spoil
            assert any(reason in one for one in verdict.reasons), verdict


def steps_of(first: int, *losses: float, **fields: object) -> list[StepRecord]:
    return [StepRecord(step, loss, **fields) for step, loss in enumerate(losses, first)]  # type: ignore[arg-type]


LEVEL = [2.0, 2.1, 1.9, 2.05, 1.95, 2.0, 2.02, 1.98, 2.1, 1.9]


def test_one_spike_is_no_failure_and_a_lasting_jump_is_one_with_numbers() -> None:
    recorded = steps_of(0, *LEVEL)
    assert judge_resume(recorded, steps_of(10, 40.0, 2.0, 2.1, 1.9, 40.0)).status == "pass"
    jumped = judge_resume(recorded, steps_of(10, 9.0, 8.0, 8.5, 2.0, 8.2))
    assert jumped.status == "fail"
    assert "the loss is 8.2 after the resume, where 2 was to be expected" in str(jumped)
    assert judge_resume(recorded, steps_of(10, 3.0, 2.95, 3.05, 3.0, 3.0)).status == "warn"
    assert judge_resume(recorded, steps_of(10, 0.1, 0.1, 0.1, 0.1, 0.1)).status == "pass"


def test_loss_that_is_no_number_fails_unless_it_was_so_before() -> None:
    recorded = steps_of(0, *LEVEL)
    assert judge_resume(recorded, steps_of(10, math.nan)).status == "fail"
    was_so = steps_of(0, *LEVEL[:-1], math.inf)
    assert judge_resume(was_so, steps_of(10, math.inf)).status == "warn"


def test_gradient_norms_only_warn() -> None:
    recorded = [StepRecord(step, grad_norm=1 + 0.1 * (step % 3)) for step in range(10)]
    for norms in ([60.0] * 5, [1.0, math.inf, 1.0]):
        told = [StepRecord(step, grad_norm=norm) for step, norm in enumerate(norms, 10)]
        verdict = judge_resume(recorded, told)
        assert verdict.status == "warn"
        assert "the gradient norm" in verdict.reasons[0]


def test_data_that_repeat_by_themselves_say_nothing() -> None:
    few = [StepRecord(step, batch="ab"[step % 2]) for step in range(10)]
    assert judge_resume(few, [StepRecord(10, batch="a")], first_batch="a").status == "pass"
    one = [StepRecord(0, batch="a")]
    assert judge_resume(one, [StepRecord(1, batch="a")], first_batch="a").status == "pass"
    assert judge_resume(one, [StepRecord(1, batch="a")], first_batch="b").status == "fail"
    unshuffled = [StepRecord(step, batch=f"{step}") for step in range(10)]
    told = [StepRecord(10, batch="0")]
    assert judge_resume(unshuffled, told, first_batch="0", at_epoch_start=True).status == "pass"
    assert judge_resume(unshuffled, told, first_batch="0").status == "fail"


def test_learning_rates_are_compared_within_single_precision() -> None:
    single = float(torch.tensor(3e-4))
    for used, in_force, status in [
        ((single,), (3e-4,), "pass"),
        ((3e-4, 1e-3), (3e-4, 1e-3), "pass"),
        ((3e-4, 1e-3), (3e-4,), "fail"),
        ((3.01e-4,), (3e-4,), "fail"),
        ((0.0,), (0.0,), "pass"),
        ((math.nan,), (3e-4,), "fail"),
        ((), (3e-4,), "pass"),
    ]:
        verdict = judge_resume([StepRecord(0)], [StepRecord(1, learning_rates=used)], learning_rates=in_force)
        assert verdict.status == status, (used, in_force)


def test_nothing_recorded_is_not_checked() -> None:
    assert ResumeCheck([]).verdict().status == "not checked"
    assert ResumeCheck([]).tell(StepRecord(5, 1.0)).status == "not checked"
    assert judge_resume(steps_of(0, *LEVEL), []).status == "not checked"
    with pytest.raises(ValueError, match="steps=0"):
        ResumeCheck([], steps=0)


def test_settled_check_hears_no_more() -> None:
    check = ResumeCheck(steps_of(0, *LEVEL), steps=3)
    for record in steps_of(10, 2.0, 2.0, 2.0):
        assert not check.is_settled
        check.tell(record)
    assert check.is_settled
    assert check.tell(StepRecord(99, math.nan)) == ResumeVerdict("pass", (), 3)


def stored(history: StepHistory) -> StepHistory:
    """What another process makes of what is stored of a history."""
    steps, batches = json.loads(json.dumps([history.steps(), history.batches()], allow_nan=False))
    losses, norms = history.numbers()
    again = StepHistory(3)
    again.restore(steps, losses.tolist(), norms.tolist(), batches, history.first_batch)
    return again


def test_history_comes_back_with_its_last_steps_and_its_first_batch() -> None:
    history = StepHistory(3)
    for step in range(5):
        history.record(step, loss=torch.tensor(step / 2), grad_norm=1.0, learning_rates=[1e-3], batch=f"{step}")
    history.record(5, loss=torch.tensor(math.nan), learning_rates=[math.nan])
    again = stored(history)
    assert again.first_batch == "0"
    assert [record.step for record in again.records()] == [3, 4, 5]
    assert again.records()[0] == StepRecord(3, 1.5, 1.0, (1e-3,), "3")
    last = again.records()[2]
    assert math.isnan(last.loss or 0)
    assert (last.grad_norm, last.learning_rates, last.batch) == (None, (), None)
    again.record(6, batch="6")
    assert again.first_batch == "0"


def test_numbers_of_a_short_history_have_the_shape_of_a_long_one() -> None:
    """So that the plan of a save is the same from the first step on."""
    history = StepHistory(4)
    assert [tuple(numbers.shape) for numbers in history.numbers()] == [(4,), (4,)]
    history.record(0, loss=2.0)
    assert [math.isnan(loss) for loss in history.numbers()[0].tolist()] == [False, True, True, True]
    assert [record.loss for record in stored(history).records()] == [2.0]


def test_recorded_tensor_may_be_changed_in_place_and_holds_no_graph() -> None:
    history = StepHistory()
    total = torch.tensor(2.0, requires_grad=True) * 1
    history.record(0, loss=total)
    with torch.no_grad():
        total.zero_()
    assert history.records()[0].loss == 2.0


class Part(torch.Tensor):
    """As a DTensor: this rank's part of a number that all ranks have together."""

    def full_tensor(self) -> torch.Tensor:
        return torch.tensor(5.0)


def test_part_of_a_number_is_made_whole_when_it_is_recorded() -> None:
    history = StepHistory()
    history.record(0, grad_norm=torch.tensor(3.0).as_subclass(Part))
    assert history.records()[0].grad_norm == 5.0


def test_recording_makes_no_number_of_a_tensor() -> None:
    """A tensor on the meta device has none: making one, as for a device, would have to wait."""
    history = StepHistory(1)
    history.record(0, loss=torch.empty((), device="meta"), grad_norm=torch.empty((), device="meta"))
    with pytest.raises(RuntimeError):
        history.records()


STEP = [0, True, True, []]


@pytest.mark.parametrize(
    ("steps", "batches", "first_batch"),
    [
        (None, None, None),
        ([[0]], None, None),
        ([[0, "big", True, []]], None, None),
        ([STEP], [1], None),
        ([STEP], ["a", "b"], None),
        ([STEP] * 5000, None, None),
        ([STEP] * 3, None, None),  # of which two numbers are stored
        ([STEP], None, 7),
    ],
)
def test_what_is_no_history_is_refused(steps: object, batches: object, first_batch: object) -> None:
    with pytest.raises(CheckpointError, match="no stored history"):
        StepHistory().restore(steps, [1.0, 2.0], [1.0, 2.0], batches, first_batch)


def test_history_is_bounded() -> None:
    for steps in (0, 5000):
        with pytest.raises(ValueError, match=f"steps={steps}"):
            StepHistory(steps)
