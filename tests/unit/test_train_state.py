"""A whole training state saved, and gone on with: the losses after it are those of a run that was not interrupted."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from distckpt import Checkpointer, CheckpointError, MismatchError, TrainState
from distckpt.testing import MemoryStorage, run_ranks
from distckpt.training.sampler import ResumableSampler

STEPS = 12
SAVED_AT = 5


pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """With dropout, batch statistics, a tied weight and a frozen one."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, width)
        self.inner = nn.Sequential(
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Linear(width, width)
        )
        self.frozen = nn.Linear(width, width)
        self.head = nn.Linear(width, 16, bias=False)
        self.head.weight = self.embedding.weight
        for parameter in self.frozen.parameters():
            parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.embedding(x)) + self.frozen(self.embedding(x)))


def dataset(length: int = 40) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(
        torch.randint(16, (length,), generator=generator), torch.randint(16, (length,), generator=generator)
    )


class Job:
    """A small training job with everything that a real one has; another seed makes another model."""

    def __init__(
        self,
        seed: int,
        make_optimizer: Callable[[nn.Module], Any],
        *,
        wrap: Callable[[Any], Any] = lambda m: m,
        **options: Any,
    ) -> None:
        for seeding in (torch.manual_seed, random.seed, np.random.seed):
            seeding(seed)
        self.model = wrap(Net())
        self.optimizer = make_optimizer(self.model)
        self.scheduler = (
            LambdaLR(self.optimizer, lambda step: 0.9**step) if not isinstance(self.optimizer, dict) else None
        )
        self.noise = torch.Generator().manual_seed(seed)
        self.loader = DataLoader(dataset(), batch_sampler=ResumableSampler(dataset(), 4, seed=11))
        options = {"resume_check": "error"} | options
        self.train = TrainState(
            self.model,
            self.optimizer,
            scheduler=self.scheduler,
            dataloader=self.loader,
            generators={"noise": self.noise},
            **options,
        )

    @cached_property
    def batches(self) -> Iterator[Any]:
        """One for the whole run, as a loop has it."""
        return self.train.batches()

    def run(self, to: int) -> list[str]:
        losses: list[str] = []
        for x, y in self.batches:
            jitter = random.random() + np.random.rand() + torch.rand(1, generator=self.noise).item()
            loss = F.cross_entropy(self.model(x), y) * (1 + 0.01 * jitter)
            optimizers = self.optimizer.values() if isinstance(self.optimizer, dict) else [self.optimizer]
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            self.train.end_step(loss=loss)
            losses.append(loss.item().hex())
            if self.train.step == to:
                return losses
        raise AssertionError


class Lion(torch.optim.Optimizer):
    """Sign momentum with no step count (Chen et al., 2023)."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    p.sub_(average.lerp(p.grad, 1 - group["betas"][0]).sign(), alpha=group["lr"])
                    average.lerp_(p.grad, 1 - group["betas"][1])


class Counting(torch.optim.Optimizer):
    """State that is no tensor, nested state, and state of no parameter, as some optimizers keep it."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        total = self.state.setdefault("total", {"steps": 0})  # type: ignore[call-overload]
        total["steps"] += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, rms=0.5, history=[torch.zeros_like(p)], row={"mean": torch.zeros(p.shape[0])})
                state["step"] += 1
                state["rms"] = 0.9 * state["rms"] + 0.1 * float(p.grad.square().mean())
                state["history"][0].lerp_(p.grad, 0.1)
                state["row"]["mean"].lerp_(p.grad.reshape(p.shape[0], -1).mean(1), 0.5)
                p.sub_(state["history"][0], alpha=group["lr"] / (1 + state["rms"] + 0.01 * total["steps"]))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "adamw": lambda m: torch.optim.AdamW(trainable(m), lr=1e-2),
    "adamw of frozen ones too": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, amsgrad=True),
    "sgd with momentum": lambda m: torch.optim.SGD(trainable(m), lr=0.1, momentum=0.9, nesterov=True),
    "sgd": lambda m: torch.optim.SGD(trainable(m), lr=0.1),
    "adafactor": lambda m: torch.optim.Adafactor(trainable(m), lr=1e-2),
    "adam with a tensor as rate": lambda m: torch.optim.Adam(trainable(m), lr=torch.tensor(1e-2)),
    "lbfgs-like nested state": lambda m: Counting(trainable(m)),
    "lion": lambda m: Lion(trainable(m)),
    "two groups": lambda m: torch.optim.AdamW(
        [{"params": trainable(m)[:2], "lr": 1e-3}, {"params": trainable(m)[2:], "weight_decay": 0.0}], lr=1e-2
    ),
    "two optimizers": lambda m: {
        "first": torch.optim.AdamW(trainable(m)[:3], lr=1e-2),
        "second": torch.optim.SGD(trainable(m)[3:], lr=0.1, momentum=0.9),
    },
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_losses_after_a_resume_are_bit_equal(kind: str) -> None:
    storage = MemoryStorage()
    job = Job(1, OPTIMIZERS[kind])
    with Checkpointer(storage) as checkpointer:
        job.run(SAVED_AT)
        job.train.save(checkpointer)
        expected = job.run(STEPS)
    resumed = Job(2, OPTIMIZERS[kind])
    with Checkpointer(storage) as checkpointer:
        report = resumed.train.resume(checkpointer)
    assert report is not None
    assert (report.step, str(report.data), report.begun_anew) == (SAVED_AT, "exact", ())
    assert resumed.run(STEPS) == expected
    assert resumed.train.verdict.status in ("pass", "warn"), resumed.train.verdict


