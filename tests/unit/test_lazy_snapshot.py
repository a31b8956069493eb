"""A lazy snapshot holds the values of the call, whatever changes them afterwards, or the save fails and says why."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from distckpt import Checkpointer, CheckpointError, PendingSave, staging
from distckpt.staging import copy_on_host
from distckpt.testing import MemoryStorage

BOUND_S = 20
State = dict[str, object]
OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, fused=True),
}


class Gate:
    """Holds up the copies that a save makes in its own thread until it is opened."""

    def __init__(self) -> None:
        self._opened = threading.Event()
        self.copied = 0

    def copy(self, tensors: Sequence[Tensor], memory: memoryview, starts: Sequence[int], *, threads: int) -> None:
        if threading.current_thread().name == "distckpt-save":
            assert self._opened.wait(BOUND_S)
            self.copied += len(tensors)
        copy_on_host(tensors, memory, starts, threads=threads)

    def open(self) -> None:
        self._opened.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(staging, "copy_on_host", gate.copy)
    yield gate
    gate.open()


class Job:
    """A model with BatchNorm, an optimizer that has made a step, and a copy of the weights that is averaged."""

    def __init__(self, make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        self.optimizer = make_optimizer(list(self.model.parameters()))
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.forward_backward()
        self.optimizer.step()

    def forward_backward(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(16, 8)).square().mean().backward()

    def update_average(self) -> None:
        for name, p in self.model.named_parameters():
            self.average[name].lerp_(p.detach(), 0.5)

    def state(self) -> State:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "average": self.average}


def leaves(value: object, path: str = "") -> dict[str, object]:
    """Path -> tensor (a copy) or value."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in leaves(item, f"{path}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, item in enumerate(value) for k, v in leaves(item, f"{path}/{i}").items()}
    return {path: value.detach().clone() if isinstance(value, Tensor) else value}


def check_saved(checkpointer: Checkpointer, expected: dict[str, object]) -> None:
    found = leaves(checkpointer.read())
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        if isinstance(value, Tensor):
            assert torch.equal(found[path], value), path  # type: ignore[arg-type]
        else:
            assert found[path] == value


@contextmanager
def lazily_saved(gate: Gate, job: Job, *, guarded: bool = True) -> Iterator[Checkpointer]:
    """The body runs between the return of async_save and the copy of what it left. Closed by the caller's checks."""
    checkpointer = Checkpointer(MemoryStorage(), timeout_s=BOUND_S)
    if guarded:
        checkpointer.guard(job.optimizer)
    checkpointer.async_save(job.state(), iteration=1, snapshot="lazy")
    yield checkpointer
    gate.open()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_step_waits_for_the_copy_and_the_old_values_are_saved(gate: Gate, kind: str) -> None:
    job = Job(OPTIMIZERS[kind])
    job.forward_backward()
    before, weight = leaves(job.state()), job.model[0].weight.detach().clone()
    with lazily_saved(gate, job) as checkpointer:
        step = threading.Thread(target=job.optimizer.step)
        step.start()
        step.join(0.2)
        assert step.is_alive()
        assert torch.equal(job.model[0].weight, weight)
    step.join(BOUND_S)
    assert not torch.equal(job.model[0].weight, weight)
    check_saved(checkpointer, before)
    checkpointer.close()


def test_everything_that_no_guarded_step_changes_is_copied_at_once(gate: Gate) -> None:
    job = Job(OPTIMIZERS["adamw"])
    before = leaves(job.state())
    with lazily_saved(gate, job) as checkpointer:
        job.forward_backward()  # changes the statistics of BatchNorm
        job.update_average()
    check_saved(checkpointer, before)
    assert not torch.equal(job.model[1].running_mean, before["/model/1.running_mean"])  # type: ignore[arg-type]
    checkpointer.close()


def test_only_what_a_guarded_step_changes_is_copied_later(gate: Gate) -> None:
    job = Job(OPTIMIZERS["adamw"])
    with lazily_saved(gate, job) as checkpointer:
        assert gate.copied == 0
    checkpointer.close()
    parameters = len(list(job.model.parameters()))
    assert gate.copied == parameters * (1 + len(("exp_avg", "exp_avg_sq", "step")))


def test_without_a_guard_everything_is_copied_at_once(gate: Gate) -> None:
    job = Job(OPTIMIZERS["adamw"])
    before = leaves(job.state())
    with lazily_saved(gate, job, guarded=False) as checkpointer:
        job.optimizer.step()
    assert gate.copied == 0
    check_saved(checkpointer, before)
    checkpointer.close()


