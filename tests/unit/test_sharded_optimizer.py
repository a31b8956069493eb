"""Models and optimizers that say themselves how they are sharded, by Megatron's convention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distckpt import Checkpointer, ShardedTensor, TrainState
from distckpt.testing import MemoryStorage


class MegatronShardedTensor:
    """Megatron's, as far as it is looked at."""

    def __init__(self, key: str, data: torch.Tensor) -> None:
        self.key, self.data = key, data
        self.global_shape = self.local_shape = tuple(data.shape)
        self.global_offset = (0,) * data.ndim
        self.replica_id, self.prepend_axis_num, self.allow_shape_mismatch = 0, 0, False


class MegatronShardedObject:
    def __init__(self, key: str, data: object) -> None:
        self.unique_key, self.data = key, data


for _kind in (MegatronShardedTensor, MegatronShardedObject):
    _kind.__module__, _kind.__name__ = (
        "megatron.core.dist_checkpointing.mapping",
        _kind.__name__.removeprefix("Megatron"),
    )


class Scaled(nn.Linear):
    """Keeps something that is no tensor, as layers of low precision do."""

    scale = 1

    def get_extra_state(self) -> object:
        return {"scale": self.scale}

    def set_extra_state(self, state: Any) -> None:
        self.scale = state["scale"]

    def sharded_state_dict(self) -> dict[str, object]:
        tensors = dict(self.named_parameters())
        sharded: dict[str, object] = {name: MegatronShardedTensor(name, p.detach()) for name, p in tensors.items()}
        return {
            **sharded,
            "_extra_state": MegatronShardedObject("layer._extra_state/shard_0_1", self.get_extra_state()),
        }


class MegatronOptimizer:
    """As Megatron's: no moments before the first step, or is_loading; then a count of steps too, in two places; and
    load_state_dict() wants tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state: dict[int, dict[str, torch.Tensor]] = {}
        self.groups: list[dict[str, Any]] = [{"lr": 0.1}]
        self.common_step = 0

    def step(self) -> None:
        self._init()
        self.common_step += 1
        self.groups[0]["step"] = self.common_step
        for own in self.state.values():
            own["exp_avg"].add_(1.5)

    def _init(self) -> None:
        for number, parameter in enumerate(self.model.parameters()):
            self.state.setdefault(number, {"exp_avg": torch.zeros_like(parameter, requires_grad=False)})

    def sharded_state_dict(self, model_state: dict[str, Any], is_loading: bool = False) -> dict[str, Any]:
        if is_loading:
            self._init()
        keys = [model_state[name].key for name, _ in self.model.named_parameters()]
        state: dict[Any, Any] = {
            number: {"exp_avg": MegatronShardedTensor(f"optimizer.exp_avg.{keys[number]}", own["exp_avg"])}
            for number, own in self.state.items()
        }
        if self.common_step:
            state["common_step"] = self.common_step
        return {"state": state, "param_groups": [dict(group) for group in self.groups]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.common_step = state["state"].pop("common_step", 0)
        assert all(isinstance(own["exp_avg"], torch.Tensor) for own in state["state"].values())
        self.state, self.groups = state["state"], state["param_groups"]


def make(scale: int) -> tuple[Scaled, MegatronOptimizer, TrainState]:
    model = Scaled(3, 2)
    model.scale = scale
    optimizer = MegatronOptimizer(model)
    return model, optimizer, TrainState(model, optimizer, resume_check="off")


@pytest.mark.parametrize("steps", [0, 2])
def test_fresh_optimizer_of_megatron_is_filled_with_moments_and_common_values(steps: int) -> None:
    model, optimizer, train = make(scale=7)
    for _ in range(steps):
        optimizer.step()
    with Checkpointer(MemoryStorage()) as checkpointer:
        train.save(checkpointer)
        other, fresh, resumed = make(scale=1)
        resumed.load(checkpointer) if steps else resumed.load(checkpointer, allow=("optimizer*",))
    assert (fresh.common_step, fresh.groups) == (steps, optimizer.groups)
    for number, own in optimizer.state.items():
        assert torch.equal(fresh.state[number]["exp_avg"], own["exp_avg"])
    assert torch.equal(other.weight, model.weight)
    assert other.scale == 7


def test_optimizer_of_our_own_shards_is_given_its_tensors() -> None:
    class Own(MegatronOptimizer):
        def sharded_state_dict(self, model_state: dict[str, Any], is_loading: bool = False) -> dict[str, Any]:
            self._init()
            moments = [own["exp_avg"] for own in self.state.values()]
            shapes = [tuple(moment.shape) for moment in moments]
            shards = [
                ShardedTensor(f"moment.{n}", moment, global_shape=shape, global_offset=(0,) * len(shape))
                for n, (moment, shape) in enumerate(zip(moments, shapes, strict=True))
            ]
            return {"moments": shards, "steps": self.common_step}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            for moment, own in zip(state["moments"], self.state.values(), strict=True):
                assert moment.data_ptr() == own["exp_avg"].data_ptr()
            self.common_step = state["steps"]

    jobs = []
    for _ in range(2):
        model = Scaled(3, 2)
        jobs.append((optimizer := Own(model), TrainState(model, optimizer, resume_check="off")))
    jobs[0][0].step()
    with Checkpointer(MemoryStorage()) as checkpointer:
        jobs[0][1].save(checkpointer)
        jobs[1][1].load(checkpointer)
    assert jobs[1][0].common_step == 1
    assert torch.equal(jobs[1][0].state[0]["exp_avg"], jobs[0][0].state[0]["exp_avg"])
