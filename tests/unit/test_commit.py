"""The commit protocol up to the commit, and which commit is newest. Whole saves are in tests/crash."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Sequence

import pytest
import torch

from distckpt import Checkpointer, commit
from distckpt.commit import (
    TRACKER,
    Commit,
    CommitFailed,
    Writer,
    find_commits,
    iteration_directory,
    list_commits,
    new_save_id,
    newest_iteration,
    read_file,
    read_index,
    read_tracker,
    tracker_warning,
)
from distckpt.errors import CheckpointNotFoundError, CorruptionError, DistributedError, FencedError
from distckpt.index import encode_index
from distckpt.removing import sweep
from distckpt.storage import Storage
from distckpt.storage.contract import read_all
from distckpt.testing import CrashingStorage, MemoryStorage
from tests.unit.protocol import (
    Clock,
    HookedStorage,
    file_names,
    io_error,
    make_index,
    save,
    tree,
    write_files,
)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def storage(clock: Clock) -> HookedStorage:
    return HookedStorage(clock=clock)


# Claim and fence


def test_first_writer_has_epoch_one_and_makes_the_root(storage: MemoryStorage) -> None:
    writer = Writer.claim(storage)
    assert (writer.epoch, writer.commit_seq) == (1, 1)
    assert storage.power_cut().list("") == ["writer-000001"]


def test_claim_goes_one_beyond_the_highest_and_removes_the_older(storage: MemoryStorage) -> None:
    assert [Writer.claim(storage).epoch for _ in range(3)] == [1, 2, 3]
    assert storage.list("") == ["writer-000003"]


def test_claim_numbers_commits_on_from_those_there_are(storage: MemoryStorage) -> None:
    first = Writer.claim(storage)
    for iteration in (10, 20, 10):
        save(first, iteration)
    assert Writer.claim(storage).commit_seq == 4


def test_claim_goes_beyond_the_epochs_of_commits_whose_writer_is_lost(storage: MemoryStorage) -> None:
    """A root that was copied without its writer files: what is saved there next must still be the newest."""
    for _ in range(3):
        writer = Writer.claim(storage)
    save(writer, 10)
    storage.remove("writer-000003")
    writer = Writer.claim(storage)
    assert writer.epoch == 4
    save(writer, 5)
    assert newest_iteration(storage) == 5


def test_writers_that_claim_at_once_get_epochs_of_their_own_or_are_fenced(storage: MemoryStorage) -> None:
    writers: list[Writer] = []
    fenced: list[FencedError] = []

    def claim() -> None:
        try:
            writers.append(Writer.claim(storage))
        except FencedError as error:
            fenced.append(error)

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(writers) + len(fenced) == 8
    *others, newest = sorted(writers, key=lambda writer: writer.epoch)
    assert len({writer.epoch for writer in writers}) == len(writers)
    assert max(storage.list("")) == f"writer-{newest.epoch:06d}"
    newest.check_fence()
    for writer in others:
        with pytest.raises(FencedError, match=f"epoch {newest.epoch}"):
            writer.check_fence()


def test_writer_that_loses_the_race_for_an_epoch_takes_the_next(storage: MemoryStorage) -> None:
    class Slow(HookedStorage):
        """Between looking and claiming, another job claims."""

        rival: Writer | None = None

        def put_if_absent(self, name: str, data: bytes) -> bool:
            if name.startswith("writer-") and self.rival is None:
                self.rival = Writer(self, 0, 0)  # no endless recursion
                self.rival = Writer.claim(self)
            return super().put_if_absent(name, data)

    slow = Slow()
    assert Writer.claim(slow).epoch == 2
    assert slow.rival is not None
    assert slow.rival.epoch == 1


def test_epoch_whose_file_a_newer_job_has_removed_is_not_given_again() -> None:
    class Slow(HookedStorage):
        """Between looking and claiming, two jobs claim, and the second removes the file of the first."""

        rivals: tuple[Writer, ...] = ()

        def put_if_absent(self, name: str, data: bytes) -> bool:
            if name.startswith("writer-") and not self.rivals:
                self.rivals = (Writer(self, 0, 0),)  # no endless recursion
                self.rivals = (Writer.claim(self), Writer.claim(self))
            return super().put_if_absent(name, data)

    slow = Slow()
    with pytest.raises(FencedError, match="epoch 1, but a newer job has claimed epoch 2"):
        Writer.claim(slow)
    assert [w.epoch for w in slow.rivals] == [1, 2]
    slow.rivals[1].check_fence()


def test_job_that_was_given_up_while_it_claimed_does_not_overrule_its_successor() -> None:
    class Slow(HookedStorage):
        """Another job claims once the file is there, before the put returns."""

        successor: Writer | None = None

        def put_if_absent(self, name: str, data: bytes) -> bool:
            is_put = super().put_if_absent(name, data)
            if name == "writer-000001":
                self.successor = Writer.claim(self)
            return is_put

    slow = Slow()
    with pytest.raises(FencedError, match="epoch 1, but a newer job has claimed epoch 2"):
        Writer.claim(slow)
    assert slow.successor is not None
    slow.successor.check_fence()


def test_claim_leaves_the_file_of_a_newer_job_that_has_come_since_its_fence_was_looked_at() -> None:
    class Slow(HookedStorage):
        """Another job claims when this one has looked at its fence, before it removes lower epochs."""

        looks = 0
        successor: Writer | None = None

        def list(self, directory: str) -> list[str]:
            if directory == "" and super().list("") == ["writer-000001"]:
                self.looks += 1
                if self.looks == 3:  # For commits, for its fence, for lower epochs.
                    self.successor = Writer.claim(self)
            return super().list(directory)

    slow = Slow()
    writer = Writer.claim(slow)
    assert slow.successor is not None
    assert slow.list("") == ["writer-000002"]
    slow.successor.check_fence()
    with pytest.raises(FencedError):
        writer.check_fence()


def test_fenced_writer_announces_nothing(storage: MemoryStorage) -> None:
    old = Writer.claim(storage)
    Writer.claim(storage)
    before = tree(storage)
    with pytest.raises(FencedError, match="epoch 1, but a newer job has claimed epoch 2"):
        old.announce(10, new_save_id())
    assert tree(storage) == before
    assert storage.list(iteration_directory(10)) == []


def test_save_is_announced_although_another_job_removes_the_empty_directory() -> None:
    """As a fenced job does that discards a save of the same iteration."""

    class Shared(HookedStorage):
        is_removed = False

        def put_if_absent(self, name: str, data: bytes) -> bool:
            if name.startswith("iter_0000010/") and not self.is_removed:
                self.is_removed = True
                self.remove_directory("iter_0000010")
            return super().put_if_absent(name, data)

    storage, save_id = Shared(), new_save_id()
    Writer.claim(storage).announce(10, save_id)
    assert storage.is_removed
    assert storage.list("iter_0000010") == [f"pending-{save_id}"]


def test_fenced_writer_publishes_nothing(storage: MemoryStorage) -> None:
    old = Writer.claim(storage)
    save(old, 10)
    save_id = new_save_id()
    old.announce(20, save_id)
    write_files(storage, 20, save_id)
    Writer.claim(storage)
    before = tree(storage)
    with pytest.raises(FencedError):
        old.publish(make_index(old, 20, save_id))
    assert tree(storage) == before
    assert (newest_iteration(storage), read_tracker(storage)) == (10, 10)


def test_commit_of_a_job_fenced_too_late_is_neither_newest_nor_reported(storage: HookedStorage) -> None:
    old = Writer.claim(storage)
    save(old, 10)

    def put_late(name: str, data: bytes) -> bool:
        """The old job stands still between its look at the fence and its commit while a new job saves."""
        save(Writer.claim(storage), 20)
        return storage.put_if_absent(name, data)

    storage.put_instead = put_late
    with pytest.raises(CommitFailed, match=r"epoch 1.*epoch 2") as caught:
        save(old, 30)
    assert caught.value.committed == "unknown"
    assert [c.iteration for c in list_commits(storage)] == [20, 30, 10]
    assert newest_iteration(storage) == 20


def test_sweep_removes_at_once_what_a_fenced_job_left_under_way(storage: HookedStorage) -> None:
    old = Writer.claim(storage)
    save_id = new_save_id()
    old.announce(30, save_id)
    write_files(storage, 30, save_id)
    assert sweep(storage, grace_s=0) == []
    Writer.claim(storage)
    assert sweep(storage, grace_s=0)
    assert list(storage.list("iter_0000030")) == []


def swept_under_way(storage: HookedStorage, clock: Clock) -> MemoryStorage:
    """A root with 10 good, where a save of it anew was silent too long, and a sweep came before its index was put."""
    writer = Writer.claim(storage)
    save(writer, 10)
    sweep(storage, grace_s=0)

    def sweep_and_put(name: str, data: bytes) -> bool:
        clock.now_s += 601
        assert sweep(storage, grace_s=0)
        return MemoryStorage.put_if_absent(storage, name, data)

    storage.put_instead = sweep_and_put
    with pytest.raises(CommitFailed, match=r"chunks-.* of this save went.*save again") as caught:
        save(writer, 10)
    assert caught.value.committed == "no"
    return storage


def test_save_whose_files_were_swept_is_no_checkpoint_and_replaces_none(storage: HookedStorage, clock: Clock) -> None:
    swept_under_way(storage, clock)
    (commit,) = list_commits(storage)
    assert (commit.commit_seq, newest_iteration(storage)) == (1, 10)
    assert read_index(storage, commit)[0].chunk_table.name in storage.list(commit.directory)


def test_power_cut_does_not_bring_back_the_index_of_files_that_were_swept(storage: HookedStorage, clock: Clock) -> None:
    swept_under_way(storage, clock)
    for seed in range(20):
        assert [commit.commit_seq for commit in list_commits(storage.power_cut(seed))] == [1]


def test_file_that_a_listing_does_not_show_yet_is_not_gone(clock: Clock) -> None:
    """On a network file system, what this host remembers of a directory may be older than another rank's file."""

    class Forgetful(HookedStorage):
        def list(self, directory: str) -> Sequence[str]:
            return [name for name in super().list(directory) if not name.startswith("chunks-")]

    storage = Forgetful(clock=clock)
    save(Writer.claim(storage), 10)
    assert newest_iteration(storage) == 10


