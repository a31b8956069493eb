"""What goes wrong on one rank of a save or load is raised on every rank, and what one rank knows, all go by."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distckpt import (
    Checkpointer,
    DistributedError,
    InvalidShardingError,
    MismatchError,
    ShardedTensor,
    saving,
)
from distckpt.commit import Writer
from distckpt.coordinator import Coordinator
from distckpt.errors import CheckpointError, FencedError
from distckpt.storage import Storage
from distckpt.testing import CrashingStorage, MemoryStorage, run_ranks

State = dict[str, object]


def on_both(
    storage: Storage, call: Callable[[Checkpointer, int], object], other: Storage | None = None
) -> list[object]:
    """call(checkpointer, rank) on two ranks; its results or errors. `other`: rank 1's storage, if it has its own."""

    def run(coordinator: Coordinator) -> object:
        own = storage if coordinator.rank == 0 or other is None else other
        with Checkpointer(own, coordinator=coordinator, timeout_s=20) as checkpointer:
            try:
                return call(checkpointer, coordinator.rank)
            except CheckpointError as error:
                return error

    return run_ranks(2, run)


def check_raised(results: list[object], kind: type[CheckpointError], text: str) -> None:
    for result in results:
        assert type(result) is kind, repr(result)
        assert text in str(result)
    assert str(results[0]) == str(results[1])


@pytest.fixture
def storage() -> MemoryStorage:
    """Iterations 10 and 20 of a state that is alike on two ranks."""
    storage = MemoryStorage()

    def save(checkpointer: Checkpointer, rank: int) -> None:
        for iteration in (10, 20):
            checkpointer.save(make_state(iteration), iteration=iteration)

    assert on_both(storage, save) == [None, None]
    return storage


def make_state(version: int) -> State:
    return {"a": torch.full((3,), version), "b": torch.full((3,), version)}


def test_ranks_that_save_different_iterations_are_told(storage: MemoryStorage) -> None:
    results = on_both(storage, lambda c, rank: c.save(make_state(1), iteration=30 + rank))
    check_raised(results, InvalidShardingError, "rank 1 iteration 31")


def test_ranks_that_save_different_metadata_are_told(storage: MemoryStorage) -> None:
    results = on_both(storage, lambda c, rank: c.save(make_state(1), iteration=30, metadata=rank))
    check_raised(results, InvalidShardingError, "rank 1 iteration 30 with b'1'")


def test_state_of_one_rank_that_cannot_be_stored_is_raised_on_all(storage: MemoryStorage) -> None:
    results = on_both(storage, lambda c, rank: c.save(make_state(1) | {"x": [1, object][rank]}, iteration=30))
    check_raised(results, DistributedError, "rank 1 of 2: UnsupportedTypeError")


def test_replicas_that_differ_are_raised_on_all(storage: MemoryStorage) -> None:
    results = on_both(storage, lambda c, rank: c.save(make_state(1) | {"a": torch.full((3,), rank)}, iteration=30))
    check_raised(results, InvalidShardingError, "'a'")


