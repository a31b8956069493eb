"""Optimizers as a section of the training state: what comes back, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distckpt import Checkpointer, CheckpointError, CorruptionError, MismatchError, TrainState, UnsupportedTypeError
from distckpt.contents import StoredTensor
from distckpt.coordinator import Coordinator
from distckpt.testing import MemoryStorage, run_ranks
from distckpt.training.optimizer_state import optimizer_state, optimizer_template

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Job:
    def __init__(self, make: Make, dtype: torch.dtype = torch.float32) -> None:
        self.model = nn.Linear(3, 4).to(dtype)
        self.optimizer = make(list(self.model.parameters()))
        self.train = TrainState(self.model, self.optimizer)

    def step(self) -> None:
        def closure() -> float:
            self.optimizer.zero_grad()
            loss = self.model(torch.ones(2, 3, dtype=self.model.weight.dtype)).square().mean()
            loss.backward()
            return float(loss.detach())

        self.optimizer.step(closure)
        self.train.end_step()

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups


def resumed(saved: Job, make: Make, **options: Any) -> Job:
    """Another job that goes on where this one is."""
    other = Job(make, saved.model.weight.dtype)
    with Checkpointer(MemoryStorage()) as checkpointer:
        saved.train.save(checkpointer)
        other.train.load(checkpointer, **options)
    return other


def stored_by(job: Job) -> tuple[dict[str, Any], dict[int, str]]:
    """What Contents.tree has of an optimizer, and the names of its parameters."""
    names = {id(parameter): name for name, parameter in job.model.named_parameters()}

    def as_stored(value: object) -> object:
        if isinstance(value, Tensor):
            return StoredTensor(str(value.dtype).removeprefix("torch."), tuple(value.shape), False)
        return {key: as_stored(one) for key, one in value.items()} if isinstance(value, dict) else value

    stored = as_stored(optimizer_state(job.optimizer, names, "optimizer"))
    assert isinstance(stored, dict)
    return stored, names


sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
adam = partial(torch.optim.Adam, lr=0.1)


def two_groups(first: dict[str, Any], second: dict[str, Any], kind: Any = sgd) -> Make:
    return lambda p: kind([{"params": p[:1], **first}, {"params": p[1:], **second}])


# Groups


def test_group_without_parameters_keeps_its_options() -> None:
    def make(parameters: list[nn.Parameter], lr: float = 0.5) -> torch.optim.Optimizer:
        return sgd([{"params": parameters}, {"params": [], "lr": lr}])

    assert resumed(Job(partial(make, lr=0.25)), make).groups[1]["lr"] == 0.25


def test_groups_of_the_same_options_may_be_joined_and_of_others_not() -> None:
    assert resumed(Job(two_groups({"lr": 0.5}, {"lr": 0.5})), sgd).groups[0]["lr"] == 0.5
    with pytest.raises(MismatchError, match=r"saved in 2 groups, whose hyper-parameters differ \(lr; "):
        resumed(Job(two_groups({"lr": 0.5}, {"lr": 0.25})), sgd)


def test_groups_with_different_tensors_as_rates_are_different() -> None:
    saved = Job(two_groups({"lr": torch.tensor(0.5)}, {"lr": torch.tensor(0.25)}, adam))
    with pytest.raises(MismatchError, match=r"hyper-parameters differ \(lr"):
        resumed(saved, partial(adam, lr=torch.tensor(1.0)))
    other = resumed(saved, two_groups({}, {}, partial(adam, lr=torch.tensor(1.0))))
    assert [float(group["lr"]) for group in other.groups] == [0.5, 0.25]


def test_tensor_that_two_groups_share_is_not_shared_after_a_load() -> None:
    other = resumed(Job(partial(adam, lr=torch.tensor(0.5))), two_groups({}, {}, partial(adam, lr=torch.tensor(1.0))))
    assert other.groups[0]["lr"] is not other.groups[1]["lr"]


def test_tensor_of_one_group_is_filled_where_a_captured_step_reads_it() -> None:
    job = Job(partial(adam, lr=torch.tensor(0.5)))
    rate = job.groups[0]["lr"]
    with Checkpointer(MemoryStorage()) as checkpointer:
        job.train.save(checkpointer)
        rate.fill_(1.0)
        job.train.load(checkpointer)
    assert job.groups[0]["lr"] is rate
    assert float(rate) == 0.5


def test_stages_whose_groups_differ_are_saved_together_and_come_back() -> None:
    storage = MemoryStorage()

    def run(coordinator: Coordinator) -> list[float]:
        rank = coordinator.rank
        model = nn.ModuleDict({f"layer{rank}": nn.Linear(3, 4)})
        parameters = list(model.parameters())
        options = {"lr": 0.5, "momentum": 0.9}, {"lr": 0.25}
        groups = [{"params": [parameters[at]], **options[at]} for at in ((0, 1) if rank == 0 else (1,))]
        optimizer = torch.optim.SGD(groups, lr=1.0)
        train = TrainState(model, optimizer, coordinator=coordinator)
        with Checkpointer(storage, coordinator=coordinator, mesh={"pp": (rank, 2)}, timeout_s=20) as checkpointer:
            train.save(checkpointer)
            for group in optimizer.param_groups:
                group["lr"] = 9.0
            train.load(checkpointer)
        return [group["lr"] for group in optimizer.param_groups]

    assert run_ranks(2, run) == [[0.5, 0.25], [0.25]]


def without(job: Job, option: str) -> Job:
    for group in job.groups:
        del group[option]
    return job


def test_option_of_which_nothing_is_stored_keeps_its_own_value_and_is_a_warning() -> None:
    """As one that a newer torch has added."""
    stored, _ = stored_by(without(Job(sgd), "nesterov"))
    job = Job(partial(sgd, nesterov=True))
    names = {id(parameter): name for name, parameter in job.model.named_parameters()}
    template = optimizer_template(job.optimizer, names, stored, {}, "optimizer")
    (warning,) = template.warnings
    assert "nesterov: nothing is stored of it, it stays True" in warning
    template.restore()
    assert job.groups[0]["nesterov"] is True


def test_option_that_the_optimizer_has_not_is_an_error_unless_it_is_off_or_allowed() -> None:
    job = Job(sgd)
    job.groups[0]["cautious"] = True
    stored, _ = stored_by(job)
    other = Job(sgd)
    names = {id(parameter): name for name, parameter in other.model.named_parameters()}
    with pytest.raises(MismatchError, match="cautious: stored is True, and this job's optimizer has no such option"):
        optimizer_template(other.optimizer, names, stored, {}, "optimizer")
    allowed = optimizer_template(other.optimizer, names, stored, {}, "optimizer", ("optimizer/groups/*/cautious",))
    assert "cautious" in allowed.warnings[0]
    job.groups[0]["cautious"] = False
    template = optimizer_template(other.optimizer, names, stored_by(job)[0], {}, "optimizer")
    assert "cautious: False is stored" in template.warnings[0]
    template.restore()
    assert "cautious" not in other.groups[0]


# State that is not by parameter


def test_state_of_all_parameters_in_a_row_wants_them_in_the_same_order() -> None:
    lbfgs = partial(torch.optim.LBFGS, lr=0.1, max_iter=2)
    saved = Job(lbfgs)
    saved.step()
    other = resumed(saved, lbfgs)
    for _ in range(2):
        saved.step()
        other.step()
    assert torch.equal(saved.model.weight, other.model.weight)
    with pytest.raises(MismatchError, match=r"was \['weight', 'bias'\].* is \['bias', 'weight'\]"):
        resumed(saved, lambda p: lbfgs(p[::-1]))


def test_order_of_parameters_does_not_matter_where_each_has_its_own_state() -> None:
    saved = Job(adam)
    saved.step()
    other = resumed(saved, lambda p: adam(p[::-1]))
    assert torch.equal(
        other.optimizer.state[other.model.bias]["exp_avg"], saved.optimizer.state[saved.model.bias]["exp_avg"]
    )


class Masters(torch.optim.SGD):
    """Keeps float32 copies beside its state."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.masters = [parameter.detach().float().clone() for parameter in parameters]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "masters": self.masters}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rest = dict(state_dict)
        self.masters = rest.pop("masters")
        super().load_state_dict(rest)


