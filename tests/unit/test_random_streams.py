"""Random streams: gone on with where they were on the same ranks; on others fresh, all different, and reproducible."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distckpt import Checkpointer, CheckpointError, MismatchError, PerRank, TrainState
from distckpt.coordinator import Coordinator
from distckpt.testing import MemoryStorage, run_ranks
from distckpt.training.random_state import generator_state, set_generator_state, set_global_random_state

GENERATORS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.Generator().manual_seed(1),
    "numpy": lambda: np.random.default_rng(1),
    "numpy with another algorithm": lambda: np.random.Generator(np.random.Philox(1)),
    "python": lambda: random.Random(1),
}


def draw(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return torch.rand((), generator=generator).item()
    return float(generator.random())


def draw_global() -> tuple[float, ...]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()


@pytest.mark.parametrize("kind", GENERATORS)
def test_streams_go_on_where_they_were(kind: str) -> None:
    generator = GENERATORS[kind]()
    draw(generator)
    random.gauss(0, 1)  # Python and NumPy keep the second of a pair.
    np.random.randn()
    train = TrainState(nn.Linear(1, 1), generators={"own": generator})
    with Checkpointer(MemoryStorage()) as checkpointer:
        train.save(checkpointer)
        expected = [draw(generator), draw(generator), *draw_global(), random.gauss(0, 1), np.random.randn()]
        again = GENERATORS[kind]()
        TrainState(nn.Linear(1, 1), generators={"own": again}).load(checkpointer)
        assert [draw(again), draw(again), *draw_global(), random.gauss(0, 1), np.random.randn()] == expected


def test_streams_are_fresh_and_different_on_other_ranks_and_the_same_whenever_it_is_loaded() -> None:
    storage = MemoryStorage()
    with Checkpointer(storage) as checkpointer:
        TrainState(nn.Linear(1, 1), generators={name: make() for name, make in GENERATORS.items()}).save(checkpointer)

    def load(coordinator: Coordinator) -> list[float]:
        own = {name: make() for name, make in GENERATORS.items()}
        train = TrainState(nn.Linear(1, 1), generators=own, coordinator=coordinator)
        with Checkpointer(storage, coordinator=coordinator, timeout_s=20) as checkpointer:
            report = train.load(checkpointer)
        assert report.load.reseeded == ("rng/global", *(f"rng/{name}" for name in sorted(own)))
        return [draw(generator) for generator in own.values()]

    first, second = run_ranks(2, load)
    assert not set(first) & set(second)
    assert len(set(first)) == len(first)
    assert run_ranks(2, load) == [first, second]


@pytest.mark.parametrize("kind", GENERATORS)
def test_stream_that_ranks_share_is_reseeded_alike(kind: str) -> None:
    storage = MemoryStorage()
    with Checkpointer(storage, mesh={"tp": (0, 1), "dp": (0, 1)}) as checkpointer:
        own = PerRank(GENERATORS[kind](), axes=("dp",), on_change="reseed")
        TrainState(nn.Linear(1, 1), rng_axes=("dp",), generators={"own": own}).save(checkpointer)

    def load(coordinator: Coordinator) -> float:
        mesh = {"tp": (coordinator.rank % 2, 2), "dp": (coordinator.rank // 2, 2)}
        generator = GENERATORS[kind]()
        own = PerRank(generator, axes=("dp",), on_change="reseed")
        train = TrainState(nn.Linear(1, 1), rng_axes=("dp",), generators={"own": own}, coordinator=coordinator)
        with Checkpointer(storage, mesh=mesh, coordinator=coordinator, timeout_s=20) as checkpointer:
            train.load(checkpointer)
        return draw(generator)

    drawn = run_ranks(4, load)
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]


@pytest.mark.parametrize("on_change", ["exact", "skip"])
def test_changed_layout_is_refused_or_leaves_streams_alone_when_that_is_said(on_change: Any) -> None:
    storage = MemoryStorage()
    with Checkpointer(storage) as checkpointer:
        TrainState(nn.Linear(1, 1)).save(checkpointer)

    def load(coordinator: Coordinator) -> tuple[str, ...]:
        train = TrainState(nn.Linear(1, 1), rng_on_change=on_change, coordinator=coordinator)
        with Checkpointer(storage, coordinator=coordinator, timeout_s=20) as checkpointer:
            return train.load(checkpointer).warnings

    if on_change == "exact":
        with pytest.raises(MismatchError, match="rng/global"):
            run_ranks(2, load)
        return
    for warnings in run_ranks(2, load):
        assert warnings == ("the random stream 'global' was left as it is, as the layout has changed",)


def test_stream_of_a_device_that_is_not_here_is_told() -> None:
    assert set_global_random_state({"no-such-device": torch.zeros(16, dtype=torch.uint8)}) == ["no-such-device"]


@pytest.mark.parametrize("kind", GENERATORS)
def test_what_is_no_state_of_a_generator_is_refused(kind: str) -> None:
    generator = GENERATORS[kind]()
    before = repr(generator_state(generator))
    with pytest.raises(CheckpointError, match="state of a"):
        set_generator_state(generator, {"state": 3})
    assert repr(generator_state(generator)) == before


@pytest.mark.parametrize("name", ["python", "numpy", "torch"])
def test_what_is_no_state_of_the_process_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"random-number state of '{name}'"):
        set_global_random_state({name: (1, 2)})


def test_what_is_no_generator_is_refused_when_the_state_is_made() -> None:
    with pytest.raises(TypeError, match="a int is no generator"):
        TrainState(nn.Linear(1, 1), generators={"own": 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="the name 'global'"):
        TrainState(nn.Linear(1, 1), generators={"global": random.Random()})
