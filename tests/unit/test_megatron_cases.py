"""What Megatron jobs ask of a sharded checkpoint, on ranks that are threads."""

from __future__ import annotations

import importlib
import io
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distckpt import Checkpointer, InvalidShardingError, LoadReport, MismatchError, PerRank, ShardedTensor
from distckpt.coordinator import Coordinator
from distckpt.testing import MemoryStorage, run_ranks
from tests.unit.megatron_states import (
    LOOK_ALIKES,
    VOCABULARY,
    Layout,
    megatron_parameter,
    padded_vocabulary,
    rank_state,
    value_at,
)

MakeState = Callable[[Coordinator], dict[str, object]]


def save(storage: MemoryStorage, world_size: int, make: MakeState) -> None:
    def run(coordinator: Coordinator) -> None:
        with Checkpointer(storage, coordinator=coordinator) as checkpointer:
            checkpointer.save(make(coordinator), iteration=1)

    run_ranks(world_size, run)


def load(storage: MemoryStorage, world_size: int, make: MakeState, **options: Any) -> list[dict[str, Any]]:
    """The loaded state of every rank."""

    def run(coordinator: Coordinator) -> dict[str, object]:
        state = make(coordinator)
        with Checkpointer(storage, coordinator=coordinator) as checkpointer:
            checkpointer.load(state, **options)
        return state

    return run_ranks(world_size, run)


# Whole jobs.

RECONFIGURATIONS = [
    (Layout(tp=2, pp=4), Layout(tp=4, pp=2)),
    (Layout(tp=8, pp=1), Layout(tp=1, pp=8)),
    (Layout(), Layout(tp=2, pp=4)),
    (Layout(tp=2, pp=4), Layout()),
    (Layout(tp=2, dp=4), Layout(tp=1, dp=3)),
    (Layout(pp=2, dp=4, ep=4), Layout(tp=2, dp=2, ep=2)),
    (Layout(dp=2, ep=2), Layout(tp=2, dp=4, ep=4)),
    (Layout(dp=4, ep=2), Layout(pp=2, dp=2, ep=1)),
    (Layout(tp=2, pp=2, chunks=2), Layout(pp=4, chunks=1)),
    (Layout(pp=2, chunks=1), Layout(tp=2, pp=2, dp=2, chunks=4)),
]
JOBS = pytest.mark.parametrize(
    ("before", "after"), RECONFIGURATIONS, ids=[f"{before}-{after}" for before, after in RECONFIGURATIONS]
)


def save_job(storage: MemoryStorage, layout: Layout, convert: Any = None) -> dict[str, tuple[int, ...]]:
    """The global shape of every stored tensor."""

    def run(coordinator: Coordinator) -> dict[str, tuple[int, ...]]:
        job = rank_state(layout, coordinator.rank, convert).fill()
        with Checkpointer(storage, coordinator=coordinator, mesh=layout.place(coordinator.rank).mesh) as checkpointer:
            checkpointer.save(job.state, iteration=7)
        return {part.key: part.global_shape for part in job.parts}

    return {key: shape for shapes in run_ranks(layout.world_size, run) for key, shape in shapes.items()}


def load_job(
    storage: MemoryStorage, layout: Layout, shapes: dict[str, tuple[int, ...]], convert: Any = None
) -> list[LoadReport]:
    def run(coordinator: Coordinator) -> LoadReport:
        job = rank_state(layout, coordinator.rank, convert)
        job.state["args"] = {"hidden_size": None, "betas": None, "iteration": None}
        with Checkpointer(storage, coordinator=coordinator, mesh=layout.place(coordinator.rank).mesh) as checkpointer:
            report = checkpointer.load(job.state)
        job.check(shapes)
        assert job.state["args"] == {"hidden_size": 8, "betas": (0.9, 0.95), "iteration": 7}
        return report

    return run_ranks(layout.world_size, run)


@JOBS
def test_model_and_optimizer_move_to_another_layout(before: Layout, after: Layout) -> None:
    storage = MemoryStorage()
    shapes = save_job(storage, before)
    reports = load_job(storage, after, shapes)
    assert {r.reseeded for r in reports} == ({()} if (before.tp, before.pp) == (after.tp, after.pp) else {("rng",)})


@JOBS
def test_state_of_megatron_classes_moves_to_another_layout(before: Layout, after: Layout) -> None:
    def convert(parts: list[ShardedTensor], data: Tensor) -> Any:
        return megatron_parameter(LOOK_ALIKES, parts, data)

    storage = MemoryStorage()
    shapes = save_job(storage, before, convert)
    load_job(storage, after, shapes, convert)


