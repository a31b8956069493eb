"""Objects with a state_dict(): modules know all their keys, others may be fresh and are given the whole stored state.

What an object cannot take is found before anything is changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from distckpt import Checkpointer, LoadReport, MismatchError, PerRank, ShardedTensor
from distckpt.coordinator import Coordinator, SingleProcess
from distckpt.testing import MemoryStorage, run_ranks

State = dict[str, Any]


class Holder:
    """Takes whatever it is given; without arguments it is fresh."""

    def __init__(self, **state: object) -> None:
        self.state: State = state

    def state_dict(self) -> State:
        return dict(self.state)

    def load_state_dict(self, state: State) -> None:
        self.state = state


class Wrapper:
    """Around an optimizer, as trainers write it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> State:
        return {"optim": self.optimizer.state_dict()}

    def load_state_dict(self, state: State) -> None:
        self.optimizer.load_state_dict(state["optim"])


def saved(state: State) -> Checkpointer:
    checkpointer = Checkpointer(MemoryStorage(), coordinator=SingleProcess())
    checkpointer.save(state, iteration=1)
    return checkpointer


def layers(count: int, value: float) -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(count)))
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


def values_of(model: nn.Module) -> set[float]:
    return {float(n) for parameter in model.parameters() for n in parameter.detach().flatten()}


LAYER_1 = ("model/1.bias", "model/1.weight")


# Modules


def test_module_that_lacks_stored_keys_is_a_mismatch_and_unchanged() -> None:
    checkpointer = saved({"model": layers(2, 5.0), "x": torch.ones(3)})
    target = {"model": layers(1, 0.0), "x": torch.zeros(3)}
    with pytest.raises(MismatchError, match="Nothing was changed") as caught:
        checkpointer.load(target)
    assert (caught.value.missing, caught.value.unexpected, caught.value.mismatched) == ((), LAYER_1, ())
    assert values_of(target["model"]) == {0.0}
    assert target["x"].tolist() == [0, 0, 0]


def test_module_that_lacks_stored_keys_is_filled_when_not_strict() -> None:
    target = {"model": layers(1, 0.0), "x": torch.zeros(3)}
    report = saved({"model": layers(2, 5.0), "x": torch.ones(3)}).load(target, strict=False)
    assert (report.missing, report.unexpected) == ((), LAYER_1)
    assert values_of(target["model"]) == {5.0}
    assert target["x"].tolist() == [1, 1, 1]


def test_module_with_keys_that_are_not_stored_is_a_mismatch_or_filled_in_part() -> None:
    checkpointer = saved({"model": layers(1, 5.0)})
    target = layers(2, 0.0)
    with pytest.raises(MismatchError) as caught:
        checkpointer.load({"model": target})
    assert (caught.value.missing, caught.value.unexpected) == (LAYER_1, ())
    assert values_of(target) == {0.0}
    report = checkpointer.load({"model": target}, strict=False)
    assert (report.missing, report.unexpected) == (LAYER_1, ())
    assert (values_of(target[0]), values_of(target[1])) == ({5.0}, {0.0})


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("stored", "wanted"), [(2, 1), (1, 2)])
def test_module_of_another_depth_is_the_same_on_two_ranks(stored: int, wanted: int, strict: bool) -> None:
    storage = MemoryStorage()

    def run(coordinator: Coordinator) -> tuple[object, ...]:
        checkpointer = Checkpointer(storage, coordinator=coordinator, timeout_s=20)
        checkpointer.save({"model": layers(stored, 5.0)}, iteration=1)
        target = layers(wanted, 0.0)
        try:
            found: LoadReport | MismatchError = checkpointer.load({"model": target}, strict=strict)
        except MismatchError as error:
            found = error
        return isinstance(found, MismatchError), found.missing, found.unexpected, values_of(target[0])

    lists = ((), LAYER_1) if stored > wanted else (LAYER_1, ())
    assert run_ranks(2, run) == [(strict, *lists, {0.0 if strict else 5.0})] * 2