def test_optimizer_that_has_more_to_say_is_taken_at_its_word() -> None:
    saved = Job(Masters)
    saved.step()
    saved.optimizer.masters[0].fill_(7.0)  # type: ignore[attr-defined]
    other = resumed(saved, Masters)
    assert torch.equal(other.optimizer.masters[0], torch.full((4, 3), 7.0))  # type: ignore[attr-defined]
    momentum = [job.optimizer.state[job.model.weight]["momentum_buffer"] for job in (saved, other)]
    assert torch.equal(*momentum)
    with pytest.raises(MismatchError, match="its state is that of all parameters in their order"):
        resumed(saved, lambda p: Masters(p[::-1]))


def test_optimizer_that_has_more_to_say_than_is_stored_is_an_error() -> None:
    stored, _ = stored_by(Job(sgd))
    job = Job(Masters)
    names = {id(parameter): name for name, parameter in job.model.named_parameters()}
    with pytest.raises(MismatchError, match="has more to store than the state of its parameters, and nothing"):
        optimizer_template(job.optimizer, names, stored, {}, "optimizer")


def test_optimizer_whose_own_word_would_not_be_exact_is_refused() -> None:
    job = Job(Masters, torch.bfloat16)
    job.optimizer.state[job.model.weight]["momentum_buffer"] = torch.ones(4, 3)
    with Checkpointer(MemoryStorage()) as checkpointer, pytest.raises(CheckpointError, match=r"Masters has more to"):
        job.train.save(checkpointer)


