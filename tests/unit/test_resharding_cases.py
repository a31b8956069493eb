"""What a reshard does with tensors and values of every kind."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import distckpt
from distckpt import Checkpointer, PerRank, ShardedTensor
from distckpt.coordinator import Coordinator
from distckpt.errors import CheckpointError
from distckpt.resharding.plan_file import Pad, ReshardPlan, TensorRule
from distckpt.storage import Storage
from distckpt.testing import MemoryStorage, run_ranks
from tests.unit.model_states import (
    Layout,
    bytes_by_rank,
    gpt,
    held_chunks,
    read_tensors,
    same_bits,
    whole_tensor,
)
from tests.unit.resharded_roots import index_of, saved

pytestmark = pytest.mark.usefixtures("small_windows")
MakeState = Callable[[int], dict[str, object]]  # rank -> its state


def save(make: MakeState, **mesh: int) -> MemoryStorage:
    """By one rank of each coordinate of the mesh; the first axis given is counted fastest."""
    storage = MemoryStorage()
    world_size = int(np.prod(list(mesh.values()), dtype=int))

    def run(coordinator: Coordinator) -> None:
        rest, at = coordinator.rank, {}
        for axis, size in mesh.items():
            rest, at[axis] = divmod(rest, size)
        own = {axis: (at[axis], size) for axis, size in mesh.items()}
        with Checkpointer(storage, coordinator=coordinator, mesh=own or None) as checkpointer:
            checkpointer.save(make(coordinator.rank), iteration=1)

    run_ranks(world_size, run)
    return storage


def reshard(source: Storage, plan: ReshardPlan | None = None, **mesh: int) -> MemoryStorage:
    target = MemoryStorage()
    distckpt.reshard(source, target, mesh, plan=plan)
    return target


def rows(key: str, whole: Tensor, rank: int, size: int, **labels: Any) -> ShardedTensor:
    """Rank's part of the rows, as torch.chunk cuts them."""
    parts = whole.chunk(size)
    begin = sum(len(part) for part in parts[:rank])
    part = parts[rank] if rank < len(parts) else whole[:0]
    offset = (min(begin, len(whole)), *(0 for _ in whole.shape[1:]))
    return ShardedTensor(key, part.clone(), global_shape=whole.shape, global_offset=offset, **labels)


# Types and shapes.

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def test_tensors_of_every_type_and_shape_come_through() -> None:
    wholes: dict[str, Tensor] = {"empty": torch.zeros(0, 4), "empty.inside": torch.zeros(3, 0, 2, dtype=torch.int8)}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        wholes[f"rows.{name}"] = whole_tensor(name, (7, 3), torch.int64).to(dtype)
        wholes[f"scalar.{name}"] = whole_tensor(name, (), torch.int64).to(dtype)

    def make(rank: int) -> dict[str, object]:
        split = {
            key: rows(key, whole, rank, 2, partition=("tp", None)) for key, whole in wholes.items() if key[0] == "r"
        }
        others = {key: whole for key, whole in wholes.items() if key not in split}
        labelled = ShardedTensor("zero.d", torch.tensor(3.5), global_shape=(), global_offset=(), partition=())
        return {"split": split, **others, "numpy": np.arange(4), "labelled": labelled}

    source = save(make, tp=2)
    expected = {**wholes, "numpy": torch.arange(4), "zero.d": torch.tensor(3.5)}
    for mesh in ({"tp": 3, "dp": 2}, {"tp": 1}, {"tp": 8}):
        target = reshard(source, **mesh)
        found = read_tensors(target)
        assert found.keys() == expected.keys()
        for key, whole in expected.items():
            assert same_bits(found[key], whole), key


def read(storage: Storage, **options: Any) -> dict[str, Any]:
    with Checkpointer(storage) as checkpointer:
        state: dict[str, Any] = checkpointer.read(**options)
    return state


