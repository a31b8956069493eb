"""Checkpoints copied to a second root while training goes on, and loads that take the nearest good copy."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import distckpt
from distckpt import (
    Checkpointer,
    CheckpointError,
    CheckpointNotFoundError,
    Copy,
    CopyReport,
    CorruptionError,
    DistributedError,
    FencedError,
    LoadReport,
)
from distckpt.commit import Commit, Writer, list_commits, read_index, read_tracker, unsound_marker, writer_epochs
from distckpt.coordinator import Coordinator
from distckpt.copier import Copier
from distckpt.copying import copy_commit
from distckpt.storage import Storage
from distckpt.testing import Crash, CrashingStorage, MemoryStorage, run_ranks
from tests.unit.damage import change, flip
from tests.unit.protocol import io_error, tree
from tests.unit.saved_roots import RANKS, make_state, save

COUNT = 25_000


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distckpt.copier.RETRY_AFTER_S", (0.0, 0.0))


class Gated(MemoryStorage):
    """Files of an iteration are created only when the gate is open; says when somebody waits before it."""

    def __init__(self, iteration: int) -> None:
        super().__init__()
        self._part = f"iter_{iteration:07d}/"
        self.is_waiting, self.gate = threading.Event(), threading.Event()

    def create(self, name: str, *, size_hint: int = 0):  # type: ignore[no-untyped-def]
        if name.startswith(self._part):
            self.is_waiting.set()
            assert self.gate.wait(30)
        return super().create(name, size_hint=size_hint)


def state_of(value: int) -> dict[str, object]:
    return {"w": torch.full((COUNT,), float(value))}


def loaded(checkpointer: Checkpointer, iteration: int | None = None) -> tuple[int, LoadReport]:
    """The value that is loaded."""
    state = state_of(0)
    report = checkpointer.load(state, iteration)
    tensor = state["w"]
    assert isinstance(tensor, torch.Tensor)
    assert len(set(tensor.tolist())) == 1
    return int(tensor[0]), report


def run_job(root: Storage, second: Storage | Copy, *iterations: int, resume: bool = False, **options: object) -> None:
    copy_to = second if isinstance(second, Copy) else Copy(second)
    with Checkpointer(root, copy_to=copy_to, **options) as checkpointer:  # type: ignore[arg-type]
        if resume:
            loaded(checkpointer)
        for iteration in iterations:
            checkpointer.save(state_of(iteration), iteration=iteration)
            # One after the other here, as what is committed meanwhile is copied first.
            assert checkpointer._after_commit.copier is not None
            assert checkpointer._after_commit.copier._worker.wait(30)


def files_of(storage: Storage, iteration: int) -> dict[str, bytes]:
    return {name: data for name, data in tree(storage).items() if name.startswith(f"iter_{iteration:07d}/")}


def iterations_in(storage: Storage) -> list[int]:
    return [commit.iteration for commit in list_commits(storage)]


def kinds(storage: Storage) -> list[str]:
    return [line.kind for line in distckpt.history(storage)]


# Copies of a job


def test_everything_that_is_committed_is_copied_byte_by_byte() -> None:
    root, second = MemoryStorage(), MemoryStorage()
    run_job(root, second, 1, 2, 3)
    for iteration in (1, 2, 3):
        assert files_of(second, iteration) == files_of(root, iteration)
    assert read_tracker(second) == 3
    assert set(second.list("")) == {*root.list("")} - {"history.jsonl"}
    lines = [line for line in distckpt.history(root) if line.kind == "copy"]
    assert [line.iteration for line in lines] == [1, 2, 3]
    for line in lines:
        assert isinstance(line.report, CopyReport)
        assert line.report.bytes_copied == line.report.bytes > 4 * COUNT
        assert line.report.tries == 1


def test_ranks_copy_what_all_of_them_saved() -> None:
    root, second = MemoryStorage(), MemoryStorage()
    save(root, 10, 20, copy_to=Copy(second), parity=2, verify_after_save=True)
    near, far = files_of(root, 20), files_of(second, 20)
    assert far == {name: data for name, data in near.items() if "/verified-" not in name} != near  # It was not read.
    assert distckpt.verify(second).is_sound


def test_each_root_keeps_as_many_as_it_is_told() -> None:
    root, second = MemoryStorage(), MemoryStorage()
    run_job(root, Copy(second, keep_last=3, removal_grace_s=0), 1, 2, 3, 4, 5, keep_last=1, removal_grace_s=0)
    assert iterations_in(root) == [5]
    assert iterations_in(second) == [5, 4, 3]
    assert files_of(second, 1) == files_of(second, 2) == {}


def test_copy_of_a_job_that_has_not_loaded_takes_nothing_from_earlier_ones() -> None:
    root, second = MemoryStorage(), MemoryStorage()
    run_job(root, Copy(second, keep_last=1), 1, 2)
    run_job(root, Copy(second, keep_last=1), 3, 4)
    assert iterations_in(second) == [4, 2]
    run_job(root, Copy(second, keep_last=1), 5, resume=True)
    assert iterations_in(second) == [5]


@pytest.mark.parametrize("labels", [{"pinned": True}, {"add_tags": ["best"]}], ids=["pin", "tag"])
@pytest.mark.parametrize("where", ["source", "copy"])
def test_copy_that_was_labelled_in_either_root_after_it_was_made_stays(labels: dict[str, object], where: str) -> None:
    root, second = MemoryStorage(), MemoryStorage()
    with Checkpointer(root, copy_to=Copy(second, keep_last=1, removal_grace_s=0)) as checkpointer:
        copier = checkpointer._after_commit.copier
        assert copier is not None
        for iteration in (1, 2, 3):
            checkpointer.save(state_of(iteration), iteration=iteration)
            assert copier._worker.wait(30)
            if iteration == 1:
                distckpt.label(root if where == "source" else second, 1, **labels)  # type: ignore[arg-type]
                distckpt.label(root, 1, note="a change there, too")
    assert iterations_in(second) == [3, 1]
    assert {entry.note for entry in distckpt.catalog(second)} == {"", "a change there, too"}


def test_protected_checkpoint_is_copied_although_newer_ones_would_outlive_it() -> None:
    root, second = MemoryStorage(), MemoryStorage()
    with Checkpointer(root) as checkpointer:
        for iteration in (1, 2, 3):
            checkpointer.save(state_of(iteration), iteration=iteration)
    distckpt.label(root, 1, pinned=True)
    run_job(root, Copy(second, keep_last=1), 4)
    assert iterations_in(second) == [4, 1]


def test_tag_that_names_another_copy_leaves_the_one_that_has_it_in_the_source() -> None:
    root, second = MemoryStorage(), MemoryStorage()
    run_job(root, second, 1, 2)
    distckpt.label(second, 1, add_tags=["best"])
    distckpt.label(second, 2, add_tags=["best"])
    distckpt.label(root, 1, add_tags=["best"])
    run_job(root, Copy(second, keep_last=1), 3, resume=True)
    assert 1 in iterations_in(second)


@contextmanager
def outrun_by_retention(root: Storage, second: Gated) -> Iterator[Checkpointer]:
    """Saves 1, 2 and 3, of which one stays, while 1 is being copied; in the body all is copied that is to be."""
    with Checkpointer(root, keep_last=1, removal_grace_s=0, copy_to=Copy(second)) as checkpointer:
        checkpointer.save(state_of(1), iteration=1)
        assert second.is_waiting.wait(30)
        for iteration in (2, 3):
            checkpointer.save(state_of(iteration), iteration=iteration)
        assert checkpointer.iterations() == [1, 3]
        second.gate.set()
        assert checkpointer._after_commit.copier is not None
        assert checkpointer._after_commit.copier._worker.wait(30)
        yield checkpointer


def test_checkpoint_that_is_being_copied_is_not_retired_until_it_is() -> None:
    root, second = MemoryStorage(), Gated(1)
    with outrun_by_retention(root, second) as checkpointer:
        checkpointer.save(state_of(4), iteration=4)
    assert iterations_in(root) == [4]
    assert iterations_in(second) == [4, 3, 1]


def test_checkpoint_that_retention_takes_before_its_turn_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    root, second = MemoryStorage(), Gated(1)
    with outrun_by_retention(root, second):
        pass
    assert iterations_in(second) == [3, 1]
    assert "iteration 2 was removed before it was copied" in caplog.text


def test_newest_is_copied_first() -> None:
    root, second = MemoryStorage(), Gated(1)
    with Checkpointer(root, copy_to=Copy(second)) as checkpointer:
        checkpointer.save(state_of(1), iteration=1)
        assert second.is_waiting.wait(30)
        for iteration in (2, 3, 4):
            checkpointer.save(state_of(iteration), iteration=iteration)
        second.gate.set()
        assert checkpointer._after_commit.copier is not None
        assert checkpointer._after_commit.copier._worker.wait(30)
    order = [line.iteration for line in distckpt.history(root) if line.kind == "copy"]
    assert order == [1, 4, 3, 2]
    assert read_tracker(second) == 4


def test_what_was_not_copied_when_a_job_ended_is_copied_by_the_next_although_newer_ones_were() -> None:
    root, second = MemoryStorage(), Gated(1)
    with Checkpointer(root, copy_to=Copy(second)) as checkpointer:
        checkpointer.save(state_of(1), iteration=1)
        assert second.is_waiting.wait(30)
        for iteration in (2, 3):
            checkpointer.save(state_of(iteration), iteration=iteration)
        threading.Timer(0.2, second.gate.set).start()
    assert iterations_in(second) == [3, 1]
    run_job(root, second, 4)
    assert iterations_in(second) == [4, 3, 2, 1]


def test_looking_back_leaves_out_what_is_unsound_or_was_saved_again() -> None:
    root, second = MemoryStorage(), MemoryStorage()
    with Checkpointer(root) as checkpointer:
        for iteration in (1, 2, 2):
            checkpointer.save(state_of(iteration), iteration=iteration)
            assert checkpointer._after_commit.wait(30)
    with Checkpointer(root) as checkpointer:  # It has not loaded, and removes nothing.
        checkpointer.save(state_of(2), iteration=2)
    oldest = list_commits(root)[-1]
    root.put_if_absent(unsound_marker(1, read_index(root, oldest)[0].save_id), b"")
    assert len(list_commits(root)) == 3
    for iteration in (3, 4):
        run_job(root, second, iteration)
    assert [line.iteration for line in distckpt.history(root) if "copy" in line.kind] == [3, 2, 4]


def test_what_retention_there_would_take_at_once_is_not_copied() -> None:
    root, second = MemoryStorage(), MemoryStorage()
    with Checkpointer(root) as checkpointer:
        for iteration in range(1, 6):
            checkpointer.save(state_of(iteration), iteration=iteration)
    run_job(root, Copy(second, keep_last=2), 6)
    assert [line.iteration for line in distckpt.history(root) if line.kind == "copy"] == [6, 5]
    assert iterations_in(second) == [6, 5]


def test_slow_copy_delays_neither_saves_nor_cleaning_up() -> None:
    root, second = MemoryStorage(), Gated(1)
    with Checkpointer(root, keep_last=1, removal_grace_s=0, copy_to=Copy(second)) as checkpointer:
        for iteration in (1, 2, 3, 4):
            checkpointer.save(state_of(iteration), iteration=iteration)
        assert 4 in checkpointer.iterations()
        assert {2, 3}.isdisjoint(checkpointer.iterations())
        second.gate.set()


def test_removal_that_hangs_delays_neither_the_next_save_nor_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distckpt.after_commit._LAST_LINES_S", 0.05)

    class Stuck(MemoryStorage):
        is_stuck = False
        gate, is_waiting = threading.Event(), threading.Event()

        def remove(self, name: str) -> None:
            if self.is_stuck and "/index-" in name:
                self.is_waiting.set()
                assert self.gate.wait(30)
            super().remove(name)

    root = Stuck()
    checkpointer = Checkpointer(root, keep_last=1, copy_to=Copy(MemoryStorage()), timeout_s=0.5)
    checkpointer.save(state_of(1), iteration=1)
    copier = checkpointer._after_commit.copier
    assert copier is not None
    assert copier._worker.wait(30)
    root.is_stuck = True
    checkpointer.save(state_of(2), iteration=2)
    assert root.is_waiting.wait(30)
    others = threading.Thread(target=lambda: (checkpointer.save(state_of(3), iteration=3), checkpointer.close()))
    others.start()
    others.join(10)
    is_done = not others.is_alive()
    root.gate.set()
    others.join(30)
    assert is_done


def test_what_is_being_retired_is_not_begun_to_be_copied() -> None:
    root, second = MemoryStorage(), MemoryStorage()
    with Checkpointer(root) as checkpointer:
        checkpointer.save(state_of(1), iteration=1)
    [commit], writer = list_commits(root), Writer.claim(root, second)
    copier = Copier(root, second, Copy(second), 30, 1, lambda *_: None)
    with copier.giving_up() as may_retire:
        assert may_retire(commit)
        copier.submit(commit, writer, first_epoch=0)
        assert copier._worker.wait(30)
        assert iterations_in(second) == []
    copier.submit(commit, writer, first_epoch=0)
    assert copier._worker.wait(30)
    assert iterations_in(second) == [1]


# Failures


def test_copy_that_fails_for_a_reason_that_may_pass_is_tried_again() -> None:
    root = MemoryStorage()

    class Failing(MemoryStorage):
        left = 2

        def move(self, name: str, new_name: str) -> None:
            if self.left:
                self.left -= 1
                raise io_error(errno.ETIMEDOUT)
            super().move(name, new_name)

    second = Failing()
    run_job(root, second, 1)
    [line] = [line for line in distckpt.history(root) if line.kind == "copy"]
    assert isinstance(line.report, CopyReport)
    assert line.report.tries == 3


def test_copy_that_fails_harms_no_save_and_is_made_after_a_later_one(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(MemoryStorage):
        is_full = False

        def create(self, name: str, *, size_hint: int = 0):  # type: ignore[no-untyped-def]
            if self.is_full:
                raise io_error(errno.ENOSPC)
            return super().create(name, size_hint=size_hint)

    root, second = MemoryStorage(), Failing()
    with Checkpointer(root, copy_to=Copy(second)) as checkpointer:
        copier = checkpointer._after_commit.copier
        assert copier is not None
        second.is_full = True
        checkpointer.save(state_of(1), iteration=1)
        assert copier._worker.wait(30)
        assert "iteration 1 was not copied to memory:: [Errno 28]" in caplog.text
        second.is_full = False
        checkpointer.save(state_of(2), iteration=2)
        assert copier._worker.wait(30)
    assert iterations_in(second) == [2, 1]
    assert kinds(root) == ["save", "failed copy", "save", "copy", "copy"]
    failed = distckpt.history(root)[1]
    assert failed.error is not None
    assert failed.error.startswith("OSError: [Errno 28]")


def test_copy_that_always_fails_is_given_up_after_some_commits() -> None:
    root, second = MemoryStorage(), MemoryStorage(capacity_bytes=COUNT)
    with Checkpointer(root, copy_to=Copy(second)) as checkpointer:
        copier = checkpointer._after_commit.copier
        assert copier is not None
        for iteration in range(1, 6):
            checkpointer.save(state_of(iteration), iteration=iteration)
            assert copier._worker.wait(30)
        assert len(copier._waiting) == 2
    failed = [line.iteration for line in distckpt.history(root) if line.kind == "failed copy"]
    assert [failed.count(iteration) for iteration in range(1, 6)] == [3, 3, 3, 2, 1]


def test_damaged_checkpoint_is_not_copied_as_good() -> None:
    root, second = MemoryStorage(), Gated(1)
    with Checkpointer(root, copy_to=Copy(second)) as checkpointer:
        checkpointer.save(state_of(1), iteration=1)
        assert second.is_waiting.wait(30)
        [name] = [name for name in files_of(root, 1) if "/shard-" in name]
        change(root, name, flip(10_000))
        second.gate.set()
    assert iterations_in(second) in ([], [1])
    if iterations_in(second):  # It had been read before it was damaged.
        assert distckpt.verify(second).is_sound


def test_job_that_a_newer_one_has_replaced_in_the_second_root_publishes_no_copy(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As when it was started again on another node, whose local root is another one."""
    root, second = MemoryStorage(), Gated(1)
    with Checkpointer(root, copy_to=Copy(second)) as checkpointer:
        checkpointer.save(state_of(1), iteration=1)
        assert second.is_waiting.wait(30)
        Writer.claim(MemoryStorage(), second)
        second.gate.set()
        assert checkpointer._after_commit.copier is not None
        assert checkpointer._after_commit.copier._worker.wait(30)
        assert iterations_in(second) == []
        assert "memory: is copied to no more: memory:: this job writes with epoch 1" in caplog.text
        checkpointer.save(state_of(2), iteration=2)  # Its own root is still its own.
    assert iterations_in(second) == []