def test_what_a_hook_adds_comes_back() -> None:
    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made = sgd(parameters)
        made.register_state_dict_post_hook(lambda _, said: {**said, "seen": 3})
        made.register_load_state_dict_pre_hook(lambda own, said: setattr(own, "seen", said["seen"]))
        return made

    assert resumed(Job(make), make).optimizer.seen == 3  # type: ignore[attr-defined]


class Delegate(torch.optim.SGD):
    """As a wrapper that says what the optimizer in it says."""

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict()


def test_optimizer_that_overrides_and_adds_nothing_is_stored_by_name() -> None:
    job = Job(partial(Delegate, lr=0.1, momentum=0.9))
    job.step()
    assert "own" not in stored_by(job)[0]


def test_optimizer_whose_state_lies_on_other_ranks_is_refused_with_what_to_do() -> None:
    class ZeroRedundancyOptimizer(torch.optim.SGD):
        def consolidate_state_dict(self) -> None: ...

    with (
        Checkpointer(MemoryStorage()) as checkpointer,
        pytest.raises(CheckpointError, match=r"ZeroRedundancyOptimizer keeps on each rank .* Use fully_shard"),
    ):
        Job(partial(ZeroRedundancyOptimizer, lr=0.1)).train.save(checkpointer)


def test_arrays_of_numpy_come_back_as_such() -> None:
    saved = Job(sgd)
    saved.optimizer.state[saved.model.weight]["history"] = np.arange(3.0)
    other = resumed(saved, sgd)
    history = other.optimizer.state[other.model.weight]["history"]
    assert isinstance(history, np.ndarray)
    assert history.tolist() == [0.0, 1.0, 2.0]


def test_option_that_is_an_array_comes_back_and_one_that_is_large_is_refused() -> None:
    saved = Job(sgd)
    saved.groups[0]["momentum"] = np.array([0.5, 0.25])
    assert resumed(saved, sgd).groups[0]["momentum"].tolist() == [0.5, 0.25]
    saved.groups[0]["momentum"] = torch.zeros(5000)
    names = {id(parameter): name for name, parameter in saved.model.named_parameters()}
    with pytest.raises(UnsupportedTypeError, match="momentum: an option of 5000 elements"):
        optimizer_state(saved.optimizer, names, "optimizer")


# Where it goes


@pytest.mark.parametrize("option", ["capturable", "fused"])
def test_count_of_steps_goes_where_the_stored_options_want_it(option: str) -> None:
    saved = Job(torch.optim.AdamW)
    saved.step()
    stored, _ = stored_by(saved)
    (key,) = stored["groups"]
    weight = nn.Parameter(torch.ones(4, 3, device="meta"))
    optimizer = torch.optim.AdamW([weight])
    template = optimizer_template(optimizer, {id(weight): "weight"}, stored, {}, "optimizer")
    assert template.state["state"]["weight"]["step"].device.type == "cpu"  # type: ignore[index]
    stored["groups"][key] |= {option: True}
    template = optimizer_template(optimizer, {id(weight): "weight"}, stored, {}, "optimizer")
    assert template.state["state"]["weight"]["step"].device.type == "meta"  # type: ignore[index]


