"""The parts of the commit protocol, one by one, on storage in memory. Whole saves are in tests/crash."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distckpt import Checkpointer
from distckpt.commit import (
    STALE_AFTER_S,
    TRACKER,
    Commit,
    CommitFailed,
    Writer,
    discard,
    find_commits,
    iteration_directory,
    list_commits,
    new_save_id,
    newest_iteration,
    pending_marker,
    read_file,
    read_index,
    read_tracker,
    retire,
    sweep,
    tracker_warning,
)
from distckpt.errors import CheckpointNotFoundError, CorruptionError, DistributedError, FencedError
from distckpt.index import ChunkTable, Index, encode_index
from distckpt.retention import superfluous
from distckpt.shard_file import FORMAT, FORMAT_VERSION
from distckpt.storage import Storage
from distckpt.storage.contract import read_all, write_all
from distckpt.storage.memory import MemoryReadFile
from distckpt.testing import Crash, CrashingStorage, MemoryStorage

GRACE_S = 60.0


class Clock:
    """Stands still until told."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class HookedStorage(MemoryStorage):
    """For failures in the middle of a commit.

    put_instead: called once in place of the next put_if_absent of an index. fail_next: method whose next call fails.
    """

    put_instead: Callable[[str, bytes], bool] | None = None
    fail_next: str | None = None

    def open(self, name: str) -> MemoryReadFile:
        self._fail("open")
        return super().open(name)

    def sync_directory(self, directory: str) -> None:
        self._fail("sync_directory")
        super().sync_directory(directory)

    def _fail(self, method: str) -> None:
        if self.fail_next == method:
            self.fail_next = None
            raise io_error()

    def put_if_absent(self, name: str, data: bytes) -> bool:
        if self.put_instead is not None and "/index-" in name:
            instead, self.put_instead = self.put_instead, None
            return instead(name, data)
        return super().put_if_absent(name, data)


def io_error(code: int = errno.EIO) -> OSError:
    return OSError(code, os.strerror(code), "injected")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def storage(clock: Clock) -> HookedStorage:
    return HookedStorage(clock=clock)


def file_names(save_id: str) -> list[str]:
    return [f"chunks-{save_id}.bin", f"shard-00000-of-00001-{save_id}.safetensors"]


def make_index(writer: Writer, iteration: int, save_id: str) -> Index:
    return Index(
        format=FORMAT,
        version=FORMAT_VERSION,
        save_id=save_id,
        epoch=writer.epoch,
        commit_seq=writer.commit_seq,
        iteration=iteration,
        parent=None,
        created_unix_s=0.0,
        world_size=1,
        mesh={},
        tensors={},
        values={},
        metadata=msgspec.Raw(b"null"),
        per_rank={},
        files=(),
        chunk_table=ChunkTable(name=f"chunks-{save_id}.bin", size_bytes=0, records_bytes=0, trailer_crc=0),
    )


def write_files(storage: Storage, iteration: int, save_id: str) -> None:
    for name in file_names(save_id):
        write_all(storage, f"{iteration_directory(iteration)}/{name}", save_id.encode())


def save(writer: Writer, iteration: int) -> str:
    """One save up to its commit; its marker is left for the sweep, as a real save leaves it."""
    save_id = new_save_id()
    writer.announce(iteration, save_id)
    write_files(writer.storage, iteration, save_id)
    writer.publish(make_index(writer, iteration, save_id))
    return save_id


def clean_up(storage: Storage, keep_last: int | None = None, grace_s: float = GRACE_S) -> list[str]:
    retire(storage, superfluous(list_commits(storage), keep_last=keep_last, tracked=read_tracker(storage)))
    return sweep(storage, grace_s=grace_s)


def tree(storage: Storage, directory: str = "") -> dict[str, bytes]:
    """Every file below the directory, with its content."""
    found: dict[str, bytes] = {}
    for name in storage.list(directory):
        path = f"{directory}/{name}" if directory else name
        try:
            found[path] = read_all(storage, path)
        except IsADirectoryError:
            found |= tree(storage, path)
    return found


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