def test_what_megatron_classes_saved_loads_into_ours() -> None:
    storage = MemoryStorage()
    shapes = save_job(storage, Layout(tp=2, pp=2), lambda parts, data: megatron_parameter(LOOK_ALIKES, parts, data))
    load_job(storage, Layout(tp=1, pp=1, dp=2), shapes)


def tensors_in(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        yield from tensors_in(value) if isinstance(value, dict) else [(key, value)]


def test_read_joins_a_whole_job() -> None:
    layout, storage = Layout(tp=2, pp=2, dp=2, ep=2), MemoryStorage()
    shapes = save_job(storage, layout)

    def run(coordinator: Coordinator) -> None:
        with Checkpointer(storage, coordinator=coordinator) as checkpointer:
            state: Any = checkpointer.read()
        found = dict(tensors_in({"model": state["model"], "optimizer": state["optimizer"]}))
        assert found.keys() == shapes.keys()
        for key, tensor in found.items():
            assert torch.equal(tensor, value_at(key, shapes[key])), key

    run_ranks(1, run)


def test_a_stage_that_loses_a_layer_is_named() -> None:
    layout, storage = Layout(pp=4), MemoryStorage()

    def run(coordinator: Coordinator) -> None:
        job = rank_state(layout, coordinator.rank).fill()
        if coordinator.rank == 2:
            job.state["model"] = {k: v for k, v in job.state["model"].items() if "norm" not in k}
        with Checkpointer(storage, coordinator=coordinator, mesh=layout.place(coordinator.rank).mesh) as checkpointer:
            message = re.escape("'decoder.layers.norm.weight' (8, 8): rows 4-5 are in no shard.\n  Ranks 0, 1, 3 gave")
            with pytest.raises(InvalidShardingError, match=message):
                checkpointer.save(job.state, iteration=7)
            assert checkpointer.iterations() == []

    run_ranks(4, run)


# One tensor.


def test_another_partition_of_one_tensor() -> None:
    whole = value_at("w", (12, 10))

    def cut(parts: tuple[int, int]) -> MakeState:
        def make(coordinator: Coordinator) -> dict[str, object]:
            i, j = divmod(coordinator.rank, parts[1])
            data = whole.chunk(parts[0], 0)[i].chunk(parts[1], 1)[j].clone()
            return {"w": ShardedTensor.from_rank_offsets("w", data, (0, i, parts[0]), (1, j, parts[1]))}

        return make

    storage = MemoryStorage()
    save(storage, 6, cut((3, 2)))
    for parts in ((1, 1), (2, 1), (4, 1), (2, 2), (1, 5), (4, 2)):
        blank = cut(parts)

        def empty(coordinator: Coordinator, blank: MakeState = blank) -> dict[str, object]:
            state = blank(coordinator)
            state["w"].data.zero_()  # type: ignore[attr-defined]
            return state

        for rank, state in enumerate(load(storage, parts[0] * parts[1], empty)):
            i, j = divmod(rank, parts[1])
            assert torch.equal(state["w"].data, whole.chunk(parts[0], 0)[i].chunk(parts[1], 1)[j])


def uneven(sizes: list[int], *, filled: bool) -> MakeState:
    """Rank r has sizes[r] elements of one 1-d tensor."""
    total = sum(sizes)

    def make(coordinator: Coordinator) -> dict[str, object]:
        start, size = sum(sizes[: coordinator.rank]), sizes[coordinator.rank]
        data = value_at("w", (total,))[start : start + size].clone() if filled else torch.zeros(size)
        return {"w": ShardedTensor("w", data, global_shape=(total,), global_offset=(start,))}

    return make


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([3, 0, 5, 1], [4, 5]),
        ([0, 0, 9], [1, 1, 1, 6]),
        ([9, 0], [0, 0, 9]),
        ([2, 3, 4], [9]),
    ],
    ids=str,
)
def test_uneven_parts_some_of_them_empty(before: list[int], after: list[int]) -> None:
    storage = MemoryStorage()
    save(storage, len(before), uneven(before, filled=True))
    found = load(storage, len(after), uneven(after, filled=False))
    assert torch.equal(torch.cat([state["w"].data for state in found]), value_at("w", (9,)))


