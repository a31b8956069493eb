"""Two jobs write to one root at once, as when a job that was given up runs beside its successor.

The one that came later wins, and never notices; the other one is told. What it had reported before stays whole.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from distckpt.commit import list_commits, read_index
from distckpt.storage import PosixStorage
from tests.crash.states import loaded
from tests.crash.two_jobs import BOUND_S
from tests.distributed.launch import Job, start

SCRIPT = Path(__file__).with_name("two_jobs.py")
WORLD_SIZE = 2
CONTESTS = 6
CONTEST = pytest.mark.parametrize("contest", range(CONTESTS))


@dataclass(frozen=True)
class Saved:
    iteration: int
    version: int
    save_id: str


@dataclass(frozen=True)
class Outcome:
    """winner, loser: what they saved, in order. lost: how the loser's ranks ended. root: after both have ended."""

    winner: list[Saved]
    loser: list[Saved]
    lost: set[str]
    root: PosixStorage


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """Two jobs go through all contests: starting processes takes longer."""
    directory = tmp_path_factory.mktemp("two_jobs")
    jobs = (1, 2)
    args = [[str(directory), str(job), str(CONTESTS)] for job in jobs]
    rng = random.Random(0)
    with start(SCRIPT, WORLD_SIZE, args=args[0]) as one, start(SCRIPT, WORLD_SIZE, args=args[1]) as two:
        found = []
        for contest in range(CONTESTS):
            for job in rng.sample(jobs, 2):
                (directory / f"{contest}-go-{job}").touch()
                time.sleep(rng.uniform(0, 0.3) if contest else 0)
            found.append(compete(directory, contest, one, two))
        for job in (one, two):
            job.wait(timeout_s=BOUND_S)
    return found


def compete(directory: Path, contest: int, *jobs: Job) -> Outcome:
    """Until one has lost, and the other is well ahead of where that one was."""
    losing = f"{contest} lost "
    deadline = time.monotonic() + BOUND_S
    while not (losers := [job for job in jobs if losing in job.stdout(0)]):
        assert time.monotonic() < deadline, f"no job has lost:\n{jobs[0].stdout(0)}\n{jobs[1].stdout(0)}"
        time.sleep(0.01)
    assert len(losers) == 1, f"both have lost:\n{jobs[0].stdout(0)}\n{jobs[1].stdout(0)}"
    [loser] = losers
    [winner] = set(jobs) - {loser}
    ahead = len(saved(loser, contest)) + 3
    winner.wait_for(0, f"{contest} saved {ahead} ", timeout_s=BOUND_S)
    (directory / f"{contest}-stop").touch()
    for rank in range(WORLD_SIZE):
        loser.wait_for(rank, losing, timeout_s=BOUND_S)
        winner.wait_for(rank, f"{contest} stopped", timeout_s=BOUND_S)
    lost = {loser.stdout(rank).partition(losing)[2].partition("\n")[0] for rank in range(WORLD_SIZE)}
    root = PosixStorage(directory / f"{contest}-root", io_backend="threads")
    return Outcome(saved(winner, contest), saved(loser, contest), lost, root)


def saved(job: Job, contest: int) -> list[Saved]:
    """What the job has reported, by any rank."""
    found = dict.fromkeys(line for rank in range(WORLD_SIZE) for line in job.stdout(rank).splitlines())
    words = [line.split() for line in found if line.startswith(f"{contest} saved ")]
    return sorted((Saved(int(i), int(v), save_id) for _, _, i, v, save_id in words), key=lambda one: one.iteration)


@CONTEST
def test_root_loads_what_the_winner_saved(contest: int, outcomes: list[Outcome]) -> None:
    outcome = outcomes[contest]
    versions = {one.iteration: one.version for one in outcome.winner}
    assert loaded(outcome.root, WORLD_SIZE) == {**versions, None: outcome.winner[-1].iteration}


@CONTEST
def test_loser_is_told_on_all_ranks_and_fenced_from_then_on(contest: int, outcomes: list[Outcome]) -> None:
    """The save that is under way may fail before the fence is looked at: the winner sweeps its files."""
    [lost] = outcomes[contest].lost
    assert lost in ("FencedError / FencedError", "DistributedError / FencedError")


@CONTEST
def test_what_the_loser_had_reported_stays_whole(contest: int, outcomes: list[Outcome]) -> None:
    root = outcomes[contest].root
    whole = set()
    for commit in list_commits(root):
        index = read_index(root, commit)[0]
        if {index.chunk_table.name, *(file.name for file in index.files)} <= set(root.list(commit.directory)):
            whole.add(index.save_id)
    assert {one.save_id for one in outcomes[contest].loser} <= whole