def test_writers_that_claim_at_once_get_epochs_of_their_own(storage: MemoryStorage) -> None:
    writers: list[Writer] = []
    threads = [threading.Thread(target=lambda: writers.append(Writer.claim(storage))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(w.epoch for w in writers) == list(range(1, 9))
    assert storage.list("") == ["writer-000008"]
    for writer in writers:
        if writer.epoch == 8:
            writer.check_fence()
        else:
            with pytest.raises(FencedError, match="epoch 8"):
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


def test_fenced_writer_announces_nothing(storage: MemoryStorage) -> None:
    old = Writer.claim(storage)
    Writer.claim(storage)
    before = tree(storage)
    with pytest.raises(FencedError, match="epoch 1, but a newer job has claimed epoch 2"):
        old.announce(10, new_save_id())
    assert tree(storage) == before
    assert storage.list(iteration_directory(10)) == []


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


# Retention and removal


def test_retention_keeps_the_last_committed_iterations() -> None:
    commits = [Commit(1, seq, iteration) for seq, iteration in enumerate((10, 20, 30, 40), 1)]
    for keep_last, removed in ((1, [10, 20, 30]), (2, [10, 20]), (4, []), (9, []), (None, [])):
        gone = superfluous(commits, keep_last=keep_last, tracked=40)
        assert [c.iteration for c in gone] == removed


def test_retention_gives_up_what_was_saved_again() -> None:
    commits = [Commit(1, 1, 10), Commit(1, 2, 20), Commit(1, 3, 10), Commit(2, 1, 20)]
    assert superfluous(commits, keep_last=None, tracked=20) == commits[:2]


def test_retention_after_a_roll_back_keeps_by_time_and_not_by_iteration() -> None:
    commits = [Commit(1, 1, 1000), Commit(1, 2, 1500), Commit(1, 3, 500)]
    assert superfluous(commits, keep_last=1, tracked=500) == commits[:2]


def test_retention_keeps_what_the_tracker_names() -> None:
    commits = [Commit(1, seq, iteration) for seq, iteration in enumerate((10, 20, 30), 1)]
    assert superfluous(commits, keep_last=1, tracked=10) == [Commit(1, 2, 20)]


@given(
    schedule=st.lists(st.tuples(st.sampled_from((10, 20, 30, 40)), st.booleans()), min_size=1, max_size=12),
    keep_last=st.sampled_from((None, 1, 2, 3)),
    tracked=st.sampled_from((None, b"10", b"40", b"", b"77")),
)
def test_any_schedule_of_saves_and_roll_backs_leaves_the_newest_and_the_tracked(
    schedule: list[tuple[int, bool]], keep_last: int | None, tracked: bytes | None
) -> None:
    """schedule: iteration, and whether a new job saves it. tracked: what somebody writes into the tracker."""
    clock = Clock()
    storage = MemoryStorage(clock=clock)
    writer = Writer.claim(storage)
    saves: list[tuple[int, str]] = []
    for iteration, is_new_job in schedule:
        if is_new_job:
            writer = Writer.claim(storage)
        saves.append((iteration, save(writer, iteration)))
        if tracked is not None:
            storage.replace(TRACKER, tracked)
        before = list_commits(storage)
        named = [c for c in before if c.iteration == read_tracker(storage)][:1]
        clean_up(storage, keep_last)
        clock.now_s += 2 * GRACE_S
        clean_up(storage, keep_last)

        kept = list_commits(storage)
        assert kept[0] == before[0]
        assert set(named) <= set(kept)
        assert newest_iteration(storage) == iteration
        assert len({c.iteration for c in kept}) == len(kept)
        assert keep_last is None or len(kept) <= keep_last + len(named)
        assert keep_last is None or len(kept) >= min(keep_last, len({c.iteration for c in before}))
        expected = {TRACKER, f"writer-{writer.epoch:06d}"}
        for commit in kept:
            save_id = read_index(storage, commit)[0].save_id
            assert save_id == [saved for at, saved in saves if at == commit.iteration][-1]
            expected |= {commit.name, *(f"{commit.directory}/{name}" for name in file_names(save_id))}
        assert set(tree(storage)) == expected
        assert storage.list("") == sorted({*(c.directory for c in kept), *(n for n in expected if "/" not in n)})


def test_index_is_removed_first_then_the_directory_synced_then_the_files_removed(storage: MemoryStorage) -> None:
    writer = Writer.claim(storage)
    save_id = save(writer, 10)
    save(writer, 20)
    sweep(storage, grace_s=0)
    counting = CrashingStorage(storage)
    clean_up(counting, keep_last=1, grace_s=0)
    calls = [c for c in counting.calls if c.startswith(("remove", "sync_directory", "put")) and "0000010" in c]
    directory = "iter_0000010"
    assert calls[:3] == [
        f"put_if_absent {directory}/retired-{save_id}",
        f"remove {directory}/index-000001-000001.json",
        f"sync_directory {directory}",
    ]
    removed = [c.removeprefix(f"remove {directory}/") for c in calls[3:] if c.startswith("remove ")]
    assert removed == [*file_names(save_id), f"retired-{save_id}"]
    assert calls[-2:] == [f"sync_directory {directory}", f"remove_directory {directory}"]


def test_files_of_a_retired_checkpoint_stay_for_the_grace_period(storage: MemoryStorage, clock: Clock) -> None:
    writer = Writer.claim(storage)
    save_id = save(writer, 10)
    save(writer, 20)
    sweep(storage, grace_s=GRACE_S)
    files = [f"iter_0000010/{name}" for name in file_names(save_id)]
    clean_up(storage, keep_last=1)
    assert [c.iteration for c in list_commits(storage)] == [20]
    clock.now_s += GRACE_S - 1
    clean_up(storage, keep_last=1)
    assert set(files) < set(tree(storage))
    clock.now_s += 1
    assert set(files) < set(clean_up(storage, keep_last=1))
    assert "iter_0000010" not in storage.list("")


def test_reader_that_resolved_before_the_removal_still_reads(clock: Clock) -> None:
    class Slow(MemoryStorage):
        """The reader has the index, and before it opens another file the checkpoint is retired."""

        meanwhile: Callable[[], object] | None = None

        def open(self, name: str) -> MemoryReadFile:
            if self.meanwhile is not None and "/chunks-" in name:
                meanwhile, self.meanwhile = self.meanwhile, None
                meanwhile()
            return super().open(name)

    storage = Slow(clock=clock)
    with Checkpointer(storage) as reader, Checkpointer(storage, keep_last=1, removal_grace_s=GRACE_S) as writer:
        writer.save({"w": torch.full((3,), 10.0)}, iteration=10)
        storage.meanwhile = lambda: writer.save({"w": torch.full((3,), 20.0)}, iteration=20)
        state: dict[str, object] = {"w": torch.zeros(3)}
        assert reader.load(state).iteration == 10
        assert torch.equal(state["w"], torch.full((3,), 10.0))
        assert reader.iterations() == [20]

        writer._grace_s = 0.0
        storage.meanwhile = lambda: writer.save({"w": torch.full((3,), 30.0)}, iteration=30)
        report = reader.load(state)  # Nothing is left of 20 when it comes to its files: it resolves again.
        assert report.iteration == 30
        assert list(report.fell_back_from) == [20]
        assert torch.equal(state["w"], torch.full((3,), 30.0))


def test_damaged_checkpoint_is_not_retired(storage: MemoryStorage) -> None:
    writer = Writer.claim(storage)
    save(writer, 10)
    save(writer, 20)
    damaged = list_commits(storage)[1]
    storage.replace(damaged.name, b"damaged")
    before = {name: data for name, data in tree(storage).items() if name.startswith(damaged.directory)}
    clean_up(storage, keep_last=1, grace_s=0)
    assert {name: data for name, data in tree(storage).items() if name.startswith(damaged.directory)} == before


def test_crash_at_any_call_of_a_removal_leaves_no_half(clock: Clock) -> None:
    """Process crash, or power cut, then another process cleans up, and the power is cut again."""

    def prepare() -> MemoryStorage:
        storage = MemoryStorage(clock=clock)
        writer = Writer.claim(storage)
        for iteration in (10, 20, 10, 30):
            save(writer, iteration)
        sweep(storage, grace_s=0)
        return storage

    def check(storage: MemoryStorage) -> None:
        commits = list_commits(storage)
        assert commits[0].iteration == 30
        for commit in commits:
            save_id = read_index(storage, commit)[0].save_id
            for name in file_names(save_id):
                assert read_all(storage, f"{commit.directory}/{name}") == save_id.encode()

    counting = CrashingStorage(prepare())
    clean_up(counting, keep_last=1, grace_s=0)
    assert len(counting.calls) > 20
    for call in range(1, len(counting.calls) + 1):
        for seed in (None, 1, 2, 3):
            storage = prepare()
            with pytest.raises(Crash):
                clean_up(CrashingStorage(storage, fail_at=call, error=Crash()), keep_last=1, grace_s=0)
            check(storage)
            check(storage.power_cut(seed))
            for again in (storage, storage.power_cut(seed)):
                clean_up(again, keep_last=1, grace_s=0)
                assert [c.iteration for c in list_commits(again)] == [30]
                check(again.power_cut(seed))
                assert {name.partition("/")[0] for name in tree(again)} == {TRACKER, "iter_0000030", "writer-000001"}


def test_files_go_only_when_the_absence_of_their_index_is_durable(clock: Clock) -> None:
    """A process removed an index and died before its sync; the next one must not build on what it sees."""

    def prepare() -> MemoryStorage:
        storage = MemoryStorage(clock=clock)
        writer = Writer.claim(storage)
        save_id = save(writer, 10)
        save(writer, 20)
        sweep(storage, grace_s=0)
        storage.put_if_absent(f"iter_0000010/retired-{save_id}", b"")
        storage.remove("iter_0000010/index-000001-000001.json")
        return storage

    counting = CrashingStorage(prepare())
    sweep(counting, grace_s=0)
    for call in range(1, len(counting.calls) + 1):
        for seed in range(5):
            storage = prepare()
            with pytest.raises(Crash):
                sweep(CrashingStorage(storage, fail_at=call, error=Crash()), grace_s=0)
            after = storage.power_cut(seed)
            for commit in list_commits(after):
                save_id = read_index(after, commit)[0].save_id
                assert set(file_names(save_id)) <= set(after.list(commit.directory))


# Sweep and discard


def test_sweep_of_a_tidy_root_opens_and_removes_nothing(storage: MemoryStorage) -> None:
    writer = Writer.claim(storage)
    for iteration in (10, 20):
        save(writer, iteration)
    sweep(storage, grace_s=0)
    before = tree(storage)
    counting = CrashingStorage(storage)
    assert sweep(counting, grace_s=0) == []
    assert {call.partition(" ")[0] for call in counting.calls} == {"list"}
    assert tree(storage) == before


def test_sweep_removes_the_marker_of_a_committed_save(storage: MemoryStorage) -> None:
    save_id = save(Writer.claim(storage), 10)
    assert sweep(storage, grace_s=GRACE_S) == [pending_marker(10, save_id)]


def test_sweep_spares_a_save_that_is_under_way(storage: MemoryStorage, clock: Clock) -> None:
    writer = Writer.claim(storage)
    save(writer, 10)
    sweep(storage, grace_s=0)
    for iteration in (10, 20):  # also where there is a checkpoint already
        save_id = new_save_id()
        writer.announce(iteration, save_id)
        write_files(storage, iteration, save_id)
        before = tree(storage)
        clock.now_s += STALE_AFTER_S - 1
        assert sweep(storage, grace_s=0) == []
        storage.touch(pending_marker(iteration, save_id))
        clock.now_s += STALE_AFTER_S - 1
        assert sweep(storage, grace_s=0) == []
        assert tree(storage) == before
        discard(storage, iteration, save_id)


def test_sweep_removes_a_save_that_died(storage: MemoryStorage, clock: Clock) -> None:
    writer = Writer.claim(storage)
    save(writer, 10)
    for iteration in (10, 20):
        save_id = new_save_id()
        writer.announce(iteration, save_id)
        write_files(storage, iteration, save_id)
    sweep(storage, grace_s=0)
    clock.now_s += STALE_AFTER_S
    removed = sweep(storage, grace_s=0)
    assert len(removed) == 6
    assert removed[-1] == pending_marker(20, save_id)
    assert storage.list("") == ["iter_0000010", TRACKER, "writer-000001"]
    assert len(storage.list("iter_0000010")) == 3
    assert newest_iteration(storage) == 10


def test_sweep_removes_files_that_no_marker_explains(storage: MemoryStorage) -> None:
    writer = Writer.claim(storage)
    save(writer, 10)
    stray = new_save_id()
    write_files(storage, 10, stray)
    assert set(sweep(storage, grace_s=GRACE_S)) > {f"iter_0000010/{name}" for name in file_names(stray)}
    assert newest_iteration(storage) == 10


@pytest.mark.parametrize("content", [b"", b"damaged\n"])
def test_sweep_spares_a_directory_whose_index_cannot_be_read(
    storage: MemoryStorage, clock: Clock, content: bytes
) -> None:
    writer = Writer.claim(storage)
    save(writer, 10)
    storage.replace(list_commits(storage)[0].name, content)
    writer.announce(10, new_save_id())
    clock.now_s += 2 * STALE_AFTER_S
    before = tree(storage)
    assert sweep(storage, grace_s=0) == []
    assert tree(storage) == before


def test_sweep_spares_a_directory_whose_index_is_of_a_newer_version(storage: MemoryStorage) -> None:
    writer = Writer.claim(storage)
    save_id = new_save_id()
    writer.announce(10, save_id)
    write_files(storage, 10, save_id)
    index = msgspec.structs.replace(make_index(writer, 10, save_id), version=FORMAT_VERSION + 1)
    storage.put_if_absent(Commit(1, 1, 10).name, encode_index(index))
    before = tree(storage)
    assert sweep(storage, grace_s=0) == []
    assert tree(storage) == before


def test_sweep_leaves_alone_what_is_not_ours(storage: MemoryStorage, clock: Clock) -> None:
    save(Writer.claim(storage), 10)
    for directory in ("", "iter_0000010", "logs"):
        storage.make_directory(directory)
        for name in ("notes.txt", "pending-1", "shard-00000-of-00001.safetensors"):
            storage.put_if_absent(f"{directory}/{name}".lstrip("/"), b"mine")
    clock.now_s += 2 * STALE_AFTER_S
    sweep(storage, grace_s=0)
    assert len([data for data in tree(storage).values() if data == b"mine"]) == 9


def test_retirement_that_stopped_before_the_index_was_removed_is_none(storage: MemoryStorage) -> None:
    save_id = save(Writer.claim(storage), 10)
    storage.put_if_absent(f"iter_0000010/retired-{save_id}", b"")
    sweep(storage, grace_s=0)
    assert newest_iteration(storage) == 10
    assert sorted(storage.list("iter_0000010")) == sorted([*file_names(save_id), "index-000001-000001.json"])


def test_discard_removes_what_the_save_wrote_and_its_marker_last(storage: MemoryStorage) -> None:
    writer = Writer.claim(storage)
    save(writer, 10)
    before = tree(storage)
    for iteration in (10, 20):
        save_id = new_save_id()
        writer.announce(iteration, save_id)
        write_files(storage, iteration, save_id)
        counting = CrashingStorage(storage)
        discard(counting, iteration, save_id)
        removed = [call for call in counting.calls if call.startswith("remove ")]
        assert removed[-1] == f"remove {pending_marker(iteration, save_id)}"
        assert tree(storage) == before
    assert "iter_0000020" not in storage.list("")


@pytest.mark.parametrize("directory", ["", "iter_0000010", "iter_0000020"])
def test_sweep_spares_fresh_temporaries_and_removes_old_ones(
    storage: MemoryStorage, clock: Clock, directory: str
) -> None:
    """A temporary file is somebody's put_if_absent or replace under way, or what is left of one that died."""
    save(Writer.claim(storage), 10)
    sweep(storage, grace_s=0)
    storage.make_directory(directory)
    temporary = f"{directory}/.tmp-{new_save_id()}".lstrip("/")
    storage.put_if_absent(temporary, b"half")
    before = tree(storage)
    clock.now_s += STALE_AFTER_S - 1
    assert sweep(storage, grace_s=0) == []
    assert tree(storage) == before
    clock.now_s += 1
    assert sweep(storage, grace_s=0) == [temporary]
    assert temporary not in tree(storage.power_cut())
    assert newest_iteration(storage) == 10


def test_discard_of_a_committed_save_changes_nothing(storage: MemoryStorage) -> None:
    """A save that was interrupted after its commit may not know that it is a checkpoint."""
    save_id = save(Writer.claim(storage), 10)
    before = tree(storage)
    discard(storage, 10, save_id)
    assert tree(storage) == before


def test_discard_leaves_to_the_sweep_what_may_be_committed(storage: MemoryStorage) -> None:
    writer = Writer.claim(storage)
    save(writer, 10)
    storage.replace(list_commits(storage)[0].name, b"damaged")
    save_id = new_save_id()
    writer.announce(10, save_id)
    before = tree(storage)
    discard(storage, 10, save_id)
    assert tree(storage) == before
