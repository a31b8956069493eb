"""A checkpoint is due after the same step on all ranks, whatever each of them knows by itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distckpt import Checkpointer, CheckpointError, CheckpointSchedule, DistributedError, SaveReport, Termination
from distckpt.coordinator import Coordinator, SingleProcess
from distckpt.testing import MemoryStorage, run_ranks
from distckpt.training import schedule as module

REPORT = {"plan_s": 0, "stage_s": 0, "stall_s": 0, "write_s": 0, "commit_s": 0, "slowest": {}, "backend": ""}


class Clock:
    """In place of the module `time`: stands still until told."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def time(self) -> float:
        return 50_000 + self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    told = Clock()
    monkeypatch.setattr(module, "time", told)
    return told


def due_steps(schedule: CheckpointSchedule, last: int) -> list[int]:
    return [step for step in range(last + 1) if schedule.is_due(step)]


def saved(total_s: float) -> SaveReport:
    return SaveReport(iteration=1, save_id="a", bytes=0, total_s=total_s, **REPORT)  # type: ignore[arg-type]


def test_rules_of_steps_add_up_and_say_why() -> None:
    schedule = CheckpointSchedule(10, at=[0, 7, 20], log_spaced=True)
    assert due_steps(schedule, 40) == [0, 1, 2, 4, 7, 8, 10, 20, 30, 40]
    assert schedule.is_due(20).reasons == ("every 10 steps", "at step 20")
    assert str(schedule.is_due(4)) == "log-spaced, step 4"
    assert str(schedule.is_due(5)) == "not due"
    assert not schedule.should_stop


def test_powers_of_two_and_then_every_thousand_steps() -> None:
    found = due_steps(CheckpointSchedule(every=1000, log_spaced=True), 3000)
    assert found == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 3000]


@given(st.integers(1, 12))
def test_each_decade_gets_as_many_steps_as_asked(per_decade: int) -> None:
    found = due_steps(CheckpointSchedule(log_spaced=per_decade), 1000)
    assert found == sorted({round(10 ** (exponent / per_decade)) for exponent in range(3 * per_decade + 1)})


