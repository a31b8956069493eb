"""verify_after_save: only what is read back as it was written counts as verified; the rest is known not to be."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from distckpt import Checkpointer, CheckpointError, DistributedError
from distckpt.commit import list_commits
from distckpt.coordinator import Coordinator
from distckpt.shard_file import BLOCK_BYTES
from distckpt.storage.memory import MemoryWriteFile
from distckpt.testing import MemoryStorage, run_ranks
from tests.unit.damage import change, flip
from tests.unit.saved_roots import RANKS, check_loads, make_state, save, saved_root


class LyingStorage(MemoryStorage):
    """Storage that says it has written a file, and keeps it with one bit changed. lies_about: part of its name."""

    lies_about = "nothing"

    def create(self, name: str, *, size_hint: int = 0) -> MemoryWriteFile:
        return _LyingFile(self, super().create(name, size_hint=size_hint))  # type: ignore[return-value]

    def put_if_absent(self, name: str, data: bytes) -> bool:
        done = super().put_if_absent(name, data)
        if self.lies_about in name:
            change(self, name, flip(len(data) // 2))
        return done


class _LyingFile:
    def __init__(self, storage: LyingStorage, inner: MemoryWriteFile) -> None:
        self._storage, self._inner = storage, inner
        self.name, self.write, self.abandon = inner.name, inner.write, inner.abandon

    def finish(self, size_bytes: int) -> None:
        self._inner.finish(size_bytes)
        if self._storage.lies_about in self.name:
            change(self._storage, self.name, flip(min(size_bytes, BLOCK_BYTES) - 1))


@pytest.mark.parametrize("is_async", [False, True])
def test_sound_save_is_verified_on_every_rank(is_async: bool) -> None:
    storage = MemoryStorage()

    def save_once(coordinator: Coordinator) -> tuple[bool, int | None]:
        with Checkpointer(storage, coordinator=coordinator, verify_after_save=True) as checkpointer:
            assert checkpointer.latest_iteration(verified=True) is None
            state = make_state(1, coordinator)
            if is_async:
                report = checkpointer.async_save(state, iteration=1).wait()
            else:
                report = checkpointer.save(state, iteration=1)
            return report.verified, checkpointer.latest_iteration(verified=True)

    assert run_ranks(RANKS, save_once) == [(True, 1)] * RANKS


def test_newest_verified_is_not_the_newest() -> None:
    storage = MemoryStorage()
    save(storage, 1, verify_after_save=True)
    save(storage, 2)
    with Checkpointer(storage) as checkpointer:
        assert checkpointer.latest_iteration() == 2
        assert checkpointer.latest_iteration(verified=True) == 1


def test_marker_of_another_save_of_the_iteration_does_not_count() -> None:
    storage = saved_root(1, verify_after_save=True)
    save(storage, 1)
    with Checkpointer(storage) as checkpointer:
        assert checkpointer.latest_iteration() == 1
        assert checkpointer.latest_iteration(verified=True) is None


@pytest.mark.parametrize("what", ["shard-00001", "chunks-", "index-"])
def test_what_is_not_as_it_was_written_fails_the_save_on_all_ranks_and_costs_no_earlier_one(what: str) -> None:
    storage = LyingStorage()
    save(storage, 1, verify_after_save=True)
    storage.lies_about = what

    def save_again(coordinator: Coordinator) -> DistributedError:
        checkpointer = Checkpointer(storage, coordinator=coordinator, verify_after_save=True, keep_last=1)
        checkpointer.load(make_state(0, coordinator))
        with pytest.raises(DistributedError, match="it was not read back as it was written") as raised:
            checkpointer.save(make_state(2, coordinator), iteration=2)
        checkpointer.close()
        return raised.value

    errors = run_ranks(RANKS, save_again)
    assert {error.committed for error in errors} == {"yes"}
    assert {tuple(error.failures) for error in errors} == {(1,) if what == "shard-00001" else (0,)}
    assert {commit.iteration for commit in list_commits(storage)} == {1, 2}
    with Checkpointer(storage) as checkpointer:
        assert checkpointer.latest_iteration(verified=True) == 1
    check_loads(storage, 1)


def test_what_lies_in_the_page_cache_is_read_from_the_disk(tmp_path, monkeypatch) -> None:
    from distckpt.storage import PosixStorage
    from distckpt.storage.posix import PosixReadFile

    dropped: list[str] = []
    drop_cache: Callable[[PosixReadFile], None] = PosixReadFile.drop_cache

    def note(file: PosixReadFile) -> None:
        dropped.append(file.name.rpartition("/")[2].partition("-")[0])
        drop_cache(file)

    monkeypatch.setattr(PosixReadFile, "drop_cache", note)
    save(PosixStorage(tmp_path), 1, verify_after_save=True)
    assert sorted(dropped) == sorted(["chunks", "index", *["shard"] * RANKS])


def save_good_bad_good(storage: LyingStorage, first: list[int], bad: int, then: int, keep_last: int | None) -> None:
    """Iterations that are saved well, one that is not, and one more."""

    def run(coordinator: Coordinator) -> None:
        checkpointer = Checkpointer(
            storage, coordinator=coordinator, verify_after_save=True, keep_last=keep_last, removal_grace_s=0
        )
        for iteration in first:
            checkpointer.save(make_state(iteration, coordinator), iteration=iteration)
        if coordinator.rank == 0:
            storage.lies_about = "shard-00001"
        with pytest.raises(DistributedError):
            checkpointer.save(make_state(bad, coordinator), iteration=bad)
        if coordinator.rank == 0:
            storage.lies_about = "nothing"
        checkpointer.save(make_state(then, coordinator), iteration=then)
        checkpointer.close()

    run_ranks(RANKS, run)


@pytest.mark.parametrize("keep_last", [None, 3])
def test_unsound_save_does_not_take_the_place_of_the_sound_one_of_its_iteration(keep_last: int | None) -> None:
    storage = LyingStorage()
    save_good_bad_good(storage, [50, 100], 100, 150, keep_last)
    check_loads(storage, 100, iteration=100)
    check_loads(storage, 150)


def test_unsound_save_does_not_count_among_those_that_are_kept() -> None:
    storage = LyingStorage()
    save_good_bad_good(storage, [1, 2], 3, 4, keep_last=2)
    assert {commit.iteration for commit in list_commits(storage)} == {2, 4}
    check_loads(storage, 2, iteration=2)


def test_ranks_that_want_different_protection_are_refused() -> None:
    storage = MemoryStorage()

    def open_root(coordinator: Coordinator) -> None:
        with pytest.raises(CheckpointError, match="the ranks differ in parity and verify_after_save"):
            Checkpointer(storage, coordinator=coordinator, parity=coordinator.rank == 1)

    run_ranks(RANKS, open_root)