def test_several_shards_of_a_key_on_one_rank() -> None:
    whole = value_at("w", (16, 3))

    def rows(numbers: list[int], *, filled: bool) -> dict[str, object]:
        shards = [
            ShardedTensor(
                "w",
                whole[n : n + 1].clone() if filled else torch.zeros(1, 3),
                global_shape=(16, 3),
                global_offset=(n, 0),
            )
            for n in numbers
        ]
        return {"w": shards}

    storage = MemoryStorage()
    save(storage, 3, lambda c: rows(list(range(c.rank, 16, 3)), filled=True))
    found = load(storage, 2, lambda c: rows(list(range(15 - c.rank, -1, -2)), filled=False))
    for rank, state in enumerate(found):
        assert [tuple(s.data[0].tolist()) for s in state["w"]] == [
            tuple(whole[n].tolist()) for n in range(15 - rank, -1, -2)
        ]


def owned(rank: int, owner: int, *, filled: bool) -> dict[str, object]:
    """Optimizer shards, all of which one rank owns: the lists of the others are empty."""
    data = value_at("m", (3,)) if filled else torch.zeros(3)
    shard = ShardedTensor("m", data, global_shape=(3,), global_offset=(0,))
    return {"optimizer": {"moments": [shard] if rank == owner else []}, "iteration": 1}


def test_ranks_whose_lists_of_shards_are_empty() -> None:
    storage = MemoryStorage()
    save(storage, 3, lambda c: owned(c.rank, 1, filled=True))
    for world_size, owner in ((1, 0), (2, 1), (4, 0)):
        found = load(storage, world_size, lambda c, owner=owner: owned(c.rank, owner, filled=False))
        assert torch.equal(found[owner]["optimizer"]["moments"][0].data, value_at("m", (3,)))
        assert all(found[r]["optimizer"]["moments"] == [] for r in range(world_size) if r != owner)
    with Checkpointer(storage) as checkpointer:
        state: Any = checkpointer.read()
    assert torch.equal(state["optimizer"]["moments"]["m"], value_at("m", (3,)))


def test_lists_of_shards_that_are_empty_on_every_rank_are_an_error() -> None:
    storage = MemoryStorage()
    save(storage, 2, lambda c: owned(c.rank, 0, filled=True))
    with pytest.raises(MismatchError) as caught:
        load(storage, 2, lambda c: owned(c.rank, -1, filled=False))
    assert (caught.value.missing, caught.value.unexpected) == ((), ("m",))


def test_an_empty_list_for_a_stored_list_of_tensors_is_an_error() -> None:
    storage = MemoryStorage()
    save(storage, 1, lambda _: {"losses": [torch.ones(2)], "iteration": 1})
    with pytest.raises(MismatchError, match=r"losses: the state has \[\], stored is a list of tensors"):
        load(storage, 1, lambda _: {"losses": [], "iteration": 0})


def test_another_global_shape_is_refused_and_nothing_changes() -> None:
    storage = MemoryStorage()
    save(storage, 2, uneven([4, 5], filled=True))

    def run(coordinator: Coordinator) -> None:
        state = uneven([5, 5], filled=False)(coordinator)
        with Checkpointer(storage, coordinator=coordinator) as checkpointer:
            with pytest.raises(MismatchError, match=re.escape("w: the state has (10,), stored is (9,)")) as caught:
                checkpointer.load(state)
            with pytest.raises(MismatchError):
                checkpointer.load(state, strict=False)
        assert caught.value.mismatched == ("w",)
        assert torch.equal(state["w"].data, torch.zeros(5))  # type: ignore[attr-defined]

    run_ranks(2, run)


@pytest.mark.parametrize(("before", "after"), [(Layout(tp=1), Layout(tp=3)), (Layout(tp=3), Layout(tp=1))], ids=str)
def test_padded_vocabulary_grows_and_shrinks(before: Layout, after: Layout) -> None:
    def make(layout: Layout, value: float | None) -> MakeState:
        rows = padded_vocabulary(layout) // layout.tp

        def state(c: Coordinator) -> dict[str, object]:
            data = torch.full((rows, 4), -1.0)
            if value is None:
                data = value_at("w", (rows * layout.tp, 4))[c.rank * rows : (c.rank + 1) * rows].clone()
            offsets = (0, c.rank, layout.tp)
            return {"w": ShardedTensor.from_rank_offsets("w", data, offsets, allow_shape_mismatch=True)}

        return state

    storage = MemoryStorage()
    save(storage, before.tp, make(before, None))
    found = torch.cat([s["w"].data for s in load(storage, after.tp, make(after, -1.0))])
    stored, wanted = padded_vocabulary(before), padded_vocabulary(after)
    common = min(stored, wanted)
    assert common > VOCABULARY
    assert stored != wanted
    assert torch.equal(found[:common], value_at("w", (stored, 4))[:common])
    assert torch.equal(found[common:], torch.full((wanted - common, 4), -1.0))


# Megatron-core's classes: look-alikes always, the real ones where they are installed.


