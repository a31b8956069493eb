"""Targets that share memory: tied weights load if what is stored is equal, and never become a mixture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distckpt import Checkpointer, DistributedError, MismatchError, tied_memory
from distckpt.coordinator import Coordinator
from distckpt.storage import PosixStorage, Storage
from distckpt.testing import MemoryStorage, run_ranks

ROWS = 60_000  # of 8 numbers: several blocks


@pytest.fixture(params=["memory", "threads", "best"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "memory":
        return MemoryStorage()
    return PosixStorage(tmp_path, io_backend="threads" if request.param == "threads" else "")


def save(storage: Storage, **tensors: torch.Tensor) -> None:
    with Checkpointer(storage) as checkpointer:
        checkpointer.save({**tensors}, iteration=1)


@pytest.mark.parametrize("piece_bytes", [16 << 20, 100_000])
def test_tied_weights_load_what_was_saved_of_them(
    storage: Storage, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tied_memory, "_PIECE_BYTES", piece_bytes)
    stored = torch.arange(ROWS * 8.0).view(ROWS, 8)
    stored[3, 3] = float("nan")
    save(storage, emb=stored, head=stored)
    weight = torch.zeros(ROWS, 8)
    with Checkpointer(storage) as checkpointer:
        checkpointer.load({"emb": weight, "head": weight})
    assert torch.equal(weight.view(torch.int32), stored.view(torch.int32))


def test_weights_that_were_untied_when_saved_are_refused_and_named(storage: Storage) -> None:
    save(storage, emb=torch.ones(ROWS, 8), head=torch.full((ROWS, 8), 2.0))
    weight = torch.zeros(ROWS, 8)
    with Checkpointer(storage) as checkpointer, pytest.raises(MismatchError, match=r"'emb' and 'head' are one memory"):
        checkpointer.load({"emb": weight, "head": weight})


def test_all_ranks_learn_of_weights_that_were_untied() -> None:
    storage = MemoryStorage()
    save(storage, emb=torch.ones(ROWS, 8), head=torch.full((ROWS, 8), 2.0))

    def run(coordinator: Coordinator) -> object:
        weight = torch.zeros(ROWS, 8)
        state: dict[str, object] = {"emb": weight, "head": weight if coordinator.rank else weight.clone()}
        with Checkpointer(storage, coordinator=coordinator, timeout_s=20) as checkpointer:
            with pytest.raises(DistributedError, match=r"rank 1 of 2: MismatchError: 'emb' and 'head'"):
                checkpointer.load(state)
            return checkpointer.load({"emb": weight}, strict=False).missing

    assert run_ranks(2, run) == [(), ()]


def test_views_that_lie_between_each_other_are_filled_each_with_its_own(storage: Storage) -> None:
    left, right = torch.ones(ROWS, 4), torch.full((ROWS, 4), 2.0)
    save(storage, left=left, right=right)
    both = torch.zeros(ROWS, 8)
    with Checkpointer(storage) as checkpointer:
        checkpointer.load({"left": both[:, :4], "right": both[:, 4:]})
    assert torch.equal(both, torch.cat([left, right], 1))


def test_part_of_a_tensor_that_has_a_key_of_its_own_is_filled_last(storage: Storage) -> None:
    save(storage, all=torch.ones(ROWS, 8), part=torch.full((10, 8), 2.0))
    memory = torch.zeros(ROWS, 8)
    with Checkpointer(storage) as checkpointer:
        checkpointer.load({"all": memory, "part": memory[5:15]})
    assert torch.equal(memory[5:15], torch.full((10, 8), 2.0))
    assert torch.equal(memory[15:], torch.ones(ROWS - 15, 8))
