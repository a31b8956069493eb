"""A plan serves until a rank's state has another structure, and nobody waits for one that is known."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from distckpt import (
    Checkpointer,
    CheckpointError,
    DistributedError,
    InvalidShardingError,
    PerRank,
    SaveReport,
    ShardedTensor,
    saving,
)
from distckpt.coordinator import Coordinator
from distckpt.testing import MemoryStorage, run_ranks

BOUND_S = 20
State = dict[str, object]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry, the number of ranks, for every plan that is made."""
    made: list[int] = []
    plan_save = saving.plan_save

    def counted(ranks: Any) -> Any:
        made.append(len(ranks))
        return plan_save(ranks)

    monkeypatch.setattr(saving, "plan_save", counted)
    return made


def on_ranks(count: int, storage: MemoryStorage, call: Callable[[Checkpointer, int], object]) -> list[Any]:
    """call(checkpointer, rank) on every rank: results or CheckpointErrors."""

    def run(coordinator: Coordinator) -> object:
        with Checkpointer(storage, coordinator=coordinator, timeout_s=BOUND_S) as checkpointer:
            try:
                return call(checkpointer, coordinator.rank)
            except CheckpointError as error:
                return error

    return run_ranks(count, run)


def rows(key: str, rank: int, count: int, value: float) -> ShardedTensor:
    data = torch.full((4, 3), value + rank)
    return ShardedTensor.from_rank_offsets(key, data, (0, rank, count))


def make_state(rank: int, value: float, count: int = 2, **more: object) -> State:
    """Shards of one tensor, a replicated tensor, a shared value and one that differs by rank."""
    return {
        "w": rows("w", rank, count, value),
        "bias": torch.full((50,), value),
        "step": int(value),
        "rng": PerRank([rank] * int(value + 1)),
        **more,
    }


def check_stored(storage: MemoryStorage, value: float, iteration: int, count: int = 2) -> None:
    with Checkpointer(storage) as checkpointer:
        state = checkpointer.read(iteration)
    expected = np.repeat(np.arange(count) + value, 4)[:, None] * np.ones(3)
    np.testing.assert_array_equal(state["w"].numpy(), expected)  # type: ignore[attr-defined]
    assert torch.equal(state["bias"], torch.full((50,), value))  # type: ignore[arg-type]
    assert state["step"] == int(value)


@pytest.mark.parametrize("is_async", [False, True])
def test_one_plan_serves_all_saves_of_one_structure(plans: list[int], is_async: bool) -> None:
    storage = MemoryStorage()

    def run(checkpointer: Checkpointer, rank: int) -> None:
        for iteration in range(1, 5):
            state = make_state(rank, float(iteration))
            if is_async:
                checkpointer.async_save(state, iteration=iteration).wait()
            else:
                checkpointer.save(state, iteration=iteration)

    assert on_ranks(2, storage, run) == [None, None]
    assert plans == [2]
    for iteration in range(1, 5):
        check_stored(storage, float(iteration), iteration)


def test_chunks_that_a_longer_header_moves_are_found_where_they_lie(plans: list[int]) -> None:
    storage = MemoryStorage()
    notes = {1: "short", 2: "long" * 5000, 3: "short"}

    def run(checkpointer: Checkpointer, rank: int) -> None:
        for iteration, note in notes.items():
            checkpointer.save(make_state(rank, float(iteration), note=note), iteration=iteration)

    assert on_ranks(2, storage, run) == [None, None]
    assert plans == [2]
    for iteration in notes:
        check_stored(storage, float(iteration), iteration)


def test_prepare_makes_the_plan_of_the_first_save(plans: list[int]) -> None:
    storage = MemoryStorage()

    def run(checkpointer: Checkpointer, rank: int) -> None:
        checkpointer.prepare(make_state(rank, 5.0))
        assert len(checkpointer._save_context.arena) > 0 or rank
        checkpointer.async_save(make_state(rank, 1.0), iteration=1).wait()

    assert on_ranks(2, storage, run) == [None, None]
    assert plans == [2]
    check_stored(storage, 1.0, 1)


def test_async_save_of_a_known_structure_waits_for_no_other_rank() -> None:
    storage, returned = MemoryStorage(), threading.Event()

    def run(checkpointer: Checkpointer, rank: int) -> None:
        checkpointer.prepare(make_state(rank, 0.0))
        if rank == 0:
            pending = checkpointer.async_save(make_state(rank, 1.0), iteration=1)
            returned.set()
        else:
            assert returned.wait(BOUND_S)  # rank 0's call has returned though this rank has not called yet
            pending = checkpointer.async_save(make_state(rank, 1.0), iteration=1)
        pending.wait()

    assert on_ranks(2, storage, run) == [None, None]
    check_stored(storage, 1.0, 1)