@pytest.fixture(params=["look-alike", "installed"])
def mapping(request: pytest.FixtureRequest) -> Any:
    if request.param == "look-alike":
        return LOOK_ALIKES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("megatron.core.dist_checkpointing")
        return importlib.import_module("megatron.core.dist_checkpointing.mapping")


def test_megatron_job_moves_to_another_layout(mapping: Any) -> None:
    def convert(parts: list[ShardedTensor], data: Tensor) -> Any:
        return megatron_parameter(mapping, parts, data)

    storage = MemoryStorage()
    shapes = save_job(storage, Layout(tp=2, pp=2, dp=2, ep=2), convert)
    load_job(storage, Layout(tp=4, pp=1, dp=1), shapes, convert)


def test_megatron_factory_is_built_for_saving_and_merged_after_loading(mapping: Any) -> None:
    def factory(data: Tensor) -> Any:
        def build(key: str, tensor: Tensor, replica_id: object, flattened_range: slice | None) -> dict[str, Any]:
            first, second = tensor[:2], tensor[2:] * 2  # not a view: only merging brings it back
            return {
                "first": mapping.ShardedTensor(key + ".a", first.clone(), first.dtype, (2, 3), (2, 3), (0, 0), (1, 1)),
                "second": mapping.ShardedTensor(key + ".b", second, second.dtype, (1, 3), (1, 3), (0, 0), (1, 1)),
            }

        def merge(state: dict[str, Tensor]) -> Tensor:
            return torch.cat([state["first"], state["second"] / 2])

        return mapping.ShardedTensorFactory("f", data, build, merge)

    storage = MemoryStorage()
    save(storage, 2, lambda _: {"layer": {"w": factory(value_at("f", (3, 3)))}})
    target = torch.zeros(3, 3)
    load(storage, 1, lambda _: {"layer": {"w": factory(target)}})
    assert torch.equal(target, value_at("f", (3, 3)))
    with Checkpointer(storage) as checkpointer:
        assert torch.equal(checkpointer.read(keys=["f.b"])["layer"]["w"]["built"]["f.b"], 2 * value_at("f", (3, 3))[2:])  # type: ignore[index]


def test_megatron_objects_come_back_as_they_were(mapping: Any) -> None:
    stream = io.BytesIO(b"\x00extra state")
    stream.seek(3)

    def objects(rank: int, *, filled: bool) -> dict[str, Any]:
        extra = {"scale": torch.tensor([1.5, 2.5]), "history": [np.float64(0.1), (1, 2)]}
        values = {
            "json": {"lr": 1e-4, "betas": (0.9, 0.95)},
            "stream": stream if filled else io.BytesIO(),
            "extra": extra,
            "none": None,
        }
        shared = {
            name: mapping.ShardedObject(f"{name}.key", value if filled or name == "stream" else None, (1,), (0,))
            for name, value in values.items()
        }
        own = mapping.ShardedObject("rng", [f"rank {rank}"] if filled else None, (2, 1), (rank, 0), replica_id=rank)
        return {"objects": shared, "rng": own, "kept": mapping.LocalNonpersistentObject(f"local {rank}")}

    storage = MemoryStorage()
    save(storage, 2, lambda c: objects(c.rank, filled=True))
    for rank, state in enumerate(load(storage, 2, lambda c: objects(c.rank, filled=False))):
        found = state["objects"]
        assert found["json"].data == {"lr": 1e-4, "betas": (0.9, 0.95)}
        assert type(found["stream"].data) is io.BytesIO
        assert found["stream"].data.read() == b"\x00extra state"
        assert torch.equal(found["extra"].data["scale"], torch.tensor([1.5, 2.5]))
        assert found["extra"].data["history"] == [np.float64(0.1), (1, 2)]
        assert type(found["extra"].data["history"][0]) is np.float64
        assert found["none"].data is None
        assert state["rng"].data == [f"rank {rank}"]
        assert state["kept"].unwrap() == f"local {rank}"


def test_megatron_objects_that_differ_under_one_unique_key_are_an_error(mapping: Any) -> None:
    def run(coordinator: Coordinator) -> None:
        state = {"rng": mapping.ShardedObject("rng", coordinator.rank, (1,), (0,), replica_id=coordinator.rank)}
        with Checkpointer(storage, coordinator=coordinator) as checkpointer:
            message = "value 'rng/shard_0_1' is 0 on rank 0 but 1 on rank 1"
            with pytest.raises(InvalidShardingError, match=message):
                checkpointer.save(state, iteration=1)

    storage = MemoryStorage()
    run_ranks(2, run)


