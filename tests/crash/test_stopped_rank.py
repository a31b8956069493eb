"""A rank is stopped in the middle of a save, a newer job takes its place, and then the rank wakes up.

It must not change what the newer job has made of the root, whatever it was about to do.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from distckpt.storage import PosixStorage
from tests.crash.states import loaded, save_as_next_job, unexplained
from tests.crash.stopped_ranks import BOUND_S, CASES, WORLD_SIZE, Case
from tests.distributed.launch import Job, start

SCRIPT = Path(__file__).with_name("stopped_ranks.py")
CASE = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


@dataclass(frozen=True)
class Outcome:
    """others, woken: how the save ended there. changed: what the woken rank has changed, but for its own files that
    belong to no checkpoint. loads: iteration -> version, after it. left: what a third job did not sweep."""

    others: list[str]
    woken: str
    changed: set[str]
    loads: Mapping[int | None, int]
    left: set[str]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Outcome]:
    """One job goes through all cases: starting processes takes longer."""
    directory = tmp_path_factory.mktemp("stopped")
    with start(SCRIPT, WORLD_SIZE, args=[str(directory)]) as job:
        found = {case: stop_and_wake(job, case, directory / case.name) for case in CASES}
        job.wait(timeout_s=BOUND_S)
    return found


def stop_and_wake(job: Job, case: Case, root: Path) -> Outcome:
    storage = PosixStorage(root, io_backend="threads")
    job.wait_for(case.rank, f"{case.name}: stops", timeout_s=BOUND_S)
    others = [end_of_save(job, rank, case) for rank in range(WORLD_SIZE) if rank != case.rank]
    save_as_next_job(storage, WORLD_SIZE, [(2, 12), (3, 13)])
    before, strays = contents(root), unexplained(storage)
    job.signal(case.rank, signal.SIGCONT)
    woken = end_of_save(job, case.rank, case)
    after = contents(root)
    strays |= unexplained(storage)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    loads = loaded(storage, WORLD_SIZE)
    save_as_next_job(storage, WORLD_SIZE, [(4, 14)])
    return Outcome(others, woken, changed - strays, loads, unexplained(storage))


def end_of_save(job: Job, rank: int, case: Case) -> str:
    """What the rank prints of it; it is waited for."""
    ended = f"{case.name}: stops\n{case.name}: " if rank == case.rank else f"{case.name}: "
    job.wait_for(rank, ended, timeout_s=BOUND_S)
    return job.stdout(rank).partition(ended)[2].partition("\n")[0]


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@CASE
def test_other_ranks_give_up_on_a_stopped_rank_and_name_it(case: Case, outcomes: dict[Case, Outcome]) -> None:
    # What rank 0 had done before it stopped nobody else can know.
    committed = "unknown" if case.rank == 0 else "no"
    assert set(outcomes[case].others) == {f"DistributedError {committed} {case.rank}"}


@CASE
def test_woken_rank_is_told_that_its_save_is_void(case: Case, outcomes: dict[Case, Outcome]) -> None:
    kind, *told = outcomes[case].woken.split()
    if case.name == "rank 0 before it looks at the fence":
        assert kind == "FencedError"
    elif kind != "FencedError":
        assert kind == "DistributedError"
        assert told[0] in ("no", "unknown")


@CASE
def test_woken_rank_changes_nothing_of_the_newer_jobs_checkpoints(case: Case, outcomes: dict[Case, Outcome]) -> None:
    """Not even between the fence and the index, where it puts one: its files were swept, and it takes that back."""
    assert outcomes[case].changed == set()


@CASE
def test_root_is_the_newer_jobs_after_the_rank_woke(case: Case, outcomes: dict[Case, Outcome]) -> None:
    assert outcomes[case].loads == {1: 1, 2: 12, 3: 13, None: 3}


@CASE
def test_third_job_sweeps_what_the_woken_rank_has_left(case: Case, outcomes: dict[Case, Outcome]) -> None:
    assert outcomes[case].left == set()
