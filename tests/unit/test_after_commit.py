"""What follows a commit is done in the background of rank 0, and whoever needs its outcome waits for it."""

from __future__ import annotations

import errno
import logging
import os
import threading

import numpy as np
import pytest
import torch

from distckpt import Checkpointer, CheckpointError, CommittedSave
from distckpt.coordinator import Coordinator
from distckpt.offer import Offer, check_free_space
from distckpt.planner import RankValues, SavePlan
from distckpt.storage import FreeSpace
from distckpt.testing import MemoryStorage, run_ranks
from distckpt.worker import Worker

COUNT = 25_000
SAVE_BYTES = 4 * COUNT


class Gated(MemoryStorage):
    """The first removal of an index waits until told, as cleaning up may take long."""

    def __init__(self, capacity_bytes: int | None = None) -> None:
        super().__init__(capacity_bytes=capacity_bytes)
        self.is_removing = threading.Event()
        self.may_remove = threading.Event()
        self.error: OSError | None = None

    def remove(self, name: str) -> None:
        if "/index-" in name:
            self.is_removing.set()
            self.may_remove.wait(20)
            error, self.error = self.error, None
            if error is not None:
                raise error
        super().remove(name)


def make_state(value: int = 0) -> dict[str, torch.Tensor]:
    return {"w": torch.full((COUNT,), float(value))}


def open_after_a(gate: threading.Event, started: threading.Event) -> threading.Thread:
    """Open the gate only when something waits behind it, and a little later: whoever does not wait has gone on then."""

    def run() -> None:
        started.wait(20)
        threading.Event().wait(0.2)
        gate.set()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_save_returns_before_what_follows_its_commit() -> None:
    storage = Gated()
    with Checkpointer(storage, keep_last=1, removal_grace_s=0) as checkpointer:
        checkpointer.save(make_state(1), iteration=1)
        checkpointer.save(make_state(2), iteration=2)
        assert storage.is_removing.wait(20)
        assert len(storage.list("iter_0000001")) > 1
        storage.may_remove.set()
    assert storage.list("iter_0000001") == []


@pytest.mark.parametrize("question", ["iterations", "latest_iteration", "load", "read"])
def test_questions_wait_for_cleaning_up(question: str) -> None:
    storage = Gated()
    with Checkpointer(storage, keep_last=1, removal_grace_s=0) as checkpointer:
        for iteration in (1, 2):
            checkpointer.save(make_state(iteration), iteration=iteration)
        opening = open_after_a(storage.may_remove, storage.is_removing)
        if question == "load":
            checkpointer.load(make_state())
        else:
            getattr(checkpointer, question)()
        assert storage.may_remove.is_set()
        assert storage.list("iter_0000001") == []
        opening.join()