def test_optimizer_that_has_state_already_is_filled_in_place() -> None:
    storage = MemoryStorage()
    job = Job(1, OPTIMIZERS["adamw"])
    with Checkpointer(storage) as checkpointer:
        job.run(SAVED_AT)
        job.train.save(checkpointer)
        expected = job.run(STEPS)
        weight = job.model.inner[0].weight
        moment = job.optimizer.state[weight]["exp_avg"]
        job.train.load(checkpointer)
        assert job.optimizer.state[weight]["exp_avg"] is moment
        assert job.run(STEPS) == expected


@pytest.mark.parametrize("change", ["order", "regrouped alike"])
def test_parameters_in_another_order_keep_their_own_state(change: str) -> None:
    def again(model: nn.Module) -> torch.optim.Optimizer:
        parameters = trainable(model)[::-1]
        if change == "order":
            return torch.optim.AdamW(parameters, lr=1e-2)
        return torch.optim.AdamW([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=5.0)

    storage = MemoryStorage()
    job = Job(1, OPTIMIZERS["adamw"])
    with Checkpointer(storage) as checkpointer:
        job.run(SAVED_AT)
        job.train.save(checkpointer)
        expected = job.run(STEPS)
        resumed = Job(2, again)
        resumed.scheduler.base_lrs = job.scheduler.base_lrs * len(resumed.optimizer.param_groups)  # type: ignore[union-attr]
        resumed.train.load(checkpointer, sections=("model", "optimizer", "rng", "data", "progress"))
        resumed.scheduler.last_epoch = SAVED_AT  # type: ignore[union-attr]
    assert resumed.run(STEPS) == expected


def test_parameters_whose_groups_had_other_hyper_parameters_cannot_be_in_one() -> None:
    storage = MemoryStorage()
    job = Job(1, OPTIMIZERS["two groups"])
    with Checkpointer(storage) as checkpointer:
        job.run(2)
        job.train.save(checkpointer)
        with pytest.raises(MismatchError, match="saved in 2 groups, whose hyper-parameters differ"):
            Job(2, OPTIMIZERS["adamw"]).train.load(checkpointer)


def test_optimizer_of_another_model_is_refused_by_name() -> None:
    job = Job(1, lambda _: torch.optim.SGD(nn.Linear(2, 3).parameters(), lr=0.1))
    with (
        Checkpointer(MemoryStorage()) as checkpointer,
        pytest.raises(
            CheckpointError, match=r"parameter 0 of group 0, of shape \(3, 2\), is no parameter of the model"
        ),
    ):
        job.train.save(checkpointer)


# Wrappers


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def compiled_inside(model: Any) -> Any:
    model.inner = compiled(model.inner)
    return model


@pytest.mark.parametrize("wrap", [compiled, compiled_inside], ids=["whole", "a part"])
def test_names_are_those_of_the_author_whatever_is_compiled(wrap: Callable[[Any], Any]) -> None:
    plain, wrapped = Job(1, OPTIMIZERS["adamw"]), Job(2, OPTIMIZERS["adamw"], wrap=wrap)
    with Checkpointer(MemoryStorage()) as checkpointer:
        plain.run(3)
        plain.train.save(checkpointer)
        wrapped.train.load(checkpointer)
        wrapped.train.save(checkpointer)
        for (name, one), (_, other) in zip(
            plain.model.named_parameters(), wrapped.model.named_parameters(), strict=True
        ):
            assert torch.equal(one, other), name
        Job(3, OPTIMIZERS["adamw"]).train.load(checkpointer)


def test_name_of_the_author_that_looks_like_a_wrappers_is_kept() -> None:
    model = nn.ModuleDict({"module": nn.ModuleDict({"_orig_mod": nn.Linear(2, 2)})})
    with Checkpointer(MemoryStorage()) as checkpointer:
        TrainState(model).save(checkpointer)
        assert set(checkpointer.read()["model"]) == {"module._orig_mod.weight", "module._orig_mod.bias"}  # type: ignore[call-overload]


def test_names_are_those_of_the_author_under_activation_checkpointing() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain, wrapped = Net(), Net()
    wrapped.inner[0] = checkpoint_wrapper(wrapped.inner[0])
    wrapped.inner = checkpoint_wrapper(wrapped.inner)
    optimizer = torch.optim.AdamW(trainable(wrapped))
    wrapped(torch.arange(4)).sum().backward()
    optimizer.step()
    with Checkpointer(MemoryStorage()) as checkpointer:
        TrainState(wrapped, optimizer).save(checkpointer)
        again = torch.optim.AdamW(trainable(plain))
        TrainState(plain, again).load(checkpointer)
    assert torch.equal(plain.inner[0].weight, wrapped.inner[0].weight)
    assert len(again.state) == len(optimizer.state)


def test_several_models_are_kept_apart_by_name() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([*one.parameters(), *other.parameters()])
    train = TrainState({"generator": one, "critic": other}, optimizer)
    expected = (one.weight.clone(), other.weight.clone())
    with Checkpointer(MemoryStorage()) as checkpointer:
        train.save(checkpointer)
        with torch.no_grad():
            one.weight.zero_()
            other.weight.zero_()
        train.load(checkpointer)
    assert torch.equal(one.weight, expected[0])
    assert torch.equal(other.weight, expected[1])


class WithExtraState(nn.Linear):
    """As modules keep what is no tensor (fp8 scaling does)."""

    note: object = "fresh"

    def get_extra_state(self) -> object:
        return {"note": self.note}

    def set_extra_state(self, state: Any) -> None:
        self.note = state["note"]


def test_extra_state_of_a_module_comes_back() -> None:
    model, again = nn.Sequential(WithExtraState(2, 2)), nn.Sequential(WithExtraState(2, 2))
    model[0].note = "kept"
    with Checkpointer(MemoryStorage()) as checkpointer:
        TrainState(model).save(checkpointer)
        TrainState(again).load(checkpointer)
    assert again[0].note == "kept"


def test_extra_is_filled_in_place() -> None:
    average, value = torch.ones(3), {"ema": torch.ones(3), "note": "x", "schedule": Counter(3)}
    with Checkpointer(MemoryStorage()) as checkpointer:
        TrainState(nn.Linear(1, 1), extra=value).save(checkpointer)
        target: dict[str, object] = {"ema": average.zero_(), "note": "", "schedule": Counter(0)}
        TrainState(nn.Linear(1, 1), extra=target).load(checkpointer)
    assert average.tolist() == [1, 1, 1]
    assert (target["note"], target["schedule"].n) == ("x", 3)  # type: ignore[attr-defined]


class Counter:
    def __init__(self, n: int) -> None:
        self.n = n

    def state_dict(self) -> dict[str, object]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n = state["n"]


def test_failure_of_one_rank_to_make_its_state_is_an_error_on_all() -> None:
    storage = MemoryStorage()

    def save(coordinator: Any) -> str:
        model = nn.Linear(2, 2)
        parameters = (nn.Linear(2, 2) if coordinator.rank else model).parameters()
        train = TrainState(model, torch.optim.SGD(parameters, lr=0.1), coordinator=coordinator)
        with (
            Checkpointer(storage, coordinator=coordinator, timeout_s=20) as checkpointer,
            pytest.raises(CheckpointError, match="is no parameter of the model") as got,
        ):
            train.save(checkpointer)
        return str(got.value)

    first, second = run_ranks(2, save)
    assert first == second


def test_fsdp1_is_refused_with_the_remedy() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapped)
    with pytest.raises(CheckpointError, match="fully_shard"):
        TrainState(wrapped)


