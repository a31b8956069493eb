"""A checkpoint rewritten for another mesh is what a job there would have saved, and loads there as if it was."""

from __future__ import annotations

from itertools import pairwise

import pytest

import distckpt
from distckpt import preview_reshard
from distckpt.errors import CheckpointError
from distckpt.resharding.plan_file import ReshardPlan, StageRule, TensorRule
from distckpt.resharding.planning import ReshardPreview
from distckpt.storage import Storage
from distckpt.testing import MemoryStorage
from tests.unit.model_states import (
    Layout,
    Model,
    Parameter,
    bytes_by_rank,
    check_holds,
    gpt,
    llama,
    load_model,
    moe,
)
from tests.unit.resharded_roots import index_of, reshard, reshard_into, saved

pytestmark = pytest.mark.usefixtures("small_windows")
MODELS = {"gpt": gpt(), "gpt untied": gpt(tied=False), "llama": llama(), "moe": moe()}


def ends_of(model: Model) -> tuple[TensorRule, ...]:
    """What a plan says of a model that lay on one stage; the moments follow."""
    first = {"first": "first", "both": "first", "last": "last"}
    return tuple(TensorRule(match=p.key, at=first[p.stage]) for p in model.parameters if isinstance(p.stage, str))


def plan_for(model: Model, layout: Layout, *, with_ends: bool = False) -> ReshardPlan:
    stages = {} if layout.layers is None else {"pp": StageRule(counts=layout.layers)}
    return ReshardPlan(stages=stages, tensors=ends_of(model) if with_ends else ())


def check_same(found: Storage, direct: Storage) -> None:
    """What a reshard made and what a job saved on that layout are alike, but for save_ids and who of several wrote."""
    a, b = index_of(found), index_of(direct)
    assert (a.mesh, a.world_size, a.iteration, a.metrics) == (b.mesh, b.world_size, b.iteration, b.metrics)
    assert {key: bytes(value) for key, value in a.values.items()} == {k: bytes(v) for k, v in b.values.items()}
    assert a.tensors.keys() == b.tensors.keys()
    for key, entry in a.tensors.items():
        other = b.tensors[key]
        for name in ("dtype", "global_shape", "partition", "owner", "blocks", "container", "given_as"):
            assert getattr(entry, name) == getattr(other, name), (key, name)


# Whole models, there and back.

CHAIN = (Layout(tp=2, pp=2, dp=2), Layout(tp=4), Layout(pp=4, dp=2), Layout(tp=2, pp=2, dp=2))
EP_CHAIN = (Layout(tp=2, pp=2, ep=2), Layout(tp=4, ep=1), Layout(pp=4, ep=2), Layout(dp=2, ep=4), Layout(tp=2, pp=2))


@pytest.mark.parametrize(
    ("model", "chain"),
    [(MODELS["gpt"], CHAIN), (MODELS["gpt untied"], CHAIN), (MODELS["llama"], CHAIN), (MODELS["moe"], EP_CHAIN)],
    ids=["gpt", "gpt-untied", "llama", "moe"],
)
def test_model_goes_from_layout_to_layout_and_comes_back(model: Model, chain: tuple[Layout, ...]) -> None:
    storage = saved(model, chain[0])
    for before, after in pairwise(chain):
        # What lay on one stage must be told where it goes.
        storage = reshard(storage, after, plan_for(model, after, with_ends=before.pp == 1 and after.pp > 1))
        check_holds(storage, model, after)
        check_same(storage, saved(model, after))
        reports = load_model(storage, model, after)
        same_places = (before.tp, before.pp) == (after.tp, after.pp)
        assert {report.reseeded for report in reports} == {() if same_places else ("rng",)}


@pytest.mark.parametrize("name", MODELS)
def test_model_of_one_rank_goes_to_many_with_what_a_plan_says_of_its_ends(name: str) -> None:
    model, many = MODELS[name], Layout(tp=2, pp=2, dp=2, ep=2 if name == "moe" else 1)
    storage = saved(model, Layout())
    with pytest.raises(CheckpointError, match="which of 2 coordinates of 'pp' holds it"):
        reshard(storage, many)
    target = reshard(storage, many, plan_for(model, many, with_ends=True))
    check_holds(target, model, many)
    check_same(target, saved(model, many))
    load_model(target, model, many)
    back = reshard(target, Layout())
    check_holds(back, model, Layout())
    check_same(back, storage)