@pytest.mark.parametrize(("is_capturable", "device"), [(True, "meta"), (False, "cpu")])
def test_rate_that_is_a_tensor_goes_to_the_parameters_of_a_captured_step(is_capturable: bool, device: str) -> None:
    stored, _ = stored_by(Job(partial(adam, lr=torch.tensor(0.5), capturable=is_capturable)))
    weight = nn.Parameter(torch.ones(4, 3, device="meta"))
    optimizer = torch.optim.Adam([weight], lr=1.0)
    optimizer_template(optimizer, {id(weight): "weight"}, stored, {}, "optimizer").restore()
    assert optimizer.param_groups[0]["lr"].device.type == device


# Hostile input

KEY = "0123456789abcdef"
HOSTILE: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("groups of a list", lambda s: s.update(groups=[1]), "groups: stored is .* expected a dict"),
    ("no groups left", lambda s: s.update(groups={}), "is no stored group"),
    ("a group that is a number", lambda s: s.update(groups={KEY: 3}), "expected the options of a parameter group"),
    ("a group with an option without a name", lambda s: s.update(groups={KEY: {1: 2}}), "expected the options"),
    ("a group that names parameters", lambda s: s.update(groups={KEY: {"params": [1]}}), "expected the options"),
    ("a rate that is a text", lambda s: first_group(s).update(lr="abc"), "lr: stored is 'abc', expected a finite"),
    ("a rate that is none", lambda s: first_group(s).update(lr=float("nan")), "lr: .* expected a finite number"),
    ("an option that is a tensor", lambda s: first_group(s).update(lr=StoredTensor("int8", (), False)), "is a tensor"),
    (
        "an option of no type",
        lambda s: first_group(s).update(momentum={"tensor": "float33", "values": 1}),
        "no element type 'float33'",
    ),
    (
        "an option of no numbers",
        lambda s: first_group(s).update(momentum={"tensor": "float32", "values": "x"}),
        "which is no float32",
    ),
    ("group_of a number", lambda s: s.update(group_of=3), "group_of: stored is 3, expected a dict"),
    ("a parameter of no group", lambda s: s["group_of"].update(weight=True), "True is no stored group"),
    ("an empty group of no group", lambda s: s.update(empty={"1": "x"}), "'x' is no stored group"),
    ("state of a number", lambda s: s.update(state=3), "state: stored is 3, expected a dict"),
    ("state of a parameter that is none", lambda s: s["state"].update(weight=3), "state/weight: stored is 3"),
    ("other state that is none", lambda s: s.update(other=3), "other: stored is 3, expected a dict"),
    ("arrays that are none", lambda s: s.update(arrays={"weight": 3}), "expected lists of names"),
    ("an order that is none", lambda s: s.update(order=3), "expected lists of names"),
    ("own state that is none", lambda s: s.update(own=3), "own: stored is 3, expected a dict"),
]


def first_group(stored: dict[str, Any]) -> dict[str, Any]:
    group: dict[str, Any] = next(iter(stored["groups"].values()))
    return group


@pytest.mark.parametrize(("spoil", "message"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_what_is_no_stored_optimizer_is_corrupt(spoil: Callable[[dict[str, Any]], object], message: str) -> None:
    job = Job(sgd)
    job.step()
    stored, names = stored_by(job)
    spoil(stored)
    with pytest.raises(CorruptionError, match=message):
        optimizer_template(job.optimizer, names, stored, {}, "optimizer")


@pytest.mark.parametrize(
    ("option", "value"),
    [("momentum", "x"), ("nesterov", []), ("betas", ("x", 0.5)), ("betas", (0.5,)), ("betas", 0.5)],
)
def test_option_of_another_kind_than_the_optimizers_is_an_error(option: str, value: object) -> None:
    job = Job(adam if option == "betas" else sgd)
    stored, names = stored_by(job)
    first_group(stored)[option] = value
    with pytest.raises(MismatchError, match=f"{option}: stored is .* of another kind"):
        optimizer_template(job.optimizer, names, stored, {}, "optimizer")


def test_what_is_no_optimizers_state_is_an_error() -> None:
    job = Job(sgd)
    _, names = stored_by(job)
    with pytest.raises(MismatchError, match="has no groups: it is not what an optimizer of torch has stored"):
        optimizer_template(job.optimizer, names, {"x": 1}, {}, "optimizer")
