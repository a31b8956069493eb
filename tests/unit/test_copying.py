"""A checkpoint copied to another root is there whole or not at all, and every byte of it was checked."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

import distckpt
from distckpt import Checkpointer, CheckpointError, CheckpointNotFoundError, CorruptionError, ShardedTensor
from distckpt.commit import find_commits, list_commits, pending_marker, read_head, read_tracker
from distckpt.coordinator import Coordinator
from distckpt.copying import copy_checkpoint
from distckpt.labels import Labels, read_labels
from distckpt.removing import STALE_AFTER_S, sweep
from distckpt.storage import PosixStorage
from distckpt.storage.contract import read_all
from distckpt.testing import Crash, CrashingStorage, MemoryStorage, run_ranks
from tests.unit.damage import change, flip
from tests.unit.protocol import Clock, io_error, tree
from tests.unit.saved_roots import RANKS, check_loads, save, saved_root


@pytest.fixture(scope="module")
def saved() -> MemoryStorage:
    """Iterations 10 and 20, with parity, read back. Not to be changed."""
    return saved_root(10, 20, parity=2, verify_after_save=True)


def files_of(storage: MemoryStorage, iteration: int) -> dict[str, bytes]:
    return {name: data for name, data in tree(storage).items() if name.startswith(f"iter_{iteration:07d}/")}


def to_copy(storage: MemoryStorage, iteration: int) -> dict[str, bytes]:
    """All but what says that it was read back: the copy was not."""
    return {name: data for name, data in files_of(storage, iteration).items() if "/verified-" not in name}


def shard_names(storage: MemoryStorage, iteration: int) -> list[str]:
    return [name for name in files_of(storage, iteration) if "/shard-" in name]


@pytest.fixture(scope="module", params=[0, 2], ids=["plain", "parity"])
def small(request: pytest.FixtureRequest) -> MemoryStorage:
    """Iteration 10, of two ranks, in few bytes. Not to be changed."""
    storage = MemoryStorage()

    def run(coordinator: Coordinator) -> None:
        rows = torch.arange(6.0)[3 * coordinator.rank :][:3]
        state: dict[str, object] = {
            "w": ShardedTensor("w", rows, global_shape=(6,), global_offset=(3 * coordinator.rank,))
        }
        with Checkpointer(storage, coordinator=coordinator, parity=request.param) as checkpointer:
            checkpointer.save(state, iteration=10)

    run_ranks(2, run)
    return storage


# What a copy is


def test_copy_is_equal_byte_by_byte_and_loads(saved: MemoryStorage) -> None:
    target = MemoryStorage()
    report = copy_checkpoint(saved, target)
    assert files_of(target, 20) == to_copy(saved, 20)
    assert set(tree(target)) == {*to_copy(saved, 20), "latest_checkpointed_iteration.txt"}
    assert (report.iteration, report.save_id) == (20, read_head(saved, find_commits(saved, 20)[0]).save_id)
    assert report.bytes == sum(
        len(data) for name, data in files_of(saved, 20).items() if "shard-" in name or "chunks-" in name
    )
    assert report.bytes_copied > report.bytes  # Parity too.
    check_loads(target.power_cut(), 20)
    assert distckpt.verify(target).is_sound


def test_copy_on_real_files(tmp_path: Path) -> None:
    source = PosixStorage(tmp_path / "a", io_backend="threads")
    save(source, 10, parity=2)
    told: list[int] = []
    report = distckpt.copy_checkpoint(tmp_path / "a", tmp_path / "b" / "c", on_bytes=told.append)
    assert sum(told) == report.bytes_copied
    check_loads(PosixStorage(tmp_path / "b" / "c", io_backend="threads"), 10)
    assert distckpt.verify(tmp_path / "b" / "c").is_sound


def test_older_iteration_takes_its_place_behind_newer_ones(saved: MemoryStorage) -> None:
    target = MemoryStorage()
    copy_checkpoint(saved, target, 20)
    copy_checkpoint(saved, target, 10)
    assert list_commits(target) == list_commits(saved)
    assert read_tracker(target) == 20
    check_loads(target, 20)


def test_copying_again_copies_nothing(saved: MemoryStorage) -> None:
    target = MemoryStorage()
    copy_checkpoint(saved, target)
    before = tree(target)
    counting = CrashingStorage(target)
    assert copy_checkpoint(saved, counting).bytes_copied == 0
    assert tree(target) == before
    assert not [call for call in counting.calls if call.startswith(("create", "write", "replace", "put_if_absent"))]


def labels_of(storage: MemoryStorage) -> Labels:
    [commit] = list_commits(storage)
    return read_labels(storage, commit.directory, read_head(storage, commit).save_id).labels


def test_labels_that_came_since_are_copied_to_a_copy_that_is_there() -> None:
    source, target = saved_root(10), MemoryStorage()
    copy_checkpoint(source, target)
    distckpt.label(source, 10, add_tags=["best"], note="good", metrics={"loss": 1.0})
    copy_checkpoint(source, target)
    assert labels_of(target) == labels_of(source)


def test_labels_of_a_copy_are_never_taken_from_it() -> None:
    source, target = saved_root(10), MemoryStorage()
    copy_checkpoint(source, target)
    distckpt.label(target, 10, add_tags=["mine"], pinned=True, note="old", metrics={"loss": 9.0, "other": 3.0})
    for loss in (1.0, 2.0, 3.0):
        distckpt.label(source, 10, add_tags=["best"], note="good", metrics={"loss": loss})
        copy_checkpoint(source, target)
    found = labels_of(target)
    assert (found.tags.keys(), found.note, found.pinned) == ({"best", "mine"}, "good", True)
    assert found.metrics == {"loss": 3.0, "other": 3.0}
    assert len([name for name in files_of(target, 10) if "/labels-" in name]) == 2


def test_labels_that_cannot_be_read_are_a_pin_of_the_copy() -> None:
    source, target = saved_root(10), MemoryStorage()
    distckpt.label(source, 10, note="good")
    [name] = [name for name in files_of(source, 10) if "/labels-" in name]
    change(source, name, flip(30))
    copy_checkpoint(source, target)
    assert labels_of(target).pinned


def test_other_checkpoint_of_the_same_place_is_never_replaced(saved: MemoryStorage) -> None:
    target = saved.power_cut()
    change(target, list_commits(target)[0].name, flip(20))
    before = tree(target)
    with pytest.raises(CheckpointError, match=r"another iter_0000020/index-000001-000002.json .*root of its own"):
        copy_checkpoint(saved, target)
    assert tree(target) == before


def test_root_of_another_run_is_no_target(saved: MemoryStorage) -> None:
    of_a_job = saved_root(7)  # It is older, and its job would save older ones than the copy.
    newer = MemoryStorage()
    copy_checkpoint(saved_root(1, 2, 3), newer, 3)
    for target in (of_a_job, newer):
        before = tree(target)
        with pytest.raises(CheckpointError, match=r"holds checkpoints of another run than .* a root of its own"):
            copy_checkpoint(saved, target)
        assert tree(target) == before


def test_copies_of_a_run_go_on_after_it_has_removed_all_in_between() -> None:
    source, target = MemoryStorage(), MemoryStorage()
    with Checkpointer(source, keep_last=1, removal_grace_s=0) as checkpointer:
        for iteration in (10, 20, 30, 40):
            checkpointer.save({"w": torch.ones(3)}, iteration=iteration)
            assert checkpointer.iterations() == [iteration]
            if iteration in (10, 40):
                copy_checkpoint(source, target)
    assert [commit.iteration for commit in list_commits(target)] == [40, 10]


def test_root_to_which_the_run_has_moved_on_is_a_target(saved: MemoryStorage) -> None:
    """Its first root was wiped meanwhile: what it has saved since has its parent among the copies."""
    target = MemoryStorage()
    copy_checkpoint(saved, target, 20)
    with Checkpointer(target) as checkpointer:
        checkpointer.read(20)
        checkpointer._save_context.parent = read_head(target, list_commits(target)[0]).save_id
        checkpointer.save({"w": torch.ones(3)}, iteration=30)
    target.remove(find_commits(target, 20)[0].name)
    copy_checkpoint(saved, target, 10)
    assert [commit.iteration for commit in list_commits(target)] == [30, 10]


def test_directory_of_an_iteration_is_no_target(tmp_path: Path) -> None:
    save(PosixStorage(tmp_path / "a", io_backend="threads"), 10)
    save(PosixStorage(tmp_path / "b", io_backend="threads"), 10)
    for inside in ("iter_0000010", "iter_0000010/copies"):
        with pytest.raises(CheckpointError, match=r"no place for checkpoints: it lies in iteration 10 of .*b"):
            copy_checkpoint(tmp_path / "a", tmp_path / "b" / inside)


def test_what_is_not_there_is_not_found(saved: MemoryStorage) -> None:
    target = MemoryStorage()
    with pytest.raises(CheckpointNotFoundError):
        copy_checkpoint(saved, target, 30)
    with pytest.raises(ValueError, match="max_bytes_per_s=0"):
        copy_checkpoint(saved, target, max_bytes_per_s=0)
    assert target.list("") == []


def test_target_without_room_is_told_before_anything_is_written(saved: MemoryStorage) -> None:
    target = MemoryStorage(capacity_bytes=5 << 20)
    with pytest.raises(CheckpointError, match=r"not enough space: the copy of iteration 20 takes \d+ bytes more"):
        copy_checkpoint(saved, target)
    assert shard_names(target, 20) == []


# Damage


def test_damage_in_the_source_is_found_and_never_copied_as_good(saved: MemoryStorage) -> None:
    for name in [name for name in files_of(saved, 20) if "/shard-" in name or "/chunks-" in name]:
        source, target = saved.power_cut(), MemoryStorage()
        change(source, name, flip(len(read_all(source, name)) // 2))
        with pytest.raises(CorruptionError, match=name.rpartition("/")[2]):
            copy_checkpoint(source, target)
        assert list_commits(target) == []
        assert name not in files_of(target, 20)


def test_checkpoint_whose_parity_is_damaged_is_copied_without_it(
    saved: MemoryStorage, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in files_of(saved, 20) if "/parity-" in name]:
        for harm in (lambda content: flip(len(content) // 2)(content), None):
            source, target = saved.power_cut(), MemoryStorage()
            if harm is None and not name.endswith(".bin"):
                continue  # Without its record there is no parity.
            if harm is None:
                source.remove(name)
            else:
                change(source, name, harm)
            caplog.clear()
            copy_checkpoint(source, target)
            assert "iteration 20 is copied without its parity" in caplog.text
            assert not [name for name in files_of(target, 20) if "/parity-" in name]
            check_loads(target, 20)


def test_file_in_the_target_that_is_damaged_is_copied_again(saved: MemoryStorage) -> None:
    target = MemoryStorage()
    copy_checkpoint(saved, target)
    [commit] = list_commits(target)
    target.remove(commit.name)
    damaged = shard_names(target, 20)[1]
    change(target, damaged, flip(3 << 20))
    report = copy_checkpoint(saved, target)
    assert files_of(target, 20) == to_copy(saved, 20)
    assert report.bytes_copied == len(read_all(saved, damaged))


# Crashes


def count_calls(saved: MemoryStorage) -> int:
    counting = CrashingStorage(MemoryStorage())
    copy_checkpoint(saved, counting)
    return len(counting.calls)


@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_crash_at_any_call_to_the_target_leaves_no_half_and_a_second_try_goes_on(
    small: MemoryStorage, moment: str
) -> None:
    whole = files_of(small, 10)
    calls = count_calls(small)
    assert calls > 20
    most = 0
    for number in range(1, calls + 1):
        clock = Clock()
        target = MemoryStorage(clock=clock)
        with pytest.raises(Crash):
            copy_checkpoint(small, CrashingStorage(target, fail_at=number, error=Crash(), moment=moment))  # type: ignore[arg-type]
        finished = {name for name in files_of(target, 10) if name in whole and "index-" not in name}
        for left in (target, target.power_cut(), *(target.power_cut(seed) for seed in range(3))):
            if list_commits(left):
                assert files_of(left, 10).items() >= whole.items()
                assert distckpt.verify(left).is_sound
            copied = {name for name in files_of(left, 10) if name in whole}
            report = copy_checkpoint(small, left)
            assert report.bytes_copied == sum(len(whole[name]) for name in whole.keys() - copied if _is_large(name))
            most = max(most, len(copied & finished))
            assert read_tracker(left) == 10
            clock.now_s += STALE_AFTER_S
            sweep(left, grace_s=0)
            assert files_of(left, 10) == whole
            assert files_of(left.power_cut(), 10).items() >= whole.items()  # The marker may come back.
    assert most > 2  # Some were left, and not copied again.


def _is_large(name: str) -> bool:
    return "/shard-" in name or "/chunks-" in name or ("/parity-" in name and name.endswith(".bin"))


def test_failure_of_any_call_to_the_target_is_raised_and_leaves_no_half(small: MemoryStorage) -> None:
    for number in range(1, count_calls(small) + 1):
        target = MemoryStorage()
        with pytest.raises(OSError, match="injected"):
            copy_checkpoint(small, CrashingStorage(target, fail_at=number, error=io_error(errno.ENOSPC)))
        if list_commits(target):
            assert distckpt.verify(target).is_sound
        copy_checkpoint(small, target)
        assert files_of(target, 10).items() >= files_of(small, 10).items()


def test_leftovers_of_a_copy_that_died_are_swept_when_they_are_old(saved: MemoryStorage) -> None:
    clock = Clock()
    target = MemoryStorage(clock=clock)
    with pytest.raises(Crash):
        copy_checkpoint(saved, CrashingStorage(target, fail_at=20, error=Crash()))
    assert shard_names(target, 20)
    clock.now_s += STALE_AFTER_S - 1
    assert sweep(target, grace_s=0) == []
    clock.now_s += 1
    sweep(target, grace_s=0)
    assert tree(target) == {}


def test_copy_is_announced_before_its_files_and_the_marker_goes_last(saved: MemoryStorage) -> None:
    target = CrashingStorage(MemoryStorage())
    copy_checkpoint(saved, target)
    marker = pending_marker(20, read_head(saved, find_commits(saved, 20)[0]).save_id)
    changes = [
        c for c in target.calls if c.partition(" ")[0] in ("replace", "create", "move", "put_if_absent", "remove")
    ]
    [announced] = [i for i, call in enumerate(changes) if call == f"replace {marker}"]
    [committed] = [i for i, call in enumerate(changes) if call.startswith("put_if_absent") and "/index-" in call]
    [removed] = [i for i, call in enumerate(changes) if call == f"remove {marker}"]
    moved = [i for i, call in enumerate(changes) if call.startswith("move")]
    assert announced < min(moved) < max(moved) < committed < removed


def test_copy_of_what_retention_there_gave_up_once_is_no_garbage_while_it_is_made(saved: MemoryStorage) -> None:
    clock = Clock()
    target = MemoryStorage(clock=clock)
    copy_checkpoint(saved, target, 10)
    copy_checkpoint(saved, target, 20)
    assert [one.iteration for one in distckpt.prune(target, distckpt.Retention(keep_last=1)).removed] == [10]
    clock.now_s += 3600.0
    swept: list[str] = []
    copy_checkpoint(saved, target, 10, on_bytes=lambda _: swept.extend(sweep(target, grace_s=0)))
    assert swept == []
    assert files_of(target, 10) == to_copy(saved, 10)


@pytest.mark.parametrize("part", ["/shard-00001", "/chunks-"])
def test_copy_that_loses_a_file_before_it_is_committed_is_none(saved: MemoryStorage, part: str) -> None:
    [name] = [name for name in files_of(saved, 20) if part in name]

    class Swept(MemoryStorage):
        def put_if_absent(self, new: str, data: bytes) -> bool:
            if "/index-" in new:
                self.remove(name)
            return super().put_if_absent(new, data)

    target = Swept()
    with pytest.raises(CheckpointError, match=f"1 files of iteration 20 were removed while .*{part[1:]}"):
        copy_checkpoint(saved, target)
    assert list_commits(target) == list_commits(target.power_cut()) == []
    assert len(shard_names(target, 20)) + (part != "/chunks-") >= RANKS


def test_chunk_table_that_is_gone_when_it_is_looked_at_is_copied(saved: MemoryStorage) -> None:
    [name] = [name for name in files_of(saved, 20) if "/chunks-" in name]

    class Swept(MemoryStorage):
        def open(self, opened: str):  # type: ignore[no-untyped-def]
            if opened == name and not self.is_swept:
                self.is_swept = True
                self.remove(name)
            return super().open(opened)

        is_swept = True

    target = Swept()
    copy_checkpoint(saved, target)
    target.remove(list_commits(target)[0].name)
    target.is_swept = False
    copy_checkpoint(saved, target)
    assert files_of(target, 20) == to_copy(saved, 20)


# Bandwidth


def test_bytes_go_by_no_faster_than_is_allowed(saved: MemoryStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("distckpt.copying.time.monotonic", clock)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.now_s += seconds

    monkeypatch.setattr("distckpt.copying.time.sleep", sleep)
    report = copy_checkpoint(saved, MemoryStorage(), max_bytes_per_s=1e6)
    assert sum(slept) == pytest.approx(report.bytes_copied / 1e6)
    assert max(slept) <= 0.2


def test_copy_can_be_given_up_between_two_words(saved: MemoryStorage) -> None:
    target = MemoryStorage()

    def give_up(_: int) -> None:
        raise TimeoutError("no time")

    with pytest.raises(TimeoutError):
        copy_checkpoint(saved, target, on_bytes=give_up)
    assert list_commits(target) == []
    assert not [name for name in tree(target) if ".tmp-" in name]