# What would begin anew


def saved_job(**options: Any) -> MemoryStorage:
    storage = MemoryStorage()
    job = Job(1, OPTIMIZERS["adamw"], **options)
    with Checkpointer(storage) as checkpointer:
        job.run(SAVED_AT)
        job.train.save(checkpointer)
    return storage


def bare(storage: MemoryStorage, *sections: str) -> None:
    """A checkpoint that holds no more than these sections."""
    job = Job(1, OPTIMIZERS["adamw"])
    job.run(SAVED_AT)
    with Checkpointer(storage) as checkpointer:
        job.train.save(checkpointer, sections=sections)


def snapshot(job: Job) -> list[Tensor]:
    return [tensor.clone() for tensor in (*job.model.parameters(), *job.model.buffers())]


@pytest.mark.parametrize("section", ["optimizer", "scheduler", "data"])
def test_section_that_is_not_stored_is_an_error_that_names_it_or_begins_anew_when_allowed(section: str) -> None:
    storage = MemoryStorage()
    bare(storage, *({"model", "optimizer", "scheduler", "data", "rng", "progress"} - {section}))
    job = Job(2, OPTIMIZERS["adamw"])
    before = snapshot(job)
    with Checkpointer(storage) as checkpointer:
        with pytest.raises(MismatchError, match=f"  {section}: this job has one, and nothing is stored of it"):
            job.train.load(checkpointer)
        assert all(torch.equal(*pair) for pair in zip(before, snapshot(job), strict=True))
        assert job.train.step == 0
        report = job.train.load(checkpointer, allow=(section,))
    assert report.begun_anew == (section,)
    assert job.train.step == SAVED_AT


