"""A power cut after any system call of a sequence of saves loses no checkpoint and mixes none.

The sequence has a roll-back, so that an iteration is replaced, and retention that removes at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import pytest

from distckpt import Checkpointer
from distckpt.coordinator import Coordinator
from distckpt.removing import STALE_AFTER_S, sweep
from distckpt.storage import PosixStorage, Storage
from distckpt.testing import MemoryStorage, run_ranks
from tests.crash.power_cut import CrashTree, Op, crash_states, marks_before, record
from tests.crash.states import loaded, make_state, unexplained

SAVES = ((10, 1), (20, 2), (10, 3), (30, 4))  # iteration and version, in order
RUN_SAVES = f"""
import sys
from distckpt import Checkpointer
from distckpt.storage import PosixStorage
from distckpt.testing import run_ranks
from tests.crash.power_cut import mark
from tests.crash.states import make_state

def run(coordinator):
    storage = PosixStorage(sys.argv[1] + "/root", io_backend="threads")
    with Checkpointer(storage, coordinator=coordinator, keep_last=2, removal_grace_s=0) as checkpointer:
        for iteration, version in {SAVES}:
            checkpointer.save(make_state(version, coordinator), iteration=iteration)
            if coordinator.rank == 0:
                mark(f"saved {{iteration}}")
    if coordinator.rank == 0:
        mark("closed")

run_ranks(int(sys.argv[2]), run)
"""


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Sequence[Op]]:
    """World size, and the system calls of the saves."""
    tmp_path = tmp_path_factory.mktemp("recorded")
    root = tmp_path / "tree"
    root.mkdir()
    return request.param, record(RUN_SAVES, root, tmp_path, [str(request.param)])


def states(ops: Sequence[Op]) -> Iterator[tuple[int, CrashTree]]:
    """(number of saves that had returned, tree) of every power cut, each pair once."""
    seen: set[tuple[int, frozenset[tuple[str, bytes | None]]]] = set()
    for position, tree in crash_states(ops, seed=0, random_states=20):
        assert isinstance(tree, CrashTree)
        saved = len(marks_before(ops, position))  # One more than there are saves: all is cleaned up.
        state = saved, frozenset(tree.entries.items())
        if state not in seen:
            seen.add(state)
            yield saved, tree


def in_memory(tree: CrashTree, clock_s: list[float]) -> MemoryStorage:
    """The tree's `root`, where reading and writing again is fast."""
    storage = MemoryStorage(clock=lambda: clock_s[0])
    for path, content in tree.entries.items():
        name = path.removeprefix("root").removeprefix("/")
        if content is None:
            storage.make_directory(name)
        else:
            assert storage.put_if_absent(name, content)
    return storage


def check_promises(storage: Storage, saved: int, world_size: int) -> dict[int | None, int]:
    """`saved` of the saves had returned; the next one was under way, or retention after the last. What loads."""
    found = loaded(storage, world_size)
    versions = dict(found)
    newest = versions.pop(None, None)
    is_closed = saved > len(SAVES)
    saved = min(saved, len(SAVES))
    promised = dict(SAVES[:saved])
    under_way = SAVES[saved] if saved < len(SAVES) else None
    if under_way is not None and versions.get(under_way[0]) == under_way[1]:
        assert newest == under_way[0]
        promised[under_way[0]] = under_way[1]
        saved += 1
    elif saved:
        assert newest == SAVES[saved - 1][0]
    if 30 in promised:
        if is_closed:
            assert 20 not in versions, "retention had removed it"
        versions.setdefault(20, promised[20])
    assert versions == promised
    return found


def check_next_save(storage: Storage, world_size: int, before: dict[int | None, int]) -> None:
    """`before`: what loaded until now."""

    def save(coordinator: Coordinator) -> None:
        with Checkpointer(storage, coordinator=coordinator, removal_grace_s=0) as checkpointer:
            checkpointer.save(make_state(9, coordinator), iteration=10)

    run_ranks(world_size, save)
    assert loaded(storage, world_size) == {**before, 10: 9, None: 10}


def test_power_cut_at_any_moment_of_saves_and_retention(recorded: tuple[int, Sequence[Op]]) -> None:
    world_size, ops = recorded
    assert marks_before(ops, len(ops)) == [*(f"saved {iteration}" for iteration, _ in SAVES), "closed"]
    counts = [0] * (len(SAVES) + 2)
    # What lies there is as if one rank had written it, but for its number of files: a part of the moments will do.
    for saved, tree in islice(states(ops), 0, None, 1 if world_size == 1 else 4):
        clock_s = [0.0]
        storage = in_memory(tree, clock_s)
        found = check_promises(storage, saved, world_size)
        counts[saved] += 1
        check_next_save(storage, world_size, found)
        clock_s[0] += STALE_AFTER_S
        sweep(storage, grace_s=0)
        assert unexplained(storage) == set()
    assert min(counts[: len(SAVES)]) > (15 if world_size == 1 else 5)


def test_power_cut_at_any_moment_on_real_files(recorded: tuple[int, Sequence[Op]], tmp_path: Path) -> None:
    """Few states, since each is made of real files; the checks are those of the many above."""
    world_size, ops = recorded
    for number, (saved, tree) in enumerate(states(ops)):
        if number % 40 == 0:
            tree(tmp_path / str(number))
            storage = PosixStorage(tmp_path / str(number) / "root", io_backend="threads")
            found = check_promises(storage, saved, world_size)
            check_next_save(storage, world_size, found)
