"""Keys of every kind, checkpoints that say nothing of their tensors, and plans: what is inferred, what is asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch

import distckpt
from distckpt import Checkpointer, PerRank, ShardedTensor
from distckpt.coordinator import Coordinator
from distckpt.errors import CheckpointError
from distckpt.resharding.plan_file import ReshardPlan, StageRule, read_plan
from distckpt.storage import Storage
from distckpt.testing import MemoryStorage, run_ranks
from tests.unit.megatron_states import Layout as MegatronLayout
from tests.unit.model_states import (
    Layout,
    Model,
    check_holds,
    gpt,
    held_chunks,
    load_model,
    read_tensors,
    whole_tensor,
)
from tests.unit.resharded_roots import index_of, reshard_into, saved
from tests.unit.test_megatron_cases import load_job, save_job
from tests.unit.test_resharding_cases import reshard, rows, save

pytestmark = pytest.mark.usefixtures("small_windows")

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


def test_plan_that_an_error_prints_for_stages_holds_layers() -> None:
    state = {"layers.0.w": torch.ones(2), "layers.1.w": torch.ones(2)}
    with pytest.raises(CheckpointError, match="no tensor is split over 'pp'") as refused:
        distckpt.reshard(save(lambda _: state), MemoryStorage(), {"pp": 2})
    plan = json.loads(str(refused.value).splitlines()[-1])
    assert plan == {
        "stages": {"pp": {"numbered_by": "layers"}},
        "tensors": [{"match": "*layers.*", "owner": "pp"}],
    }
    target = reshard(save(lambda _: state), plan_of_json(plan), pp=2)
    assert {key: [rank for rank, _ in chunks] for key, chunks in held_chunks(target).items()} == {
        "layers.0.w": [0],
        "layers.1.w": [1],
    }


def test_axis_over_which_all_is_replicated_may_keep_its_size() -> None:
    def make(rank: int) -> dict[str, object]:
        return {
            "w": rows("w", torch.arange(8.0), rank % 2, 2, partition=("tp",)),
            "at": PerRank(rank // 2, axes=("rep",), on_change="exact"),
        }

    source = save(make, tp=2, rep=2)
    target = reshard(source, tp=4, rep=2)
    assert index_of(target).mesh == {"tp": 4, "rep": 2}
    assert torch.equal(read_tensors(target)["w"], torch.arange(8.0))
    with pytest.raises(CheckpointError, match="no tensor is split over 'rep'"):
        distckpt.reshard(save(make, tp=2, rep=1), MemoryStorage(), {"tp": 2, "rep": 2}, drop=["at"])


def test_two_axes_that_may_split_a_tensor_are_asked_about() -> None:
    """Gate and up, split one by one over tp. Of replicas along ep one may have written the gate and one the rest: then
    ep may be what splits."""
    whole = torch.arange(64.0).reshape(16, 4)

    def make(rank: int) -> dict[str, object]:
        tp = rank % 2
        parts = [whole[begin : begin + 4].clone() for begin in (tp * 4, 8 + tp * 4)]
        shards = [
            ShardedTensor("fc1", part, global_shape=(16, 4), global_offset=(begin, 0))
            for part, begin in zip(parts, (tp * 4, 8 + tp * 4), strict=True)
        ]
        return {"fc1": shards}

    source = save(make, tp=2, ep=2)
    with pytest.raises(CheckpointError, match=r"fc1: shape \[16, 4\], and nothing tells whether or how tp split it"):
        reshard(source, tp=4)
    plan = plan_of_json({"tensors": [{"match": "fc1", "partition": ["tp", None], "blocks": [2, 1]}]})
    target = reshard(source, plan, tp=4)
    assert torch.equal(read_tensors(target)["fc1"], whole)
    assert sorted(box.offset[0] for rank, box in held_chunks(target)["fc1"] if rank == 0) == [0, 8]


def test_tensor_that_stages_or_tp_may_have_split_is_asked_about() -> None:
    whole = torch.arange(64.0).reshape(16, 4)

    def make(rank: int) -> dict[str, object]:
        own = {"own": torch.ones(9)} if rank == 1 else {}  # Then rank 3 writes the half of rank 1.
        return {"emb": rows("emb", whole, rank % 2, 2), **own}

    source = save(make, tp=2, pp=2)
    with pytest.raises(CheckpointError, match=r"emb: .* nothing tells whether or how tp, pp split it"):
        reshard(source, tp=2, pp=2)


def test_stages_do_not_hold_the_same_though_their_number_stays() -> None:
    """Layers that were stored by stages, but do not say so, would be dealt out to anybody."""

    def make(rank: int) -> dict[str, object]:
        stage = rank // 2
        keys = [f"layers.{number}.w" for number in (2 * stage, 2 * stage + 1)]
        return {key: rows(key, torch.arange(8.0), rank % 2, 2, partition=("tp",)) for key in keys}

    with pytest.raises(CheckpointError, match=r'no tensor is split over .pp.(.|\n)*"match":"\*layers.\*","owner":"pp"'):
        reshard(save(make, tp=2, pp=2), tp=4, pp=2)


def test_state_is_taken_along_without_its_parameters() -> None:
    def make(rank: int) -> dict[str, object]:
        whole = torch.arange(8.0).reshape(4, 2)
        return {key: rows(key, whole, rank, 2, partition=("tp", None)) for key in ("w", "exp_avg.w")}

    target = MemoryStorage()
    distckpt.reshard(save(make, tp=2), target, {"tp": 4}, select=["exp_avg.*"])
    assert set(index_of(target).tensors) == {"exp_avg.w"}
    assert len(held_chunks(target)["exp_avg.w"]) == 4


def test_layers_that_lie_on_stages_in_turn_are_dealt_out_when_a_plan_says_so() -> None:
    """As interleaved pipelines have them: the number does not say where a layer lay."""

    def make(rank: int) -> dict[str, object]:
        return {
            f"m{n}": ShardedTensor(
                f"layers.{n}.w",
                torch.full((2,), n),
                global_shape=(2,),
                global_offset=(0,),
                owner="pp",
                partition=(None,),
            )
            for n in range(rank, 4, 2)
        }

    source = save(make, pp=2)
    with pytest.raises(CheckpointError, match="deals out by number") as caught:
        reshard(source, pp=4)
    said = re.search(r"(\{\"stages\".*\}) deals out", str(caught.value))
    assert said
    target = reshard(source, plan_of_json(json.loads(said[1])), pp=4)
    assert {key: rank for key, ((rank, _),) in held_chunks(target).items()} == {f"layers.{n}.w": n for n in range(4)}