def test_copy_that_is_published_while_a_newer_job_comes_counts_as_none() -> None:
    """It may have taken the files for those of a dead copy before it saw the index."""

    class Contested(MemoryStorage):
        def put_if_absent(self, name: str, data: bytes) -> bool:
            if "/index-" in name:
                Writer.claim(MemoryStorage(), self)
            return super().put_if_absent(name, data)

    root, second = MemoryStorage(), Contested()
    run_job(root, second, 1)
    assert kinds(root) == ["save"]


def test_copier_whose_job_was_fenced_in_the_first_root_publishes_no_copy() -> None:
    root, second = MemoryStorage(), Gated(1)
    with Checkpointer(root, copy_to=Copy(second)) as checkpointer:
        checkpointer.save(state_of(1), iteration=1)
        assert second.is_waiting.wait(30)
        Writer.claim(root)
        second.gate.set()
        assert checkpointer._after_commit.copier is not None
        assert checkpointer._after_commit.copier._worker.wait(30)
        with pytest.raises(FencedError):
            checkpointer.save(state_of(2), iteration=2)
    assert iterations_in(second) == []


def test_close_waits_for_the_newest_copy_and_leaves_the_others() -> None:
    root, second = MemoryStorage(), Gated(1)
    with Checkpointer(root, copy_to=Copy(second)) as checkpointer:
        checkpointer.save(state_of(1), iteration=1)
        assert second.is_waiting.wait(30)
        for iteration in (2, 3):
            checkpointer.save(state_of(iteration), iteration=iteration)
        threading.Timer(0.2, second.gate.set).start()
    assert iterations_in(second) == [3, 1]
    assert kinds(root).count("copy") == 2


