"""Saves of tensors on an accelerator: what is ordered, what is waited for, and what the checkpoint holds in the end."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from distckpt import Checkpointer, CheckpointError, InvalidShardingError, checkpointer
from distckpt.coordinator import Coordinator
from distckpt.storage import Storage
from distckpt.storage.memory import MemoryWriteFile
from distckpt.testing import FakeAccelerator, MemoryStorage, run_ranks

BOUND_S = 20
State = dict[str, object]


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> FakeAccelerator:
    """One that every Checkpointer knows."""
    accelerator = FakeAccelerator()
    monkeypatch.setattr(checkpointer, "Transports", accelerator.transports)
    return accelerator


class Held(MemoryStorage):
    """Takes no shard file before it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()

    def create(self, name: str, *, size_hint: int = 0) -> MemoryWriteFile:
        assert self.let_go.wait(BOUND_S)
        return super().create(name, size_hint=size_hint)


def make_state(accelerator: FakeAccelerator) -> dict[str, Tensor]:
    """On the device, contiguous or not, empty or not, and one tensor on the host."""
    numbers = torch.arange(600, dtype=torch.float32)
    return {
        "plain": accelerator.put(numbers),
        "transposed": accelerator.put(numbers.view(20, 30)).t(),
        "half": accelerator.put(numbers.to(torch.bfloat16)),
        "empty": accelerator.put(torch.empty(0)),
        "scalar": accelerator.put(torch.tensor(3)),
        "host": numbers + 1,
    }


def clones(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in state.items()}


def check_stored(storage: Storage, expected: dict[str, Tensor]) -> None:
    with Checkpointer(storage) as reading:
        found = reading.read()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key  # type: ignore[arg-type]


@pytest.mark.parametrize("is_async", [False, True])
def test_state_on_the_device_is_saved(accelerator: FakeAccelerator, is_async: bool) -> None:
    storage, state = MemoryStorage(), make_state(accelerator)
    with Checkpointer(storage) as saving:
        for iteration in (1, 2):
            for tensor in state.values():
                tensor += 1
            if is_async:
                saving.async_save({**state}, iteration=iteration).wait()
            else:
                saving.save({**state}, iteration=iteration)
            check_stored(storage, clones(state))


def test_eager_save_orders_what_comes_next_and_waits_for_no_copy(accelerator: FakeAccelerator) -> None:
    storage, state = Held(), make_state(accelerator)
    expected = clones(state)
    with Checkpointer(storage) as saving:
        saving.prepare({**state})
        accelerator.counts.clear()
        pending = saving.async_save({**state}, iteration=1)
        assert accelerator.counts["order_before_compute"] >= 1
        for tensor in state.values():
            tensor.zero_()
        storage.let_go.set()
        pending.wait()
    check_stored(storage, expected)


def test_tensors_that_are_dropped_after_an_eager_save_are_saved(accelerator: FakeAccelerator) -> None:
    storage, state = Held(), make_state(accelerator)
    expected = clones(state)
    with Checkpointer(storage) as saving:
        pending = saving.async_save({**state}, iteration=1)
        state.clear()
        storage.let_go.set()
        pending.wait()
    check_stored(storage, expected)


@pytest.fixture
def optimizer(accelerator: FakeAccelerator) -> torch.optim.Optimizer:
    """Of two parameters on the device; has made a step."""
    weights = [
        torch.nn.Parameter(accelerator.put(torch.ones(50, 3))),
        torch.nn.Parameter(accelerator.put(torch.ones(7))),
    ]
    optimizer = torch.optim.SGD(weights, lr=0.5)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    return optimizer


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {f"w{i}": p.detach() for i, p in enumerate(optimizer.param_groups[0]["params"])}


