"""Targets on the meta device: what is made real, what stays the object it was, and what is tied stays tied."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from distckpt import Checkpointer, UnsupportedTypeError
from distckpt.testing import MemoryStorage

META = torch.device("meta")


def load(state: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    with Checkpointer(MemoryStorage()) as checkpointer:
        checkpointer.save(state, iteration=1)
        checkpointer.load(target)
    return target


def tied_module() -> nn.ModuleDict:
    module = nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in ("a", "b")})
    module["b"].weight = module["a"].weight
    return module


def test_tied_weights_of_a_meta_module_stay_tied() -> None:
    source = tied_module()
    with META:
        target = tied_module()
    load({"model": source}, {"model": target})
    assert target["a"].weight is target["b"].weight
    assert len(list(target.parameters())) == 1
    assert torch.equal(target["a"].weight, source["a"].weight)


@pytest.mark.parametrize("kind", [lambda t: t, nn.Parameter], ids=["tensor", "parameter"])
def test_one_meta_tensor_in_two_places_becomes_one_tensor(kind: Any) -> None:
    value, meta = torch.arange(2.0), kind(torch.empty(2, device=META))
    target = load({"a": value, "l": [value], "other": value}, {"a": meta, "l": [meta], "other": torch.empty_like(meta)})
    assert target["a"] is target["l"][0]
    assert type(target["a"]) is type(meta)
    assert target["other"] is not target["a"]
    assert [t.tolist() for t in (target["a"], target["other"])] == [[0, 1], [0, 1]]


def half_meta(device: torch.device | str) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device=device))


def test_real_parameters_of_a_partly_meta_module_are_filled_in_place() -> None:
    source, target = half_meta("cpu"), half_meta(META)
    real = target[0].weight
    optimizer = torch.optim.SGD(target[0].parameters(), lr=1.0)
    load({"model": source}, {"model": target})
    assert target[0].weight is real
    for found, expected in zip(target.parameters(), source.parameters(), strict=True):
        assert torch.equal(found, expected)
    target(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(target[0].weight, source[0].weight)


def test_frozen_parameters_of_a_meta_module_stay_frozen() -> None:
    with META:
        target = nn.Linear(2, 2)
    target.bias.requires_grad_(False)
    load({"model": nn.Linear(2, 2)}, {"model": target})
    assert (target.weight.requires_grad, target.bias.requires_grad) == (True, False)


def test_module_whose_only_meta_tensors_are_buffers_gets_real_ones() -> None:
    source = nn.BatchNorm1d(2, affine=False)
    source.running_mean = torch.full((2,), 5.0)
    with META:
        target = nn.BatchNorm1d(2, affine=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of a copy to the meta device, which does nothing.
        load({"model": source}, {"model": target})
    assert target.running_mean is not None
    assert target.running_mean.tolist() == [5, 5]
    assert dict(target.named_buffers()).keys() == dict(source.named_buffers()).keys()
    assert not any(buffer.is_meta for buffer in target.buffers())


def test_buffer_that_no_checkpoint_holds_stays_as_it_is() -> None:
    def make() -> nn.Module:
        module = nn.Linear(2, 2)
        module.register_buffer("scratch", torch.empty(3), persistent=False)
        return module

    with META:
        target = make()
    scratch = target.get_buffer("scratch")
    load({"model": make()}, {"model": target})
    assert not target.get_parameter("weight").is_meta
    assert target.get_buffer("scratch") is scratch


class Wrapped(torch.Tensor):
    """A wrapper around one tensor."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        wrapped = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        wrapped.inner = inner
        return wrapped

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} is not needed to store it")


def test_wrapper_subclass_around_meta_tensors_is_refused() -> None:
    with pytest.raises(UnsupportedTypeError, match="'w': a Wrapped on the meta device; make it real"):
        load({"w": Wrapped(torch.ones(2))}, {"w": Wrapped(torch.empty(2, device=META))})