def test_close_gives_a_copy_up_after_the_timeout(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distckpt.copier._STOP_S", 0.05)
    root, second = MemoryStorage(), Gated(1)
    checkpointer = Checkpointer(root, copy_to=Copy(second), timeout_s=1.0)
    checkpointer.save(state_of(1), iteration=1)
    assert second.is_waiting.wait(30)
    checkpointer.close()
    assert "copying iteration 1 to memory: is not done after" in caplog.text
    second.gate.set()
    assert checkpointer._after_commit.copier is not None
    assert checkpointer._after_commit.copier._worker.wait(30)
    assert iterations_in(second) == []


def test_copy_that_was_killed_is_finished_by_the_next_job_without_copying_again() -> None:
    """And it is not swept away meanwhile, although the next job copies its own first."""
    root, second = MemoryStorage(), MemoryStorage()
    with Checkpointer(root) as checkpointer:
        checkpointer.save({f"w{n}": torch.full((COUNT,), 1.0) for n in range(3)}, iteration=1)
    counting = CrashingStorage(MemoryStorage())
    distckpt.copy_checkpoint(root, counting)
    last_move = max(number for number, call in enumerate(counting.calls, 1) if call.startswith("move "))
    Writer.claim(root, second)  # Of the job that is killed.
    with pytest.raises(Crash):
        copy_commit(root, CrashingStorage(second, fail_at=last_move, error=Crash()), list_commits(root)[0], marker=b"1")
    finished = files_of(second, 1).keys() & files_of(root, 1).keys()
    assert finished
    with Checkpointer(root, copy_to=Copy(second, removal_grace_s=0)) as checkpointer:
        checkpointer.save(state_of(2), iteration=2)
        assert checkpointer._after_commit.copier is not None
        assert checkpointer._after_commit.copier._worker.wait(30)
    assert iterations_in(second) == [2, 1]
    left = {name: data for name, data in files_of(second, 1).items() if "/.tmp-" not in name}  # Young, and so spared.
    assert left == files_of(root, 1)
    [report] = [line.report for line in distckpt.history(root) if line.kind == "copy" and line.iteration == 1]
    assert isinstance(report, CopyReport)
    assert report.bytes_copied == report.bytes - sum(len(tree(root)[name]) for name in finished)


# Epochs of two roots


def test_epoch_is_one_more_than_any_in_either_root() -> None:
    root, second = MemoryStorage(), MemoryStorage()
    for _ in range(3):
        Writer.claim(MemoryStorage(), second)
    assert Writer.claim(root, second).epoch == 4
    assert writer_epochs(root) == writer_epochs(second) == [4]
    assert Writer.claim(root).epoch == 5
    assert Writer.claim(root, second).epoch == 6


def test_epoch_that_another_job_takes_in_the_second_root_meanwhile_is_not_claimed() -> None:
    class Contested(MemoryStorage):
        taken = False

        def put_if_absent(self, name: str, data: bytes) -> bool:
            if not self.taken:
                self.taken = True
                super().put_if_absent("writer-000001", b"another")
            return super().put_if_absent(name, data)

    root, second = MemoryStorage(), Contested()
    writer = Writer.claim(root, second)
    assert writer.epoch == 2
    writer.check_fences()
    assert writer_epochs(root) == writer_epochs(second) == [2]


def test_commits_stay_in_order_when_the_first_root_was_wiped() -> None:
    second = MemoryStorage()
    run_job(MemoryStorage(), second, 1, 2)
    root = MemoryStorage()
    run_job(root, second, 3, resume=True)
    assert list_commits(second) == [Commit(2, 3, 3), Commit(1, 2, 2), Commit(1, 1, 1)]
    with Checkpointer(root, copy_to=Copy(second)) as checkpointer:
        assert loaded(checkpointer)[0] == 3
        assert checkpointer.iterations() == [1, 2, 3]
        assert checkpointer.latest_iteration() == 3


# Loads


def test_wiped_first_root_is_loaded_from_the_second() -> None:
    root, second = MemoryStorage(), MemoryStorage()
    run_job(root, second, 1, 2)
    with Checkpointer(MemoryStorage(), copy_to=Copy(second)) as checkpointer:
        assert checkpointer.latest_iteration() == 2
        value, report = loaded(checkpointer)
    assert value == 2
    assert report.copy_used == "memory:"
    assert report.fell_back_from == {}
    assert report.warnings == ()


def test_nearest_copy_is_loaded_where_both_are_sound() -> None:
    root, second = MemoryStorage(), MemoryStorage()
    run_job(root, second, 1, 2)
    counting = CrashingStorage(second)
    with Checkpointer(root, copy_to=Copy(counting)) as checkpointer:
        value, report = loaded(checkpointer)
    assert (value, report.copy_used) == (2, None)
    assert {call.partition(" ")[0] for call in counting.calls} == {"list"}


@pytest.mark.parametrize("where", ["/index-", "/shard-00001", "/chunks-"])
@pytest.mark.parametrize("harm", [flip(20), None], ids=["flipped", "gone"])
def test_newest_that_is_damaged_in_the_first_root_is_loaded_from_the_second(
    where: str, harm: Callable[[bytearray], object] | None
) -> None:
    root, second = MemoryStorage(), MemoryStorage()
    save(root, 10, 20, copy_to=Copy(second))
    [name] = [name for name in files_of(root, 20) if where in name]
    if harm is None:
        root.remove(name)
    else:
        change(root, name, harm)

    def load(coordinator: Coordinator) -> LoadReport:
        with Checkpointer(root, coordinator=coordinator, copy_to=Copy(second)) as checkpointer:
            state = make_state(0, coordinator)
            report = checkpointer.load(state)
            assert state["step"] == 20
            return report

    for report in run_ranks(RANKS, load):
        assert (report.iteration, report.copy_used, report.fell_back_from) == (20, "memory:", {})
        is_missing_index = where == "/index-" and harm is None  # Then nothing says that it was there.
        assert any("iteration 20 is damaged in memory:" in warning for warning in report.warnings) != is_missing_index


def test_older_one_is_loaded_where_the_newest_is_damaged_in_both_roots() -> None:
    root, second = MemoryStorage(), MemoryStorage()
    run_job(root, second, 1, 2)
    for storage in (root, second):
        [name] = [name for name in files_of(storage, 2) if "/shard-" in name]
        change(storage, name, flip(5000))
    with Checkpointer(root, copy_to=Copy(second)) as checkpointer:
        value, report = loaded(checkpointer)
        assert (value, report.copy_used, list(report.fell_back_from)) == (1, None, [2])
        assert "; " in report.fell_back_from[2]
        with pytest.raises(CorruptionError, match="no good checkpoint under memory: or memory: of iteration 2"):
            loaded(checkpointer, 2)


def test_iteration_that_only_the_second_root_has_is_loaded_and_read_from_there() -> None:
    root, second = MemoryStorage(), MemoryStorage()
    run_job(root, second, 1, 2, keep_last=1, removal_grace_s=0)
    with Checkpointer(root, copy_to=Copy(second)) as checkpointer:
        assert loaded(checkpointer, 1)[1].copy_used == "memory:"
        read = checkpointer.read(1)["w"]
        assert isinstance(read, torch.Tensor)
        assert read[0] == 1
        with pytest.raises(CheckpointNotFoundError, match=r"iteration 3 under memory:.*; .*iteration 3 under memory:"):
            loaded(checkpointer, 3)


def test_fall_back_over_both_roots_goes_along_the_branch() -> None:
    """1, 2, 3 are abandoned after a roll-back to 1; the new 2 is damaged: 1 comes before the old 3."""
    root, second = MemoryStorage(), MemoryStorage()
    run_job(root, second, 1, 2, 3)
    with Checkpointer(root, copy_to=Copy(second)) as checkpointer:
        loaded(checkpointer, 1)
        checkpointer.save(state_of(20), iteration=2)
    for storage in (root, second):
        index = read_index(storage, list_commits(storage)[0])[0]
        change(storage, f"iter_0000002/{index.files[0].name}", flip(5000))
    [shard] = [name for name in files_of(root, 1) if "/shard-" in name]
    root.remove(shard)
    with Checkpointer(root, copy_to=Copy(second)) as checkpointer:
        value, report = loaded(checkpointer)
    assert (value, report.copy_used, report.fell_back_from.keys()) == (1, "memory:", {2})


def test_later_work_of_a_job_that_did_not_know_of_the_second_root_is_warned_of_and_kept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The first root was wiped, and that job went on there alone: its epochs began anew."""
    second = MemoryStorage()
    for iteration in (100, 110):
        run_job(MemoryStorage(), second, iteration)
    root = MemoryStorage()
    with Checkpointer(root) as checkpointer:
        checkpointer.save(state_of(200), iteration=200)
    with Checkpointer(root, copy_to=Copy(second), keep_last=1, removal_grace_s=0) as checkpointer:
        value, report = loaded(checkpointer)
        assert value == 110
        [warning] = report.warnings
        assert "iteration 200 in memory: was saved later" in warning
        assert warning in caplog.text
        copier = checkpointer._after_commit.copier
        assert copier is not None
        for iteration in (111, 112):
            checkpointer.save(state_of(iteration), iteration=iteration)
            assert copier._worker.wait(30)  # What is being copied does not go.
        assert {200, 110} <= {*checkpointer.iterations()}
        assert 200 in iterations_in(root)
        assert loaded(checkpointer, 200)[1].warnings == ()
        checkpointer.save(state_of(201), iteration=201)
        assert checkpointer._after_commit.wait(30)
        assert 111 not in iterations_in(root)


def test_second_root_that_cannot_be_looked_at_is_no_absence() -> None:
    class Unreachable(MemoryStorage):
        is_down = False

        def list(self, directory: str):  # type: ignore[no-untyped-def]
            if self.is_down:
                raise io_error(errno.ESTALE)
            return super().list(directory)

    root, second = MemoryStorage(), Unreachable()
    run_job(root, second, 1)
    second.is_down = True
    with Checkpointer(root, copy_to=Copy(second)) as checkpointer, pytest.raises(OSError, match="injected"):
        loaded(checkpointer)


@pytest.mark.parametrize("is_readable", [True, False])
def test_second_root_that_cannot_be_claimed_stops_no_save(is_readable: bool, caplog: pytest.LogCaptureFixture) -> None:
    class Unwritable(MemoryStorage):
        is_down = False

        def list(self, directory: str):  # type: ignore[no-untyped-def]
            if self.is_down and not is_readable:
                raise io_error(errno.ESTALE)
            return super().list(directory)

        def make_directory(self, name: str) -> None:
            if self.is_down:
                raise io_error(errno.EROFS)
            super().make_directory(name)

    second = Unwritable()
    run_job(MemoryStorage(), second, 1)
    run_job(MemoryStorage(), second, 2)
    second.is_down = True
    root = MemoryStorage()
    before = tree(second) if is_readable else None
    with Checkpointer(root, copy_to=Copy(second)) as checkpointer:
        for iteration in (3, 4):
            checkpointer.save(state_of(iteration), iteration=iteration)
    assert iterations_in(root) == [4, 3]
    assert kinds(root) == ["save", "save"]
    assert "memory: cannot be claimed, so this job copies nothing to it" in caplog.text
    if is_readable:
        assert tree(second) == before
        assert min(list_commits(root)) > max(list_commits(second))  # The order is one, all the same.
    second.is_down = False
    run_job(root, second, 5)
    assert {3, 4, 5} <= {*iterations_in(second)}


def test_first_root_that_cannot_be_claimed_stops_the_save() -> None:
    class Unwritable(MemoryStorage):
        def put_if_absent(self, name: str, data: bytes) -> bool:
            raise io_error(errno.EROFS)

    copy_to = Copy(MemoryStorage())
    with Checkpointer(Unwritable(), copy_to=copy_to) as checkpointer, pytest.raises(OSError, match="injected"):
        checkpointer.save(state_of(1), iteration=1)


# How it is asked for


def test_root_is_no_place_for_its_own_copies(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "root")
    for root, second in ((tmp_path / "root", tmp_path / "root"), (tmp_path / "root", tmp_path / "link")):
        with pytest.raises(ValueError, match="that is the root itself"):
            Checkpointer(root, copy_to=Copy(second))
    with pytest.raises(ValueError, match="keep_last=0"):
        Copy(tmp_path, keep_last=0)
    with pytest.raises(ValueError, match="max_bytes_per_s=0"):
        Copy(tmp_path, max_bytes_per_s=0)


def test_ranks_that_copy_to_different_roots_are_told(tmp_path: Path) -> None:
    def make(coordinator: Coordinator) -> str:
        copy_to = Copy(tmp_path / str(coordinator.rank))
        with pytest.raises((CheckpointError, DistributedError)) as caught:
            Checkpointer(tmp_path / "root", coordinator=coordinator, copy_to=copy_to)
        return str(caught.value)

    first, second = run_ranks(2, make)
    assert first == second
    assert "the ranks differ in copy_to: rank 0 has" in first


def test_copies_on_real_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "distckpt")
    with Checkpointer(tmp_path / "near", copy_to=Copy(tmp_path / "far"), io_backend="threads") as checkpointer:
        checkpointer.save(state_of(1), iteration=1)
    near, far = ({f.name: f.read_bytes() for f in (tmp_path / r / "iter_0000001").iterdir()} for r in ("near", "far"))
    assert near == far
    assert f"copied iteration 1 to {tmp_path / 'far'}" in caplog.text
    os.rename(tmp_path / "near", tmp_path / "gone")
    with Checkpointer(tmp_path / "near", copy_to=Copy(tmp_path / "far"), io_backend="threads") as checkpointer:
        assert loaded(checkpointer)[0] == 1
