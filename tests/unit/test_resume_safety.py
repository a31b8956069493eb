"""A job that starts again never takes trouble for absence, removes nothing it has not loaded, and finds room."""

from __future__ import annotations

import errno

import pytest
import torch

from distckpt import Checkpointer, CheckpointError, CheckpointNotFoundError, CorruptionError, DistributedError
from distckpt.commit import Commit, Writer, list_commits, new_save_id, read_index
from distckpt.coordinator import Coordinator
from distckpt.removing import sweep
from distckpt.storage.contract import read_all, write_all
from distckpt.storage.memory import MemoryReadFile
from distckpt.testing import MemoryStorage, run_ranks
from tests.unit.protocol import Clock, io_error, superfluous

COUNT = 25_000
SAVE_BYTES = 4 * COUNT  # of tensor data


def make_state(value: int = 0) -> dict[str, torch.Tensor]:
    return {"w": torch.full((COUNT,), float(value))}


def run_job(storage: MemoryStorage, *iterations: int, keep_last: int | None = None, resume: bool = False) -> list[int]:
    """Save them as a job of its own, and say which iterations there are then."""
    with Checkpointer(storage, keep_last=keep_last) as checkpointer:
        if resume:
            checkpointer.load(make_state())
        for iteration in iterations:
            checkpointer.save(make_state(iteration), iteration=iteration)
        return checkpointer.iterations()


class Unreadable(MemoryStorage):
    """Opens no index any more once `code` is set."""

    code = 0

    def open(self, name: str) -> MemoryReadFile:
        if self.code and "/index-" in name:
            raise io_error(self.code)
        return super().open(name)


# What is newest


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.EIO])
def test_unreadable_index_is_raised_by_latest_iteration(code: int) -> None:
    storage = Unreadable()
    run_job(storage, 10)
    storage.code = code
    with Checkpointer(storage) as checkpointer:
        with pytest.raises(OSError, match="injected") as caught:
            checkpointer.latest_iteration()
        assert caught.value.errno == code
        storage.code = 0
        assert checkpointer.latest_iteration() == 10


def test_unreadable_index_is_raised_on_all_ranks() -> None:
    storage = Unreadable()
    run_job(storage, 10)
    storage.code = errno.EACCES

    def ask(coordinator: Coordinator) -> str:
        with (
            Checkpointer(storage, coordinator=coordinator) as checkpointer,
            pytest.raises(DistributedError) as caught,
        ):
            checkpointer.latest_iteration()
        return str(caught.value)

    first, second = run_ranks(2, ask)
    assert first == second
    assert "rank 0 of 2: PermissionError" in first


def test_latest_iteration_passes_over_a_damaged_index_and_raises_when_all_are() -> None:
    storage = MemoryStorage()
    run_job(storage, 10, 20)
    older, newer = sorted(list_commits(storage))
    with Checkpointer(storage) as checkpointer:
        storage.replace(newer.name, read_all(storage, newer.name)[:-3])
        assert checkpointer.latest_iteration() == 10
        storage.replace(older.name, b"")
        with pytest.raises(CorruptionError, match=r"no index is sound: .*index-000001-000002.*index-000001-000001"):
            checkpointer.latest_iteration()


def test_latest_iteration_of_a_root_without_commits_is_none() -> None:
    storage = MemoryStorage()
    with Checkpointer(storage) as checkpointer:
        assert checkpointer.latest_iteration() is None
        Writer.claim(storage).announce(10, new_save_id())
        assert checkpointer.latest_iteration() is None


# What is retired


def test_job_that_has_not_loaded_retires_only_what_it_saved_itself() -> None:
    storage = MemoryStorage()
    run_job(storage, 10, 20, 30)
    assert run_job(storage, 5, 6, 7, keep_last=1) == [7, 10, 20, 30]


def test_job_that_has_loaded_retires_what_earlier_ones_saved() -> None:
    storage = MemoryStorage()
    run_job(storage, 10, 20, 30)
    run_job(storage, 5, keep_last=1)
    assert run_job(storage, 6, keep_last=1, resume=True) == [6]