def test_step_after_a_lazy_save_is_ordered_after_the_copies_and_does_not_wait(
    accelerator: FakeAccelerator, optimizer: torch.optim.Optimizer
) -> None:
    storage = Held()
    expected = clones(state_of(optimizer))
    with Checkpointer(storage) as saving:
        saving.guard(optimizer)
        pending = saving.async_save({**state_of(optimizer)}, iteration=1, snapshot="lazy")
        optimizer.step()
        assert not torch.equal(state_of(optimizer)["w0"], expected["w0"])
        storage.let_go.set()
        pending.wait()
    check_stored(storage, expected)


def test_change_on_the_device_that_nobody_announced_fails_a_lazy_save(
    accelerator: FakeAccelerator, optimizer: torch.optim.Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = threading.Event()
    complete = checkpointer.Save.finish

    def finish(save: checkpointer.Save) -> object:
        assert waiting.wait(BOUND_S)
        return complete(save)

    monkeypatch.setattr(checkpointer.Save, "finish", finish)
    saving = Checkpointer(MemoryStorage())
    saving.guard(optimizer)
    saving.async_save({**state_of(optimizer)}, iteration=1, snapshot="lazy")
    with torch.no_grad():
        optimizer.param_groups[0]["params"][1].zero_()
    optimizer.step()
    waiting.set()
    with pytest.raises(CheckpointError, match=r"'w1' .*it was changed before the snapshot had it"):
        saving.close()


def test_staging_memory_is_page_locked_until_it_is_freed(accelerator: FakeAccelerator) -> None:
    state = make_state(accelerator)
    with Checkpointer(MemoryStorage()) as saving:
        saving.async_save({**state}, iteration=1).wait()
        report = saving.async_save({**state}, iteration=2).wait()
        assert accelerator.counts["register"] == 1
        assert accelerator.counts["release"] == 0
    assert report.degraded == ()
    assert accelerator.counts["release"] == 1
    assert accelerator.counts["pageable copies"] == 0


def test_refused_page_lock_is_reported_and_harmless(accelerator: FakeAccelerator) -> None:
    accelerator.refuses_registration = True
    storage, state = MemoryStorage(), make_state(accelerator)
    with Checkpointer(storage) as saving:
        report = saving.async_save({**state}, iteration=1).wait()
    assert "refuse page-locked memory" in report.degraded[0]
    check_stored(storage, clones(state))


def test_device_that_fails_fails_the_save(accelerator: FakeAccelerator) -> None:
    storage, state = MemoryStorage(), make_state(accelerator)
    with Checkpointer(storage) as saving:
        saving.save({**state}, iteration=1)
        accelerator.wait_error = RuntimeError("the device is gone")
        with pytest.raises(RuntimeError, match="the device is gone"):
            saving.async_save({**state}, iteration=2).wait()
        assert accelerator.counts["release"] == 0  # The device may still write there.
        assert saving.iterations() == [1]
        saving.save({**state}, iteration=3)
    check_stored(storage, clones(state))


@pytest.mark.parametrize("same", [True, False])
def test_replicas_on_devices_are_compared(accelerator: FakeAccelerator, same: bool) -> None:
    storage = MemoryStorage()

    def run(coordinator: Coordinator) -> object:
        value = 1.0 if same else float(coordinator.rank)
        state: State = {"bias": accelerator.put(torch.full((50,), value))}
        with Checkpointer(storage, coordinator=coordinator, timeout_s=BOUND_S) as saving:
            try:
                return saving.async_save(state, iteration=1).wait()
            except InvalidShardingError as error:
                return error

    results = run_ranks(2, run)
    assert all(isinstance(result, InvalidShardingError) is not same for result in results)


def test_state_that_staging_has_no_room_for_is_saved_all_the_same(accelerator: FakeAccelerator) -> None:
    storage, state = MemoryStorage(), make_state(accelerator)
    with Checkpointer(storage, max_staging_bytes=100) as saving:
        report = saving.async_save({**state}, iteration=1).wait()
        expected = clones(state)
        saving.save({**state}, iteration=2)
    assert "more than the 100" in report.degraded[0]
    check_stored(storage, expected)