def test_replicated_tensors_are_stored_once() -> None:
    whole = whole_tensor("w", (6, 5), torch.float32)

    def make(rank: int) -> dict[str, object]:
        return {
            "sharded": ShardedTensor(
                "w", whole.clone(), global_shape=(6, 5), global_offset=(0, 0), partition=(None, None)
            ),
            "split": rows("s", whole, rank % 2, 2, partition=("tp", None)),
            "plain": torch.ones(9),
        }

    target = reshard(save(make, tp=2, dp=2), tp=3, dp=2)
    assert sum(bytes_by_rank(target).values()) == 2 * whole.numel() * 4 + 9 * 4
    assert {key: len(chunks) for key, chunks in held_chunks(target).items()} == {"w": 1, "s": 3, "plain": 1}


# Other element types.


def test_floating_point_tensors_are_rounded_as_torch_does() -> None:
    random = torch.Generator().manual_seed(1)
    wide = torch.randn(300, 40, generator=random, dtype=torch.float64) * 10.0 ** torch.arange(-20, 20)
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1.0039062, 1.0117188, 1e-40, -3.0])

    def make(rank: int) -> dict[str, object]:
        return {
            "wide": rows("wide", wide, rank, 2, partition=("tp", None)),
            "narrow": rows("narrow", wide.float(), rank, 2, partition=("tp", None)),
            "special": special,
            "halves": special.half(),
            "counts": torch.arange(5),
            "flags": torch.ones(3, dtype=torch.bool),
        }

    source = save(make, tp=2)
    target = MemoryStorage()
    distckpt.reshard(source, target, {"tp": 3}, dtype="bfloat16")
    found = read_tensors(target)
    for key, expected in {
        "wide": wide.bfloat16(),
        "narrow": wide.float().bfloat16(),
        "special": special.bfloat16(),
        "halves": special.half().bfloat16(),
        "counts": torch.arange(5),
        "flags": torch.ones(3, dtype=torch.bool),
    }.items():
        assert found[key].dtype == expected.dtype
        torch.testing.assert_close(found[key], expected, rtol=0, atol=0, equal_nan=True, msg=key)
        if expected.dtype is torch.bfloat16:
            assert torch.equal(torch.signbit(found[key]), torch.signbit(expected)) or key == "special"
    assert index_of(target).tensors["wide"].dtype == "bfloat16"


def test_number_that_the_type_cannot_hold_is_an_error_that_names_the_tensor() -> None:
    source = save(lambda _: {"small": torch.ones(4), "large": torch.tensor([1.0, 1e6])})
    target = MemoryStorage()
    with pytest.raises(CheckpointError, match="'large' has numbers of float32 that float16 cannot hold"):
        distckpt.reshard(source, target, {"dp": 2}, dtype="float16")
    assert Checkpointer(target).iterations() == []
    # As the error says: a rule keeps its type.
    plan = ReshardPlan(tensors=(TensorRule(match="large", dtype="float32"),))
    distckpt.reshard(source, target, {"dp": 2}, dtype="float16", plan=plan)
    assert {key: str(t.dtype) for key, t in read_tensors(target).items()} == {
        "small": "torch.float16",
        "large": "torch.float32",
    }


@pytest.mark.parametrize("dtype", ["int8", "float8_e8m0fnu", "complex64", "half"])
def test_types_that_numbers_are_not_converted_to_are_an_error(dtype: str) -> None:
    source = save(lambda _: {"w": torch.ones(4)})
    with pytest.raises(CheckpointError, match=re.escape(f"dtype '{dtype}'")):
        distckpt.reshard(source, MemoryStorage(), {"dp": 2}, dtype=dtype)


# A padded vocabulary.