def test_scaler_that_is_not_stored_is_an_error() -> None:
    with Checkpointer(saved_job()) as checkpointer, pytest.raises(MismatchError, match="  scaler: this job has one"):
        Job(2, OPTIMIZERS["adamw"], scaler=torch.amp.GradScaler("cpu")).train.load(checkpointer)


def test_section_that_is_stored_and_not_part_of_the_job_is_an_error_or_unread_when_allowed() -> None:
    storage = saved_job()
    model = Net()
    train = TrainState(model, torch.optim.AdamW(trainable(model)))
    with Checkpointer(storage) as checkpointer:
        with pytest.raises(
            MismatchError, match=r"  data: it is stored, and this job has none(.|\n)*  scheduler: it is stored"
        ):
            train.load(checkpointer)
        report = train.load(checkpointer, allow=("scheduler", "data", "rng/noise"))
    assert report.unread == ("data", "scheduler")


def test_allowed_section_is_loaded_where_it_is_stored() -> None:
    with Checkpointer(saved_job()) as checkpointer:
        job = Job(2, OPTIMIZERS["adamw"])
        assert job.train.load(checkpointer, allow=("scheduler", "optimizer")).begun_anew == ()
        assert job.scheduler.last_epoch == SAVED_AT  # type: ignore[union-attr]
        assert job.optimizer.state


def test_parameter_that_had_no_optimizer_state_is_an_error_or_begins_anew_when_allowed() -> None:
    def unfrozen(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-2)

    with Checkpointer(saved_job()) as checkpointer:
        with pytest.raises(MismatchError) as got:
            Job(2, unfrozen).train.load(checkpointer)
        assert got.value.missing == ("optimizer/group_of/frozen.bias", "optimizer/group_of/frozen.weight")
        job = Job(2, unfrozen)
        report = job.train.load(checkpointer, allow=("optimizer/*/frozen.*",))
    assert report.load.missing == got.value.missing
    assert job.model.frozen.weight not in job.optimizer.state
    assert job.model.inner[0].weight in job.optimizer.state


