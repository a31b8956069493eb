"""Every call to the storage fails once, in every way that it can, in a save by one rank and by two.

The save of iteration 30 finds 10 and 20, keeps two, and so retires 10. Whatever fails: the error says the truth
about the checkpoint, what was there before still loads, nothing is ever a mix, and the next save works.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from distckpt import Checkpointer
from distckpt.coordinator import Coordinator
from distckpt.errors import CheckpointError
from distckpt.storage import Storage
from distckpt.testing import Crash, CrashingStorage, run_ranks
from tests.crash.failing_saves import (
    NEW,
    NEXT,
    OLD,
    OPTIONS,
    Roots,
    check_next_save,
    check_root,
    committed,
)
from tests.crash.states import load_version, make_state

pytestmark = pytest.mark.usefixtures("everything_is_stale")
Moment = Literal["before", "half", "after"]


@dataclass(frozen=True)
class Fault:
    """What goes wrong; `code` 0 is the death of the process."""

    code: int
    moment: Moment

    def error(self) -> Exception:
        return OSError(self.code, os.strerror(self.code), "injected") if self.code else Crash()


FAULTS = {
    "EIO": Fault(errno.EIO, "before"),
    "ENOSPC": Fault(errno.ENOSPC, "before"),
    "EDQUOT": Fault(errno.EDQUOT, "before"),
    "ENOSPC in the middle of a write": Fault(errno.ENOSPC, "half"),
    "EDQUOT in the middle of a write": Fault(errno.EDQUOT, "half"),
    "EIO after the effect": Fault(errno.EIO, "after"),
    "crash": Fault(0, "before"),
    "crash in the middle of a write": Fault(0, "half"),
    "crash after the effect": Fault(0, "after"),
}


PROTECTED: Mapping[str, Any] = {**OPTIONS, "parity": 2, "verify_after_save": True}


READS = ("list", "open", "read_into", "age_s", "free_space")
Save = Callable[[Checkpointer, dict[str, object]], object]


def save_now(checkpointer: Checkpointer, state: dict[str, object]) -> None:
    checkpointer.save(state, iteration=NEW)


def save_async_and_wait(checkpointer: Checkpointer, state: dict[str, object]) -> None:
    checkpointer.async_save(state, iteration=NEW).wait()


def save_async_and_ask(checkpointer: Checkpointer, state: dict[str, object]) -> None:
    checkpointer.async_save(state, iteration=NEW)
    checkpointer.latest_iteration()


def count_calls(roots: Roots, failing_rank: int, save: Save) -> tuple[int, Sequence[str]]:
    """What a save that goes well calls on one rank, and how many calls the load before it makes."""
    inner = roots.copy()
    counting = CrashingStorage(inner)
    loading: list[int] = []

    def run(coordinator: Coordinator) -> None:
        storage = counting if coordinator.rank == failing_rank else inner
        with Checkpointer(storage, coordinator=coordinator, **roots.options) as checkpointer:
            checkpointer.load(make_state(0, coordinator))
            if storage is counting:
                loading.append(len(counting.calls))
            save(checkpointer, make_state(NEW, coordinator))

    run_ranks(roots.world_size, run)
    return loading[0], counting.calls[loading[0] :]


def save_with_fault(inner: Storage, crashing: CrashingStorage, failing_rank: int, roots: Roots, save: Save) -> None:
    """A resumed job: a save on all ranks, one of which meets the fault; then, unless that was a crash, another.

    Checks the root after each.
    """
    errors: dict[int, Exception | None] = {}
    world_size = roots.world_size
    is_crash = isinstance(crashing._error, Crash)

    def run(coordinator: Coordinator) -> None:
        rank = coordinator.rank
        storage = crashing if rank == failing_rank else inner
        checkpointer = Checkpointer(storage, coordinator=coordinator, **roots.options)
        errors[rank] = None
        checkpointer.load(make_state(0, coordinator))
        try:
            save(checkpointer, make_state(NEW, coordinator))
        except (CheckpointError, OSError, Crash) as error:
            errors[rank] = error
        assert checkpointer._after_commit.wait(20)  # The fault may be in what follows the commit.
        if is_crash:
            return
        if rank == 0:  # The others change nothing before rank 0 begins its next save.
            check_root(inner, world_size, errors[rank])
        checkpointer.save(make_state(NEXT, coordinator), iteration=NEXT)
        checkpointer.close()

    run_ranks(world_size, run)
    if not is_crash:
        assert len({type(error) for error in errors.values()}) == 1
        assert len({committed(error) for error in errors.values()}) == 1
    for error in errors.values():
        if is_crash:
            check_root(inner, world_size, error)


def try_every_call(roots: Roots, failing_rank: int, fault: Fault, save: Save) -> None:
    before, calls = count_calls(roots, failing_rank, save_async_and_wait if save is save_async_and_ask else save)
    assert len(calls) >= (40 if failing_rank == 0 else 4)
    for number, call in enumerate(calls, 1):
        if fault.moment == "half" and not call.startswith("write "):
            continue  # It has no half.
        if fault.code == 0 and call.startswith(READS) and calls[number - 2].startswith(READS):
            continue  # A crash leaves what one at the read before it has left.
        inner = roots.copy()
        crashing = CrashingStorage(inner, fail_at=before + number, error=fault.error(), moment=fault.moment)
        save_with_fault(inner, crashing, failing_rank, roots, save)
        assert crashing.failed
        check_next_save(inner, roots.world_size)


RANKS = pytest.mark.parametrize(("world_size", "failing_rank"), [(1, 0), (2, 0), (2, 1)])
# A full disk and a quota are other numbers to one and the same code: on two ranks one error stands for them.
EVERY = [(1, 0, name) for name in FAULTS] + [
    (2, rank, name) for rank in (0, 1) for name in FAULTS if name not in ("ENOSPC", "EDQUOT")
]


@pytest.mark.parametrize(("world_size", "failing_rank", "name"), EVERY)
def test_any_call_of_a_save_may_fail(tmp_path: Path, world_size: int, failing_rank: int, name: str) -> None:
    try_every_call(Roots("memory", world_size, tmp_path), failing_rank, FAULTS[name], save_now)


@pytest.mark.parametrize("name", ["EIO after the effect", "ENOSPC in the middle of a write", "crash"])
@pytest.mark.parametrize(("world_size", "failing_rank"), [(1, 0), (2, 1)])
def test_any_call_of_a_save_to_files_may_fail(tmp_path: Path, world_size: int, failing_rank: int, name: str) -> None:
    try_every_call(Roots("posix", world_size, tmp_path), failing_rank, FAULTS[name], save_now)


@pytest.mark.parametrize("name", ["EIO", "ENOSPC in the middle of a write", "crash after the effect"])
@pytest.mark.parametrize(("world_size", "failing_rank"), [(1, 0), (2, 1)])
def test_any_call_of_a_protected_save_may_fail(tmp_path: Path, world_size: int, failing_rank: int, name: str) -> None:
    """One that is read back and has parity: what fails after the commit leaves the checkpoint, and says so."""
    try_every_call(Roots("memory", world_size, tmp_path, PROTECTED), failing_rank, FAULTS[name], save_now)


@pytest.mark.parametrize("save", [save_async_and_wait, save_async_and_ask])
@pytest.mark.parametrize("name", ["EIO", "ENOSPC in the middle of a write", "crash after the effect"])
@pytest.mark.parametrize(("world_size", "failing_rank"), [(1, 0), (2, 1)])
def test_any_call_of_an_async_save_may_fail(
    tmp_path: Path, world_size: int, failing_rank: int, name: str, save: Save
) -> None:
    """The failure is raised by wait(), or else by the next call."""
    try_every_call(Roots("memory", world_size, tmp_path), failing_rank, FAULTS[name], save)


def full() -> OSError:
    """What no second try helps against."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "injected")


