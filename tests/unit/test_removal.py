"""How checkpoints are retired, and what a sweep and a discarded save remove, and what they spare."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distckpt import Checkpointer
from distckpt.commit import (
    TRACKER,
    Commit,
    Writer,
    list_commits,
    new_save_id,
    newest_iteration,
    pending_marker,
    read_index,
    read_tracker,
)
from distckpt.index import encode_index
from distckpt.removing import RETIRING_S, STALE_AFTER_S, discard, retire, sweep
from distckpt.shard_file import FORMAT_VERSION
from distckpt.storage.contract import read_all
from distckpt.storage.memory import MemoryReadFile
from distckpt.testing import Crash, CrashingStorage, MemoryStorage
from tests.unit.protocol import (
    GRACE_S,
    Clock,
    HookedStorage,
    clean_up,
    file_names,
    make_index,
    save,
    superfluous,
    tree,
    write_files,
)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def storage(clock: Clock) -> HookedStorage:
    return HookedStorage(clock=clock)


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
    assert removed == [f"pending-{save_id}", *file_names(save_id), f"retired-{save_id}"]
    assert calls[-2:] == [f"sync_directory {directory}", f"remove_directory {directory}"]


def test_retired_checkpoint_does_not_come_back(storage: MemoryStorage) -> None:
    writer = Writer.claim(storage)
    save(writer, 10)
    save(writer, 20)
    retire(storage, list_commits(storage)[1:])
    for seed in range(10):
        assert [c.iteration for c in list_commits(storage.power_cut(seed))] == [20]


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

        def replace_by(iteration: int) -> None:
            writer.save({"w": torch.full((3,), float(iteration))}, iteration=iteration)
            assert writer.iterations() == [iteration]  # It has been cleaned up.

        replace_by(10)
        storage.meanwhile = lambda: replace_by(20)
        state: dict[str, object] = {"w": torch.zeros(3)}
        assert reader.load(state).iteration == 10
        assert torch.equal(state["w"], torch.full((3,), 10.0))
        assert reader.iterations() == [20]

        writer._after_commit.grace_s = 0.0
        storage.meanwhile = lambda: replace_by(30)
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


def test_job_that_is_fenced_right_after_its_commit_removes_nothing() -> None:
    """The root is the newer job's, which may count on what it has seen there."""

    class Claimed(MemoryStorage):
        """Another job claims the root when the tracker is about to name iteration 20."""

        def replace(self, name: str, data: bytes) -> None:
            super().replace(name, data)
            if data == b"20":
                Writer.claim(self)

    storage = Claimed()
    with Checkpointer(storage, keep_last=1, removal_grace_s=0) as checkpointer:
        checkpointer.save({"w": torch.zeros(3)}, iteration=10)
        checkpointer.save({"w": torch.zeros(3)}, iteration=20)
        assert checkpointer.iterations() == [10, 20]
        assert checkpointer.load({"w": torch.ones(3)}, 10).iteration == 10


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


def test_sweep_that_lists_a_directory_during_a_commit_spares_it(clock: Clock) -> None:
    """A listing is no snapshot: of a save that commits meanwhile, it may show neither marker nor index."""

    class Torn(MemoryStorage):
        is_torn = False

        def list(self, directory: str) -> Sequence[str]:
            names = super().list(directory)
            if self.is_torn and directory:
                self.is_torn = False
                names = [name for name in names if not name.startswith(("pending-", "index-"))]
            return names

    storage = Torn(clock=clock)
    save_id = save(Writer.claim(storage), 10)
    storage.is_torn = True
    assert sweep(storage, grace_s=0) == []
    assert not storage.is_torn
    assert set(file_names(save_id)) < set(storage.list("iter_0000010"))


@pytest.mark.parametrize("at_sync", [1, 2], ids=["before its files go", "after its files went"])
def test_sweep_goes_on_where_another_job_has_removed_the_directory(clock: Clock, at_sync: int) -> None:
    """As a fenced job does that discards its save while the newer one sweeps it."""

    class Shared(MemoryStorage):
        syncs = 0

        def sync_directory(self, directory: str) -> None:
            if directory == "iter_0000010":
                self.syncs += 1
            if self.syncs == at_sync:
                for name in self.list("iter_0000010"):
                    self.remove(f"iter_0000010/{name}")
                self.remove_directory("iter_0000010")
            super().sync_directory(directory)

    storage = Shared(clock=clock)
    for iteration in (10, 20):
        write_files_of_a_fenced_job(storage, iteration)
    newer = Writer.claim(storage)
    sweep(storage, grace_s=0)
    assert storage.syncs == at_sync
    assert set(tree(storage)) == {f"writer-{newer.epoch:06d}"}


def write_files_of_a_fenced_job(storage: MemoryStorage, iteration: int) -> None:
    save_id = new_save_id()
    Writer.claim(storage).announce(iteration, save_id)
    write_files(storage, iteration, save_id)


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


def test_retirement_that_stopped_before_the_index_was_removed_is_none(storage: MemoryStorage, clock: Clock) -> None:
    save_id = save(Writer.claim(storage), 10)
    storage.put_if_absent(f"iter_0000010/retired-{save_id}", b"")
    sweep(storage, grace_s=0)
    assert f"retired-{save_id}" in storage.list("iter_0000010")  # It may be about to be removed.
    clock.now_s += RETIRING_S
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