def test_copy_of_the_state_that_fails_on_one_rank_is_raised_on_all(
    storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_snapshot = saving.take_snapshot

    def fail_on_rank_1(*arguments: Any, **options: Any) -> Any:
        if threading.current_thread().name == "rank 1":
            raise MemoryError("no room for the copy")
        return take_snapshot(*arguments, **options)

    monkeypatch.setattr(saving, "take_snapshot", fail_on_rank_1)
    results = on_both(storage, lambda c, rank: c.async_save(make_state(1), iteration=30).wait())
    check_raised(results, DistributedError, "rank 1 of 2: MemoryError: no room for the copy")
    assert on_both(storage, lambda c, rank: c.iterations()) == [[10, 20]] * 2


def test_fenced_rank_0_stops_all(storage: MemoryStorage) -> None:
    def save(checkpointer: Checkpointer, rank: int) -> object:
        checkpointer.save(make_state(30), iteration=30)
        if rank == 0:
            Writer.claim(storage)
        return checkpointer.save(make_state(40), iteration=40)

    check_raised(on_both(storage, save), FencedError, "a newer job has claimed epoch 3")
    assert on_both(storage, lambda c, rank: c.iterations()) == [[10, 20, 30]] * 2


def test_ranks_that_load_different_iterations_are_told(storage: MemoryStorage) -> None:
    results = on_both(storage, lambda c, rank: c.load(make_state(0), 10 + 10 * rank))
    check_raised(results, CheckpointError, "the ranks ask for different ")


def test_rank_that_cannot_see_the_checkpoints_goes_by_what_rank_0_resolved(storage: MemoryStorage) -> None:
    """Then it cannot read them either, which is a damaged checkpoint for all."""
    results = on_both(storage, lambda c, rank: c.load(make_state(0)), other=MemoryStorage())
    for result in results:
        assert isinstance(result, CheckpointError)
        assert "rank 1: FileNotFoundError" in str(result)


def test_key_that_one_rank_misses_is_raised_on_all_and_nothing_is_changed(storage: MemoryStorage) -> None:
    states = [make_state(0), make_state(0) | {"only here": torch.zeros(1)}]
    results = on_both(storage, lambda c, rank: c.load(states[rank]))
    check_raised(results, MismatchError, "only here")
    assert all(not torch.as_tensor(value).any() for state in states for value in state.values())


def test_key_that_one_rank_takes_is_not_in_excess_for_the_other(storage: MemoryStorage) -> None:
    states: list[State] = [{"a": torch.zeros(3, dtype=torch.int64)}, {"b": torch.zeros(3, dtype=torch.int64)}]
    reports = on_both(storage, lambda c, rank: c.load(states[rank]).unexpected)
    assert reports == [(), ()]


def test_key_that_no_rank_takes_is_in_excess_for_all(storage: MemoryStorage) -> None:
    results = on_both(storage, lambda c, rank: c.load({"a": torch.zeros(3, dtype=torch.int64)}))
    check_raised(results, MismatchError, "b")
    assert [error.unexpected for error in results if isinstance(error, MismatchError)] == [("b",), ("b",)]


def test_object_of_one_rank_that_refuses_its_state_is_raised_on_all() -> None:
    class Refuses:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def state_dict(self) -> State:
            return {"w": torch.ones(2)}

        def load_state_dict(self, state: State) -> None:
            if self.rank == 1:
                raise ValueError("not like this")

    storage = MemoryStorage()
    on_both(storage, lambda c, rank: c.save({"model": Refuses(rank)}, iteration=10))
    results = on_both(storage, lambda c, rank: c.load({"model": Refuses(rank)}))
    check_raised(results, DistributedError, "rank 1 of 2: ValueError: not like this")


def test_ranks_that_read_different_keys_get_them(storage: MemoryStorage) -> None:
    results = on_both(storage, lambda c, rank: sorted(c.read(keys=[["a"], ["b"]][rank])))
    assert results == [["a"], ["b"]]


def test_key_that_one_rank_reads_and_is_not_there_is_raised_on_all(storage: MemoryStorage) -> None:
    results = on_both(storage, lambda c, rank: c.read(keys=[["a"], ["a", "z"]][rank]))
    check_raised(results, MismatchError, "z")


def test_only_rank_0_looks_which_iterations_there_are(storage: MemoryStorage) -> None:
    def ask(checkpointer: Checkpointer, rank: int) -> object:
        return checkpointer.latest_iteration(), checkpointer.iterations()

    other = CrashingStorage(storage)
    assert on_both(storage, ask, other=other) == [(20, [10, 20])] * 2
    assert other.calls == ()


def test_rank_0_that_cannot_look_is_raised_on_all(storage: MemoryStorage) -> None:
    failing = CrashingStorage(storage, fail_at=1)
    check_raised(
        on_both(failing, lambda c, rank: c.iterations(), other=storage), DistributedError, "rank 0 of 2: OSError"
    )


@pytest.mark.parametrize("verb", ["ask", "load", "read", "save"])
def test_failed_async_save_that_one_rank_has_seen_is_raised_on_all_by_the_next_call(
    storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    take_snapshot = saving.take_snapshot
    failed: set[str] = set()

    def fail_once_a_rank(*arguments: Any, **options: Any) -> Any:
        name = threading.current_thread().name
        if name not in failed:
            failed.add(name)
            raise MemoryError("no room for the copy")
        return take_snapshot(*arguments, **options)

    monkeypatch.setattr(saving, "take_snapshot", fail_once_a_rank)

    def call(checkpointer: Checkpointer, rank: int) -> object:
        pending = checkpointer.async_save(make_state(30), iteration=30)
        if rank == 0:
            with pytest.raises(DistributedError, match="no room"):
                pending.wait()
        match verb:
            case "ask":
                return checkpointer.iterations()
            case "load":
                return checkpointer.load(make_state(0))
            case "read":
                return checkpointer.read()
        return checkpointer.save(make_state(40), iteration=40)

    check_raised(on_both(storage, call), DistributedError, "no room for the copy")
    assert on_both(storage, lambda c, rank: c.iterations()) == [[10, 20]] * 2


def test_calls_after_a_failed_async_save_was_raised_go_on_in_step(
    storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_snapshot = saving.take_snapshot
    failed: list[str] = []

    def fail_once(*arguments: Any, **options: Any) -> Any:
        name = threading.current_thread().name
        if name == "rank 1" and not failed:
            failed.append(name)
            raise MemoryError("no room for the copy")
        return take_snapshot(*arguments, **options)

    monkeypatch.setattr(saving, "take_snapshot", fail_once)

    def call(checkpointer: Checkpointer, rank: int) -> object:
        pending = checkpointer.async_save(make_state(30), iteration=30)
        if rank == 0:
            with pytest.raises(DistributedError, match="no room"):
                pending.wait()
        with pytest.raises(DistributedError, match=r"rank 1 of 2: .*no room"):
            checkpointer.save(make_state(40), iteration=40)
        checkpointer.save(make_state(50), iteration=50)
        checkpointer.async_save(make_state(60), iteration=60).wait()
        state = make_state(0)
        checkpointer.load(state)
        return state, checkpointer.iterations()

    assert repr(on_both(storage, call)) == repr([(make_state(60), [10, 20, 50, 60])] * 2)


@pytest.mark.parametrize("of_rank_1", ["no list", "an empty list"])
def test_rank_without_shards_of_a_list_of_them_saves_and_loads(of_rank_1: str) -> None:
    """As a rank whose part of a distributed optimizer is empty."""
    storage = MemoryStorage()

    def make(rank: int, value: float) -> State:
        averages = [ShardedTensor("avg", torch.full((4,), value), global_shape=(4,), global_offset=(0,))]
        optimizer: State = {"avg": averages if rank == 0 else [], "step": int(value)}
        if rank == 1 and of_rank_1 == "no list":
            del optimizer["avg"]
        return {"optimizer": optimizer}

    def load(checkpointer: Checkpointer, rank: int) -> object:
        state = make(rank, 0.0)
        report = checkpointer.load(state)
        return repr(state) == repr(make(rank, 3.0)), report.missing, report.unexpected

    on_both(storage, lambda c, rank: c.save(make(rank, 3.0), iteration=10))
    assert on_both(storage, load) == [(True, (), ())] * 2
    with Checkpointer(storage) as checkpointer:
        assert load(checkpointer, 0) == (True, (), ())
        checkpointer.save(make(0, 3.0), iteration=20)
    assert on_both(storage, load) == [(True, (), ())] * 2


@pytest.mark.parametrize("count", [1000, 16 * 1024])
def test_replicas_up_to_64_kib_that_differ_anywhere_are_raised_on_all(storage: MemoryStorage, count: int) -> None:
    """In one of the elements that a sample of 64 would pass over."""

    def save(checkpointer: Checkpointer, rank: int) -> object:
        weight = torch.zeros(count)
        weight[1] = rank
        return checkpointer.save({"w": weight}, iteration=30)

    check_raised(on_both(storage, save), InvalidShardingError, "'w'")


def test_ranks_that_load_with_different_strictness_are_told(storage: MemoryStorage) -> None:
    states = [make_state(0), make_state(0)]
    results = on_both(storage, lambda c, rank: c.load(states[rank], strict=rank == 1))
    check_raised(results, CheckpointError, "the ranks ask for different loads: strict is False or True")
    assert repr(states) == repr([make_state(0), make_state(0)])


def test_mesh_axis_without_a_rank_at_some_coordinate_is_raised_on_all() -> None:
    """As when a rank passes a constant for its coordinate."""

    def run(coordinator: Coordinator) -> object:
        mesh = {"dp": (coordinator.rank, 2), "tp": (0, 2)}
        try:
            return Checkpointer(MemoryStorage(), coordinator=coordinator, timeout_s=20, mesh=mesh)
        except CheckpointError as error:
            return error

    check_raised(run_ranks(2, run), InvalidShardingError, "mesh axis 'tp' has size 2, but no rank has coordinate 1")


def test_single_process_may_take_any_place_in_a_mesh(storage: MemoryStorage) -> None:
    with Checkpointer(storage, mesh={"tp": (1, 2)}) as checkpointer:
        assert checkpointer.latest_iteration() == 20


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([{}, {"io_backend": "pigeon"}], "rank 1 of 2: ValueError"),
        ([{"mesh": {"dp": (0, 2)}}, {"mesh": {"dp": (1, 3)}}], "mesh"),
        ([{"mesh": {"dp": (0, 2)}}, {"mesh": {"tp": (1, 2)}}], "mesh"),
        ([{"mesh": {"dp": (0, 2)}}, {"mesh": {"dp": (2, 2)}}], "mesh"),
    ],
)
def test_rank_that_cannot_open_the_root_is_raised_on_all(tmp_path: Path, options: list[Any], text: str) -> None:
    def run(coordinator: Coordinator) -> object:
        try:
            return Checkpointer(tmp_path, coordinator=coordinator, timeout_s=20, **options[coordinator.rank])
        except CheckpointError as error:
            return error

    results = run_ranks(2, run)
    for result in results:
        assert isinstance(result, CheckpointError), repr(result)
        assert text in str(result)
