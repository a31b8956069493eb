"""Whether a job can go on from a checkpoint, as it is told without reading a tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distckpt import BaseCheckpoint, Checkpointer, CorruptionError, TrainState
from distckpt.commit import list_commits, read_index
from distckpt.testing import MemoryStorage
from distckpt.training.resumable import resumability


def answer(save: Any) -> str:
    storage = MemoryStorage()
    with Checkpointer(storage) as checkpointer:
        save(checkpointer)
    index, _ = read_index(storage, list_commits(storage)[0])
    return str(resumability(bytes(index.metadata), "index"))


def job(**options: Any) -> TrainState:
    model = nn.Linear(2, 2)
    return TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def test_whole_state_is_resumable() -> None:
    assert answer(lambda ckpt: job().save(ckpt)) == "yes"


def test_state_that_was_saved_in_part_is_not() -> None:
    assert answer(lambda ckpt: job().save(ckpt, sections=("model",))) == (
        "no, because it was saved without optimizer, progress, rng"
    )


def test_job_without_an_optimizer_is_not() -> None:
    assert answer(lambda ckpt: TrainState(nn.Linear(2, 2)).save(ckpt)) == "no, because its job had no optimizer"


def test_adapter_is_on_its_base() -> None:
    base = BaseCheckpoint(location="runs/base", digest="abcdef0123456789" * 4, iteration=7, save_id="0" * 32)
    assert answer(lambda ckpt: job(base=base).save(ckpt)) == (
        "yes, on its base runs/base, iteration 7 (digest abcdef0123456789)"
    )


@pytest.mark.parametrize("metadata", [None, 3, [1], {"mine": 1}, "train_state"])
def test_what_no_train_state_saved_is_unknown(metadata: Any) -> None:
    assert answer(lambda ckpt: ckpt.save({"a": 1}, iteration=1, metadata=metadata)) == (
        "unknown, because it was not saved by a TrainState, which would have recorded what the job consists of"
    )


def test_record_of_a_newer_version_is_unknown() -> None:
    record = b'{"train_state": {"version": 99, "sections": "of another kind"}}'
    assert str(resumability(record, "index")) == "unknown, because its record has version 99, this package knows 1"


@pytest.mark.parametrize(
    "record",
    [
        b'{"train_state": 3}',
        b'{"train_state": {"version": 0, "sections": [], "left_out": []}}',
        b'{"train_state": {"version": 1, "sections": 7, "left_out": []}}',
        b"x",
    ],
)
def test_record_that_is_none_is_corrupt(record: bytes) -> None:
    with pytest.raises(CorruptionError, match="index: metadata"):
        resumability(record, "index")