def test_power_cut_after_a_claim_cannot_bring_the_older_writer_back(storage: MemoryStorage) -> None:
    old = Writer.claim(storage)
    Writer.claim(storage)
    for seed in range(20):
        old.storage = storage.power_cut(seed)
        with pytest.raises(FencedError):
            old.check_fence()


# Commit


def test_commit_is_durable_and_its_files_too(storage: MemoryStorage) -> None:
    save_id = save(Writer.claim(storage), 10)
    after = storage.power_cut()
    (commit,) = list_commits(after)
    assert commit == Commit(1, 1, 10)
    assert read_index(after, commit)[0].save_id == save_id
    assert read_tracker(after) == 10
    for name in file_names(save_id):
        assert read_all(after, f"{commit.directory}/{name}") == save_id.encode()


def test_names_of_the_files_are_durable_before_the_index_has_one(storage: HookedStorage) -> None:
    seen: list[MemoryStorage] = []

    def look(name: str, data: bytes) -> bool:
        seen.append(storage.power_cut())
        return storage.put_if_absent(name, data)

    storage.put_instead = look
    save_id = save(Writer.claim(storage), 10)
    assert set(file_names(save_id)) <= set(seen[0].list(iteration_directory(10)))


def test_fence_is_looked_at_after_the_files_are_durable(storage: MemoryStorage) -> None:
    counting = CrashingStorage(storage)
    save(Writer.claim(counting), 10)
    synced = counting.calls.index("sync_directory iter_0000010")
    committed = counting.calls.index("put_if_absent iter_0000010/index-000001-000001.json")
    assert "list" in counting.calls[synced:committed]