@pytest.mark.parametrize("name", MODELS)
def test_ranks_get_as_many_bytes_as_was_announced(name: str) -> None:
    model, layout = MODELS[name], Layout(tp=4, pp=2, dp=2)
    storage = saved(model, Layout(tp=2, pp=2, dp=2))
    announced: list[ReshardPreview] = []
    target = MemoryStorage()
    report = reshard_into(storage, target, layout, on_plan=announced.append)
    preview = preview_reshard(storage, layout.mesh)
    assert announced == [preview]
    found = bytes_by_rank(target)
    assert {rank.rank: rank.bytes for rank in preview.ranks if rank.bytes} == found
    total = sum(tensor.numel() * tensor.element_size() for tensor in model.stored().values())
    assert preview.bytes == report.bytes_written == sum(found.values()) == total
    assert {rank.rank: rank.mesh for rank in preview.ranks} == {r: layout.place(r) for r in range(layout.world_size)}
    # The least that anyone can have is a dp rank's half of a stage's part.
    assert min(found.values()) * 2 > max(found.values())


def test_layers_are_dealt_out_as_asked() -> None:
    model = MODELS["gpt"]
    storage = saved(model, Layout(tp=2, pp=2))
    for layers in ((3, 1), (1, 1, 2), (0, 4)):
        layout = Layout(tp=1, pp=len(layers), layers=layers)
        target = reshard(storage, layout, plan_for(model, layout))
        check_holds(target, model, layout)
        load_model(target, model, layout)
    # From stages that are unlike: they come out as asked, and stay as they are if nobody asks.
    uneven = Layout(tp=2, pp=2, layers=(3, 1))
    storage = saved(model, uneven)
    check_holds(reshard(storage, Layout(tp=4, pp=2, layers=(3, 1))), model, uneven_on(4))
    even = Layout(tp=1, pp=4)
    check_holds(reshard(storage, even), model, even)


def uneven_on(tp: int) -> Layout:
    return Layout(tp=tp, pp=2, layers=(3, 1))


@pytest.mark.parametrize(
    ("layers", "message"),
    [((3, 2), "sum to the 4 layers"), ((2, 1, 1), "2 numbers expected"), (None, "do not fill 3 coordinates of 'pp'")],
    ids=str,
)
def test_layers_that_cannot_be_dealt_out_are_an_error(layers: tuple[int, ...] | None, message: str) -> None:
    storage = saved(MODELS["gpt"], Layout(pp=2))
    stages = {} if layers is None else {"pp": StageRule(counts=layers)}
    with pytest.raises(CheckpointError, match=message):
        distckpt.reshard(storage, MemoryStorage(), {"pp": 2 if layers else 3}, plan=ReshardPlan(stages=stages))


def test_same_mesh_with_other_layers_is_another_checkpoint() -> None:
    model, target = MODELS["gpt"], MemoryStorage()
    storage = saved(model, Layout(tp=2, pp=2))
    for layers in ((2, 2), (3, 1), (1, 3)):
        layout = Layout(tp=1, pp=2, layers=layers)
        assert not reshard_into(storage, target, layout, plan_for(model, layout)).is_there
        check_holds(target, model, layout)
        assert reshard_into(storage, target, layout, plan_for(model, layout)).is_there


def test_same_mesh_without_a_per_rank_value_is_another_checkpoint() -> None:
    model, target, layout = MODELS["gpt"], MemoryStorage(), Layout(tp=2, pp=2)
    storage = saved(model, layout)
    assert not reshard_into(storage, target, layout).is_there
    assert reshard_into(storage, target, layout).is_there
    assert not reshard_into(storage, target, layout, drop=["rng"]).is_there
    assert not index_of(target).per_rank


def uneven_model() -> Model:
    """Extents that no axis divides; some ranks of four have nothing of a tensor."""
    found = [
        Parameter("rows", (10, 3), ("tp", None), "first"),
        Parameter("few", (5,), ("tp",), "first"),
        Parameter("two", (2, 2), (None, "tp"), "last"),
        Parameter("fused", (2 * 7, 3), ("tp", None), 0, (2, 1)),
        Parameter("both.axes", (3, 7), ("ep", "tp"), 1),
        Parameter("layers.0.x", (9, 9), ("tp", None), 0),
        Parameter("layers.1.x", (9, 9), ("tp", None), 1),
    ]
    return Model("uneven", 2, tuple(found))


def test_extents_that_do_not_divide_are_cut_as_torch_does() -> None:
    model = uneven_model()
    storage = saved(model, Layout(tp=2, pp=2, dp=3))
    for layout in (Layout(tp=4, pp=2, ep=2), Layout(tp=3, pp=2, dp=2), Layout(tp=8, pp=2, ep=4), Layout(tp=2, pp=2)):
        storage = reshard(storage, layout)
        check_holds(storage, model, layout)
        load_model(storage, model, layout)