def first_finish(roots: Roots) -> int:
    """The number of the first call that makes a shard file durable, by a job that loads nothing before."""
    _, calls = count_calls(roots, 0, save_async_and_wait)
    return next(number for number, call in enumerate(calls, 1) if call.startswith("finish "))


@pytest.mark.parametrize("save", [save_async_and_wait, save_async_and_ask])
def test_failure_of_an_async_save_is_raised_once(tmp_path: Path, save: Save) -> None:
    roots = Roots("memory", 1, tmp_path)
    failing = first_finish(roots)
    with Checkpointer(CrashingStorage(roots.copy(), fail_at=failing, error=full())) as checkpointer:
        with pytest.raises(OSError, match="injected"):
            save(checkpointer, make_state(NEW))
        assert checkpointer.latest_iteration() == OLD
        checkpointer.save(make_state(NEXT), iteration=NEXT)


def test_failure_of_an_async_save_is_raised_by_close(tmp_path: Path) -> None:
    roots = Roots("memory", 1, tmp_path)
    failing = first_finish(roots)
    checkpointer = Checkpointer(CrashingStorage(roots.copy(), fail_at=failing, error=full()))
    checkpointer.async_save(make_state(NEW), iteration=NEW)
    with pytest.raises(OSError, match="injected"):
        checkpointer.close()


@RANKS
def test_any_call_of_a_load_may_fail(tmp_path: Path, world_size: int, failing_rank: int) -> None:
    """Either all ranks raise, or all load one version whole; which one, the report says."""
    inner = Roots("memory", world_size, tmp_path).copy()

    def load(storage: CrashingStorage) -> list[tuple[int, int] | str]:
        def run(coordinator: Coordinator) -> tuple[int, int] | str:
            try:
                own = storage if coordinator.rank == failing_rank else inner
                return load_version(own, None, coordinator)
            except (CheckpointError, OSError) as error:
                return type(error).__name__

        return run_ranks(world_size, run)

    counting = CrashingStorage(inner)
    assert load(counting) == [(OLD, OLD)] * world_size
    results = []
    for number in range(1, len(counting.calls) + 1):
        result, *others = load(CrashingStorage(inner, fail_at=number))
        assert all(other == result for other in others)
        assert result in [(OLD, OLD), (10, 10), "OSError", "DistributedError"]
        results.append(result)
    assert (10, 10) in results
