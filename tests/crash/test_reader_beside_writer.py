"""A reader loads while a job replaces what it reads: each load gives one version, whole, and none that is outdated."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from distckpt import Checkpointer
from distckpt.storage import PosixStorage
from distckpt.storage.memory import MemoryReadFile
from distckpt.storage.posix import PosixReadFile
from distckpt.testing import MemoryStorage
from tests.crash.states import load_whole, make_state
from tests.distributed.launch import Job, start

ITERATIONS = (10, 10, 20, 10, 20, 20)  # of versions 1, 2, ..., and so on from the beginning
LOADS = 50
BOUND_S = 60.0
WRITER = f"""
import sys
from pathlib import Path
from distckpt import Checkpointer
from tests.crash.states import load_whole, make_state
from tests.distributed.launch import say

root, stop = sys.argv[1], Path(sys.argv[2])
version = 0
while not stop.exists():
    with Checkpointer(root, keep_last=1, removal_grace_s=0.05) as checkpointer:
        if version:
            load_whole(checkpointer)
        for iteration in {ITERATIONS}:
            version += 1
            checkpointer.save(make_state(version), iteration=iteration)
            say("saved", version)
"""


class Slow(PosixStorage):
    """Now and then it takes its time before it lists a directory or opens a file."""

    def __init__(self, root: Path, seed: int) -> None:
        super().__init__(root, io_backend="threads")
        self._random = random.Random(seed)

    def list(self, directory: str) -> Sequence[str]:
        self._dawdle()
        return super().list(directory)

    def open(self, name: str) -> PosixReadFile:
        self._dawdle()
        return super().open(name)

    def _dawdle(self) -> None:
        if self._random.random() < 0.1:
            time.sleep(self._random.uniform(0, 0.2))


def newest_reported(job: Job) -> int:
    return int(job.stdout(0).split()[-1])


def test_each_load_beside_a_writer_gives_one_version_that_is_not_outdated(tmp_path: Path) -> None:
    stop = tmp_path / "stop"
    again = 0
    with start(WRITER, 1, args=[str(tmp_path / "root"), str(stop)]) as job:
        job.wait_for(0, "saved 1\n", timeout_s=BOUND_S)
        with Checkpointer(Slow(tmp_path / "root", seed=0)) as checkpointer:
            for _ in range(LOADS):
                earlier = newest_reported(job)
                report, version = load_whole(checkpointer)
                assert version >= earlier
                assert report.iteration == ITERATIONS[(version - 1) % len(ITERATIONS)]
                again += bool(report.fell_back_from)
        stop.touch()
        job.wait(timeout_s=BOUND_S)
        assert newest_reported(job) > 10
    assert again, "no file vanished: the reader is too fast, or the writer removes nothing"


class Watched(MemoryStorage):
    """Before it lists, or opens, what has a part in its name, a writer does something. One turn after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: list[tuple[str, Callable[[], object]]] = []

    def list(self, directory: str) -> Sequence[str]:
        self._look(directory)
        return super().list(directory)

    def open(self, name: str) -> MemoryReadFile:
        self._look(name)
        return super().open(name)

    def _look(self, name: str) -> None:
        if self.turns and self.turns[0][0] in name:
            (_, act), *rest = self.turns
            self.turns = []  # The writer's own calls are not waited for.
            act()
            self.turns = rest


def ask_latest(reader: Checkpointer) -> int | None:
    return reader.latest_iteration()


def load(reader: Checkpointer) -> int:
    return load_whole(reader)[0].iteration


def read(reader: Checkpointer) -> int:
    optimizer = reader.read()["optimizer"]
    assert isinstance(optimizer, dict)
    return optimizer["step"]


@pytest.mark.parametrize("call", [ask_latest, load, read])
@pytest.mark.parametrize(
    ("saved", "turns"),
    [
        pytest.param([10], [("iter_0000010", 20)], id="listed"),
        pytest.param([10], [("iter_0000010/index-", 20)], id="opened"),
        pytest.param([10, 20], [("iter_0000020", 10)], id="behind"),
        pytest.param([10, 20], [("iter_0000020", 10), ("iter_0000010", 20), ("iter_0000020", 10)], id="behind twice"),
    ],
)
def test_only_checkpoint_that_is_replaced_before_its_index_is_read_is_no_absence(
    saved: list[int], turns: list[tuple[str, int]], call: Callable[[Checkpointer], int | None]
) -> None:
    """turns: before this is listed or opened, that iteration is saved, and so the one before removed. "behind": the
    new one lies in a directory that has been listed."""
    storage = Watched()
    with Checkpointer(storage, keep_last=1) as writer, Checkpointer(storage) as reader:

        def save(iteration: int) -> None:
            writer.save(make_state(iteration), iteration=iteration)
            assert writer.iterations() == [iteration]  # It has been cleaned up.

        for iteration in saved:
            save(iteration)
        storage.turns = [(part, partial(save, iteration)) for part, iteration in turns]
        assert call(reader) == turns[-1][1]
        assert storage.turns == []


@pytest.mark.parametrize("part", ["iter_0000020", "iter_0000020/index-"], ids=["listed", "opened"])
def test_checkpoint_that_vanishes_gives_way_to_its_successor_and_not_to_an_older_one(part: str) -> None:
    """The older one is of a job that the writer has not resumed, and so it stays."""
    storage = Watched()
    with Checkpointer(storage) as first:
        first.save(make_state(1), iteration=10)
    with Checkpointer(storage, keep_last=1) as writer, Checkpointer(storage) as reader:
        writer.save(make_state(2), iteration=20)
        assert writer.iterations() == [10, 20]  # It has been cleaned up: no thread of the writer's is to take the turn.

        def replace() -> None:
            writer.save(make_state(3), iteration=30)
            assert writer.iterations() == [10, 30]  # It has been cleaned up.

        storage.turns = [(part, replace)]
        report, version = load_whole(reader)
    assert (report.iteration, version) == (30, 3)
    assert storage.turns == []
