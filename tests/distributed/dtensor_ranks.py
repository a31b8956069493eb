"""What each of four processes does in test_dtensor.py: every check_ function runs on all of them, in order.

python dtensor_ranks.py <directory>    prints one line of JSON, [name, "ok" or a traceback], for each check
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import ShardOrderEntry
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import distckpt
from distckpt import DistributedError, MismatchError
from tests.distributed.checks import run_checks

WORLD_SIZE = 4
Checkpointer = partial(distckpt.Checkpointer, timeout_s=20.0)


def value(number: int, shape: Sequence[int]) -> Tensor:
    return torch.arange(prod(shape), dtype=torch.float32).reshape(tuple(shape)) + 1000 * number


def line() -> DeviceMesh:
    return init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))


def square() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


# Every placement here is uneven, or leaves some rank with nothing.
TENSORS: list[tuple[Sequence[int], Any, list[Placement]]] = [
    ((10, 3), line, [Shard(0)]),
    ((4, 6), line, [Shard(1)]),
    ((3,), line, [Shard(0)]),
    ((5, 2), line, [Replicate()]),
    ((), line, [Replicate()]),
    ((7, 5), square, [Shard(0), Shard(1)]),
    ((7, 2), square, [Shard(0), Shard(0)]),
    ((3, 5, 2), square, [Replicate(), Shard(1)]),
    ((9, 2), square, [Shard(0), Replicate()]),
    ((8, 3), square, [_StridedShard(0, split_factor=2), Shard(0)]),
    ((7, 3), square, [_StridedShard(0, split_factor=2), Shard(0)]),
    ((3, 9), square, [_StridedShard(1, split_factor=2), Shard(1)]),
]


def distributed(*, filled: bool, shift: int) -> dict[str, DTensor]:
    """The tensors, each under the placement of the one `shift` further on that has as many dimensions."""
    out = {}
    for i, (shape, _, _) in enumerate(TENSORS):
        alike = [t for t in TENSORS if len(t[0]) == len(shape)]
        _, mesh, placements = alike[(alike.index(TENSORS[i]) + shift) % len(alike)]
        whole = value(i, shape) if filled else torch.zeros(tuple(shape))
        out[f"t{i}"] = distribute_tensor(whole, mesh(), placements, src_data_rank=None)
    return out


def is_whole(tensor: DTensor, expected: Tensor) -> None:
    """The local part is what torch itself would cut out of the expected tensor."""
    own = distribute_tensor(expected, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
    assert torch.equal(tensor.to_local(), own), (tensor.placements, tensor.to_local(), own)
    if not any(isinstance(p, _StridedShard) for p in tensor.placements):  # which torch joins only if it is even
        assert torch.equal(tensor.full_tensor(), expected), (tensor.placements, tensor.full_tensor(), expected)


def check_dtensors_load_under_any_other_placement(root: Path) -> None:
    with Checkpointer(root / "placements") as checkpointer:
        checkpointer.save({"model": distributed(filled=True, shift=0)}, iteration=1)
        for shift in range(8):
            state = distributed(filled=False, shift=shift)
            checkpointer.load({"model": state})
            for i, (shape, _, _) in enumerate(TENSORS):
                is_whole(state[f"t{i}"], value(i, shape))


def check_dtensors_load_into_plain_tensors_on_every_rank(root: Path) -> None:
    state = {f"t{i}": torch.zeros(tuple(shape)) for i, (shape, _, _) in enumerate(TENSORS)}
    with Checkpointer(root / "placements") as checkpointer:
        checkpointer.load({"model": state})
    for i, (shape, _, _) in enumerate(TENSORS):
        assert torch.equal(state[f"t{i}"], value(i, shape))


def check_a_partial_tensor_is_refused(root: Path) -> None:
    state = {"grad": DTensor.from_local(torch.ones(3), line(), [Partial()])}
    with Checkpointer(root / "partial") as checkpointer:
        with pytest.raises(DistributedError, match=r"'grad': a DTensor with placement Partial\(sum\)") as caught:
            checkpointer.save(state, iteration=1)
        assert sorted(caught.value.failures) == [0, 1, 2, 3]
        assert checkpointer.iterations() == []


def check_dimensions_cut_in_another_order_are_refused(root: Path) -> None:
    tensor = distribute_tensor(value(0, (8, 2)), square(), [Shard(0), Shard(0)])
    tensor._spec.shard_order = (ShardOrderEntry(tensor_dim=0, mesh_dims=(1, 0)),)
    with Checkpointer(root / "order") as checkpointer, pytest.raises(DistributedError, match=r"'w'.*in the order"):
        checkpointer.save({"w": tensor}, iteration=1)


def check_ranks_outside_a_mesh_take_part(root: Path) -> None:
    pair = DeviceMesh("cpu", [1, 3], mesh_dim_names=("pp",))

    def make(*, filled: bool) -> dict[str, Any]:
        def tensor(shape: Sequence[int], placement: Placement) -> DTensor:
            whole = value(3, shape) if filled else torch.zeros(tuple(shape))
            return distribute_tensor(whole, pair, [placement])

        return {"w": tensor((5, 2), Shard(0)), "b": tensor((3,), Replicate()), "scale": tensor((), Replicate())}

    with Checkpointer(root / "outside") as checkpointer:
        checkpointer.save({"model": make(filled=True)}, iteration=1)
        state = make(filled=False)
        checkpointer.load({"model": state})
        plain = {"w": torch.zeros(5, 2), "b": torch.zeros(3), "scale": torch.zeros(())}
        checkpointer.load({"model": plain})
    for key, tensor in plain.items():
        assert torch.equal(tensor, value(3, tensor.shape)), key
    if dist.get_rank() in (1, 3):
        for tensor in state.values():
            is_whole(tensor, value(3, tensor.shape))


class Block(nn.Module):
    """Widths that neither two nor four ranks divide."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def sharded_model(mesh: DeviceMesh, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(Block(), Block())
    names = mesh.mesh_dim_names or ()
    for block in model:
        if "tp" in names:
            parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        torch.manual_seed(100 + step)
        model(torch.randn(3, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def full(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: full(item) for key, item in tree.items()}
    return tree.full_tensor() if isinstance(tree, DTensor) else tree


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected), (where, found, expected)
    else:
        assert found == expected, (where, found, expected)


def job_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}


