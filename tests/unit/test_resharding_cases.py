"""What a reshard does with tensors, values and keys of every kind, and what it says where it cannot know."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import distckpt
from distckpt import Checkpointer, PerRank, ShardedTensor
from distckpt.coordinator import Coordinator
from distckpt.errors import CheckpointError
from distckpt.resharding.plan_file import Pad, ReshardPlan, StageRule, TensorRule, read_plan
from distckpt.storage import Storage
from distckpt.testing import MemoryStorage, run_ranks
from tests.unit.megatron_states import Layout as MegatronLayout
from tests.unit.model_states import (
    Layout,
    Model,
    bytes_by_rank,
    check_holds,
    gpt,
    held_chunks,
    load_model,
    read_tensors,
    same_bits,
    whole_tensor,
)
from tests.unit.resharded_roots import index_of, reshard_into, saved
from tests.unit.test_megatron_cases import load_job, save_job

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
    shrunk = reshard(storage, small, tp=1)
    assert torch.equal(read_tensors(shrunk)["w"], whole[:50])
    grown = read_tensors(reshard(shrunk, plan, tp=4))["w"]
    assert torch.equal(grown[:50], whole[:50])
    assert not grown[50:].any()
    assert len(grown) == 64


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
    with pytest.raises(CheckpointError, match=re.escape(f"--{option} 'modle/*' is the key of nothing")):
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


# Keys.

ODD = [
    "layers[0].w",
    "a*b",
    "what?",
    "sp ace",
    "quo'te\"s",
    "back\\slash",
    "h\u00e4ndler",
    "\u6a21\u578b",
    "at@7",
    "%41",
    "new\nline",
    "{brace}",
    "[!x]",
    ".",
    "..",
    "a//b",
    "/lead",
    "0",
    "trail/",
]


def test_keys_may_have_any_characters() -> None:
    def make(rank: int) -> dict[str, object]:
        return {
            "model": [
                rows(key, whole_tensor(key, (6, 2), torch.float32), rank, 2, partition=("tp", None)) for key in ODD
            ]
        }

    storage = save(make, tp=2)
    for tp in (3, 1):
        storage = reshard(storage, tp=tp)
        index = index_of(storage)
        assert index.tensors.keys() == set(ODD)

        def load(coordinator: Coordinator, storage: Storage = storage) -> None:
            shards = [rows(key, torch.zeros(6, 2), 0, 1) for key in ODD]
            with Checkpointer(storage, coordinator=coordinator) as checkpointer:
                checkpointer.load({"model": shards})
            for shard in shards:
                assert torch.equal(shard.data, whole_tensor(shard.key, (6, 2), torch.float32)), shard.key

        run_ranks(1, load)


@pytest.mark.parametrize("key", ODD)
def test_line_that_an_error_prints_for_a_key_is_a_rule_for_it(key: str) -> None:
    source = save(lambda _: {"model": [rows(key, torch.ones(6, 2), 0, 1)]}, tp=1)
    with pytest.raises(CheckpointError) as caught:
        reshard(source, tp=3)
    plan = printed_plan(str(caught.value))
    (rule,) = plan["tensors"]
    assert rule["partition"] == [None, None]
    target = reshard(source, plan_of_json({"tensors": [{**rule, "partition": ["tp", None]}]}), tp=3)
    assert len(held_chunks(target)[key]) == 3


def printed_plan(message: str) -> dict[str, Any]:
    """The plan that an error prints, to be completed."""
    begin = message.index('{"tensors"')
    plan: dict[str, Any] = json.JSONDecoder().raw_decode(message[begin:])[0]
    return plan


def plan_of_json(plan: Mapping[str, object], tmp_path: Path | None = None) -> ReshardPlan:
    import msgspec

    return msgspec.json.decode(json.dumps(plan).encode(), type=ReshardPlan)


# Checkpoints of jobs that record nothing about their tensors.


def shapes_of(storage: Storage) -> dict[str, tuple[int, ...]]:
    return {key: entry.global_shape for key, entry in index_of(storage).tensors.items()}


def megatron_root(layout: MegatronLayout) -> MemoryStorage:
    storage = MemoryStorage()
    save_job(storage, layout)
    return storage


def megatron_mesh(layout: MegatronLayout) -> dict[str, int]:
    return {"tp": layout.tp, "pp": layout.pp, "dp": layout.dp}


EXPERTS = "decoder.layers.experts.fc1.weight"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (MegatronLayout(tp=2, pp=2), MegatronLayout(tp=4, pp=2)),
        (MegatronLayout(tp=2, pp=2, dp=2), MegatronLayout(tp=1, pp=4, dp=2)),
        (MegatronLayout(tp=4, pp=2), MegatronLayout(tp=2, pp=1, dp=2)),
        (MegatronLayout(tp=2, pp=4, dp=2), MegatronLayout(tp=2, pp=2)),
    ],
    ids=str,
)
def test_layout_without_labels_is_inferred_from_who_wrote_what(before: MegatronLayout, after: MegatronLayout) -> None:
    source = megatron_root(before)
    target = MemoryStorage()
    distckpt.reshard(source, target, megatron_mesh(after))
    if before.tp > 1 and before.pp > 1:
        tensors = index_of(target).tensors
        assert tensors["decoder.layers.qkv.weight"].partition == ("pp", "tp", None)
        assert tensors["decoder.layers.proj.weight"].partition == ("pp", None, "tp")
        assert tensors["decoder.layers.fc1.weight"].blocks == (1, 2, 1)
        assert tensors["optimizer.exp_avg.decoder.layers.fc1.weight"].blocks == (1, 2, 1)
    load_job(target, after, shapes_of(source))


def test_error_about_an_unlabelled_checkpoint_has_the_lines_of_the_plan_that_it_needs() -> None:
    model, many = gpt(tied=False), Layout(tp=2, pp=2, dp=2)
    source = saved(model, Layout(), labels=False)
    rules: list[dict[str, Any]] = []
    for _ in range(4):  # It shows a dozen at a time.
        try:
            target = reshard(source, plan_of_json({"tensors": rules}), **many.mesh)
            break
        except CheckpointError as error:
            said = str(error)
        rules += [completed(rule, model) for rule in printed_plan(said)["tensors"]]
    else:
        raise AssertionError(rules)
    assert "how these tensors lie on tp2 ep1 dp2 pp2:\n" in said
    assert not any(rule["match"].startswith("optimizer") for rule in rules)  # They lie as their parameters do.
    check_holds(target, model, many)
    load_model(target, model, many)


def completed(rule: dict[str, Any], model: Model) -> dict[str, Any]:
    """With what its author knows of the model."""
    parameter = next(p for p in model.parameters if fnmatch(p.key, rule["match"]))
    assert rule["partition"] == [None] * len(parameter.shape)
    ends = {} if isinstance(parameter.stage, int) else {"at": parameter.stage}
    return {**rule, "partition": parameter.partition, "blocks": parameter.blocks, "owner": "pp", **ends}


def test_unlabelled_tensors_on_many_ranks_stay_as_they_are_where_no_axis_is_new() -> None:
    model = gpt(tied=False)
    source = saved(model, Layout(tp=2, pp=2), labels=False)
    target = reshard(source, tp=4, pp=1)
    for key, chunks in held_chunks(target).items():
        parameter = model.parameter_of(key)
        boxes = {box for rank in range(4) for box in parameter.boxes(Layout(tp=4), {"tp": rank})}
        assert {box for _, box in chunks} == boxes, key


# Plans that are wrong.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"tensor": []}', "unknown field `tensor`"),
        ('{"tensors": [{"match": "*", "split": ["tp"]}]}', "unknown field `split`"),
        ('{"tensors": [{"partition": ["tp"]}]}', "missing required field `match`"),
        ('{"tensors": [{"match": "*", "blocks": [0]}]}', ">= 1"),
        ('{"tensors": [{"match": "*", "at": -1}]}', ">= 0"),
        ('{"stages": {"pp": [1, 2]}}', "Expected `object`"),
        ("[]", "Expected `object`"),
        ("{", "truncated"),
        ("[" * 100_000, "is no plan"),
    ],
    ids=lambda text: text[:40],
)
def test_file_that_is_no_plan(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_plan(path)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"tensors": [{"match": "nothing.*", "at": 0}]}, "a rule for 'nothing.*', which is the key of no tensor"),
        ({"tensors": [{"match": "*norm.weight", "partition": ["tp", None]}]}, "has 1 dimensions"),
        ({"tensors": [{"match": "*qkv.weight", "blocks": [5, 1]}]}, "5 blocks do not divide dimension 0"),
        ({"tensors": [{"match": "final_norm.*", "at": 2}]}, '"at" is 2, expected "first", "last" or a number below 2'),
        ({"tensors": [{"match": "final_norm.*", "at": "middle"}]}, "\"at\" is 'middle'"),
        ({"tensors": [{"match": "*fc1.weight", "partition": ["tq", None]}]}, "'tq'"),
        ({"tensors": [{"match": "*fc1.weight", "partition": ["tp", "tp"]}]}, "'tp'"),
        ({"tensors": [{"match": "*fc1.weight", "owner": "stage"}]}, "'stage'"),
        ({"stages": {"pq": {"counts": [2, 2]}}}, "'pq'"),
        ({"stages": {"pp": {"numbered_by": "blocks"}}}, "no key held by 'pp' has a number after 'blocks'"),
        ({"stages": {"pp": {"counts": [4]}}}, "2 numbers expected"),
        ({"tensors": [{"match": "final_norm.weight", "dtype": "float31"}]}, "'float31'"),
    ],
    ids=lambda value: json.dumps(value)[12:60] if isinstance(value, dict) else "",
)
def test_plan_that_does_not_fit_the_checkpoint(plan: dict[str, Any], message: str) -> None:
    source = saved(gpt(tied=False), Layout(tp=2, pp=4))
    target = MemoryStorage()
    with pytest.raises(CheckpointError, match=re.escape(message)):
        reshard_into(source, target, Layout(tp=4, pp=2), plan_of_json(plan))
    assert target.list("") == []


def two_numberings(_: int) -> dict[str, object]:
    def held(key: str) -> ShardedTensor:
        return ShardedTensor(key, torch.ones(2), global_shape=(2,), global_offset=(0,), owner="pp", partition=(None,))

    return {"w": [held(f"block.{n}.part.{m}.w") for n in range(4) for m in range(2)]}


def test_two_numberings_are_asked_about() -> None:
    source = save(two_numberings)
    with pytest.raises(CheckpointError, match=re.escape("numbers after ['block', 'part']: say in a plan")) as caught:
        reshard(source, pp=2)
    assert '{"stages": {"pp": {"numbered_by": "block"}}}' in str(caught.value)
    for word, place in (("block", 1), ("part", 3)):
        target = reshard(source, ReshardPlan(stages={"pp": StageRule(numbered_by=word)}), pp=2)
        for key, ((rank, _),) in held_chunks(target).items():
            number = int(key.split(".")[place])
            assert rank == (number // 2 if word == "block" else number)


@pytest.mark.parametrize("mesh", [{"tp": 0}, {"tp": -2}])
def test_size_that_is_none(mesh: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1 expected"):
        distckpt.reshard(saved(gpt(), Layout()), MemoryStorage(), mesh)


def test_axis_that_would_change_nothing_is_an_error() -> None:
    source = saved(gpt(), Layout(tp=2, pp=2))
    with pytest.raises(CheckpointError, match="no tensor is split over 'fsdp'"):
        distckpt.reshard(source, MemoryStorage(), {"fsdp": 2})
