"""What must hold after a save that failed: the error says the truth, what was there before loads, the next save works.

OLD is committed before, in copies of Roots OLDER too; NEW is the iteration whose save fails, or does not; NEXT is saved
afterwards. The version of each is its iteration.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from distckpt import Checkpointer
from distckpt.coordinator import Coordinator
from distckpt.errors import CheckpointError
from distckpt.removing import sweep
from distckpt.storage import PosixStorage, Storage
from distckpt.storage.requests import Requests
from distckpt.testing import Crash, MemoryStorage, run_ranks
from tests.crash.states import COLUMNS, loaded, make_state, unexplained

OLDER, OLD, NEW, NEXT = 10, 20, 30, 40
OPTIONS: Mapping[str, Any] = {"keep_last": 2, "removal_grace_s": 0}


class Roots:
    """Copies of one root with OLDER and OLD, on either backend; and how a job saves there."""

    def __init__(self, backend: str, world_size: int, tmp_path: Path, options: Mapping[str, Any] = OPTIONS) -> None:
        self.options = options
        self._tmp_path = tmp_path
        self._count = 0
        self._first: Storage = MemoryStorage() if backend == "memory" else self._posix(tmp_path / "first")
        self.world_size = world_size
        save_versions(self._first, world_size, (OLDER, OLD), options=options)

    @staticmethod
    def _posix(path: Path) -> PosixStorage:
        return PosixStorage(path, io_backend="threads", writes=Requests(2 << 20, 1))

    def copy(self) -> Storage:
        if isinstance(self._first, MemoryStorage):
            return self._first.power_cut()
        self._count += 1
        path = self._tmp_path / f"copy {self._count}"
        shutil.copytree(self._first.location, path)
        return self._posix(path)


def save_versions(
    storage: Storage,
    world_size: int,
    iterations: Iterable[int],
    columns: int = COLUMNS,
    options: Mapping[str, Any] = OPTIONS,
) -> None:
    """By one job."""

    def save(coordinator: Coordinator) -> None:
        with Checkpointer(storage, coordinator=coordinator, **options) as checkpointer:
            for iteration in iterations:
                checkpointer.save(make_state(iteration, coordinator, columns), iteration=iteration)

    run_ranks(world_size, save)


def check_only_old(storage: Storage, columns: int = COLUMNS) -> None:
    """OLD is all that two ranks can load."""
    assert loaded(storage, 2, columns) == {OLD: OLD, None: OLD}


def committed(error: Exception | None) -> str:
    """What an outcome says of the checkpoint. A group of one rank raises the storage's errors as they are."""
    return "yes" if error is None else getattr(error, "committed", "no")


def check_root(storage: Storage, world_size: int, error: Exception | None, columns: int = COLUMNS) -> None:
    """After the save of NEW: it is there whole, or not at all, as the error says; the one before is there."""
    # What is reported as there must be durable, and a crash may come with a power cut.
    seeds = (None, 1) if isinstance(error, Crash) else (None,) if committed(error) == "yes" else ()
    cuts = [storage.power_cut(seed) for seed in seeds] if isinstance(storage, MemoryStorage) else []
    for left in (storage, *cuts):
        versions = loaded(left, world_size, columns)
        newest = versions.pop(None)
        assert versions[OLD] == OLD
        assert all(iteration == version for iteration, version in versions.items())
        assert newest == (NEW if NEW in versions else OLD)
        if not isinstance(error, Crash):
            assert committed(error) != "yes" or newest == NEW, f"reported as committed, but it is not: {error!r}"
            assert committed(error) != "no" or newest == OLD, f"reported as not committed, but it is: {error!r}"


def check_next_save(storage: Storage, world_size: int, columns: int = COLUMNS) -> None:
    """By a new process, if no other has followed; and that it leaves nothing lying about."""

    def save(coordinator: Coordinator) -> None:
        with Checkpointer(storage, coordinator=coordinator, **OPTIONS) as checkpointer:
            if checkpointer.latest_iteration() != NEXT:
                checkpointer.save(make_state(NEXT, coordinator, columns), iteration=NEXT)

    run_ranks(world_size, save)
    versions = loaded(storage, world_size, columns)
    assert versions.pop(None) == NEXT
    assert all(iteration == version for iteration, version in versions.items())
    sweep(storage, grace_s=0)
    assert unexplained(storage) == set()


def save_and_recover(
    storage: Storage,
    *,
    harm: Callable[[], object] = lambda: None,
    heal: Callable[[], object] = lambda: None,
    columns: int = COLUMNS,
) -> CheckpointError | None:
    """The outcome of a save by two ranks between harm() and heal(); the same job then saves again."""

    def run(coordinator: Coordinator) -> CheckpointError | None:
        error = None
        with Checkpointer(storage, coordinator=coordinator, timeout_s=20.0) as checkpointer:
            checkpointer.save(make_state(OLD, coordinator, columns), iteration=OLD)
            checkpointer._after_commit.wait(20)
            if coordinator.rank == 0:
                harm()
            checkpointer.iterations()  # The other rank waits for rank 0.
            try:
                checkpointer.save(make_state(NEW, coordinator, columns), iteration=NEW)
            except CheckpointError as raised:
                error = raised
            checkpointer._after_commit.wait(20)
            if coordinator.rank == 0:
                heal()
                check_root(storage, 2, error, columns)
            checkpointer.iterations()
            checkpointer.save(make_state(NEXT, coordinator, columns), iteration=NEXT)
        return error

    error, other = run_ranks(2, run)
    assert (type(error), str(error)) == (type(other), str(other))
    check_next_save(storage, 2, columns)
    return error