# Fresh objects


def test_fresh_object_is_given_what_is_stored_type_for_type() -> None:
    state = {"a": np.arange(3), "t": (1, torch.ones(1)), "l": [torch.zeros(2), "x"], "e": {}, "n": None}
    target = Holder()
    saved({"o": Holder(**state)}).load({"o": target})
    assert repr(sorted(target.state.items())) == repr(sorted(state.items()))


def test_numpy_arrays_are_read_as_numpy_arrays() -> None:
    state = saved({"a": np.arange(3), "deep": [{"b": np.float32([[1.5]])}], "t": torch.arange(3)}).read()
    assert repr(state["a"]) == repr(np.arange(3))
    assert repr(state["deep"]) == repr([{"b": np.float32([[1.5]])}])
    assert repr(state["t"]) == repr(torch.arange(3))


def check_refused(stored: State, target: State, why: str) -> None:
    """That the object "o" is named, and neither it nor the tensor "x" beside it is touched."""
    target["x"] = torch.zeros(2)
    with pytest.raises(MismatchError, match=re.escape(why)) as caught:
        saved(stored | {"x": torch.ones(2)}).load(target, strict=False)
    assert caught.value.mismatched == ("o",)
    assert target["x"].tolist() == [0, 0]


@pytest.mark.parametrize("own", [{}, {"position": PerRank(0)}], ids=["none of its own", "with its own"])
def test_fresh_object_with_per_rank_values_stored_below_it_is_a_mismatch(own: State) -> None:
    target = Holder(**own)
    check_refused({"o": Holder(w=torch.ones(2), position=PerRank(7))}, {"o": target}, "'o/position' is a PerRank")
    assert target.state == own


def test_fresh_object_with_shards_stored_below_it_is_a_mismatch() -> None:
    halves = {
        name: ShardedTensor("m", torch.ones(2), global_shape=(4,), global_offset=(2 * i,))
        for i, name in enumerate(("low", "high"))
    }
    target = Holder()
    check_refused({"o": Holder(**halves)}, {"o": target}, "'m' was saved as shards")
    assert target.state == {}


def test_object_that_has_per_rank_values_and_shards_of_its_own_is_filled() -> None:
    def make(value: int) -> Holder:
        part = ShardedTensor("m", torch.full((2,), value), global_shape=(2,), global_offset=(0,))
        return Holder(m=part, position=PerRank(value), n=value)

    target = make(0)
    part, position = target.state["m"], target.state["position"]
    saved({"o": make(7)}).load({"o": target})
    assert (part.data.tolist(), position.value, target.state["n"]) == ([7, 7], 7, 7)


@pytest.fixture
def one_rank_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank_group")
@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, Wrapper], ids=["optimizer", "wrapper"])
def test_fresh_optimizer_of_dtensors_is_a_mismatch(wrap: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    optimizer, fresh = torch.optim.AdamW([weight]), torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    check_refused({"o": wrap(optimizer)}, {"o": wrap(fresh)}, "'o/")
    assert not fresh.state


def test_fresh_optimizer_in_a_wrapper_takes_plain_tensors() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer, fresh = torch.optim.AdamW([weight]), torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    saved({"o": Wrapper(optimizer)}).load({"o": Wrapper(fresh)})
    assert torch.equal(fresh.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg"])


def test_fresh_objects_whose_names_begin_alike_get_what_is_below_their_own() -> None:
    names = ["a", "a-", "a.b", "a0", "a!", "aa", "a~", "b"]
    state: State = {name: Holder(value=i, inner={"w": torch.full((2,), float(i))}) for i, name in enumerate(names)}
    checkpointer = saved(state)
    target = {name: Holder() for name in names}
    checkpointer.load(dict(target))
    for i, name in enumerate(names):
        assert target[name].state["value"] == i
        assert torch.equal(target[name].state["inner"]["w"], torch.full((2,), float(i)))
        assert target[name].state.keys() == {"value", "inner"}
