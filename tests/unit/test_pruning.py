"""prune: what it reports, what it changes, and that it is safe beside a job and when it dies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from distckpt import CheckpointNotFoundError, Retention, catalog, label, prune
from distckpt.commit import Commit, Writer, list_commits, new_save_id, read_index
from distckpt.removing import sweep
from distckpt.storage import PosixStorage
from distckpt.testing import Crash, CrashingStorage, MemoryStorage
from tests.unit.protocol import Clock, file_names, save, tree, write_files
from tests.unit.saved_roots import saved_root


@pytest.fixture
def clock() -> Clock:
    return Clock()


def four(storage: MemoryStorage) -> MemoryStorage:
    writer = Writer.claim(storage)
    for iteration in (10, 20, 30, 40):
        save(writer, iteration)
    sweep(storage, grace_s=0)
    label(storage, 20, pinned=True)
    return storage


@pytest.fixture
def storage(clock: Clock) -> MemoryStorage:
    return four(MemoryStorage(clock=clock))


def test_dry_run_says_what_would_go_and_why_and_changes_nothing(storage: MemoryStorage) -> None:
    before = tree(storage)
    counting = CrashingStorage(storage)
    dry = prune(counting, Retention(keep_last=1), dry_run=True)
    assert tree(storage) == before
    assert {call.partition(" ")[0] for call in counting.calls} <= {"list", "open", "read_into", "age_s"}
    assert [(one.iteration, one.why) for one in dry.kept] == [(40, "newest"), (20, "tagged or pinned")]
    assert [(one.iteration, one.why) for one in dry.removed] == [(30, "no rule keeps it"), (10, "no rule keeps it")]
    assert dry.removed_bytes == sum(entry.bytes for entry in catalog(storage) if entry.iteration in (10, 30))
    done = prune(storage, Retention(keep_last=1))
    assert (done.kept, done.removed) == (dry.kept, dry.removed)
    assert [entry.iteration for entry in catalog(storage)] == [40, 20]


def test_files_stay_for_readers_and_a_later_prune_takes_them(storage: MemoryStorage, clock: Clock) -> None:
    save_id = catalog(storage)[3].save_id
    prune(storage, Retention(keep_last=1))
    assert f"iter_0000010/{file_names(save_id)[0]}" in tree(storage)
    clock.now_s += 61
    swept = prune(storage, Retention(keep_last=1)).swept
    assert f"iter_0000010/{file_names(save_id)[0]}" in swept
    assert "iter_0000010" not in storage.list("")


def test_prune_spares_a_save_that_is_under_way_and_claims_nothing(storage: MemoryStorage, clock: Clock) -> None:
    writer = Writer.claim(storage)
    save_id = new_save_id()
    writer.announce(50, save_id)
    write_files(storage, 50, save_id)
    clock.now_s += 500
    prune(storage, Retention(keep_last=1), removal_grace_s=0)
    assert set(file_names(save_id)) < set(storage.list("iter_0000050"))
    writer.check_fence()


def test_newest_stays_though_no_rule_keeps_it(storage: MemoryStorage) -> None:
    assert [one.iteration for one in prune(storage, Retention(keep_every=30)).kept] == [40, 30, 20]


def test_checkpoint_that_lacks_a_file_takes_the_place_of_no_other(storage: MemoryStorage) -> None:
    storage.remove(f"iter_0000040/{file_names(catalog(storage)[0].save_id)[0]}")
    pruned = prune(storage, Retention(keep_last=1))
    assert [(one.iteration, one.why) for one in pruned.kept] == [
        (40, "newest"),
        (30, "last good"),
        (20, "tagged or pinned"),
    ]


@pytest.mark.parametrize("parity", [True, False])
def test_checkpoint_that_lacks_a_file_stays_if_parity_may_make_it_again(parity: bool) -> None:
    storage = saved_root(10, 20, 30, parity=parity)
    shard = next(name for name in storage.list("iter_0000010") if name.startswith("shard-"))
    storage.remove(f"iter_0000010/{shard}")
    kept = {one.iteration: one.why for one in prune(storage, Retention(keep_last=1)).kept}
    assert kept == {30: "newest"} | ({10: "files of it are missing, and parity may make them again"} if parity else {})


def test_checkpoint_that_is_labelled_between_decision_and_removal_stays(clock: Clock) -> None:
    class Labelled(MemoryStorage):
        meanwhile: Callable[[], object] | None = None

        def put_if_absent(self, name: str, data: bytes) -> bool:
            if self.meanwhile is not None and "/retired-" in name:
                meanwhile, self.meanwhile = self.meanwhile, None
                meanwhile()
            return super().put_if_absent(name, data)

    storage = Labelled(clock=clock)
    four(storage)
    storage.meanwhile = lambda: (label(storage, 10, note="x"), label(storage, 30, add_tags=["a"]))
    report = prune(storage, Retention(keep_last=1))
    assert report.removed == ()
    assert report.kept[1].why == "labelled meanwhile (no rule keeps it before)"
    assert [one.iteration for one in prune(storage, Retention(keep_last=1)).removed] == [10]


def test_crash_at_any_call_of_a_prune_leaves_checkpoints_whole_or_none(clock: Clock) -> None:
    counting = CrashingStorage(four(MemoryStorage(clock=clock)))
    prune(counting, Retention(keep_last=1), removal_grace_s=0)
    for call in range(1, len(counting.calls) + 1):
        for seed in (None, 1, 2):
            storage = four(MemoryStorage(clock=clock))
            with pytest.raises(Crash):
                prune(CrashingStorage(storage, fail_at=call, error=Crash()), Retention(keep_last=1), removal_grace_s=0)
            for after in (storage, storage.power_cut(seed)):
                left = list_commits(after)
                assert {Commit(1, 4, 40), Commit(1, 2, 20)} <= set(left)
                for commit in left:
                    save_id = read_index(after, commit)[0].save_id
                    assert set(file_names(save_id)) <= set(after.list(commit.directory))
                prune(after, Retention(keep_last=1), removal_grace_s=0)
                assert [entry.iteration for entry in catalog(after)] == [40, 20]
                assert {name.partition("/")[0] for name in tree(after) if "/" in name} == {
                    "iter_0000040",
                    "iter_0000020",
                }


def test_nothing_to_prune_is_an_error_and_so_is_one_iteration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        prune(tmp_path, Retention(keep_last=1))
    save(Writer.claim(PosixStorage(tmp_path)), 10)
    with pytest.raises(ValueError, match="give the root"):
        prune(tmp_path / "iter_0000010", Retention(keep_last=1))