def test_optimizer_state_of_a_parameter_that_is_frozen_now_is_an_error() -> None:
    def frozen_more(model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in trainable(model) if p is not model.inner[0].weight], lr=1e-2)

    with Checkpointer(saved_job()) as checkpointer:
        with pytest.raises(MismatchError) as got:
            Job(2, frozen_more).train.load(checkpointer)
        assert set(got.value.unexpected) == {
            "optimizer/group_of/inner.0.weight",
            *(f"optimizer/state/inner.0.weight/{entry}" for entry in ("exp_avg", "exp_avg_sq", "step")),
        }


@pytest.mark.parametrize("names", [("",), ("one", "two")], ids=["the only one", "one of several"])
def test_state_of_another_optimizer_is_an_error_or_begins_anew_when_allowed(names: tuple[str, ...]) -> None:
    """It would be taken into an optimizer that never looks at it, and the moments would begin anew in silence."""

    def make(*kinds: Any) -> tuple[TrainState, list[Any]]:
        models = {name: nn.Linear(2, 2) for name in names}
        made = [kind(model.parameters(), lr=0.1) for kind, model in zip(kinds, models.values(), strict=False)]
        for model, optimizer in zip(models.values(), made, strict=True):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        several = dict(zip(names, made, strict=True))
        return TrainState(models, several) if names[0] else TrainState(models[""], made[0]), made

    adamw, sgd = torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)
    where = f"optimizer/{names[-1]}" if names[-1] else "optimizer"
    with Checkpointer(MemoryStorage()) as checkpointer:
        make(*[adamw] * len(names))[0].save(checkpointer)
        train, optimizers = make(*[adamw] * (len(names) - 1), sgd)
        momentum = [own["momentum_buffer"] for own in optimizers[-1].state.values()]
        with pytest.raises(
            MismatchError, match=f"{where}: what is stored is the state of AdamW, and this job's is SGD"
        ):
            train.load(checkpointer)
        assert train.load(checkpointer, allow=("optimizer",)).begun_anew == ("optimizer",)
        assert all(own["momentum_buffer"] is m for own, m in zip(optimizers[-1].state.values(), momentum, strict=True))
        assert "betas" not in optimizers[-1].param_groups[0]


def test_state_of_the_same_optimizer_by_another_name_is_taken_when_allowed() -> None:
    class FusedAdam(torch.optim.AdamW):
        pass

    with Checkpointer(saved_job()) as checkpointer:
        job = Job(2, lambda model: FusedAdam(trainable(model), lr=1e-2))
        with pytest.raises(MismatchError, match=r"state of AdamW, and this job's is .*FusedAdam"):
            job.train.load(checkpointer)
        assert job.train.load(checkpointer, allow=("optimizer/class",)).begun_anew == ()
    assert job.optimizer.state[job.model.inner[0].weight]["step"] == SAVED_AT


def test_state_of_a_parameter_that_had_none_when_saved_is_dropped() -> None:
    storage, job = MemoryStorage(), Job(1, OPTIMIZERS["adamw of frozen ones too"])
    with Checkpointer(storage) as checkpointer:
        job.train.save(checkpointer)
        job.run(2)
        assert job.optimizer.state
        job.train.load(checkpointer)
    assert not job.optimizer.state


def test_sections_that_are_no_such_are_a_value_error() -> None:
    job = Job(1, OPTIMIZERS["adamw"])
    with Checkpointer(MemoryStorage()) as checkpointer:
        for sections in (("model", "optimiser"), "model"):
            with pytest.raises(ValueError, match="expected a collection of model, optimizer"):
                job.train.save(checkpointer, sections=sections)