def test_padding_follows_the_number_of_parts() -> None:
    real, hidden = 50, 6
    whole = whole_tensor("w", (64, hidden), torch.float32)  # 50 in multiples of 16 for two ranks

    def make(rank: int) -> dict[str, object]:
        return {"w": rows("w", whole, rank, 2, partition=("tp", None))}

    storage = save(make, tp=2)
    plan = ReshardPlan(tensors=(TensorRule(match="w", pad=Pad(dim=0, size=real, multiple=16)),))
    for tp, padded in ((8, 128), (1, 64), (3, 96), (2, 64)):
        storage = reshard(storage, plan, tp=tp)
        found = read_tensors(storage)["w"]
        assert found.shape == (padded, hidden)
        common = min(64, padded)
        assert torch.equal(found[:common], torch.cat([whole[:common]]))
        assert not found[64:].any()
        assert {box.shape[0] for _, box in held_chunks(storage)["w"]} == {padded // tp}
    # Rows that are no real ones go where there is no room for them, and come back as zeros.
    small = ReshardPlan(tensors=(TensorRule(match="w", pad=Pad(dim=0, size=real, multiple=2)),))
    (note,) = distckpt.preview_reshard(storage, {"tp": 1}, plan=small).notes
    assert note == "the end of 'w' (64, 6) -> (50, 6) is padding by the plan, and left out"
    shrunk = reshard(storage, small, tp=1)
    assert torch.equal(read_tensors(shrunk)["w"], whole[:50])
    grown = read_tensors(reshard(shrunk, plan, tp=4))["w"]
    assert torch.equal(grown[:50], whole[:50])
    assert not grown[50:].any()
    assert len(grown) == 64


def test_state_of_what_is_padded_is_padded_alike() -> None:
    def make(rank: int) -> dict[str, object]:
        whole = torch.arange(20.0).reshape(10, 2)
        keys = ("w", "optimizer.exp_avg.w")
        return {key: rows(key, whole, rank, 2, partition=("tp", None)) for key in keys}

    plan = ReshardPlan(tensors=(TensorRule(match="w", pad=Pad(dim=0, size=10, multiple=4), dtype="bfloat16"),))
    found = read_tensors(reshard(save(make, tp=2), plan, tp=4))
    assert {key: tuple(tensor.shape) for key, tensor in found.items()} == {"w": (16, 2), "optimizer.exp_avg.w": (16, 2)}
    assert found["optimizer.exp_avg.w"].dtype is torch.float32


def test_padding_is_converted_and_padded_at_once() -> None:
    whole = torch.arange(30, dtype=torch.float32).reshape(10, 3)
    source = save(lambda rank: {"w": rows("w", whole, rank, 2, partition=("tp", None))}, tp=2)
    plan = ReshardPlan(tensors=(TensorRule(match="w", pad=Pad(dim=0, size=10, multiple=4), dtype="bfloat16"),))
    found = read_tensors(reshard(source, plan, tp=4))["w"]
    assert torch.equal(found, torch.cat([whole, torch.zeros(6, 3)]).bfloat16())


@pytest.mark.parametrize(
    ("pad", "message"),
    [(Pad(dim=2, size=4), "dimension 2 cannot be padded"), (Pad(dim=0, size=11), "fewer than 11 entries")],
    ids=["no such dimension", "more than there are"],
)
def test_padding_that_cannot_be(pad: Pad, message: str) -> None:
    source = save(lambda rank: {"w": rows("w", torch.ones(10, 3), rank, 2, partition=("tp", None))}, tp=2)
    with pytest.raises(CheckpointError, match=message):
        reshard(source, ReshardPlan(tensors=(TensorRule(match="w", pad=pad),)), tp=4)


def test_padding_of_blocks_is_refused() -> None:
    source = saved(gpt(), Layout(tp=2))
    rule = TensorRule(match="*qkv.weight", pad=Pad(dim=0, size=20))
    with pytest.raises(CheckpointError, match="dimension 0 cannot be padded"):
        reshard(source, ReshardPlan(tensors=(rule,)), tp=4)


# A part of a checkpoint.


def nested(_: int) -> dict[str, object]:
    return {
        "model": {"a": torch.ones(2), "b": torch.zeros(3)},
        "optimizer": {"state": [{"m": torch.full((2,), 2.0)}, {"m": torch.full((3,), 3.0)}], "lr": 0.1, "empty": {}},
        "step": 4,
        "tuple": (1, torch.arange(3), {"x": None}),
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"select": ["model/*"]}, {"model": nested(0)["model"]}),
        ({"drop": ["optimizer*", "tuple*"]}, {"model": nested(0)["model"], "step": 4}),
        (
            {"drop": ["model/a", "optimizer/state*", "tuple*"]},
            {"model": {"b": torch.zeros(3)}, "optimizer": {"lr": 0.1, "empty": {}}, "step": 4},
        ),
        ({"select": ["step"]}, {"step": 4}),
        (
            {"select": ["optimizer*"], "drop": ["optimizer/lr"]},
            {"optimizer": {"state": [{"m": torch.full((2,), 2.0)}, {"m": torch.full((3,), 3.0)}], "empty": {}}},
        ),
        ({"select": ["tuple*", "step"]}, {"step": 4, "tuple": nested(0)["tuple"]}),
    ],
    ids=lambda value: " ".join(f"{k} {v}" for k, v in value.items()) if "model" not in value else "",
)
def test_part_of_a_checkpoint_is_read_as_that(options: Any, expected: Mapping[str, object]) -> None:
    target = MemoryStorage()
    distckpt.reshard(save(nested), target, {"dp": 2}, **options)
    assert shown(read(target)) == shown(expected)


