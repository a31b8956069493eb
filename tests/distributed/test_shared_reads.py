"""Ranks of one host that read together, as real processes; most checks are in shared_read_ranks.py."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from distckpt import Checkpointer
from tests.distributed.checks import assert_ok, names_of_checks, outcomes_of
from tests.distributed.launch import launch, start
from tests.unit.test_shared_reading import WHOLE, empty_memory_directory

SCRIPT = Path(__file__).with_name("shared_read_ranks.py")
CHECKS = names_of_checks(SCRIPT)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """All checks run in one job: starting processes takes longer than the checks."""
    with empty_memory_directory() as memory:
        results = launch(SCRIPT, 8, args=[str(tmp_path_factory.mktemp("shared")), memory], timeout_s=200)
    return [outcomes_of(result.stdout) for result in results]


@pytest.mark.parametrize("name", CHECKS)
def test_eight_processes(name: str, outcomes: list[dict[str, str]]) -> None:
    assert_ok(name, outcomes)


# Each rank reads a third of the windows; the victim stays in its third read.
HELD_UP = """
import sys, time
from pathlib import Path
from typing import Any
import torch.distributed as dist
from distckpt import Checkpointer, DistributedError, host_group
from distckpt.storage import PosixStorage
from tests.unit.test_shared_reading import make_target, replicas

dist.init_process_group("gloo")
host_group.DIRECTORY = sys.argv[3]
rank, root, victim = dist.get_rank(), Path(sys.argv[1]), int(sys.argv[2])

class HeldUpFile:
    def __init__(self, inner):
        self._inner, self._calls = inner, 0

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def read_into(self, offset, buffer):
        self._inner.read_into(offset, buffer)

    def read_checked(self, *arguments):
        self._calls += 1
        if self._calls == 2:
            print("reading")
            time.sleep(300)
        return self._inner.read_checked(*arguments)

class HeldUpStorage:
    def __init__(self):
        self._inner = PosixStorage(root)

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def open(self, name):
        file = self._inner.open(name)
        return HeldUpFile(file) if rank == victim and "/shard-" in name else file

checkpointer = Checkpointer(HeldUpStorage(), timeout_s=6)
try:
    checkpointer.load({"w": make_target(replicas, 0, 1)})
except DistributedError as error:
    print("raised", sorted(error.failures), str(error))
time.sleep(300)  # the others may still be hearing from rank 0; the test ends all
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_rank_that_is_killed_or_stopped_while_others_wait_for_its_windows_is_named(
    victim: int, number: signal.Signals, tmp_path: Path
) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save({"w": WHOLE}, iteration=1)
    others = {0, 1, 2} - {victim}
    with empty_memory_directory() as memory, start(HELD_UP, 3, args=[str(tmp_path), str(victim), memory]) as job:
        job.wait_for(victim, "reading")
        job.signal(victim, number)
        for rank in others:
            job.wait_for(rank, "raised", timeout_s=60)
        outputs = {rank: job.stdout(rank) for rank in others}
    for text in outputs.values():
        if victim == 0:  # who alone can tell the others what each has met
            assert "raised [0] " in text
        else:
            assert "raised [1] " in text
            assert "rank 1" in text
