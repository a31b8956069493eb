"""Each rank sees other damage, as on hosts with a file system each: all load the newest that is good for all of them.

What the kinds of damage do that a single rank meets is tested elsewhere; here it differs by rank and checkpoint.
"""

from __future__ import annotations

import random

import pytest

from distckpt import Checkpointer, CorruptionError
from distckpt.commit import Commit, list_commits, read_index
from distckpt.coordinator import Coordinator
from distckpt.storage.contract import read_all
from distckpt.testing import MemoryStorage, run_ranks
from tests.crash.states import load_whole, make_state

WORLD_SIZE = 3
SAVES = ((10, 1), (20, 2), (10, 3), (30, 4), (20, 5))  # iterations and versions
ROUNDS = 60


@pytest.fixture(scope="module")
def saved() -> MemoryStorage:
    """Each save is by a job that has loaded nothing, and so removes nothing."""
    storage = MemoryStorage()
    for iteration, version in SAVES:

        def save(coordinator: Coordinator, iteration: int = iteration, version: int = version) -> None:
            with Checkpointer(storage, coordinator=coordinator) as checkpointer:
                checkpointer.save(make_state(version, coordinator), iteration=iteration)

        run_ranks(WORLD_SIZE, save)
    return storage


def damage(storage: MemoryStorage, commit: Commit, rank: int, rng: random.Random) -> None:
    """Something that this rank needs of the checkpoint, in one of the ways there are. Without its index it is none."""
    index = read_index(storage, commit)[0]
    headers = {f"{commit.directory}/{file.name}": file.header_bytes for file in index.files}
    parts = [[*headers], [f"{commit.directory}/{index.chunk_table.name}"]]  # Each rank reads a shard file of its own.
    names = rng.choice([*parts, [commit.name]] if rank == 0 else parts)
    kind = rng.choice(("flipped", "short") if commit.name in names else ("flipped", "short", "missing"))
    for name in names:
        content = bytearray(read_all(storage, name))
        if kind == "missing":
            storage.remove(name)
        elif kind == "flipped":
            # Of shard files behind the header, which is the most of files so small.
            content[rng.randrange(headers.get(name, 0), len(content))] ^= 1
            storage.replace(name, bytes(content))
        else:
            storage.replace(name, bytes(content[:-1]))


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_ranks_that_see_different_damage_load_the_same(saved: MemoryStorage, seed: int) -> None:
    rng = random.Random(seed)
    commits = list_commits(saved)
    copies = [saved.power_cut() for _ in range(WORLD_SIZE)]
    damaged: set[Commit] = set()
    for rank, copy in enumerate(copies):
        for commit in commits:
            if rng.random() < 0.3:
                damage(copy, commit, rank, rng)
                damaged.add(commit)

    def load(coordinator: Coordinator) -> tuple[int, str, int, list[int]] | None:
        with Checkpointer(copies[coordinator.rank], coordinator=coordinator, timeout_s=20) as checkpointer:
            try:
                report, version = load_whole(checkpointer, None, coordinator)
            except CorruptionError:
                return None
        return report.iteration, report.save_id, version, sorted(report.fell_back_from)

    expected = None
    good = [commit for commit in commits if commit not in damaged]
    if good:
        newest = good[0]
        passed_over = {commit.iteration for commit in commits if commit > newest}
        version = dict(zip(sorted(commits), SAVES, strict=True))[newest][1]
        expected = newest.iteration, read_index(saved, newest)[0].save_id, version, sorted(passed_over)
    assert run_ranks(WORLD_SIZE, load) == [expected] * WORLD_SIZE
