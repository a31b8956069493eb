"""Training goes on when a checkpoint fails, where that is asked for, and as long as it is asked for."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable

import pytest
import torch

from distckpt import Checkpointer, CheckpointError, DistributedError, FencedError, PendingSave, writing
from distckpt.commit import Writer, list_commits
from distckpt.coordinator import Coordinator
from distckpt.storage.memory import MemoryWriteFile
from distckpt.testing import MemoryStorage, run_ranks
from tests.unit.protocol import io_error
from tests.unit.saved_roots import RANKS, check_loads, make_state


class FailingStorage(MemoryStorage):
    """Whose next `failures` shard files cannot be written; the names of all that were begun are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.failures = 0
        self.code = errno.ENOSPC
        self.begun: list[str] = []

    def create(self, name: str, *, size_hint: int = 0) -> MemoryWriteFile:
        file = super().create(name, size_hint=size_hint)
        if "/shard-" in name:
            self.begun.append(name)
            if self.failures > 0:
                self.failures -= 1
                file.write = _refuse(self.code)  # type: ignore[method-assign]
        return file


def _refuse(code: int) -> Callable[..., None]:
    def write(*_: object) -> None:
        raise io_error(code)

    return write


@pytest.fixture
def storage() -> FailingStorage:
    return FailingStorage()


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The pauses that were made, none of which takes any time."""
    made: list[float] = []
    monkeypatch.setattr(writing.time, "sleep", made.append)
    return made


def wait_for_end(pending: PendingSave) -> None:
    """Without looking how it ended."""
    ended = threading.Event()
    pending.add_done_callback(ended.set)
    assert ended.wait(60)


def state(version: int = 1) -> dict[str, object]:
    return {"w": torch.full((10,), version)}


def test_failure_of_an_async_save_is_raised_by_the_next_call_unless_told_otherwise(storage: FailingStorage) -> None:
    with Checkpointer(storage) as checkpointer:
        storage.failures = 1
        checkpointer.async_save(state(), iteration=1)
        with pytest.raises(OSError, match="No space"):
            checkpointer.async_save(state(), iteration=2)
        checkpointer.async_save(state(), iteration=3).wait()


def test_warned_of_failures_are_logged_and_training_goes_on(storage: FailingStorage, caplog) -> None:
    with Checkpointer(storage, on_error="warn") as checkpointer:
        checkpointer.save(state(), iteration=1)
        for iteration in (2, 3):
            storage.failures = 1
            wait_for_end(checkpointer.async_save(state(iteration), iteration=iteration))
        checkpointer.async_save(state(4), iteration=4)
    assert [record.message.count("No space left") for record in caplog.records] == [1, 1]
    assert [commit.iteration for commit in list_commits(storage)] == [4, 1]


def test_last_of_so_many_failures_in_a_row_is_raised(storage: FailingStorage) -> None:
    checkpointer = Checkpointer(storage, on_error="warn", max_failures=2)
    checkpointer.save(state(), iteration=1)
    for iteration in (2, 3):
        storage.failures = 1
        wait_for_end(checkpointer.async_save(state(), iteration=iteration))
    with pytest.raises(OSError, match="No space"):
        checkpointer.async_save(state(), iteration=4)
    checkpointer.close()


def test_save_that_succeeds_begins_the_count_anew(storage: FailingStorage) -> None:
    with Checkpointer(storage, on_error="warn", max_failures=2) as checkpointer:
        for iteration in range(6):
            storage.failures = iteration % 2
            wait_for_end(checkpointer.async_save(state(), iteration=iteration))


def test_wait_raises_all_the_same(storage: FailingStorage) -> None:
    with Checkpointer(storage, on_error="warn") as checkpointer:
        storage.failures = 1
        with pytest.raises(OSError, match="No space"):
            checkpointer.async_save(state(), iteration=1).wait()


def test_synchronous_save_raises_all_the_same(storage: FailingStorage) -> None:
    with Checkpointer(storage, on_error="warn") as checkpointer:
        storage.failures = 1
        with pytest.raises(OSError, match="No space"):
            checkpointer.save(state(), iteration=1)


def test_plan_that_fails_in_the_call_is_tolerated_too(storage: FailingStorage, caplog) -> None:
    with Checkpointer(storage, on_error="warn") as checkpointer:
        pending = checkpointer.async_save({"w": object()}, iteration=1)
        assert pending.done()
        pending.wait_staged()
        with pytest.raises(CheckpointError, match="'w'"):
            pending.wait()
        checkpointer.async_save(state(), iteration=2).wait()
    assert "training goes on (failure 1 in a row)" in caplog.text


def test_newer_job_is_never_tolerated(storage: FailingStorage) -> None:
    checkpointer = Checkpointer(storage, on_error="warn")
    checkpointer.save(state(), iteration=1)
    Writer.claim(storage)
    checkpointer.async_save(state(), iteration=2)
    with pytest.raises(FencedError):
        checkpointer.close()


def test_newer_job_is_never_tolerated_on_any_rank(storage: FailingStorage) -> None:
    def train(coordinator: Coordinator) -> None:
        checkpointer = Checkpointer(storage, coordinator=coordinator, on_error="warn")
        checkpointer.save(make_state(1, coordinator), iteration=1)
        if coordinator.rank == 0:
            Writer.claim(storage)
        wait_for_end(checkpointer.async_save(make_state(2, coordinator), iteration=2))
        with pytest.raises(CheckpointError, match="newer job"):
            checkpointer.async_save(make_state(3, coordinator), iteration=3)
        checkpointer.close()

    run_ranks(RANKS, train)


def test_all_ranks_go_on_or_raise_together(storage: FailingStorage) -> None:
    def train(coordinator: Coordinator) -> list[str]:
        checkpointer = Checkpointer(storage, coordinator=coordinator, on_error="warn", max_failures=2)
        seen = []
        for iteration in (1, 2, 3):
            if coordinator.rank == 0:
                storage.failures = 1
            try:
                wait_for_end(checkpointer.async_save(make_state(iteration, coordinator), iteration=iteration))
                seen.append("went on")
            except DistributedError:
                seen.append("raised")
        checkpointer.close()
        return seen

    assert run_ranks(RANKS, train) == [["went on", "went on", "raised"]] * RANKS


def test_bad_options_are_refused(storage: FailingStorage) -> None:
    with pytest.raises(ValueError, match="on_error='ignore'"):
        Checkpointer(storage, on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_failures=0"):
        Checkpointer(storage, max_failures=0)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_write_that_fails_for_a_reason_that_may_pass_is_made_again_under_a_new_name(
    storage: FailingStorage, pauses: list[float], code: int, caplog
) -> None:
    storage.code = code

    def save(coordinator: Coordinator) -> None:
        with Checkpointer(storage, coordinator=coordinator) as checkpointer:
            if coordinator.rank == 0:
                storage.failures = 2
            checkpointer.save(make_state(1, coordinator), iteration=1)

    run_ranks(RANKS, save)
    assert len(storage.begun) == RANKS + 2
    assert len(set(storage.begun)) == RANKS + 2, "a name was used again"
    assert len(pauses) == 2
    assert os.strerror(code) in caplog.text
    check_loads(storage, 1)
    left = [name for name in storage.list("iter_0000001") if name.startswith("shard-")]
    assert len(left) == RANKS, "what failed was left there"


def test_write_that_keeps_failing_fails_the_save(storage: FailingStorage, pauses: list[float]) -> None:
    storage.code, storage.failures = errno.EIO, 100
    with Checkpointer(storage) as checkpointer, pytest.raises(OSError, match="Input/output"):
        checkpointer.save(state(), iteration=1)
    assert pauses == list(writing.RETRY_AFTER_S)
    assert not list_commits(storage)


def test_full_disk_is_not_tried_again(storage: FailingStorage, pauses: list[float]) -> None:
    storage.failures = 1
    with Checkpointer(storage) as checkpointer, pytest.raises(OSError, match="No space"):
        checkpointer.save(state(), iteration=1)
    assert pauses == []