def test_rules_of_steps_make_no_coordinator(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Coordinator:
        raise AssertionError("nobody needs one")

    monkeypatch.setattr(module, "default_coordinator", refuse)
    with CheckpointSchedule(every=5, at=[3], log_spaced=2) as schedule:
        assert schedule.is_due(5, {"loss": 1.0})
    with pytest.raises(AssertionError):
        CheckpointSchedule(every_s=5)


def test_seconds_count_from_when_a_checkpoint_was_due_by_any_rule(clock: Clock) -> None:
    schedule = CheckpointSchedule(every=100, every_s=60, coordinator=SingleProcess())
    due = []
    for step in range(1, 121):
        clock.now_s += 1
        if reasons := schedule.is_due(step).reasons:
            due.append((step, *reasons))
    assert due == [(60, "60 s since the last one"), (100, "every 100 steps")]
    clock.now_s += 40
    assert schedule.is_due(121)


def test_all_ranks_follow_the_clock_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    class RankClock(Clock):
        """Each thread's own: rank 1's runs ten times as fast."""

        def monotonic(self) -> float:
            return steps[threading.current_thread().name] * (10 if "1" in threading.current_thread().name else 1)

    steps = {"rank 0": 0, "rank 1": 0}
    monkeypatch.setattr(module, "time", RankClock())

    def train(coordinator: Coordinator) -> list[int]:
        schedule, due = CheckpointSchedule(every_s=7, coordinator=coordinator), []
        for step in range(1, 30):
            steps[f"rank {coordinator.rank}"] += 1
            if schedule.is_due(step):
                due.append(step)
        return due

    assert run_ranks(2, train) == [[7, 14, 21, 28]] * 2


def test_one_agreement_for_all_rules_at_every_so_many_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    phases, agree = [], module.agree

    def counted(coordinator: Coordinator, phase: str, *arguments: object, **options: object) -> object:
        phases.append(phase)
        return agree(coordinator, phase, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "agree", counted)
    schedule = CheckpointSchedule(
        every=2,
        every_s=1e6,
        best=("loss", "min"),
        deadline_s=1e6,
        on_termination=Termination(signals=(), coordinator=SingleProcess()),
        agree_every=5,
        coordinator=SingleProcess(),
    )
    for step in range(12):
        schedule.is_due(step)
    assert phases == ["schedule, step 0", "schedule, step 5", "schedule, step 10"]
    assert schedule.is_due(12, {"loss": 1.0}).is_best
    assert phases[3:] == ["schedule, step 12"]


def test_signal_to_one_rank_is_due_and_stops_all_at_the_same_step() -> None:
    def train(coordinator: Coordinator) -> tuple[int, str, bool, str | None]:
        termination = Termination(signals=(), coordinator=coordinator)
        schedule = CheckpointSchedule(every=1000, on_termination=termination, coordinator=coordinator, agree_every=3)
        for step in range(100):
            if coordinator.rank == 2 and step == 7:
                termination.tell("SIGTERM")
            if due := schedule.is_due(step):
                assert not schedule.is_due(step + 1)
                assert termination.told is not None
                return step, str(due), schedule.should_stop, schedule.stop_reason
        raise AssertionError("never due")

    assert run_ranks(4, train) == [(9, "rank 2: SIGTERM", True, "rank 2: SIGTERM")] * 4


def test_termination_of_its_own_listens_from_the_start_until_it_is_closed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    schedule = CheckpointSchedule(on_termination=True)
    try:
        assert not schedule.is_due(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert str(schedule.is_due(2)) == "rank 0: SIGTERM"
        assert schedule.should_stop
    finally:
        schedule.close()
    schedule.close()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("options", "saves", "due_at"),
    [
        ({"deadline_s": 1000}, [], 700),  # 300 s, as long as nothing is known
        ({"deadline": 52_000}, [], 700),
        ({"deadline_s": 1000, "save_takes_s": 50}, [], 950),
        ({"deadline_s": 1000}, [20, 60, 30], 900),  # one and a half of the slowest, and 10 s
        ({"deadline_s": 1000, "save_takes_s": 50, "agree_every": 20}, [], 940),
    ],
)
def test_last_checkpoint_is_due_while_there_is_time_for_it(
    clock: Clock, options: dict[str, float], saves: list[float], due_at: int
) -> None:
    schedule = CheckpointSchedule(coordinator=SingleProcess(), **options)  # type: ignore[arg-type]
    for seconds in saves:
        schedule.saved(saved(seconds))
    step_s = 10
    for step in range(1, 101):
        clock.now_s += step_s
        if due := schedule.is_due(step):
            break
    # No later than due_at, and earlier by no more than the time until the ranks ask each other again.
    round_s = step_s * options.get("agree_every", 1)
    assert due_at - round_s <= step * step_s <= due_at
    assert "the deadline is in" in str(due)
    assert schedule.should_stop
    clock.now_s += 10_000
    assert not schedule.is_due(step + 1)


def test_deadline_leaves_the_grace_of_a_termination_alone(clock: Clock) -> None:
    termination = Termination(signals=(), grace_s=1, coordinator=SingleProcess())
    schedule = CheckpointSchedule(deadline_s=200, on_termination=termination, coordinator=SingleProcess())
    assert schedule.is_due(1)
    assert schedule.should_stop
    assert termination.told is None
    assert termination.remaining_s() is None


def test_slow_first_step_does_not_bring_the_deadline_near(clock: Clock) -> None:
    schedule = CheckpointSchedule(deadline_s=5000, save_takes_s=10, agree_every=100, coordinator=SingleProcess())
    clock.now_s += 600
    assert not any(schedule.is_due(step) for step in range(1, 250))


def test_improvement_of_a_metric_is_due_and_its_best_is_stored() -> None:
    schedule = CheckpointSchedule(best=("val_loss", "min"), coordinator=SingleProcess())
    values = [3.0, 3.0, 2.5, float("nan"), float("-inf"), 2.6, torch.tensor(2.25), None]
    due = [schedule.is_due(step, {"val_loss": value, "x": 0.0}) for step, value in enumerate(values)]
    assert [one.is_best for one in due] == [True, False, True, False, False, False, True, False]
    assert str(due[2]) == "val_loss 2.5 is the best so far"
    assert not schedule.is_due(9, {"x": 1.0})
    again = CheckpointSchedule(best=("val_loss", "min"), coordinator=SingleProcess())
    again.load_state_dict(schedule.state_dict())
    assert not again.is_due(1, {"val_loss": 2.3})
    assert again.is_due(1, {"val_loss": 2.2})
    other = CheckpointSchedule(best=("accuracy", "max"), coordinator=SingleProcess())
    other.load_state_dict(schedule.state_dict())
    assert [other.is_due(step, {"accuracy": value}).is_best for step, value in enumerate([0.1, 0.3, 0.2])] == [
        *(True, True, False)
    ]
    CheckpointSchedule(every=1).load_state_dict(schedule.state_dict())
    assert CheckpointSchedule(every=1).state_dict() == {"metric": None, "mode": None, "best": None}


def test_state_goes_through_a_checkpoint() -> None:
    schedule, again = (CheckpointSchedule(best=("loss", "max"), coordinator=SingleProcess()) for _ in range(2))
    with Checkpointer(MemoryStorage(), coordinator=SingleProcess()) as checkpointer:
        checkpointer.save({"schedule": schedule}, iteration=1)
        schedule.is_due(1, {"loss": 0.1})
        checkpointer.save({"schedule": schedule}, iteration=2)
        checkpointer.load({"schedule": again})
    assert again.state_dict() == schedule.state_dict() == {"metric": "loss", "mode": "max", "best": 0.1}


def test_all_ranks_take_the_metric_of_the_lowest_rank_that_knows_it() -> None:
    def train(coordinator: Coordinator) -> tuple[list[bool], dict[str, object]]:
        schedule = CheckpointSchedule(best=("loss", "min"), coordinator=coordinator, agree_every=100)
        due = []
        for step, loss in enumerate([3.0, 2.0, 2.5]):
            own = {1: {"loss": loss}, 2: {"loss": 9.0 - loss}}.get(coordinator.rank, {})
            due.append(bool(schedule.is_due(step, own)))
        return due, schedule.state_dict()

    expected = ([True, True, False], {"metric": "loss", "mode": "min", "best": 2.0})
    assert run_ranks(3, train) == [expected] * 3


def test_ranks_that_ask_about_different_steps_are_told() -> None:
    def train(coordinator: Coordinator) -> None:
        schedule = CheckpointSchedule(every_s=1, coordinator=coordinator)
        with pytest.raises(DistributedError, match="different phases"):
            schedule.is_due(coordinator.rank)

    run_ranks(2, train)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "no rule is given"),
        ({"every": 0}, "every=0"),
        ({"every": 2.5}, "every=2.5"),
        ({"every_s": -1}, "every_s=-1"),
        ({"every_s": float("nan")}, "every_s=nan"),
        ({"at": [-1]}, "at="),
        ({"log_spaced": -2}, "log_spaced=-2"),
        ({"best": ("loss", "least")}, "expected the name of a metric"),
        ({"best": "loss"}, "expected the name of a metric"),
        ({"deadline_s": 5, "deadline": 5}, "give one of them"),
        ({"deadline_s": 0}, "deadline_s=0"),
        ({"every": 1, "agree_every": 0}, "agree_every=0"),
        ({"every": 1, "save_takes_s": 0}, "save_takes_s=0"),
    ],
)
def test_nonsense_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CheckpointSchedule(coordinator=SingleProcess(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("state", [{}, {"metric": 3}, {"metric": "a", "mode": "least", "best": 1.0}])
def test_state_of_something_else_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="no state of a CheckpointSchedule"):
        CheckpointSchedule(every=1).load_state_dict(state)