def test_sections_that_are_named_are_loaded_and_no_other() -> None:
    job = Job(2, OPTIMIZERS["adamw"])
    with Checkpointer(saved_job()) as checkpointer:
        job.train.load(checkpointer, sections=("model",))
    assert (job.train.step, job.scheduler.last_epoch, dict(job.optimizer.state)) == (0, 0, {})  # type: ignore[union-attr]


# The first start


def test_resume_where_nothing_was_saved_is_none_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with Checkpointer(MemoryStorage()) as checkpointer:
        assert Job(1, OPTIMIZERS["adamw"]).train.resume(checkpointer) is None
    assert "this job starts at step 0: no checkpoint" in caplog.text


def test_resume_of_what_does_not_fit_is_an_error_and_no_fresh_start() -> None:
    with Checkpointer(saved_job()) as checkpointer, pytest.raises(MismatchError):
        TrainState(nn.Linear(2, 2)).resume(checkpointer)


# Data


def test_other_data_are_an_error_or_gone_on_with_when_allowed() -> None:
    with Checkpointer(saved_job()) as checkpointer:
        for sampler, what in (
            (ResumableSampler(dataset(44), 4, seed=11), "the dataset has 44 samples, it had 40"),
            (ResumableSampler(dataset(), 4, seed=12), "the seed is 12, it was 11"),
            (ResumableSampler(40, 4, seed=11, fingerprint="another"), "the dataset's fingerprint is 'another', it was"),
        ):
            job = Job(2, OPTIMIZERS["adamw"])
            train = TrainState(
                job.model, job.optimizer, scheduler=job.scheduler, dataloader=sampler, generators={"noise": job.noise}
            )
            with pytest.raises(MismatchError, match=re.escape(what)):
                train.load(checkpointer)
            report = train.load(checkpointer, allow=("data",))
            assert str(report.data).startswith("inexact, because")
            assert sampler.consumed_samples == 4 * SAVED_AT


def test_another_batch_size_goes_on_at_the_same_sample() -> None:
    job = Job(2, OPTIMIZERS["adamw"])
    sampler = ResumableSampler(dataset(), 2, seed=11)
    train = TrainState(
        job.model, job.optimizer, scheduler=job.scheduler, dataloader=sampler, generators={"noise": job.noise}
    )
    with Checkpointer(saved_job()) as checkpointer:
        assert str(train.load(checkpointer).data) == "exact"
    assert sampler.consumed_samples == 4 * SAVED_AT


def test_data_position_that_stands_still_while_the_job_trains_is_an_error() -> None:
    job = Job(1, OPTIMIZERS["adamw"])
    with Checkpointer(MemoryStorage()) as checkpointer:
        for _ in range(2):
            job.train.end_step()
        with pytest.raises(CheckpointError, match=r"data position stands still.*batches\(\).*advance\(\)"):
            job.train.save(checkpointer)


def test_loader_that_keeps_no_position_is_refused() -> None:
    with pytest.raises(CheckpointError, match="keeps no position, and a resume would start from the first sample"):
        TrainState(nn.Linear(2, 2), dataloader=DataLoader(dataset(), batch_size=4))


class OwnLoader:
    """Keeps its own position, of one rank, as torchdata's does."""

    def __init__(self) -> None:
        self.at = 0

    def state_dict(self) -> dict[str, object]:
        return {"at": self.at, "workers": [{"rng": torch.arange(3)}]}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.at = state["at"]  # type: ignore[assignment]

    def __iter__(self) -> Iterator[int]:
        while True:
            self.at += 1
            yield self.at


def test_position_of_one_rank_is_kept_by_rank() -> None:
    storage = MemoryStorage()
    loader = OwnLoader()
    train = TrainState(nn.Linear(2, 2), dataloader=loader)
    batches = train.batches()
    assert [next(batches) for _ in range(3)] == [1, 2, 3]
    train.end_step()
    with Checkpointer(storage) as checkpointer:
        train.save(checkpointer)
        again = OwnLoader()
        report = TrainState(nn.Linear(2, 2), dataloader=again).load(checkpointer)
    assert (again.at, str(report.data)) == (3, "exact")


