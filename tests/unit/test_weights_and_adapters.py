"""Weights alone, onto any device and element type, and adapters, which go with one base and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from distckpt import BaseCheckpoint, Checkpointer, CheckpointNotFoundError, MismatchError, TrainState
from distckpt.testing import MemoryStorage


def model(value: float, **options: Any) -> nn.Sequential:
    made = nn.Sequential(nn.Linear(3, 4, **options), nn.BatchNorm1d(4, **options), nn.Linear(4, 2, **options))
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            if not tensor.is_meta:
                tensor.fill_(value)
    return made


def train(module: nn.Module, steps: int = 1) -> TrainState:
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1)
    state = TrainState(module, optimizer)
    for _ in range(steps):
        module(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        state.end_step()
    return state


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A run of two steps."""
    state = train(model(0.5), steps=2)
    with Checkpointer(tmp_path / "base") as checkpointer:
        state.save(checkpointer)
    return tmp_path / "base"


def stored_weight(root: Path) -> Tensor:
    with Checkpointer(root) as checkpointer:
        return checkpointer.read(keys=["model/0.weight"])["model"]["0.weight"]  # type: ignore[index,no-any-return]


def test_weights_alone_begin_at_step_0_with_a_fresh_optimizer(base: Path) -> None:
    before = sorted(base.rglob("*"))
    target = model(0.0)
    state = train(target, steps=0)
    loaded = state.load_weights(base)
    assert torch.equal(target[0].weight, stored_weight(base))
    assert target[1].num_batches_tracked == 2
    assert state.step == 0
    assert (loaded.location, loaded.iteration) == (str(base), 2)
    assert sorted(base.rglob("*")) == before