def test_index_that_is_there_already_with_our_save_id_is_success(storage: HookedStorage) -> None:
    """The storage put it, lost the reply, tried again by itself and found the name taken."""
    storage.put_instead = lambda name, data: not storage.put_if_absent(name, data)
    save(Writer.claim(storage), 10)
    assert (newest_iteration(storage), read_tracker(storage)) == (10, 10)


def test_index_of_another_save_under_our_name_is_an_error(storage: HookedStorage) -> None:
    writer = Writer.claim(storage)
    other = make_index(writer, 10, new_save_id())
    storage.put_instead = lambda name, data: bool(storage.put_if_absent(name, encode_index(other))) and False
    with pytest.raises(FencedError, match=r"index-000001-000001\.json is there already, of another save"):
        save(writer, 10)
    (commit,) = list_commits(storage)
    assert read_index(storage, commit)[0] == other
    assert read_tracker(storage) is None


def test_failed_put_of_the_index_without_effect_is_not_committed(storage: HookedStorage) -> None:
    def fail(name: str, data: bytes) -> bool:
        raise io_error(errno.ENOSPC)

    storage.put_instead = fail
    with pytest.raises(CommitFailed, match="No space") as caught:
        save(Writer.claim(storage), 10)
    assert caught.value.committed == "no"
    assert list_commits(storage) == []


