"""Ranks of real jobs are killed at random moments; what was reported as committed is there after, and whole.

A campaign is a row of jobs on one root. Each resumes from what the one before has left and saves, in the call and in
the background, until one of its ranks, its rank 0 or all of them are killed.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from distckpt.storage import PosixStorage
from tests.crash.killed_ranks import BOUND_S, KEEP_LAST
from tests.crash.states import loaded, save_as_next_job, unexplained
from tests.distributed.launch import Job, Result, start

SCRIPT = Path(__file__).with_name("killed_ranks.py")
KILLED = ("all ranks", "rank 0", "another rank")
Save = tuple[int, int]  # iteration and version


def lines(results: Sequence[Result], word: str) -> list[tuple[str, ...]]:
    """What follows the word in the lines that begin with it, over all ranks, each once and in order."""
    found = [line.split() for result in results for line in result.stdout.splitlines()]
    return list(dict.fromkeys(tuple(rest) for first, *rest in found if first == word))


def saves(results: Sequence[Result], word: str) -> list[Save]:
    return sorted((int(iteration), int(version)) for iteration, version in lines(results, word))


class Campaign:
    """Kills its jobs, and checks the root after each."""

    def __init__(self, directory: Path, world_size: int, seed: int) -> None:
        self._directory = directory
        self._world_size = world_size
        self._random = random.Random(seed)
        self._storage = PosixStorage(directory / "root", io_backend="threads")
        self._committed: list[Save] = []  # in order, whether they are kept or not
        self._left: set[str] = set()  # files of saves that died, after the job before

    def run(self, jobs: int) -> None:
        upcoming: Job | None = self._start(1)
        try:
            for number in range(1, jobs + 1):
                with upcoming as job:
                    upcoming = None
                    self._go(number).touch()
                    victims = self._kill(job, KILLED[number % len(KILLED)])
                    # Already now: the interpreters start while the survivors wait for their timeout.
                    upcoming = self._start(number + 1) if number < jobs else None
                    killed = [-signal.SIGKILL if rank in victims else 0 for rank in range(self._world_size)]
                    results = job.wait(expect_exit=killed, timeout_s=BOUND_S)
                self._check(results, victims)
        finally:
            if upcoming is not None:
                with upcoming:
                    pass
        self._check_that_a_job_tidies_up()

    def _go(self, number: int) -> Path:
        return self._directory / f"go-{number}"

    def _start(self, number: int) -> Job:
        return start(SCRIPT, self._world_size, args=[self._storage.location, str(self._go(number)), str(number)])

    def _kill(self, job: Job, killed: str) -> set[int]:
        """After a random number of saves, and a random time; the ranks killed."""
        everybody = range(self._world_size)
        one = self._random.randrange(1, self._world_size)
        victims = {"all ranks": set(everybody), "rank 0": {0}, "another rank": {one}}[killed]
        for rank in everybody:
            job.wait_for(rank, "open", timeout_s=BOUND_S)
        count = self._random.randrange(9)
        if count:
            newest = self._committed[-1][0] if self._committed else 0
            job.wait_for(0, f"saved {newest + count} ", timeout_s=BOUND_S)
        time.sleep(self._random.uniform(0, 0.1))
        for rank in victims:
            job.signal(rank, signal.SIGKILL)
        return victims

    def _check(self, results: list[Result], victims: set[int]) -> None:
        survivors = [result for result in results if result.rank not in victims]
        begun, reported = saves(results, "begins"), saves(results, "saved")
        assert saves(results, "loaded") == self._committed[-1:] or not begun, "the ranks did not load the newest"

        found = loaded(self._storage, self._world_size)
        found.pop(None, None)
        under_way = [save for save in begun if save not in reported]
        made_it = [save for save in under_way if save in found.items()]
        assert reported + under_way == begun
        assert made_it == under_way[: len(made_it)]
        self._committed += reported + made_it
        kept = dict(self._committed[-KEEP_LAST:])
        assert kept.items() <= found.items() <= dict(self._committed).items()

        for survivor in survivors:
            [(committed, *ranks)] = lines([survivor], "raised")
            assert {int(rank) for rank in ranks} == victims
            if committed == "no":
                assert not set(saves([survivor], "begins")[-1:]) & found.items()

        left = {name for name in unexplained(self._storage) if "/" in name and ".tmp-" not in name}
        if reported:
            assert not left & self._left, "the first save sweeps what the job before has left"
        self._left = left

    def _check_that_a_job_tidies_up(self) -> None:
        for path in Path(self._storage.location).rglob(".tmp-*"):
            os.utime(path, (0, 0))  # A young one might be somebody's.
        save = (self._committed[-1][0] + 1 if self._committed else 1, 1)
        save_as_next_job(self._storage, self._world_size, [save], keep_last=KEEP_LAST)
        expected = dict([*self._committed, save][-KEEP_LAST:])
        assert loaded(self._storage, self._world_size) == {**expected, None: save[0]}
        assert unexplained(self._storage) == set()


@pytest.mark.parametrize(("world_size", "jobs"), [(2, 6), (3, 3), (4, 2)])
def test_killed_ranks_lose_no_checkpoint_that_was_reported(tmp_path: Path, world_size: int, jobs: int) -> None:
    Campaign(tmp_path, world_size, seed=world_size).run(jobs)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 130))
def test_hundreds_of_kills_lose_no_checkpoint_that_was_reported(tmp_path: Path, seed: int) -> None:
    Campaign(tmp_path, 2 + seed % 3, seed).run(10)