def test_job_that_has_not_loaded_keeps_the_commit_of_an_iteration_that_it_saves_again() -> None:
    storage = MemoryStorage()
    run_job(storage, 10)
    run_job(storage, 10)
    assert list_commits(storage) == [Commit(2, 2, 10), Commit(1, 1, 10)]
    run_job(storage, 20, resume=True)
    assert list_commits(storage) == [Commit(3, 3, 20), Commit(2, 2, 10)]


def test_neither_a_look_nor_a_failed_load_makes_a_job_one_that_has_loaded() -> None:
    storage = MemoryStorage()
    run_job(storage, 10, 20)
    with Checkpointer(storage, keep_last=1) as checkpointer:
        assert checkpointer.latest_iteration() == 20
        checkpointer.read()
        with pytest.raises(CheckpointNotFoundError):
            checkpointer.load(make_state(), 15)
        checkpointer.save(make_state(), iteration=30)
        assert checkpointer.iterations() == [10, 20, 30]


def test_parent_is_what_was_loaded_or_saved_before() -> None:
    storage = MemoryStorage()
    run_job(storage, 10, 20)
    run_job(storage, 30)
    run_job(storage, 40, resume=True)
    indexes = {commit.iteration: read_index(storage, commit)[0] for commit in list_commits(storage)}
    assert indexes[10].parent is None
    assert indexes[20].parent == indexes[10].save_id
    assert indexes[30].parent is None
    assert indexes[40].parent == indexes[30].save_id


def test_commits_before_the_first_epoch_are_not_superfluous() -> None:
    commits = [Commit(1, 1, 10), Commit(1, 2, 20), Commit(2, 3, 20), Commit(2, 4, 30), Commit(2, 5, 40)]
    assert superfluous(commits, keep_last=1, tracked=40, first_epoch=2) == [Commit(2, 3, 20), Commit(2, 4, 30)]
    assert superfluous(commits, keep_last=1, tracked=40, first_epoch=3) == []


# Room


def test_saves_go_on_where_only_checkpoints_past_their_grace_fill_the_storage() -> None:
    """Room for three checkpoints and a half, of which two are kept."""
    clock = Clock()
    storage = MemoryStorage(clock=clock, capacity_bytes=3 * SAVE_BYTES + SAVE_BYTES // 2)
    with Checkpointer(storage, keep_last=2, removal_grace_s=60) as checkpointer:
        for iteration in range(1, 8):
            checkpointer.save(make_state(iteration), iteration=iteration)
            checkpointer.iterations()  # Waits for cleaning up, whose markers go by the clock.
            clock.now_s += 61
        assert checkpointer.iterations() == [6, 7]


def test_checkpoint_within_its_grace_is_not_removed_for_room() -> None:
    clock = Clock()
    storage = MemoryStorage(clock=clock, capacity_bytes=3 * SAVE_BYTES + SAVE_BYTES // 2)
    with Checkpointer(storage, keep_last=2, removal_grace_s=60) as checkpointer:
        for iteration in (1, 2, 3):
            checkpointer.save(make_state(iteration), iteration=iteration)
        checkpointer.iterations()  # Waits for cleaning up, whose markers go by the clock.
        clock.now_s += 59
        with pytest.raises(CheckpointError, match="not enough space"):
            checkpointer.save(make_state(4), iteration=4)
        assert any(name.startswith("retired-") for name in storage.list("iter_0000001"))
        assert checkpointer.iterations() == [2, 3]
        clock.now_s += 2
        checkpointer.save(make_state(4), iteration=4)
        assert checkpointer.iterations() == [3, 4]


def test_saves_go_on_where_files_of_dead_saves_fill_the_storage() -> None:
    storage = MemoryStorage(capacity_bytes=3 * SAVE_BYTES + SAVE_BYTES // 2)
    run_job(storage, 10)
    died = Writer.claim(storage)
    for iteration in (20, 30):
        save_id = new_save_id()
        died.announce(iteration, save_id)
        name = f"iter_{iteration:07d}/shard-00000-of-00001-{save_id}.safetensors"
        write_all(storage, name, bytes(SAVE_BYTES))
    assert sweep(storage, grace_s=0) == []  # They may be under way as long as nobody has a higher epoch.
    assert run_job(storage, 40) == [10, 40]
    assert [name for name in storage.list("") if name.startswith("iter_")] == ["iter_0000010", "iter_0000040"]
