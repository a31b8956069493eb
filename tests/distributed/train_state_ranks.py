"""What the processes of test_train_state.py do: two of them save, and three load what these have saved.

python train_state_ranks.py <directory>    the checks whose name begins with the number of processes
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import distckpt
from distckpt import MismatchError, TrainState
from tests.distributed.checks import run_checks

Checkpointer = partial(distckpt.Checkpointer, timeout_s=20.0)
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "amsgrad": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
}


class Block(nn.Module):
    """Sizes that neither two nor three ranks divide, and a parameter of which some ranks have nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(5)
        self.up = nn.Linear(5, 11)
        self.down = nn.Linear(11, 5)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(torch.relu(self.up(self.norm(x))))


class Job:
    def __init__(self, optimizer: str, seed: int) -> None:
        torch.manual_seed(seed)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.model = nn.Sequential(Block(), Block())
        for part in (*self.model, self.model):
            fully_shard(part, mesh=mesh)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.train = TrainState(self.model, self.optimizer, resume_check="off")

    def run(self, steps: int) -> None:
        for _ in range(steps):
            torch.manual_seed(100 + self.train.step)
            self.model(torch.randn(3, 5)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.train.end_step()

    def tensors(self) -> dict[str, Any]:
        """Model and optimizer state, whole."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        state = {names[parameter]: own for parameter, own in self.optimizer.state.items()}
        return {"model": _whole(self.model.state_dict()), "optimizer": _whole(state)}


def _whole(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _whole(item) for key, item in tree.items()}
    return tree.full_tensor() if isinstance(tree, DTensor) else copy.deepcopy(tree)


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}/{key}")
    else:
        assert torch.equal(found, expected), (where, found, expected)


def check_2_fresh_optimizer_of_uneven_shards_is_filled_and_goes_on_bit_by_bit(root: Path) -> None:
    for name in OPTIMIZERS:
        job = Job(name, seed=1)
        job.run(2)
        with Checkpointer(root / name) as checkpointer:
            job.train.save(checkpointer)
            expected = job.tensors()
            if dist.get_rank() == 0:
                torch.save(expected, root / f"{name}.pt")
            resumed = Job(name, seed=2)
            assert not resumed.optimizer.state
            resumed.train.load(checkpointer)
        assert_same(resumed.tensors(), expected)
        for parameter, own in resumed.optimizer.state.items():
            for entry, tensor in own.items():
                assert entry == "step" or tensor.placements == parameter.placements, (name, entry)
        job.run(2)
        resumed.run(2)
        assert_same(resumed.tensors(), job.tensors())


def check_2_ranks_have_nothing_of_a_parameter(root: Path) -> None:
    """Else the checks above would show less than they say."""
    local = [parameter.to_local().numel() for parameter in Job("sgd", seed=1).model.parameters()]
    sizes: list[Any] = [None, None]
    dist.all_gather_object(sizes, local)
    assert 0 in sizes[1]
    assert sizes[0] != sizes[1]


def check_2_ranks_whose_buffers_differ_store_those_of_rank_0(root: Path) -> None:
    """DistributedDataParallel gives rank 0's to the others ahead of a forward pass; between two of them they differ."""

    def make(seed: int) -> tuple[Any, Any, Any]:
        torch.manual_seed(seed)
        model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, TrainState(model, optimizer, resume_check="off")

    def run(model: Any, optimizer: Any, train: Any) -> list[str]:
        losses = []
        for _ in range(3):
            torch.manual_seed(10 * train.step + dist.get_rank())  # other data on each rank
            loss = model(torch.randn(6, 3)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            train.end_step()
            losses.append(loss.item().hex())
        return losses

    job = make(seed=1)
    run(*job)
    own = job[0].module[1].running_mean.clone()
    means: list[Any] = [None, None]
    dist.all_gather_object(means, own)
    assert not torch.equal(*means)
    with Checkpointer(root / "ddp") as checkpointer:
        job[2].save(checkpointer)
        expected = run(*job)
        stored: Any = checkpointer.read()
        assert torch.equal(stored["model"]["1.running_mean"], means[0])
        resumed = make(seed=2)
        resumed[2].load(checkpointer)
        assert torch.equal(resumed[0].module[1].running_mean, means[0])
    assert run(*resumed) == expected


def check_2_ranks_load_a_plain_models_state_into_a_sharded_model(root: Path) -> None:
    torch.manual_seed(6)
    plain, sharded = Block(), Block()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01)
    plain(torch.randn(3, 5)).square().sum().backward()
    optimizer.step()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    fresh = torch.optim.AdamW(sharded.parameters(), lr=0.01)
    with Checkpointer(root / "plain") as checkpointer:
        TrainState(plain, optimizer).save(checkpointer)
        TrainState(sharded, fresh, resume_check="off").load(checkpointer)
        assert_same(_whole(sharded.state_dict()), plain.state_dict())
        TrainState(sharded, fresh).save(checkpointer)
        TrainState(plain, optimizer, resume_check="off").load(checkpointer)


def check_2_ranks_load_an_adapter_whatever_wraps_the_model(root: Path) -> None:
    def whole() -> nn.Sequential:
        return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))

    with Checkpointer(root / "base") as checkpointer:
        TrainState(whole()).save(checkpointer)

    def sharded(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", (2,))
        for part in (*(m for m in model.modules() if isinstance(m, LoraLayer)), model):
            fully_shard(part, mesh=mesh)  # type: ignore[arg-type]
        return model

    def run(job: tuple[nn.Module, Any, TrainState], steps: int) -> list[str]:
        model, optimizer, train = job
        losses = []
        for _ in range(steps):
            torch.manual_seed(train.step)
            loss = model(torch.randn(4, 5)).square().mean()  # the same data on both ranks
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            train.end_step()
            losses.append(loss.item().hex())
        return losses

    def make(wrap: Callable[[Any], nn.Module], seed: int) -> tuple[nn.Module, Any, TrainState]:
        torch.manual_seed(seed)
        model = whole()
        base = TrainState(model).load_weights(root / "base")
        wrapped = wrap(get_peft_model(model, LoraConfig(r=2, target_modules=["0", "2"])))  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
        return wrapped, optimizer, TrainState(wrapped, optimizer, base=base, resume_check="off")

    wrappers = {"fsdp": sharded, "ddp": DistributedDataParallel, "compiled": partial(torch.compile, backend="eager")}
    for name, wrap in wrappers.items():
        job = make(wrap, seed=1)
        run(job, 2)
        with Checkpointer(root / f"adapter-{name}") as checkpointer:
            job[2].save(checkpointer)
            expected = run(job, 2)
            stored: Any = checkpointer.read(keys=["model"])
            assert len(stored["model"]) == 4, stored
            assert all(".lora_" in key for key in stored["model"]), stored
            for other in wrappers.values():
                resumed = make(other, seed=2)
                resumed[2].load(checkpointer)
                assert run(resumed, 2) == expected, (name, other)


def check_3_ranks_load_what_two_have_saved(root: Path) -> None:
    for name in OPTIMIZERS:
        job = Job(name, seed=3)
        with Checkpointer(root / name) as checkpointer:
            report = job.train.load(checkpointer)
        assert_same(job.tensors(), torch.load(root / f"{name}.pt", weights_only=True))
        assert (job.train.step, report.load.reseeded) == (2, ("rng/global",))
        job.run(1)


def check_3_ranks_refuse_the_state_of_another_optimizer(root: Path) -> None:
    job = Job("sgd", seed=4)
    job.run(1)
    before = job.tensors()
    with Checkpointer(root / "adamw") as checkpointer, pytest.raises(MismatchError, match="state of AdamW"):
        job.train.load(checkpointer)
    assert_same(job.tensors(), before)


if __name__ == "__main__":
    world_size = int(os.environ["WORLD_SIZE"])
    run_checks({n: c for n, c in globals().items() if n.startswith(f"check_{world_size}_")}, world_size)