def test_values_of_each_save_are_its_own() -> None:
    storage, loaded = MemoryStorage(), {}

    def run(checkpointer: Checkpointer, rank: int) -> None:
        for iteration in (1, 7):
            checkpointer.save(make_state(rank, float(iteration)), iteration=iteration)
        state = make_state(rank, 0.0)
        checkpointer.load(state)
        loaded[rank] = (state["step"], state["rng"].value)  # type: ignore[attr-defined]

    assert on_ranks(2, storage, run) == [None, None]
    assert loaded == {0: (7, [0] * 8), 1: (7, [1] * 8)}


def test_values_that_differ_between_ranks_are_refused_at_every_save() -> None:
    def run(checkpointer: Checkpointer, rank: int) -> None:
        checkpointer.save(make_state(rank, 1.0), iteration=1)
        checkpointer.save(make_state(rank, 2.0) | {"step": 2 + rank}, iteration=2)

    for error in on_ranks(2, MemoryStorage(), run):
        assert isinstance(error, InvalidShardingError)
        assert "'step'" in str(error)


def test_replicas_that_differ_are_refused_at_every_save() -> None:
    storage = MemoryStorage()

    def run(checkpointer: Checkpointer, rank: int) -> None:
        checkpointer.save(make_state(rank, 1.0), iteration=1)
        checkpointer.save(make_state(rank, 2.0) | {"bias": torch.full((50,), 2.0 + rank)}, iteration=2)

    for error in on_ranks(2, storage, run):
        assert isinstance(error, InvalidShardingError)
        assert "'bias'" in str(error)
        assert "differ between rank 0 and rank 1" in str(error)
    with Checkpointer(storage) as checkpointer:
        assert checkpointer.iterations() == [1]


@pytest.mark.parametrize("changed", [{0}, {1}, {0, 1}])
def test_rank_whose_structure_changed_makes_all_plan_anew(plans: list[int], changed: set[int]) -> None:
    """Those whose structure is the same have copied their state by then, and write that."""
    storage = MemoryStorage()

    def run(checkpointer: Checkpointer, rank: int) -> None:
        for iteration in (1, 2, 3):
            more = {f"extra {r}": torch.full((5,), 9.0) for r in changed if r == rank and iteration > 1}
            state = make_state(rank, float(iteration), **more)
            pending = checkpointer.async_save(state, iteration=iteration)
            state["bias"].fill_(-1)  # type: ignore[attr-defined]
            state["w"].data.fill_(-1)  # type: ignore[attr-defined]
            pending.wait()

    assert on_ranks(2, storage, run) == [None, None]
    assert plans == [2, 2]
    for iteration in (1, 2, 3):
        check_stored(storage, float(iteration), iteration)
    with Checkpointer(storage) as checkpointer:
        assert {key for key in checkpointer.read(3) if key.startswith("extra")} == {f"extra {r}" for r in changed}