def test_failed_put_of_the_index_with_effect_is_committed(storage: HookedStorage) -> None:
    def lose_the_reply(name: str, data: bytes) -> bool:
        storage.put_if_absent(name, data)
        raise io_error()

    storage.put_instead = lose_the_reply
    with pytest.raises(CommitFailed) as caught:
        save(Writer.claim(storage), 10)
    assert caught.value.committed == "yes"
    assert newest_iteration(storage.power_cut()) == 10


def test_failed_put_of_the_index_whose_name_may_not_be_durable_is_unknown(storage: HookedStorage) -> None:
    def fail_to_sync(name: str, data: bytes) -> bool:
        storage.put_if_absent(name, data)
        storage.fail_next = "sync_directory"
        raise io_error()

    writer = Writer.claim(storage)
    storage.put_instead = fail_to_sync
    with pytest.raises(CommitFailed) as caught:
        save(writer, 10)
    assert caught.value.committed == "unknown"


def test_index_that_is_there_already_and_cannot_be_read_is_unknown(storage: HookedStorage) -> None:
    """It may be our own: whoever takes it for another's would go on to remove the files of a checkpoint."""

    def lose_the_reply(name: str, data: bytes) -> bool:
        storage.put_if_absent(name, data)
        storage.fail_next = "open"
        return False

    writer = Writer.claim(storage)
    storage.put_instead = lose_the_reply
    with pytest.raises(CommitFailed) as caught:
        save(writer, 10)
    assert caught.value.committed == "unknown"
    assert newest_iteration(storage) == 10


def test_files_of_a_save_that_may_be_committed_stay(storage: HookedStorage) -> None:
    """The put may still take its effect: who cannot see the index now does not know that there will be none."""

    def fail(name: str, data: bytes) -> bool:
        storage.fail_next = "open"
        raise io_error()

    with Checkpointer(storage) as checkpointer:
        storage.put_instead = fail
        with pytest.raises(DistributedError) as caught:
            checkpointer.save({"w": torch.zeros(3)}, iteration=10)
    assert caught.value.committed == "unknown"
    assert [name.partition("-")[0] for name in storage.list("iter_0000010")] == ["chunks", "pending", "shard"]


@pytest.mark.parametrize("is_there", [True, False])
def test_number_of_a_failed_commit_is_not_used_again(storage: HookedStorage, is_there: bool) -> None:
    writer = Writer.claim(storage)
    save(writer, 20)

    def fail(name: str, data: bytes) -> bool:
        if is_there:
            storage.put_if_absent(name, data)
        raise io_error()

    storage.put_instead = fail
    with pytest.raises(CommitFailed):
        save(writer, 20)
    save(writer, 20)
    save(writer, 10)
    assert [c.commit_seq for c in list_commits(storage)] == ([4, 3, 2, 1] if is_there else [4, 3, 1])
    assert newest_iteration(storage) == 10


