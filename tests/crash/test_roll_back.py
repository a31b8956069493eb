"""A run that had come to iteration 1500 goes back to 1000 and on from there: what is newest is of the new branch."""

from __future__ import annotations

from pathlib import Path

import pytest

from distckpt.commit import Commit, list_commits, newest_iteration, read_index, read_tracker
from distckpt.storage import PosixStorage
from distckpt.testing import run_ranks
from tests.crash.states import load_version, loaded, save_as_next_job, unexplained

WORLD_SIZE = 2
OLD_BRANCH = [(1000, 1), (1100, 2), (1500, 3)]  # iterations and versions, in the order of their saves


@pytest.fixture
def storage(tmp_path: Path) -> PosixStorage:
    """The old branch, and of the new one 1100, which replaces that of the old."""
    storage = PosixStorage(tmp_path / "root", io_backend="threads")
    save_as_next_job(storage, WORLD_SIZE, OLD_BRANCH)
    save_as_next_job(storage, WORLD_SIZE, [(1100, 4)], resume_from=1000)
    return storage


def go_on(storage: PosixStorage, *saves: tuple[int, int], keep_last: int | None = None) -> None:
    save_as_next_job(storage, WORLD_SIZE, saves, keep_last=keep_last)


def damage(storage: PosixStorage, commit: Commit) -> None:
    """A bit of each of its shard files."""
    for file in read_index(storage, commit)[0].files:
        path = Path(storage.location, commit.directory, file.name)
        content = bytearray(path.read_bytes())
        content[100] ^= 1
        path.write_bytes(content)


def iterations(storage: PosixStorage) -> list[int]:
    """Of the commits, newest first."""
    return [commit.iteration for commit in list_commits(storage)]


def test_newest_is_of_the_new_branch(storage: PosixStorage) -> None:
    assert loaded(storage, WORLD_SIZE) == {1000: 1, 1100: 4, 1500: 3, None: 1100}
    assert newest_iteration(storage) == read_tracker(storage) == 1100
    assert iterations(storage) == [1100, 1500, 1000]


def test_next_job_goes_on_with_the_new_branch(storage: PosixStorage) -> None:
    go_on(storage, (1200, 5))
    parents = {}
    for commit in list_commits(storage):
        index = read_index(storage, commit)[0]
        parents[commit.iteration] = index.parent, index.save_id
    assert parents[1200][0] == parents[1100][1]
    assert parents[1100][0] == parents[1000][1]
    assert loaded(storage, WORLD_SIZE) == {1000: 1, 1100: 4, 1200: 5, 1500: 3, None: 1200}
    assert read_tracker(storage) == 1200


def test_damage_falls_back_along_the_new_branch(storage: PosixStorage) -> None:
    go_on(storage, (1200, 5))
    # The one that the new branch began with comes before any of the one that was abandoned.
    for damaged, left in ((1200, (1100, 4)), (1100, (1000, 1)), (1000, (1500, 3))):
        damage(storage, next(commit for commit in list_commits(storage) if commit.iteration == damaged))
        assert run_ranks(WORLD_SIZE, lambda coordinator: load_version(storage, None, coordinator)) == [left] * 2


def test_retention_keeps_what_was_saved_last_and_that_is_the_new_branch(storage: PosixStorage) -> None:
    go_on(storage, (1200, 5), (1300, 6), keep_last=3)
    assert loaded(storage, WORLD_SIZE) == {1100: 4, 1200: 5, 1300: 6, None: 1300}
    assert read_tracker(storage) == 1300
    assert unexplained(storage) == set()


def test_retention_keeps_where_the_new_branch_began_rather_than_the_abandoned_one(storage: PosixStorage) -> None:
    go_on(storage, (1200, 5), keep_last=3)
    assert loaded(storage, WORLD_SIZE) == {1000: 1, 1100: 4, 1200: 5, None: 1200}


def test_new_branch_that_comes_to_1500_replaces_it(storage: PosixStorage) -> None:
    go_on(storage, (1500, 7))
    assert loaded(storage, WORLD_SIZE) == {1000: 1, 1100: 4, 1500: 7, None: 1500}
    assert iterations(storage) == [1500, 1100, 1000]
    assert unexplained(storage) == set()
    go_on(storage, (1600, 8), keep_last=1)
    assert loaded(storage, WORLD_SIZE) == {1600: 8, None: 1600}