def test_position_of_one_rank_means_nothing_on_others() -> None:
    storage = MemoryStorage()
    loader = OwnLoader()
    loader.at = 7
    with Checkpointer(storage) as checkpointer:
        TrainState(nn.Linear(2, 2), dataloader=loader).save(checkpointer)

    def load(coordinator: Any) -> tuple[str, int]:
        own = OwnLoader()
        train = TrainState(nn.Linear(2, 2), dataloader=own, coordinator=coordinator)
        with Checkpointer(storage, coordinator=coordinator, timeout_s=20) as checkpointer:
            with pytest.raises(MismatchError, match="data/loader"):
                train.load(checkpointer)
            return str(train.load(checkpointer, allow=("data",)).data), own.at

    for data, at in run_ranks(2, load):
        assert data == "inexact, because the loader's state is that of one rank, and there are other ranks now"
        assert at == 0


class DrawingLoader(OwnLoader):
    """Draws the order of an epoch from the process's stream, as a shuffling DataLoader does."""

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]
        return self._rest(torch.randint(1000, ()).item())

    def _rest(self, drawn: float) -> Iterator[int]:
        while self.at < 3:
            self.at += 1
            yield int(drawn)
        self.at = 0


def test_every_epoch_is_begun_with_other_random_numbers() -> None:
    """Also where the loop itself draws none in between."""
    torch.manual_seed(1)
    batches = TrainState(nn.Linear(2, 2), dataloader=DrawingLoader()).batches()
    assert len({next(batches) for _ in range(9)}) == 3


def test_resume_at_the_last_batch_of_an_epoch_goes_on_with_the_next() -> None:
    storage = MemoryStorage()
    train = TrainState(nn.Linear(2, 2), dataloader=DrawingLoader())
    batches = train.batches()
    with Checkpointer(storage) as checkpointer:
        for _ in range(3):
            next(batches)
        train.end_step()
        train.save(checkpointer)
        expected = [next(batches) for _ in range(6)], torch.rand(1)
        resumed = TrainState(nn.Linear(2, 2), dataloader=DrawingLoader())
        resumed.load(checkpointer)
    again = resumed.batches()
    assert ([next(again) for _ in range(6)], torch.rand(1)) == expected


@pytest.mark.parametrize("saved_at", [9, 10, 11])
def test_losses_are_bit_equal_around_the_end_of_an_epoch(saved_at: int) -> None:
    job = Job(1, OPTIMIZERS["adamw"])
    with Checkpointer(MemoryStorage()) as checkpointer:
        job.run(saved_at)
        job.train.save(checkpointer)
        expected = job.run(22)
        resumed = Job(2, OPTIMIZERS["adamw"])
        resumed.train.load(checkpointer)
    assert resumed.run(22) == expected


# Accumulation


def test_gradients_are_saved_in_the_middle_of_an_accumulation() -> None:
    def half(job: Job) -> Tensor:
        x, y = next(job.batches)
        loss = F.cross_entropy(job.model(x), y) / 2
        loss.backward()
        return loss

    def finish(job: Job) -> list[str]:
        second = half(job)
        job.optimizer.step()
        job.optimizer.zero_grad()
        job.train.end_step(loss=second)
        return [second.item().hex(), *job.run(8)]

    storage, job = MemoryStorage(), Job(1, OPTIMIZERS["adamw"])
    job.run(SAVED_AT)
    job.optimizer.zero_grad()
    half(job)
    job.train.end_micro_step()
    with Checkpointer(storage) as checkpointer:
        job.train.save(checkpointer)
        expected = finish(job)
        resumed = Job(2, OPTIMIZERS["adamw"])
        resumed.train.load(checkpointer)
    assert (resumed.train.step, resumed.train.micro_step) == (SAVED_AT, 1)
    assert finish(resumed) == expected


def test_accumulated_gradients_that_are_kept_elsewhere_are_an_error() -> None:
    """As fully_shard does without synchronisation: .grad is None until the last batch of a step."""
    job = Job(1, OPTIMIZERS["adamw"])
    job.run(1)
    job.optimizer.zero_grad()
    job.train.end_micro_step()
    with Checkpointer(MemoryStorage()) as checkpointer:
        with pytest.raises(CheckpointError, match="1 batches of a step are accumulated, and no par"):
            job.train.save(checkpointer)
        assert checkpointer.iterations() == []