def shown(value: object) -> object:
    """Something that can be compared."""
    if isinstance(value, Tensor):
        return ("tensor", value.tolist(), str(value.dtype))
    if isinstance(value, dict):
        return {key: shown(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(shown(child) for child in value)
    return value


def test_part_of_a_list_is_read() -> None:
    """One entry of a list that was left out must not make the rest unreadable."""
    target = MemoryStorage()
    distckpt.reshard(save(nested), target, {"dp": 2}, drop=["optimizer/state/%l0/*", "tuple/%l1"])
    found = read(target)
    assert shown(found["optimizer"]) == shown({"state": [{"m": torch.full((3,), 3.0)}], "lr": 0.1, "empty": {}})
    assert found["tuple"] == (1, {"x": None})


@pytest.mark.parametrize("option", ["select", "drop"])
def test_glob_of_no_key_is_an_error(option: str) -> None:
    options: Any = {option: ["model/a", "modle/*"]}
    with pytest.raises(CheckpointError, match=re.escape(f"--{option} 'modle/*' matches no key")):
        distckpt.reshard(save(nested), MemoryStorage(), {"dp": 2}, **options)


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="nothing is left"):
        distckpt.reshard(save(nested), MemoryStorage(), {"dp": 2}, drop=["*"])


# What differs by rank.


def with_streams(on_change: Any, axes: tuple[str, ...] | None) -> MakeState:
    def make(rank: int) -> dict[str, object]:
        value = rank if axes is None else rank % 2
        split = rows("w", torch.arange(8.0), rank % 2, 2, partition=("tp",))
        return {"w": split, "rng": PerRank(value, axes=axes, on_change=on_change)}

    return make


def load_streams(storage: Storage, make: MakeState, **mesh: int) -> list[PerRank]:
    world_size = int(np.prod(list(mesh.values())))

    def run(coordinator: Coordinator) -> PerRank:
        rest, own = coordinator.rank, {}
        for axis, size in mesh.items():
            rest, at = divmod(rest, size)
            own[axis] = (at, size)
        state = make(coordinator.rank)
        rng = state["rng"]
        assert isinstance(rng, PerRank)
        rng.value = "untouched"
        state["w"] = ShardedTensor("w", torch.zeros(8), global_shape=(8,), global_offset=(0,))
        with Checkpointer(storage, coordinator=coordinator, mesh=own) as checkpointer:
            checkpointer.load(state)
        return rng

    return run_ranks(world_size, run)


@pytest.mark.parametrize("on_change", ["exact", "reseed", "skip"])
def test_values_by_rank_stay_with_the_coordinates_that_stay(on_change: str) -> None:
    make = with_streams(on_change, ("tp",))
    target = reshard(save(make, tp=2, dp=2), tp=2, dp=1, pp=1)
    assert [rng.value for rng in load_streams(target, make, tp=2)] == [0, 1]
    target = reshard(save(make, tp=2, dp=2), tp=2, dp=4)
    found = load_streams(target, make, tp=2, dp=4)
    assert [(rng.value, rng.seed) for rng in found] == [(rank % 2, None) for rank in range(8)]


def test_values_by_rank_whose_axis_changes_are_begun_anew() -> None:
    make = with_streams("reseed", ("tp",))
    target, notes = MemoryStorage(), []
    report = distckpt.reshard(save(make, tp=2, dp=2), target, {"tp": 4}, on_plan=lambda p: notes.extend(p.notes))
    assert list(report.notes) == notes
    assert notes == [
        "per-rank value 'rng' is left out, as its axes change (tp 2 -> 4): at a load ranks will draw a new seed"
    ]
    found = load_streams(target, make, tp=4)
    assert all(rng.value == "untouched" for rng in found)
    assert len({rng.seed for rng in found}) == 4
    assert None not in {rng.seed for rng in found}
    # Back on the old mesh nothing is there to come back.
    again = load_streams(reshard(target, tp=2, dp=2), make, tp=2, dp=2)
    assert all(rng.value == "untouched" and rng.seed is not None for rng in again)


def test_values_by_rank_that_may_be_skipped_are_left_alone() -> None:
    make = with_streams("skip", None)
    target = reshard(save(make, tp=2, dp=2), tp=4)
    assert [(rng.value, rng.seed) for rng in load_streams(target, make, tp=4)] == [("untouched", None)] * 4


def test_values_by_rank_that_must_come_back_exactly_are_refused_and_can_be_dropped() -> None:
    source = save(with_streams("exact", ("tp",)), tp=2, dp=2)
    with pytest.raises(CheckpointError, match=re.escape("its axes change (tp 2 -> 4). Leave it out with --drop 'rng'")):
        reshard(source, tp=4)
    target = MemoryStorage()
    distckpt.reshard(source, target, {"tp": 4}, drop=["rng"])
    assert not index_of(target).per_rank


@pytest.mark.parametrize("world_size", [1, 2])
def test_values_by_rank_of_a_job_without_a_mesh_are_of_another_one(world_size: int) -> None:
    """Its ranks are all that tells them apart: where others are, it is not the same job."""

    def make(on_change: Any) -> MakeState:
        def state(rank: int) -> dict[str, object]:
            return {"w": rows("w", torch.arange(8.0), 0, 1), "rng": PerRank(rank, on_change=on_change)}

        return state

    def save_without_mesh(on_change: Any) -> MemoryStorage:
        storage = MemoryStorage()

        def run(coordinator: Coordinator) -> None:
            with Checkpointer(storage, coordinator=coordinator) as checkpointer:
                checkpointer.save(make(on_change)(coordinator.rank), iteration=1)

        run_ranks(world_size, run)
        return storage

    plan = ReshardPlan(tensors=(TensorRule(match="w", partition=("dp",)),))
    with pytest.raises(CheckpointError, match="its axes change"):
        reshard(save_without_mesh("exact"), plan, dp=2)
    target = reshard(save_without_mesh("reseed"), plan, dp=2)
    assert index_of(target).per_rank["rng"].holders == ()
    found = load_streams(target, make("reseed"), dp=2)
    assert len({rng.seed for rng in found} - {None}) == 2