def test_failed_put_of_an_index_that_cannot_be_read_is_unknown(storage: HookedStorage) -> None:
    def fail(name: str, data: bytes) -> bool:
        storage.fail_next = "open"
        raise io_error()

    writer = Writer.claim(storage)
    storage.put_instead = fail
    with pytest.raises(CommitFailed) as caught:
        save(writer, 10)
    assert caught.value.committed == "unknown"


def test_failed_sync_of_the_files_is_not_committed(storage: MemoryStorage) -> None:
    counting = CrashingStorage(MemoryStorage())
    save(Writer.claim(counting), 10)
    failing = CrashingStorage(storage, fail_at=1 + counting.calls.index("sync_directory iter_0000010"))
    with pytest.raises(CommitFailed) as caught:
        save(Writer.claim(failing), 10)
    assert caught.value.committed == "no"
    assert list_commits(storage) == []


def test_index_larger_than_readers_take_is_refused_before_the_commit(
    storage: HookedStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpointer(storage) as checkpointer:
        checkpointer.save({"w": torch.ones(3)}, iteration=10)
        values = {"short": "x" * 10, "long": "x" * 5000, "longer": "x" * 6000, "w": torch.ones(3), "some": "x" * 100}
        monkeypatch.setattr(commit, "MAX_INDEX_BYTES", 10_000)
        expected = r"the index has 1\d{4} bytes, readers take 10000.*'longer' \(6002 bytes\), 'long' \(5002 bytes\)"
        with pytest.raises(DistributedError, match=expected) as caught:
            checkpointer.save(values, iteration=20)
        assert caught.value.committed == "no"
        assert storage.list("iter_0000020") == []
        assert checkpointer.iterations() == [10]
        monkeypatch.undo()
        checkpointer.save(values, iteration=20)
        assert checkpointer.iterations() == [10, 20]


def test_failed_tracker_leaves_a_commit_and_says_so(storage: MemoryStorage) -> None:
    counting = CrashingStorage(MemoryStorage())
    save(Writer.claim(counting), 10)
    failing = CrashingStorage(storage, fail_at=1 + counting.calls.index(f"replace {TRACKER}"))
    writer = Writer.claim(failing)
    with pytest.raises(CommitFailed, match="the checkpoint is committed, but the tracker is not updated") as caught:
        save(writer, 10)
    assert caught.value.committed == "yes"
    assert newest_iteration(storage) == 10
    save(writer, 20)
    assert (newest_iteration(storage), read_tracker(storage)) == (20, 20)


# Which is newest


def test_newest_is_the_last_committed_not_the_highest_iteration(storage: MemoryStorage) -> None:
    writer = Writer.claim(storage)
    for iteration in (10, 20, 30, 10):
        save(writer, iteration)
    assert newest_iteration(storage) == 10
    assert [(c.iteration, c.commit_seq) for c in list_commits(storage)] == [(10, 4), (30, 3), (20, 2), (10, 1)]


def test_newest_is_that_of_the_newest_job_whatever_its_numbers(storage: MemoryStorage) -> None:
    old = Writer.claim(storage)
    for iteration in (10, 20, 30):
        save(old, iteration)
    new = Writer.claim(storage)
    new.commit_seq = 1
    save(new, 5)
    assert newest_iteration(storage) == 5


def test_damaged_index_is_passed_over(storage: MemoryStorage) -> None:
    writer = Writer.claim(storage)
    save(writer, 10)
    save(writer, 20)
    newest = list_commits(storage)[0]
    data = read_all(storage, newest.name)
    for damaged in (b"", data[:-1], data[: len(data) // 2], data.replace(b'"iteration":20', b'"iteration":21')):
        storage.replace(newest.name, damaged)
        assert newest_iteration(storage) == 10
        with pytest.raises(CorruptionError, match="index-000001-000002"):
            read_index(storage, newest)


@pytest.mark.parametrize(
    "name",
    [
        "iter_0000020/index-000001-000001.json",
        "iter_0000010/index-000002-000001.json",
        "iter_0000010/index-000001-000002.json",
    ],
)
def test_index_under_the_name_of_another_is_refused(storage: MemoryStorage, name: str) -> None:
    save(Writer.claim(storage), 10)
    (good,) = list_commits(storage)
    storage.make_directory("iter_0000020")
    storage.put_if_absent(name, read_all(storage, good.name))
    newest = list_commits(storage)[0]
    assert newest.name == name
    with pytest.raises(CorruptionError, match=f"{name}: it is the index of {good.name}"):
        read_index(storage, newest)
    assert newest_iteration(storage) == 10


def test_names_that_are_not_of_the_format_are_no_commits(storage: MemoryStorage) -> None:
    save(Writer.claim(storage), 10)
    data = read_all(storage, list_commits(storage)[0].name)
    for directory in ("iter_10", "iter_00000010", "iter_0000010x", "iter_-000010", "other"):
        storage.make_directory(directory)
        storage.put_if_absent(f"{directory}/index-000001-000001.json", data)
    for name in ("index-1-1.json", "index-000001-000002.json.bak", "index-000001.json", ".index-000001-000002.json"):
        storage.put_if_absent(f"iter_0000010/{name}", data)
    assert list_commits(storage) == [Commit(1, 1, 10)]


def test_find_commits_says_what_there_is(storage: MemoryStorage) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint under memory:: it has no committed checkpoint"):
        find_commits(storage, None)
    writer = Writer.claim(storage)
    for iteration in (10, 20, 10):
        save(writer, iteration)
    assert [c.commit_seq for c in find_commits(storage, 10)] == [3, 1]
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint of iteration 30 .* iterations \[10, 20\]"):
        find_commits(storage, 30)


def test_small_file_larger_than_allowed_is_refused(storage: MemoryStorage) -> None:
    storage.make_directory("")
    storage.put_if_absent("a", b"12345")
    assert read_file(storage, "a", 5) == b"12345"
    with pytest.raises(CorruptionError, match="a: 5 bytes, at most 4 expected"):
        read_file(storage, "a", 4)


# Tracker


BAD_TRACKERS = {
    "missing": None,
    "empty": b"",
    "torn": b"1\0",
    "not a number": b"release",
    "negative": b"-10",
    "too long": b"1" * 65,
    "uncommitted": b"99",
    "an older one": b"10",
}


def set_tracker(storage: Storage, content: bytes | None) -> None:
    if content is None:
        storage.remove(TRACKER)
    else:
        storage.replace(TRACKER, content)


@pytest.mark.parametrize("content", BAD_TRACKERS.values(), ids=BAD_TRACKERS.keys())
def test_bad_tracker_is_named_in_a_warning(storage: MemoryStorage, content: bytes | None) -> None:
    writer = Writer.claim(storage)
    save(writer, 10)
    save(writer, 20)
    newest = list_commits(storage)[0]
    assert tracker_warning(storage, newest) is None
    set_tracker(storage, content)
    warning = tracker_warning(storage, newest)
    assert warning is not None
    assert "the newest committed checkpoint is 20" in warning


def test_tracker_may_end_in_a_line_feed(storage: MemoryStorage) -> None:
    storage.make_directory("")
    storage.replace(TRACKER, b"20\n")
    assert read_tracker(storage) == 20


def test_tracker_that_cannot_be_read_is_a_warning(storage: MemoryStorage) -> None:
    save(Writer.claim(storage), 10)
    failing = CrashingStorage(storage, fail_at=1)
    warning = tracker_warning(failing, Commit(1, 1, 10))
    assert warning is not None
    assert "cannot be read" in warning


@pytest.mark.parametrize("content", BAD_TRACKERS.values(), ids=BAD_TRACKERS.keys())
def test_load_with_a_bad_tracker_takes_the_newest_and_warns(
    storage: MemoryStorage, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(storage) as checkpointer:
        for iteration in (10, 20):
            checkpointer.save({"w": torch.full((3,), float(iteration))}, iteration=iteration)
        set_tracker(storage, content)
        state: dict[str, object] = {"w": torch.zeros(3)}
        with caplog.at_level(logging.WARNING, "distckpt"):
            report = checkpointer.load(state)
    assert report.iteration == 20
    assert torch.equal(state["w"], torch.full((3,), 20.0))
    (warning,) = report.warnings
    assert warning.startswith(TRACKER)
    assert warning in caplog.messages