def test_replica_that_only_its_former_writer_copied_is_named_and_the_next_save_succeeds() -> None:
    """Its writer has it no longer; the other rank saw no change, so it did not copy what another was to write."""
    storage, writers = MemoryStorage(), []

    def run(checkpointer: Checkpointer, rank: int) -> object:
        checkpointer.save({"a": torch.ones(9), f"b{rank}": torch.ones(5 + 90 * rank)}, iteration=1)
        share = checkpointer._save_context.share
        assert share is not None
        if len(share.shards) == 2:
            writers.append(rank)
        own: State = {f"b{rank}": torch.full((5 + 90 * rank,), 2.0)}
        state: State = own if rank in writers else {"a": torch.full((9,), 2.0), **own}
        try:
            checkpointer.async_save(state, iteration=2).wait()
        except InvalidShardingError as error:
            checkpointer.async_save(state, iteration=2).wait()
            return error
        return None

    results = on_ranks(2, storage, run)
    for error in results:
        assert isinstance(error, InvalidShardingError)
        assert "'a'" in str(error)
    with Checkpointer(storage) as checkpointer:
        assert torch.equal(checkpointer.read(2)["a"], torch.full((9,), 2.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("failing", ["look", "copy"])
def test_failure_on_one_rank_ahead_of_the_plan_is_raised_on_all(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = MemoryStorage()
    failed = threading.Event()

    def run(checkpointer: Checkpointer, rank: int) -> object:
        checkpointer.save(make_state(rank, 1.0), iteration=1)
        state = make_state(rank, 2.0)
        if rank == 1 and failing == "look":
            state["bad"] = object()
        if rank == 1 and failing == "copy":

            def fail(*_: object) -> None:
                failed.set()
                raise MemoryError("no memory left")

            monkeypatch.setattr(saving.Save, "_copy", fail)
        elif failing == "copy":
            pass
        try:
            checkpointer.async_save(state, iteration=2).wait()
        except DistributedError as error:
            return error
        return None

    errors = on_ranks(2, storage, run)
    for error in errors:
        assert isinstance(error, DistributedError)
        assert 1 in error.failures
        assert error.committed == "no"
    with Checkpointer(storage) as checkpointer:
        assert checkpointer.iterations() == [1]


def test_all_plan_anew_after_a_failed_save(plans: list[int]) -> None:
    """In their calls, so that no rank's failure is left for a later call to raise."""
    storage = MemoryStorage()

    def run(checkpointer: Checkpointer, rank: int) -> None:
        checkpointer.save(make_state(rank, 1.0), iteration=1)
        with pytest.raises(InvalidShardingError):
            checkpointer.save(make_state(rank, 2.0) | {"step": rank}, iteration=2)
        checkpointer.save(make_state(rank, 3.0), iteration=3)

    assert on_ranks(2, storage, run) == [None, None]
    assert plans == [2, 2]
    check_stored(storage, 3.0, 3)


@pytest.mark.parametrize("trouble", ["bad leaf", "failure that rank 1 has not waited for"])
def test_one_failed_async_save_does_not_make_later_ones_fail(trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, failed = MemoryStorage(), []
    write_shard_file = saving.write_shard_file

    def fail_once(*arguments: Any, **options: Any) -> Any:
        if trouble != "bad leaf" and options["rank"] == 0 and len(failed) == 1:
            failed.append("now")
            raise OSError(28, "no room")
        return write_shard_file(*arguments, **options)

    monkeypatch.setattr(saving, "write_shard_file", fail_once)

    def run(checkpointer: Checkpointer, rank: int) -> None:
        for iteration in range(8):
            state = make_state(rank, float(iteration))
            if iteration == 1 and rank == 0:
                failed.append("next")
            if iteration == 1 and rank == 1 and trouble == "bad leaf":
                state["bad"] = object()
            try:
                pending = checkpointer.async_save(state, iteration=iteration)
                if rank == 0:
                    pending.wait()
            except (CheckpointError, OSError):
                continue
        with contextlib.suppress(CheckpointError, OSError):
            checkpointer.latest_iteration()

    on_ranks(2, storage, run)
    with Checkpointer(storage) as checkpointer:
        assert set(checkpointer.iterations()) >= {0, 4, 5, 6, 7}


def test_other_dtype_or_shape_or_place_is_another_structure(plans: list[int]) -> None:
    storage = MemoryStorage()
    with Checkpointer(storage) as checkpointer:
        for tensor in (torch.ones(6), torch.ones(6, dtype=torch.bfloat16), torch.ones(2, 3), torch.ones(6)):
            checkpointer.save({"a": tensor}, iteration=1)
            found = checkpointer.read()["a"]
            assert isinstance(found, torch.Tensor)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)
    assert plans == [1, 1, 1, 1]


# Memory


def test_state_larger_than_staging_may_take_is_written_while_training_waits() -> None:
    storage, reports = MemoryStorage(), []

    def run(coordinator: Coordinator) -> None:
        rank = coordinator.rank
        bound = 64 if rank else None
        with Checkpointer(storage, coordinator=coordinator, max_staging_bytes=bound) as checkpointer:
            for iteration in (1, 2):
                state = make_state(rank, float(iteration))
                pending = checkpointer.async_save(state, iteration=iteration)
                pending.wait_staged()
                state["bias"].fill_(-1)  # type: ignore[attr-defined]
                state["w"].data.fill_(-1)  # type: ignore[attr-defined]
                reports.append((rank, pending.wait()))

    run_ranks(2, run)
    for iteration in (1, 2):
        check_stored(storage, float(iteration), iteration)
    for rank, report in reports:
        assert isinstance(report, SaveReport)
        assert len(report.degraded) == rank
        assert not rank or "more than the 64 that staging may take" in report.degraded[0]


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="max_staging_bytes=-1"):
        Checkpointer(MemoryStorage(), max_staging_bytes=-1)
    for rate in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="max_write_bytes_per_s"):
            Checkpointer(MemoryStorage(), max_write_bytes_per_s=rate)
