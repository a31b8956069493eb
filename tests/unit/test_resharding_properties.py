"""Any tiling of any tensors, resharded in steps of any size by any number of threads and processes: nothing changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import distckpt
from distckpt import Checkpointer, ShardedTensor
from distckpt.coordinator import Coordinator
from distckpt.resharding import planning
from distckpt.resharding.part import LotMemory
from distckpt.resharding.plan_file import ReshardPlan, TensorRule, glob_of
from distckpt.testing import MemoryStorage, run_ranks
from tests.unit.model_states import held_chunks, read_tensors
from tests.unit.test_layouts import CARRIERS, Case, all_cases, lay_out, sharded


@dataclass(frozen=True)
class Labels:
    """Of one tensor, in the target."""

    partition: tuple[str | None, ...]
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Target:
    labels: tuple[Labels, ...]
    mesh: dict[str, int]
    window_bytes: int
    jobs: int
    ranks: int


@st.composite
def targets(draw: st.DrawFn, cases: Sequence[Case]) -> Target:
    labels = []
    for case in cases:
        free = ["a", "b"]
        partition: list[str | None] = []
        for _ in case.shape:
            axis = draw(st.sampled_from([None, *free]))
            partition.append(axis)
            free = [other for other in free if other != axis]
        blocks = [draw(st.sampled_from([n for n in range(1, 7) if extent % n == 0])) for extent in case.shape]
        labels.append(Labels(tuple(partition), tuple(blocks)))
    used = {axis for own in labels for axis in own.partition if axis is not None}
    return Target(
        tuple(labels),
        {"dp": draw(st.integers(1, 2)), **{axis: draw(st.integers(1, 4)) for axis in sorted(used)}},
        draw(st.sampled_from([16, 64, 1000, 64 << 10])),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
    )


def save(cases: Sequence[Case]) -> MemoryStorage:
    storage = MemoryStorage()

    def run(coordinator: Coordinator) -> None:
        state: dict[str, object] = {}
        for case in cases:
            for i, piece in enumerate(case.saved[coordinator.rank]):
                _, view = lay_out(piece.cut(case.whole()).shape, piece.memory, CARRIERS[case.dtype])
                view[...] = piece.cut(case.whole())
                state[f"{case.key} {i}"] = sharded(case, piece, view)
        with Checkpointer(storage, coordinator=coordinator) as checkpointer:
            checkpointer.save({"model": state}, iteration=3)

    run_ranks(len(cases[0].saved), run)
    return storage


def check(cases: Sequence[Case], target: Target) -> None:
    source, made = save(cases), MemoryStorage()
    rules = [
        TensorRule(match=glob_of(case.key), partition=own.partition, blocks=own.blocks)
        for case, own in zip(cases, target.labels, strict=True)
        if any(case.saved)
    ]
    plan = ReshardPlan(tensors=tuple(rules))

    def run(coordinator: Coordinator) -> None:
        distckpt.reshard(source, made, target.mesh, plan=plan, jobs=target.jobs, coordinator=coordinator)

    with patch.object(planning, "share_memory", lambda *_, **__: LotMemory(1, target.window_bytes)):
        run_ranks(target.ranks, run)
    with Checkpointer(made) as checkpointer:
        found = checkpointer.read()
    for case, own in zip(cases, target.labels, strict=True):
        if not any(case.saved):
            continue
        tensor = found["model"][case.key]
        assert tensor.dtype == case.dtype
        bits = tensor.view(torch.from_numpy(np.empty(0, CARRIERS[case.dtype])).dtype).numpy()
        np.testing.assert_array_equal(bits, case.whole())
        parts = prod(target.mesh.get(axis or "", 1) for axis in own.partition)
        blocks = prod(
            n for n, axis in zip(own.blocks, own.partition, strict=True) if target.mesh.get(axis or "", 1) > 1
        )
        assert len(held_chunks(made)[case.key]) <= parts * blocks


@st.composite
def reshards(draw: st.DrawFn) -> tuple[list[Case], Target]:
    cases = draw(all_cases().filter(lambda cases: all(any(case.saved) for case in cases)))
    return cases, draw(targets(cases))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(reshards())
def test_any_tiling_is_resharded_to_any_other(reshard: tuple[list[Case], Target]) -> None:
    check(*reshard)


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (1, 1), (2, 1)])
def test_blocks_and_windows_end_anywhere(before: int, after: int, jobs: int) -> None:
    """Tensors of several blocks: files are met in pieces that are begun, joined and ended."""
    whole = torch.arange(35 * 66 * 267, dtype=torch.int32).reshape(35, 66, 267)
    other = (whole[:20] * 3).to(torch.int16)
    source, made = MemoryStorage(), MemoryStorage()

    def save_part(coordinator: Coordinator) -> None:
        state: dict[str, object] = {}
        for key, data in (("w", whole), ("x", other)):
            parts = data.chunk(2, before)
            offset = [0, 0, 0]
            offset[before] = parts[0].shape[before] * coordinator.rank
            own = parts[coordinator.rank].clone()
            state[key] = ShardedTensor(key, own, global_shape=data.shape, global_offset=offset)
        with Checkpointer(source, coordinator=coordinator) as checkpointer:
            checkpointer.save({"model": state}, iteration=3)

    run_ranks(2, save_part)
    partition = tuple("tp" if d == after else None for d in range(3))
    plan = ReshardPlan(tensors=(TensorRule(match="*", partition=partition),))
    with patch.object(planning, "share_memory", lambda *_, **__: LotMemory(1, 64 << 10)):
        distckpt.reshard(source, made, {"tp": 3}, plan=plan, jobs=jobs)
    found = read_tensors(made)
    assert torch.equal(found["w"], whole)
    assert torch.equal(found["x"], other)
    assert len(held_chunks(made)["w"]) == 3
    assert distckpt.verify(made).is_sound