def test_weights_alone_of_a_checkpoint_that_no_train_state_saved(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save({"net": {"inner": model(3.0)}}, iteration=1)
    target = model(0.0)
    state = TrainState(target)
    with pytest.raises(MismatchError, match=r"has no section 'model'; it has \['net'\]"):
        state.load_weights(tmp_path)
    state.load_weights(tmp_path, section="net/inner")
    assert target[0].weight.unique().tolist() == [3.0]


def test_weights_with_a_new_head_are_loaded_when_that_is_said(base: Path) -> None:
    target = nn.Sequential(*model(0.0), nn.Linear(2, 5))
    with pytest.raises(MismatchError) as got:
        TrainState(target).load_weights(base)
    assert got.value.missing == ("model/3.bias", "model/3.weight")
    TrainState(target).load_weights(base, allow=("model/3.*",))
    assert torch.equal(target[0].weight, stored_weight(base))


def test_weights_go_into_another_type_when_that_is_said(base: Path) -> None:
    target = model(0.0, dtype=torch.bfloat16)
    with pytest.raises(MismatchError, match="convert_dtypes=True"):
        TrainState(target).load_weights(base)
    TrainState(target).load_weights(base, convert_dtypes=True)
    assert torch.equal(target[0].weight, stored_weight(base).bfloat16())


def test_weights_make_a_model_on_the_meta_device_real(base: Path) -> None:
    target = model(0.0, device="meta")
    target[2].weight.requires_grad_(False)
    TrainState(target).load_weights(base)
    assert torch.equal(target[0].weight, stored_weight(base))
    assert [p.requires_grad for p in target.parameters()] == [True] * 4 + [False, True]
    assert target(torch.ones(2, 3)).device.type == "cpu"


def test_model_on_the_meta_device_with_an_optimizer_is_an_error(base: Path) -> None:
    target = model(0.0, device="meta")
    state = TrainState(target, torch.optim.SGD(target.parameters(), lr=0.1))
    with Checkpointer(base) as checkpointer, pytest.raises(MismatchError, match=r"'0.weight' is on the meta device"):
        state.load(checkpointer, sections=("model",))


def test_moments_take_the_type_of_their_parameter_when_converted(base: Path) -> None:
    target = model(0.0, dtype=torch.bfloat16)
    state = train(target, steps=0)
    with Checkpointer(base) as checkpointer:
        state.load(checkpointer, convert_dtypes=True)
    entry = state._parts.torch_optimizers()[0].state[target[0].weight]
    assert (entry["exp_avg"].dtype, entry["step"].dtype) == (torch.bfloat16, torch.float32)
    target(torch.ones(2, 3, dtype=torch.bfloat16)).sum().backward()
    state._parts.torch_optimizers()[0].step()


def test_moments_of_a_type_of_their_own_keep_it() -> None:
    """As optimizers keep them in float32 for parameters in bfloat16; torch's own load_state_dict() casts them."""
    weight = nn.Linear(3, 2, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(weight.parameters(), lr=0.1)
    for parameter in weight.parameters():
        optimizer.state[parameter] = {"momentum_buffer": torch.rand(parameter.shape, dtype=torch.float32)}
    storage, again = MemoryStorage(), nn.Linear(3, 2, dtype=torch.bfloat16)
    fresh = torch.optim.SGD(again.parameters(), lr=0.1)
    with Checkpointer(storage) as checkpointer:
        TrainState(weight, optimizer).save(checkpointer)
        TrainState(again, fresh).load(checkpointer)
    loaded = fresh.state[again.weight]["momentum_buffer"]
    assert torch.equal(loaded, optimizer.state[weight.weight]["momentum_buffer"])
    assert loaded.dtype == torch.float32


# Adapters


STATISTICS = ("base.1.running_mean", "base.1.running_var", "base.1.num_batches_tracked")


class Adapted(nn.Module):
    """A frozen base and a low-rank adapter of its first layer."""

    def __init__(self, base: nn.Sequential) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(3, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base[2](self.base[0](x) + self.up(self.down(x)))  # type: ignore[no-any-return]


def adapter_state(root: Path, base: BaseCheckpoint | None = None) -> TrainState:
    target = model(0.0)
    loaded = TrainState(target).load_weights(root)
    adapted = Adapted(target)
    return TrainState(
        adapted, torch.optim.AdamW([*adapted.down.parameters(), *adapted.up.parameters()]), base=base or loaded
    )


def test_checkpoint_of_an_adapter_holds_the_adapter_and_names_its_base(base: Path, tmp_path: Path) -> None:
    state = adapter_state(base)
    with Checkpointer(tmp_path / "adapter") as checkpointer:
        state.save(checkpointer)
        assert stored_names(checkpointer) == {"down.weight", "up.weight", *STATISTICS}
        assert adapter_state(base).load(checkpointer).step == 0


def stored_names(checkpointer: Checkpointer) -> set[str]:
    return set(checkpointer.read(keys=["model"])["model"])  # type: ignore[call-overload]


def test_batch_statistics_of_a_frozen_base_come_back_too(base: Path, tmp_path: Path) -> None:
    """In training they change, though nothing of the module is trained."""
    module = model(0.0)
    adapted = Adapted(module)
    state = TrainState(adapted, base=TrainState(module).load_weights(base))
    module[1](torch.rand(4, 4))
    with Checkpointer(tmp_path / "adapter") as checkpointer:
        state.save(checkpointer)
        expected = module[1].running_mean.clone()
        TrainState(module).load_weights(base)
        assert not torch.equal(module[1].running_mean, expected)
        state.load(checkpointer)
    assert torch.equal(module[1].running_mean, expected)


def test_adapter_in_a_checkpoint_wrapper_is_stored(base: Path, tmp_path: Path) -> None:
    """Activation checkpointing leaves itself out of the names of a state_dict(), and not out of those of modules."""
    module = model(0.0)
    adapted = Adapted(module)
    adapted.down = checkpoint_wrapper(adapted.down)  # type: ignore[no-untyped-call]
    with Checkpointer(tmp_path / "adapter") as checkpointer:
        TrainState(adapted, base=TrainState(module).load_weights(base)).save(checkpointer)
        assert stored_names(checkpointer) == {"down.weight", "up.weight", *STATISTICS}


def test_extra_state_of_a_frozen_module_is_left_alone(base: Path, tmp_path: Path) -> None:
    class Scaled(nn.Linear):
        def get_extra_state(self) -> object:
            return {"scale": 2}

        def set_extra_state(self, state: Any) -> None:
            raise AssertionError

    module = model(0.0)
    loaded = TrainState(module).load_weights(base)
    adapted = Adapted(module)
    module[2] = Scaled(4, 2).requires_grad_(False)
    state = TrainState(adapted, base=loaded)
    with Checkpointer(tmp_path / "adapter") as checkpointer:
        state.save(checkpointer)
        state.load(checkpointer)


def test_adapter_on_another_base_is_an_error(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with Checkpointer(other) as checkpointer:
        train(model(0.25), steps=2).save(checkpointer)
    with Checkpointer(tmp_path / "adapter") as checkpointer:
        adapter_state(base).save(checkpointer)
        with pytest.raises(
            MismatchError, match=rf"trained on another base: on {base}, iteration 2 .*{other}, iteration 2"
        ):
            adapter_state(other).load(checkpointer)


def test_adapter_without_its_base_is_an_error_and_so_is_a_base_without_an_adapter(base: Path, tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "adapter") as checkpointer:
        state = adapter_state(base)
        state.save(checkpointer)
        with pytest.raises(MismatchError, match=rf"holds an adapter, trained on {base}.*Load that base first"):
            TrainState(Adapted(model(0.0))).load(checkpointer, sections=("model",))
    with Checkpointer(base) as checkpointer, pytest.raises(MismatchError, match="holds a whole model, no adapter"):
        state.load(checkpointer)


def test_base_that_was_moved_is_the_same_base(base: Path, tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "adapter") as checkpointer:
        adapter_state(base).save(checkpointer)
        moved = base.rename(tmp_path / "moved")
        adapter_state(moved).load(checkpointer)


def test_base_of_files_is_known_by_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "model.safetensors"
    file.write_bytes(b"weights")
    (tmp_path / "a" / "README.md").write_text("not weights")
    first = BaseCheckpoint.of_files(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("still not")
    assert BaseCheckpoint.of_files(tmp_path / "a") == first
    assert (first.iteration, first.save_id) == (None, None)
    file.write_bytes(b"weightz")
    assert BaseCheckpoint.of_files(tmp_path / "a").digest != first.digest
    assert BaseCheckpoint.of_files(file).digest == BaseCheckpoint.of_files(tmp_path / "a").digest
    with pytest.raises(CheckpointNotFoundError, match="no weight files there"):
        BaseCheckpoint.of_files(tmp_path / "b")


class Scaled(nn.Module):
    """An adapter with a buffer of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.zeros(()))


def test_buffers_of_an_adapter_are_stored_with_it_and_those_of_its_base_are_not(base: Path, tmp_path: Path) -> None:
    target = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4).eval(), nn.Linear(4, 2))
    loaded = TrainState(target).load_weights(base)
    with Checkpointer(tmp_path / "adapter") as checkpointer:
        TrainState(Scaled(nn.Sequential(target[0], target[2])), base=loaded).save(checkpointer)
        assert set(checkpointer.read(keys=["model"])["model"]) == {"gain", "count"}  # type: ignore[call-overload]


def test_head_of_another_size_keeps_its_weights_when_allowed(base: Path) -> None:
    target = nn.Sequential(*model(0.0)[:2], nn.Linear(4, 7))
    before = target[2].weight.clone()
    with pytest.raises(MismatchError, match=r"model/2.weight: the state has \(7, 4\), stored is \(2, 4\)"):
        TrainState(target).load_weights(base)
    TrainState(target).load_weights(base, allow=("model/2.*",))
    assert torch.equal(target[2].weight, before)
    assert torch.equal(target[0].weight, stored_weight(base))


def test_weights_of_a_meta_model_with_an_optimizer_are_refused(base: Path) -> None:
    target = model(0.0, device="meta")
    with pytest.raises(MismatchError, match="on the meta device, and an optimizer"):
        TrainState(target, torch.optim.SGD(target.parameters(), lr=0.1)).load_weights(base)