def check_fsdp_with_tensor_parallelism_loads_on_other_meshes(root: Path) -> None:
    model = sharded_model(square(), seed=1)
    placements = {type(p) for param in model.parameters() for p in param.placements}
    assert _StridedShard in placements, placements
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    saved = job_state(model, optimizer)
    with Checkpointer(root / "fsdp") as checkpointer:
        checkpointer.save(saved, iteration=2)
        expected = full(saved)
        if dist.get_rank() == 0:
            torch.save(expected, root / "fsdp-full.pt")
        for mesh in (line(), square()):
            other = sharded_model(mesh, seed=2)
            fresh = torch.optim.AdamW(other.parameters(), lr=0.5)
            state = job_state(other, fresh)
            checkpointer.load(state)
            set_optimizer_state_dict(other, fresh, state["optim"])
            assert_same(full(job_state(other, fresh)), expected)
            assert fresh.param_groups[0]["lr"] == 0.01


def check_fsdp_module_is_an_object_that_loads_itself(root: Path) -> None:
    model = sharded_model(square(), seed=3)
    with Checkpointer(root / "object") as checkpointer:
        checkpointer.save({"model": model}, iteration=1)
        other = sharded_model(line(), seed=4)
        checkpointer.load({"model": other})
    assert_same(full(other.state_dict()), full(model.state_dict()))


def _expect_mismatch(checkpointer: distckpt.Checkpointer, state: dict[str, Any], *words: str) -> None:
    with pytest.raises(MismatchError) as caught:
        checkpointer.load(state)
    for word in words:
        assert word in str(caught.value), (word, caught.value)


def check_a_fresh_optimizer_of_sharded_parameters_is_an_error(root: Path) -> None:
    model = sharded_model(square(), seed=5)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 1)
    other = sharded_model(square(), seed=6)
    fresh = torch.optim.AdamW(other.parameters())
    with Checkpointer(root / "sharded-optimizer") as checkpointer:
        checkpointer.save({"optim": optimizer}, iteration=1)
        _expect_mismatch(checkpointer, {"optim": fresh}, "optim: the ", "no state for")
        _expect_mismatch(checkpointer, {"optim": fresh.state_dict()}, "optim/state/", "exp_avg")
        assert not fresh.state
        train(other, fresh, 1)  # its state exists now
        checkpointer.load({"optim": fresh})
    assert_same(full(fresh.state_dict()["state"]), full(optimizer.state_dict()["state"]))


def check_a_fresh_optimizer_of_plain_parameters_is_filled_or_an_error(root: Path) -> None:
    torch.manual_seed(7)
    model, other = Block(), Block()
    optimizer, fresh = torch.optim.AdamW(model.parameters(), lr=0.01), torch.optim.AdamW(other.parameters(), lr=0.5)
    train(model, optimizer, 2)
    with Checkpointer(root / "plain-optimizer") as checkpointer:
        checkpointer.save({"optim": optimizer}, iteration=1)
        _expect_mismatch(checkpointer, {"optim": fresh.state_dict()}, "optim/state/", "exp_avg")
        assert not fresh.state
        checkpointer.load({"optim": fresh})
        assert_same(fresh.state_dict()["state"], optimizer.state_dict()["state"])
        assert fresh.param_groups[0]["lr"] == 0.01
        checkpointer.save({"optim": optimizer.state_dict()}, iteration=2)
        again = torch.optim.AdamW(other.parameters(), lr=0.5)
        _expect_mismatch(checkpointer, {"optim": again.state_dict()}, "optim/state/", "exp_avg")
        checkpointer.load({"optim": again})
        assert_same(again.state_dict()["state"], optimizer.state_dict()["state"])


def check_meta_dtensors_are_replaced_by_filled_ones(root: Path) -> None:
    def meta(i: int, *, parameter: bool) -> DTensor:
        shape, mesh, placements = TENSORS[i]
        tensor = distribute_tensor(torch.empty(tuple(shape), device="meta"), mesh(), placements, src_data_rank=None)
        return nn.Parameter(tensor) if parameter else tensor  # type: ignore[return-value]

    state = {f"t{i}": meta(i, parameter=i % 2 == 1) for i in range(len(TENSORS))}
    with Checkpointer(root / "placements") as checkpointer:
        checkpointer.load({"model": state})
    for i, (shape, _, _) in enumerate(TENSORS):
        is_whole(state[f"t{i}"].detach(), value(i, shape))
        assert isinstance(state[f"t{i}"], nn.Parameter) == (i % 2 == 1)


def check_a_sharded_module_on_the_meta_device_loads_itself(root: Path) -> None:
    model = sharded_model(square(), seed=8)
    with torch.device("meta"):
        other = sharded_model(line(), seed=9)
    with Checkpointer(root / "meta-module") as checkpointer:
        checkpointer.save({"model": model}, iteration=1)
        checkpointer.load({"model": other})
    assert not any(p.is_meta for p in other.parameters())
    assert_same(full(other.state_dict()), full(model.state_dict()))
    train(other, torch.optim.SGD(other.parameters()), 1)


if __name__ == "__main__":
    run_checks(globals(), WORLD_SIZE)
