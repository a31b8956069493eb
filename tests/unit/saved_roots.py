"""Roots in memory with checkpoints of several ranks, of files that are several blocks long."""

from __future__ import annotations

import torch

from distckpt import Checkpointer, PerRank, ShardedTensor
from distckpt.coordinator import Coordinator
from distckpt.shard_file import BLOCK_BYTES
from distckpt.storage import Storage
from distckpt.testing import MemoryStorage, run_ranks

RANKS = 3
ROWS = 3 * RANKS


def make_state(version: int, coordinator: Coordinator) -> dict[str, object]:
    """Rank r's rows of a tensor of which each row is a block, and what else there is to store."""
    rank, rows = coordinator.rank, ROWS // coordinator.world_size
    data = torch.arange(ROWS * BLOCK_BYTES // 8, dtype=torch.int64).reshape(ROWS, -1) * version
    return {
        "weight": ShardedTensor.from_rank_offsets(
            "weight", data[rank * rows : (rank + 1) * rows].clone(), (0, rank, coordinator.world_size)
        ),
        "bias": torch.full((5,), version),
        "empty": torch.zeros(0, 4),
        "random": PerRank((version, rank)),
        "step": version,
    }


def save(storage: Storage, *iterations: int, **options: object) -> None:
    """Each iteration holds the version of its number."""

    def save_all(coordinator: Coordinator) -> None:
        with Checkpointer(storage, coordinator=coordinator, **options) as checkpointer:  # type: ignore[arg-type]
            for iteration in iterations:
                checkpointer.save(make_state(iteration, coordinator), iteration=iteration)

    run_ranks(RANKS, save_all)


def saved_root(*iterations: int, **options: object) -> MemoryStorage:
    storage = MemoryStorage()
    save(storage, *iterations, **options)
    return storage


def check_loads(storage: Storage, version: int, *, iteration: int | None = None) -> None:
    """That all ranks load this version, whole."""

    def load(coordinator: Coordinator) -> None:
        with Checkpointer(storage, coordinator=coordinator) as checkpointer:
            state = make_state(0, coordinator)
            assert checkpointer.load(state, iteration).iteration == version
        expected = make_state(version, coordinator)
        for key in ("bias", "step"):
            assert torch.equal(torch.as_tensor(state[key]), torch.as_tensor(expected[key]))
        weight, wanted, random = state["weight"], expected["weight"], state["random"]
        assert isinstance(weight, ShardedTensor)
        assert isinstance(wanted, ShardedTensor)
        assert torch.equal(weight.data, wanted.data)
        assert isinstance(random, PerRank)
        assert random.value == (version, coordinator.rank)

    run_ranks(RANKS, load)
