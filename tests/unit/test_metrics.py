"""Metrics of a save: what is stored of them, and that all ranks give the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distckpt import Checkpointer, CheckpointError, InvalidShardingError, Retention, repair
from distckpt.commit import list_commits, read_head, read_index
from distckpt.coordinator import Coordinator
from distckpt.metrics import MAX_METRICS, MAX_NAME_LENGTH, known_metrics
from distckpt.storage import Storage
from distckpt.testing import MemoryStorage, run_ranks
from tests.data import make_v1
from tests.unit.damage import change


def saved(metrics: dict[str, float] | None) -> MemoryStorage:
    storage = MemoryStorage()
    with Checkpointer(storage) as checkpointer:
        checkpointer.save({"w": torch.ones(3)}, iteration=10, metadata={"a": 1}, metrics=metrics)
    return storage


def stored(storage: Storage) -> dict[str, float | None]:
    (commit,) = list_commits(storage)
    index = read_index(storage, commit)[0]
    assert read_head(storage, commit).metrics == index.metrics
    return index.metrics


def test_metrics_are_numbers_of_any_kind_and_none_where_they_are_not_finite() -> None:
    given = {
        "loss": 2.5,
        "steps": 3,
        "numpy": np.float32(0.5),
        "tensor": torch.tensor(1.5),
        "nan": math.nan,
        "infinite": -math.inf,
    }
    expected = {"loss": 2.5, "steps": 3.0, "numpy": 0.5, "tensor": 1.5, "nan": None, "infinite": None}
    assert stored(saved(given)) == expected


def test_async_save_stores_metrics() -> None:
    storage = MemoryStorage()
    with Checkpointer(storage) as checkpointer:
        checkpointer.async_save({"w": torch.ones(3)}, iteration=10, metrics={"loss": 1.0}).wait()
    assert stored(storage) == {"loss": 1.0}


def test_index_without_metrics_has_none() -> None:
    storage = saved(None)
    assert stored(storage) == {}
    (commit,) = list_commits(storage)
    assert b"metrics" not in read_index(storage, commit)[1]
    with Checkpointer(make_v1.ROOT / "single") as golden:
        assert [stored(golden._storage), golden.iterations()] == [{}, [5]]


def test_index_made_again_has_its_metrics() -> None:
    storage = saved({"loss": 2.5, "nan": math.nan})
    (commit,) = list_commits(storage)
    before = read_index(storage, commit)[0]
    change(storage, commit.name, lambda content: content.clear())
    assert repair(storage).is_sound
    after = read_index(storage, commit)[0]
    assert after.metrics == before.metrics == {"loss": 2.5, "nan": None}
    assert after.metadata == before.metadata


def test_ranks_that_give_other_metrics_are_named() -> None:
    storage = MemoryStorage()

    def save(coordinator: Coordinator) -> None:
        with Checkpointer(storage, coordinator=coordinator) as checkpointer:
            with pytest.raises(InvalidShardingError, match=r"rank 1 with \{'loss': 1.0\}: give the same on all ranks"):
                checkpointer.save({"w": torch.ones(3)}, iteration=10, metrics={"loss": float(coordinator.rank)})
            checkpointer.save({"w": torch.ones(3)}, iteration=20, metrics={"loss": 4.0})

    run_ranks(2, save)
    assert stored(storage) == {"loss": 4.0}


@pytest.mark.parametrize("name", ["", " a", "a\n", "a\x1b[1m", "x" * (MAX_NAME_LENGTH + 1)])
def test_name_that_could_not_be_shown_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="metric"):
        known_metrics({name: 1.0})


def test_what_is_no_number_is_refused_before_anything_is_written() -> None:
    with pytest.raises(ValueError, match="'loss': 'low' is no number"):
        known_metrics({"loss": "low"})  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        known_metrics([("loss", 1.0)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at most"):
        known_metrics({str(i): 1.0 for i in range(MAX_METRICS + 1)})
    storage = MemoryStorage()
    with Checkpointer(storage) as checkpointer, pytest.raises((CheckpointError, ValueError), match="is no number"):
        checkpointer.save({"w": torch.ones(3)}, iteration=10, metrics={"loss": None})  # type: ignore[dict-item]
    assert storage.list("") == []


@pytest.mark.parametrize("name", ["acc:max", "acc:top:min", ":max"])
def test_name_that_no_selector_could_mean_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no name may end in :min or :max"):
        known_metrics({name: 1.0})
    with pytest.raises(ValueError, match="no name may end in :min or :max"):
        Retention(keep_best=(name, 1, "min"))
    assert known_metrics({"acc:top": 1.0}) == {"acc:top": 1.0}