def test_save_finds_the_room_that_cleaning_up_under_way_gives() -> None:
    storage = Gated(capacity_bytes=2 * SAVE_BYTES + SAVE_BYTES // 2)
    with Checkpointer(storage, keep_last=1, removal_grace_s=0) as checkpointer:
        for iteration in (1, 2):
            checkpointer.save(make_state(iteration), iteration=iteration)
        opening = open_after_a(storage.may_remove, storage.is_removing)
        checkpointer.save(make_state(3), iteration=3)
        assert checkpointer.iterations() == [3]
        opening.join()


def offer(filesystem_id: str, free_bytes: int) -> Offer:
    return Offer(1, b"null", {}, None, RankValues(b"", {}), filesystem_id, free_bytes)


def plan_of(*bytes_by_rank: int) -> SavePlan:
    plan = SavePlan.__new__(SavePlan)
    object.__setattr__(plan, "bytes_by_rank", np.array(bytes_by_rank))
    return plan


def test_room_is_what_rank_0_sees_last_on_its_own_file_system() -> None:
    check_free_space([offer("a", 10), offer("a", 5)], plan_of(50, 50), FreeSpace("a", 100), None)
    with pytest.raises(CheckpointError, match="has 99 bytes free"):
        check_free_space([offer("a", 10), offer("a", 5)], plan_of(50, 50), FreeSpace("a", 99), 0)


def test_room_that_was_gained_while_offers_were_made_counts_for_other_hosts() -> None:
    offers = [offer("a", 100), offer("b", 20)]  # The other host looked before, rank 0 after cleaning up.
    check_free_space(offers, plan_of(100, 100), FreeSpace("a", 100), 20)
    with pytest.raises(CheckpointError, match="on file system b, which has 20 bytes free"):
        check_free_space(offers, plan_of(100, 100), FreeSpace("a", 100), None)


def test_cleaning_up_that_fails_is_a_warning_and_done_after_the_next_commit(caplog: pytest.LogCaptureFixture) -> None:
    storage = Gated()
    storage.may_remove.set()
    storage.error = OSError(errno.EIO, os.strerror(errno.EIO), "injected")
    with Checkpointer(storage, keep_last=1) as checkpointer:
        for iteration in (1, 2):
            checkpointer.save(make_state(iteration), iteration=iteration)
        assert checkpointer.iterations() == [1, 2]
        assert "removing old checkpoints failed, the new one is safe" in caplog.text
        checkpointer.save(make_state(3), iteration=3)
        assert checkpointer.iterations() == [3]


def test_close_waits_for_cleaning_up_at_most_the_timeout(caplog: pytest.LogCaptureFixture) -> None:
    storage = Gated()
    checkpointer = Checkpointer(storage, keep_last=1, timeout_s=0.2)
    for iteration in (1, 2):
        checkpointer.save(make_state(iteration), iteration=iteration)
    checkpointer.close()
    assert "cleaning up still goes on after 0.2 s" in caplog.text
    storage.may_remove.set()


# Hooks


def test_hooks_are_told_of_each_commit_in_order() -> None:
    told: list[tuple[str, CommittedSave]] = []

    def first(committed: CommittedSave) -> None:
        told.append((threading.current_thread().name, committed))

    def second(committed: CommittedSave) -> None:
        told.append(("second", committed))

    storage = MemoryStorage()
    with Checkpointer(storage, after_commit=[first, second]) as checkpointer:
        reports = [
            checkpointer.save(make_state(1), iteration=1),
            checkpointer.async_save(make_state(2), iteration=2).wait(),
        ]
    assert [committed.report for _, committed in told] == [reports[0], reports[0], reports[1], reports[1]]
    assert [who for who, _ in told] == ["distckpt-hooks", "second"] * 2
    assert (told[0][1].location, told[0][1].directory) == ("memory:", "iter_0000001")
    assert told[0][1].directory in storage.list("")


def test_hooks_are_called_on_rank_0_only() -> None:
    ranks: list[int] = []

    def run(coordinator: Coordinator) -> None:
        def hook(_: CommittedSave) -> None:
            ranks.append(coordinator.rank)

        with Checkpointer(storage, coordinator=coordinator, after_commit=[hook]) as checkpointer:
            checkpointer.save(make_state(1), iteration=1)

    storage = MemoryStorage()
    run_ranks(2, run)
    assert ranks == [0]


def test_save_that_fails_calls_no_hook() -> None:
    told: list[CommittedSave] = []
    with Checkpointer(MemoryStorage(capacity_bytes=100), after_commit=[told.append]) as checkpointer:
        with pytest.raises(CheckpointError, match="not enough space"):
            checkpointer.save(make_state(1), iteration=1)
        assert checkpointer.iterations() == []
    assert told == []


def test_hook_that_fails_is_named_and_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    told: list[int] = []

    def upload(committed: CommittedSave) -> None:
        raise KeyError("bucket")

    hooks = [upload, lambda committed: told.append(committed.report.iteration)]
    with Checkpointer(MemoryStorage(), after_commit=hooks) as checkpointer:
        for iteration in (1, 2):
            checkpointer.save(make_state(iteration), iteration=iteration)
    assert told == [1, 2]
    assert "upload failed after iteration 1 was committed: KeyError: 'bucket'" in caplog.text


def test_hook_that_hangs_delays_neither_saves_nor_questions_and_close_for_a_bounded_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = threading.Event()

    def hang(_: CommittedSave) -> None:
        gate.wait(30)

    checkpointer = Checkpointer(MemoryStorage(), after_commit=[hang], keep_last=1, timeout_s=0.5)
    for iteration in (1, 2, 3):
        checkpointer.save(make_state(iteration), iteration=iteration)
    assert checkpointer.iterations() == [3]
    checkpointer.close()
    assert "hang has not returned after 0.5 s, and is no longer waited for; calls left out: 2" in caplog.text
    gate.set()


# The thread


def test_worker_goes_on_after_a_call_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []
    worker = Worker("w", 1.0)

    def fail() -> None:
        raise SystemExit(3)

    worker.submit(lambda: done.append(1))
    worker.submit(fail)
    worker.submit(lambda: done.append(2))
    assert worker.wait(20)
    assert done == [1, 2]
    assert "w: SystemExit: 3" in caplog.text


def test_worker_whose_host_gives_no_thread_works_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done: list[int] = []
    worker = Worker("w", 1.0)
    worker.submit(lambda: done.append(1))
    assert done == [1]
    assert worker.wait(0)


def test_program_waits_for_the_work_that_is_left_but_not_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    gate = threading.Event()
    worker = Worker("w", 0.05)
    worker.submit(lambda: gate.wait(20) and None)
    worker._leave()
    assert "w: the program ends while it is at work" in caplog.text
    gate.set()
    assert worker.wait(20)