def test_megatron_tensor_on_the_meta_device_gets_its_data_by_loading(mapping: Any) -> None:
    def tensor(data: Tensor) -> Any:
        return mapping.ShardedTensor("w", data, data.dtype, (3,), (2, 3), (1, 0), (2, 1), prepend_axis_num=1)

    storage = MemoryStorage()
    save(
        storage,
        1,
        lambda _: {"w": ShardedTensor("w", value_at("w", (2, 3)), global_shape=(2, 3), global_offset=(0, 0))},
    )
    (state,) = load(storage, 1, lambda _: {"w": tensor(torch.empty(3, device="meta"))})
    assert torch.equal(state["w"].data, value_at("w", (2, 3))[1])


def test_megatron_tensor_without_data_is_refused(mapping: Any) -> None:
    with Checkpointer(MemoryStorage()) as checkpointer, pytest.raises(InvalidShardingError, match=r"'w'.*without data"):
        checkpointer.save({"w": mapping.ShardedTensor("w", None, torch.float32, (3,), (3,), (0,), (1,))}, iteration=1)


def test_flattened_range_of_older_megatron_moves_to_another_dp() -> None:
    def state(rank: int, dp: int, *, filled: bool) -> dict[str, Any]:
        """Two layers of a row-parallel weight, flattened and cut into dp equal ranges."""
        bucket = 12 // dp
        whole, tensors = value_at("w", (2, 4, 6)), []
        for layer, t in ((0, 0), (0, 1), (1, 0), (1, 1)):
            local = whole[layer, :, 3 * t : 3 * t + 3]
            flat_range = slice(rank * bucket, (rank + 1) * bucket)
            flat = local.reshape(-1)[flat_range].clone()
            tensors.append(
                LOOK_ALIKES.ShardedTensor(
                    "w",
                    flat if filled else torch.zeros_like(flat),
                    flat.dtype,
                    (4, 3),
                    (2, 4, 6),
                    (layer, 0, 3 * t),
                    (2, 1, 2),
                    replica_id=(0, 0, 0),
                    prepend_axis_num=1,
                    flattened_range=flat_range,
                )
            )
        return {"optimizer": tensors}

    storage = MemoryStorage()
    save(storage, 4, lambda c: state(c.rank, 4, filled=True))
    for rank, found in enumerate(load(storage, 3, lambda c: state(c.rank, 3, filled=False))):
        for tensor, expected in zip(found["optimizer"], state(rank, 3, filled=True)["optimizer"], strict=True):
            assert torch.equal(tensor.data, expected.data)


def test_gated_factory_of_the_installed_megatron_joins_its_halves() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("megatron.core.dist_checkpointing")
        mlp = importlib.import_module("megatron.core.transformer.mlp")
        mapping = importlib.import_module("megatron.core.dist_checkpointing.mapping")
    whole = value_at("fc1", (2, 24, 3))  # two layers; 12 rows of gate, then 12 of up

    def state(rank: int, tp: int, *, filled: bool) -> dict[str, Any]:
        factories = []
        for layer in range(2):
            rows = 12 // tp
            halves = [whole[layer, h + rank * rows : h + (rank + 1) * rows] for h in (0, 12)]
            data = torch.cat(halves) if filled else torch.zeros(2 * rows, 3)
            layer_offset = (0, layer, 2)
            tensor = mapping.ShardedTensor.from_rank_offsets(
                "fc1", data, layer_offset, (1, rank, tp), prepend_axis_num=1
            )
            factories.append(mlp.apply_swiglu_sharded_factory(tensor, (layer_offset,)))
        return {"layers": factories}

    storage = MemoryStorage()
    save(storage, 2, lambda c: state(c.rank, 2, filled=True))
    for rank, found in enumerate(load(storage, 3, lambda c: state(c.rank, 3, filled=False))):
        for got, expected in zip(found["layers"], state(rank, 3, filled=True)["layers"], strict=True):
            assert torch.equal(got.data, expected.data)


def test_random_state_is_reseeded_when_the_axes_change_size() -> None:
    storage = MemoryStorage()

    def make(c: Coordinator) -> dict[str, object]:
        return {"rng": PerRank([c.rank], on_change="reseed")}

    save(storage, 2, make)
    same = load(storage, 2, lambda _: {"rng": PerRank(None, on_change="reseed")})
    assert [(s["rng"].value, s["rng"].seed) for s in same] == [([0], None), ([1], None)]
    more = load(storage, 3, lambda _: {"rng": PerRank(None, on_change="reseed")})
    assert [s["rng"].value for s in more] == [None] * 3
    assert len({s["rng"].seed for s in more}) == 3
