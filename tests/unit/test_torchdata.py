"""torchdata's StatefulDataLoader in a training state: the batches after a resume are those that were to come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from distckpt import Checkpointer, ResumableSampler, TrainState
from distckpt.testing import MemoryStorage

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it
WORKERS = pytest.mark.parametrize("num_workers", [0, 2])


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset[int]):
    """Keeps its own position, in each worker."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[int]:
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        while self.at < 12:
            self.at += 1
            yield 100 * first + self.at * step
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Job:
    def __init__(self, make: Any, seed: int) -> None:
        torch.manual_seed(seed)
        self.loader = make()
        self.train = TrainState(nn.Linear(1, 1), dataloader=self.loader)
        self.batches = self.train.batches()

    def take(self, count: int) -> list[list[int]]:
        taken = []
        for batch in islice(self.batches, count):
            taken.append(batch.tolist())
            self.train.end_step()
        return taken

    def close(self) -> None:
        """End the workers now. Left to the collector of cycles they may not hear of it, and each is waited for, 5 s."""
        self.batches.close()  # type: ignore[attr-defined]
        self.loader._iterator = None


def resumes_exactly(make: Any, *, after: int, count: int = 12) -> None:
    """Across the end of an epoch."""
    job = Job(make, seed=1)
    before = job.take(after)
    with Checkpointer(MemoryStorage()) as checkpointer:
        job.train.save(checkpointer)
        expected = job.take(count)
        assert before != expected[:after]
        resumed = Job(make, seed=2)
        report = resumed.train.load(checkpointer)
    with closing(job), closing(resumed):
        assert resumed.take(count) == expected
    assert str(report.data) == "exact"


@WORKERS
@pytest.mark.parametrize("after", [3, 6], ids=["in an epoch", "at its last batch"])
def test_shuffled_batches_go_on(num_workers: int, after: int) -> None:
    resumes_exactly(
        lambda: StatefulDataLoader(Numbers(), batch_size=4, shuffle=True, num_workers=num_workers), after=after
    )


@WORKERS
def test_stream_that_keeps_its_position_goes_on(num_workers: int) -> None:
    resumes_exactly(lambda: StatefulDataLoader(Stream(), batch_size=4, num_workers=num_workers), after=2, count=4)


@WORKERS
def test_position_of_a_resumable_sampler_counts_what_the_loop_was_given(num_workers: int) -> None:
    def make() -> StatefulDataLoader:
        sampler = ResumableSampler(Numbers(), 4, seed=5)
        return StatefulDataLoader(Numbers(), batch_sampler=sampler, num_workers=num_workers)

    resumes_exactly(make, after=3)