def test_before_mutation_waits_for_the_copy(gate: Gate) -> None:
    job = Job(OPTIMIZERS["adamw"])
    before = leaves(job.state())
    with lazily_saved(gate, job) as checkpointer:

        def change() -> None:
            checkpointer.before_mutation()
            with torch.no_grad():
                job.model[0].weight.zero_()

        thread = threading.Thread(target=change)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
    thread.join(BOUND_S)
    check_saved(checkpointer, before)
    checkpointer.close()


def zero(weight: torch.nn.Parameter) -> None:
    with torch.no_grad():
        weight.zero_()


def zero_behind_the_version_counter(weight: torch.nn.Parameter) -> None:
    weight.data.zero_()


def free(weight: torch.nn.Parameter) -> None:
    weight.untyped_storage().resize_(0)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (zero, "it was changed before the snapshot had it"),
        (zero_behind_the_version_counter, "it was changed before the snapshot had it"),
        (free, "its storage was freed or resized before the snapshot had it"),
    ],
)
def test_change_that_nobody_announced_fails_the_save_and_names_the_tensor(
    gate: Gate, change: Callable[[torch.nn.Parameter], None], why: str
) -> None:
    job = Job(OPTIMIZERS["sgd"])
    with lazily_saved(gate, job) as checkpointer:
        change(job.model[2].weight)
    with pytest.raises(CheckpointError, match=rf"'model/2\.weight' .*{why}(.|\n)*before_mutation\(\)"):
        checkpointer.close()


def test_one_element_changed_in_place_fails_the_save_by_the_version(gate: Gate) -> None:
    weight = torch.nn.Parameter(torch.zeros(30_000))  # of which 65 elements are sampled
    optimizer = torch.optim.SGD([weight])
    checkpointer = Checkpointer(MemoryStorage(), timeout_s=BOUND_S)
    checkpointer.guard(optimizer)
    checkpointer.async_save({"w": weight}, iteration=1, snapshot="lazy")
    with torch.no_grad():
        weight[7] = 1
    gate.open()
    with pytest.raises(CheckpointError, match="it was changed before"):
        checkpointer.close()


def test_parameter_that_gets_another_storage_is_saved_as_it_was(gate: Gate) -> None:
    job = Job(OPTIMIZERS["sgd"])
    before = leaves(job.state())
    with lazily_saved(gate, job) as checkpointer:
        job.model[0].weight.data = torch.full((8, 8), 7.0)
        del job.model[2].weight
    check_saved(checkpointer, before)
    checkpointer.close()


def test_step_is_not_held_up_by_a_snapshot_that_failed(gate: Gate) -> None:
    job = Job(OPTIMIZERS["sgd"])
    with lazily_saved(gate, job) as checkpointer:
        free(job.model[0].weight)
        gate.open()
        checkpointer.before_mutation()
    with pytest.raises(CheckpointError, match="freed or resized"):
        checkpointer.close()


def test_wait_of_a_step_counts_as_stall(gate: Gate) -> None:
    job = Job(OPTIMIZERS["sgd"])
    job.forward_backward()
    checkpointer = Checkpointer(MemoryStorage(), timeout_s=BOUND_S)
    checkpointer.guard(job.optimizer)
    pending = checkpointer.async_save(job.state(), iteration=1, snapshot="lazy")
    threading.Timer(0.3, gate.open).start()
    job.optimizer.step()
    report = pending.wait()
    assert report.stall_s >= 0.2
    checkpointer.close()


def test_wait_counts_as_stall_though_the_save_ends_before_the_waiter_wakes_up(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_staged = PendingSave.wait_staged

    def wake_up_late(pending: PendingSave) -> None:
        wait_staged(pending)
        pending.wait()

    monkeypatch.setattr(PendingSave, "wait_staged", wake_up_late)
    test_wait_of_a_step_counts_as_stall(gate)


def test_next_steps_pass_once_the_copy_is_made(gate: Gate) -> None:
    job = Job(OPTIMIZERS["sgd"])
    with lazily_saved(gate, job) as checkpointer:
        gate.open()
        checkpointer.before_mutation()
        job.optimizer.step()
        job.optimizer.step()
    checkpointer.close()


def test_guard_is_gone_when_the_checkpointer_is_closed(gate: Gate) -> None:
    job = Job(OPTIMIZERS["sgd"])
    checkpointer = Checkpointer(MemoryStorage())
    checkpointer.guard(job.optimizer)
    checkpointer.close()
    assert not job.optimizer._optimizer_step_pre_hooks


def test_what_has_no_step_hook_cannot_be_guarded() -> None:
    with (
        Checkpointer(MemoryStorage()) as checkpointer,
        pytest.raises(TypeError, match="a object has no hook ahead of its step"),
    ):
        checkpointer.guard(object())  # type: ignore[arg-type]
