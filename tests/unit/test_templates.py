"""Loads with a template made for what is stored, of other element types, onto several devices."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from distckpt import Checkpointer, CheckpointError, MismatchError, PerRank, ShardedTensor
from distckpt.contents import Contents, StoredTensor
from distckpt.converting import fill_converted
from distckpt.coordinator import Coordinator
from distckpt.geometry import Box
from distckpt.testing import MemoryStorage, run_ranks
from distckpt.wanted_tensor import WantedTensor
from tests.unit.damage import change, flip, newest

STATE = {"model": {"w": torch.arange(12.0).view(3, 4), "n": 7}, "empty": {}, "metadata": [1, 2.5], "random": PerRank(3)}


def saved(state: dict[str, object]) -> MemoryStorage:
    storage = MemoryStorage()
    with Checkpointer(storage) as checkpointer:
        checkpointer.save(state, iteration=3, metadata={"a": (1, float("inf"))})
    return storage


def test_template_is_made_for_what_is_stored() -> None:
    seen: list[Contents] = []
    target: dict[str, object] = {}

    def template(contents: Contents) -> dict[str, object]:
        seen.append(contents)
        tensor = contents.tree["model"]["w"]  # type: ignore[index]
        target["model"] = {"w": torch.zeros(tensor.global_shape, dtype=getattr(torch, tensor.dtype)), "n": None}
        return target

    with Checkpointer(saved(STATE)) as checkpointer:
        report = checkpointer.load(template)
    assert torch.equal(target["model"]["w"], STATE["model"]["w"])  # type: ignore[index]
    assert target["model"]["n"] == 7  # type: ignore[index]
    (contents,) = seen
    assert (contents.iteration, contents.save_id, contents.world_size) == (3, report.save_id, 1)
    assert contents.metadata == {"a": (1, float("inf"))}
    model = {"n": 7, "w": StoredTensor("float32", (3, 4), is_sharded=False)}
    assert contents.tree == {"model": model, "empty": {}, "metadata": [1, 2.5]}
    assert contents.per_rank == {"random"}


def test_template_is_made_anew_for_the_checkpoint_that_a_load_falls_back_to() -> None:
    storage = MemoryStorage()
    with Checkpointer(storage) as checkpointer:
        for iteration, size in ((1, 4), (2, 9)):
            checkpointer.save({"w": torch.full((size,), float(iteration))}, iteration=iteration)
    directory, index = newest(storage)
    change(storage, f"{directory}/{index.files[0].name}", flip(index.files[0].header_bytes))
    target: dict[str, Tensor] = {}

    def template(contents: Contents) -> dict[str, object]:
        tensor = contents.tree["w"]
        assert isinstance(tensor, StoredTensor)
        target["w"] = torch.zeros(tensor.global_shape)
        return target  # type: ignore[return-value]

    with Checkpointer(storage) as checkpointer:
        assert checkpointer.load(template).iteration == 1
    assert target["w"].tolist() == [1.0] * 4


def test_digest_is_another_for_other_bytes_and_the_same_for_every_reader() -> None:
    digests: list[str] = []

    def template(contents: Contents) -> dict[str, object]:
        digests.append(contents.digest)
        return {"w": torch.zeros(3)}

    for value in (1.0, 2.0):
        storage = saved({"w": torch.full((3,), value)})
        for _ in range(2):
            with Checkpointer(storage) as checkpointer:
                checkpointer.load(template)
    assert digests[0] == digests[1]
    assert digests[2] == digests[3]
    assert digests[0] != digests[2]


def test_mismatch_that_one_rank_finds_while_it_makes_its_template_is_raised_on_all() -> None:
    storage = saved(STATE)

    def load(coordinator: Coordinator) -> MismatchError:
        def template(_: Contents) -> dict[str, object]:
            if coordinator.rank == 1:
                raise MismatchError("no scheduler is stored", missing=("scheduler",))
            return {"metadata": None}

        with (
            Checkpointer(storage, coordinator=coordinator, timeout_s=20) as checkpointer,
            pytest.raises(MismatchError, match="no scheduler is stored") as got,
        ):
            checkpointer.load(template)
        return got.value

    first, second = run_ranks(2, load)
    assert first.missing == second.missing == ("scheduler",)


def test_only_keys_that_are_allowed_to_may_be_missing_or_left_unread() -> None:
    storage = saved({"model": {"a": torch.ones(2), "old.head": torch.ones(2)}})

    def state() -> dict[str, object]:
        return {"model": {"a": torch.zeros(2), "new.head": torch.zeros(2)}}

    with Checkpointer(storage) as checkpointer:
        for allow in ((), ("model/old*",), ("model/new*", "old.head")):
            with pytest.raises(MismatchError) as got:
                checkpointer.load(state(), allow=allow)
            assert got.value.missing == (() if "model/new*" in allow else ("model/new.head",))
            assert got.value.unexpected == (() if "model/old*" in allow else ("model/old.head",))
        report = checkpointer.load(state(), allow=("model/*.head",))
    assert (report.missing, report.unexpected) == (("model/new.head",), ("model/old.head",))


def test_template_that_fails_on_one_rank_is_an_error_on_all() -> None:
    storage = saved(STATE)

    def load(coordinator: Coordinator) -> str:
        def template(_: Contents) -> dict[str, object]:
            if coordinator.rank == 1:
                raise ValueError("no such model here")
            return {"metadata": None}

        with (
            Checkpointer(storage, coordinator=coordinator, timeout_s=20) as checkpointer,
            pytest.raises(CheckpointError) as got,
        ):
            checkpointer.load(template)
        return str(got.value)

    first, second = run_ranks(2, load)
    assert first == second
    assert "no such model here" in first


@pytest.mark.parametrize(
    ("stored", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float64")]
)
def test_other_floating_point_type_is_refused_or_converted(stored: str, wanted: str) -> None:
    source = torch.randn(5, 3).to(getattr(torch, stored))
    target = {"w": torch.zeros(5, 3, dtype=getattr(torch, wanted)), "i": torch.zeros(2, dtype=torch.int64)}
    with Checkpointer(saved({"w": source, "i": torch.ones(2, dtype=torch.int64)})) as checkpointer:
        with pytest.raises(MismatchError, match="convert_dtypes=True converts it"):
            checkpointer.load(target)  # type: ignore[arg-type]
        report = checkpointer.load(target, convert_dtypes=True)  # type: ignore[arg-type]
    assert report.converted == ("w",)
    assert torch.equal(target["w"], source.to(target["w"].dtype))
    assert target["i"].tolist() == [1, 1]


def test_other_integer_type_is_never_converted() -> None:
    with (
        Checkpointer(saved({"w": torch.ones(3, dtype=torch.int32)})) as checkpointer,
        pytest.raises(MismatchError, match=r"the state has int64, stored is int32$|int64, stored is int32\n"),
    ):
        checkpointer.load({"w": torch.zeros(3, dtype=torch.int64)}, convert_dtypes=True)


def test_shards_and_modules_are_converted_in_place() -> None:
    model = nn.Linear(4, 4)
    storage = MemoryStorage()
    with Checkpointer(storage) as checkpointer:
        checkpointer.save({"model": model, "s": torch.arange(6.0)}, iteration=1)
        half = nn.Linear(4, 4, dtype=torch.bfloat16)
        weight = half.weight
        part = ShardedTensor("s", torch.zeros(2, dtype=torch.float64), global_shape=(6,), global_offset=(2,))
        checkpointer.load({"model": half, "s": part}, convert_dtypes=True)
    assert half.weight is weight
    assert torch.equal(half.weight, model.weight.bfloat16())
    assert part.data.tolist() == [2.0, 3.0]


@pytest.mark.parametrize(("stored", "wanted"), [("float32", "float64"), ("float64", "float16")])
def test_conversion_holds_a_bounded_part_at_a_time(stored: str, wanted: str) -> None:
    source = torch.randn(40, 8).to(getattr(torch, stored))
    shapes = {"w": (40, 8), "v": (8,)}
    targets = {key: torch.zeros(shape, dtype=getattr(torch, wanted)) for key, shape in shapes.items()}
    held: list[int] = []

    def read(parts: Sequence[WantedTensor]) -> None:
        held.append(sum(part.data.nbytes for part in parts))
        for part in parts:
            inside = tuple(slice(o, e) for o, e in zip(part.box.offset, part.box.end, strict=True))
            part.data.copy_((source if part.key == "w" else source[0])[inside])

    fill_converted(
        [(WantedTensor(k, Box.whole(shapes[k]), t), source.dtype) for k, t in targets.items()], read, held_bytes=512
    )
    assert torch.equal(targets["w"], source.to(targets["w"].dtype))
    assert torch.equal(targets["v"], targets["w"][0])
    assert sum(held) == 41 * 8 * source.element_size()
    assert max(held) <= 512


def test_converted_tensor_of_a_graph_cannot_be_used_in_backward() -> None:
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    loss = (weight * weight).sum()
    with Checkpointer(saved({"w": torch.ones(3)})) as checkpointer:
        checkpointer.load({"w": weight}, convert_dtypes=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_devices_are_chosen_by_the_longest_path() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2))
        target: dict[str, object] = {"model": model, "other": {"w": torch.empty(2)}}
    storage = saved({"model": nn.Sequential(nn.Linear(2, 2)), "other": {"w": torch.ones(2)}})
    with Checkpointer(storage) as checkpointer:
        checkpointer.load(target, device={"other": "no such device", "other/w": "cpu"})
    assert model[0].weight.device.type == "cpu"
    assert target["other"]["w"].tolist() == [1.0, 1.0]  # type: ignore[index]
