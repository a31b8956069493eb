"""Resumes that are none, or of another run: each is named, in an error or a warning."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, LinearLR, SequentialLR

from distckpt import BaseCheckpoint, Checkpointer, CheckpointError, CorruptionError, MismatchError, TrainState
from distckpt.coordinator import Coordinator
from distckpt.testing import MemoryStorage, run_ranks
from distckpt.training.assets import extract_assets
from distckpt.training.progress import ResumeCheckFailed
from distckpt.training.sampler import ResumableSampler
from distckpt.training.sections import SECTIONS

STEPS = 20


pytestmark = pytest.mark.usefixtures("one_thread")


class Job:
    """Learns a line from noisy points."""

    def __init__(self, seed: int = 0, *, scale: float = 0.1, **options: Any) -> None:
        torch.manual_seed(seed)
        self.model = nn.Linear(4, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=scale)
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1 / (1 + 0.01 * step))
        generator = torch.Generator().manual_seed(5)
        self.data = torch.randn(400, 4, generator=generator)
        self.noise = torch.randn(400, generator=generator) * 0.1
        self.sampler = ResumableSampler(400, 8, rank=0, world_size=1)
        options = {"resume_check": "error"} | options
        self.train = TrainState(
            self.model, self.optimizer, scheduler=self.scheduler, dataloader=self.sampler, **options
        )
        self.batches = self.train.batches()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            rows = next(self.batches)
            found = self.model(self.data[rows]).squeeze(1)
            loss = (found - self.data[rows].sum(1) - self.noise[rows]).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), 100.0)
            self.optimizer.step()
            self.scheduler.step()
            self.train.end_step(loss=loss, grad_norm=norm)


def saved(**options: Any) -> MemoryStorage:
    storage, job = MemoryStorage(), Job(**options)
    job.run(STEPS)
    with Checkpointer(storage) as checkpointer:
        job.train.save(checkpointer)
    return storage


def resumed(
    storage: MemoryStorage, *, allow: tuple[str, ...] = (), overrides: dict[str, Any] | None = None, **options: Any
) -> Job:
    job = Job(1, **options)
    with Checkpointer(storage) as checkpointer:
        job.train.load(checkpointer, allow=allow, overrides=overrides)
    return job


# The first steps


def test_resume_that_is_one_passes(caplog: pytest.LogCaptureFixture) -> None:
    job = resumed(saved())
    assert str(job.train.verdict) == "not checked: no step was made yet"
    with caplog.at_level(logging.INFO):
        job.run(6)
    assert job.train.verdict.status == "pass"
    assert "resume check after 5 steps: pass" in caplog.text


@pytest.mark.parametrize("mode", ["error", "warn", "off"])
def test_weights_that_were_made_anew_after_the_load_are_found(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    job = resumed(saved(), resume_check=mode)
    with torch.no_grad():
        for parameter in job.model.parameters():
            parameter.fill_(-3.0)
    if mode == "error":
        with pytest.raises(ResumeCheckFailed, match=r"the loss is .* after the resume, where .* was to be expected"):
            job.run(6)
        return
    job.run(6)
    assert ("resume check after 3 steps: fail: the loss is" in caplog.text) == (mode == "warn")


def test_learning_rate_that_was_set_after_the_load_is_found() -> None:
    job = resumed(saved())
    job.optimizer.param_groups[0]["lr"] = 0.05
    with pytest.raises(ResumeCheckFailed, match=r"step 21 used the learning rate 0.05, but 0.083333\d* was in force"):
        job.run(6)


def test_data_that_begin_from_the_start_are_found() -> None:
    job = resumed(saved())
    job.sampler.load_state_dict({**job.sampler.state_dict(), "consumed_samples": 0})
    with pytest.raises(ResumeCheckFailed, match="very first batch: the data starts from the beginning"):
        job.run(6)


def test_what_one_rank_finds_is_raised_on_all() -> None:
    storage = MemoryStorage()

    making = threading.Lock()  # Ranks here are threads, which have one random stream.

    def run(coordinator: Coordinator) -> str:
        with making:
            job = Job(coordinator=coordinator)
        job.run(STEPS)
        with Checkpointer(storage, coordinator=coordinator, timeout_s=20) as checkpointer:
            job.train.save(checkpointer)
            job.train.load(checkpointer)
        if coordinator.rank == 1:
            job.sampler.load_state_dict({**job.sampler.state_dict(), "consumed_samples": 0})
        with pytest.raises(ResumeCheckFailed) as got:
            job.run(6)
        return str(got.value)

    first, second = run_ranks(2, run)
    assert first == second
    assert "starts from the beginning (rank 1)" in first


def test_history_is_kept_over_a_change_of_layout_and_batches_are_not() -> None:
    storage = saved()

    def run(coordinator: Coordinator) -> str:
        job = Job(1, coordinator=coordinator)
        with Checkpointer(storage, coordinator=coordinator, timeout_s=20) as checkpointer:
            job.train.load(checkpointer)
        with torch.no_grad():
            for parameter in job.model.parameters():
                parameter.fill_(-3.0)
        with pytest.raises(ResumeCheckFailed) as got:
            job.run(6)
        return str(got.value)

    for text in run_ranks(2, run):
        assert "the loss is" in text
        assert "batch" not in text


# What the run was made with


def test_arguments_that_changed_are_warned_of_by_name(caplog: pytest.LogCaptureFixture) -> None:
    storage = saved(arguments={"lr": 0.1, "model": {"layers": 2}})
    job = resumed(storage, arguments={"lr": 0.05, "model": {"layers": 2}})
    assert "arguments.lr: 0.1 -> 0.05" in caplog.text
    assert "layers" not in caplog.text
    assert job.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 1.2)


def test_learning_rate_that_is_overridden_is_scaled_and_recorded(caplog: pytest.LogCaptureFixture) -> None:
    storage = saved(arguments={"lr": 0.1})
    job = resumed(storage, arguments={"lr": 0.05}, overrides={"lr": 0.05})
    assert "arguments.lr" not in caplog.text
    assert job.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 / 1.2)
    job.run(6)
    assert job.train.verdict.status in ("pass", "warn")
    assert job.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 / 1.26)
    recorded: list[Any] = []
    with Checkpointer(storage) as checkpointer:
        job.train.save(checkpointer)
        checkpointer.load(lambda contents: recorded.append(contents.metadata) or {})  # type: ignore[func-returns-value]
    (resume,) = recorded[0]["train_state"]["resumed_from"]
    assert (resume["iteration"], resume["overrides"]) == (STEPS, {"lr": 0.05})


def test_another_model_class_is_an_error_unless_it_is_allowed() -> None:
    class Renamed(nn.Linear):
        pass

    storage = saved()
    job = Job(1)
    other = Renamed(4, 1)
    train = TrainState(
        other, torch.optim.SGD(other.parameters(), lr=0.1), scheduler=job.scheduler, dataloader=job.sampler
    )
    with Checkpointer(storage) as checkpointer:
        with pytest.raises(MismatchError, match=r"block: models.model.class: \"Linear\" -> \"test_another_model"):
            train.load(checkpointer)
        train.load(checkpointer, allow=("models.*",))


def test_scheduler_of_another_class_is_an_error_or_begins_anew_when_allowed() -> None:
    """Its state would be taken in part, by names that both have."""
    storage = saved()
    job = Job(1)
    scheduler = SequentialLR(job.optimizer, [LinearLR(job.optimizer), ExponentialLR(job.optimizer, 0.9)], [3])
    train = TrainState(job.model, job.optimizer, scheduler=scheduler, dataloader=job.sampler)
    with Checkpointer(storage) as checkpointer:
        with pytest.raises(
            MismatchError, match=r'block: schedulers.0.class: "LambdaLR" -> "SequentialLR\(LinearLR, ExponentialLR\)"'
        ):
            train.load(checkpointer)
        assert train.load(checkpointer, allow=("scheduler",)).begun_anew == ("scheduler",)
    assert scheduler.last_epoch == 0


def test_scaler_of_another_class_is_an_error() -> None:
    class Scaler(torch.amp.GradScaler):
        pass

    storage = saved(scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(MismatchError, match=r'block: scaler\.class: "GradScaler" -> "test_scaler'):
        resumed(storage, scaler=Scaler("cpu"))
    resumed(storage, scaler=torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("arguments", [{"epochs": 3, "data": {"path": "x"}}, None])
def test_override_of_no_argument_is_an_error_that_names_those_there_are(arguments: Any) -> None:
    storage = saved(arguments=arguments)
    there_are = "data.path, epochs" if arguments else "none recorded"
    with pytest.raises(MismatchError, match=f"there is no argument 'epoch'; there are {there_are}"):
        resumed(storage, arguments=arguments, overrides={"epoch": 5})
    if arguments:
        resumed(storage, arguments={**arguments, "epochs": 5}, overrides={"epochs": 5, "data.path": "x"})


@pytest.mark.parametrize("lr", ["fast", -1.0])
def test_override_that_is_no_rate_changes_nothing(lr: object) -> None:
    job = Job(1)
    before = job.model.weight.clone()
    with Checkpointer(saved()) as checkpointer, pytest.raises(MismatchError, match="expected a finite number"):
        job.train.load(checkpointer, overrides={"lr": lr})
    assert torch.equal(before, job.model.weight)
    assert job.train.step == 0


def test_what_differs_by_rank_is_recorded_and_compared_as_rank_0_has_it() -> None:
    class First(nn.Linear):
        pass

    class Last(nn.Linear):
        pass

    storage = MemoryStorage()
    asset_of = {"file": Path(__file__)}, {"file": Path(__file__).parent / "test_resumable.py"}

    def run(coordinator: Coordinator) -> list[str]:
        rank = coordinator.rank
        model = nn.ModuleDict({f"layer{rank}": nn.Linear(2, 2)})
        stage = (First if rank == 0 else Last)(2, 2)
        train = TrainState(
            {"body": model, f"own{rank}": stage},
            arguments={"lr": 0.1, "local_rank": rank},
            assets=asset_of[rank],
            coordinator=coordinator,
        )
        with Checkpointer(storage, coordinator=coordinator, mesh={"pp": (rank, 2)}, timeout_s=20) as checkpointer:
            train.save(checkpointer)
            report = train.load(checkpointer)
        return [entry.name for entry in report.differences.entries]

    assert run_ranks(2, run) == [[], []]


def test_ranks_with_different_bases_are_told() -> None:
    def run(coordinator: Coordinator) -> str:
        base = BaseCheckpoint(location="base", digest=f"digest {coordinator.rank}")
        train = TrainState(nn.Linear(2, 2), base=base, coordinator=coordinator)
        storage = MemoryStorage()
        with (
            Checkpointer(storage, coordinator=coordinator, timeout_s=20) as checkpointer,
            pytest.raises(MismatchError) as got,
        ):
            train.save(checkpointer)
        return str(got.value)

    for text in run_ranks(2, run):
        assert "rank 0 has the digest 'digest 0', rank 1 'digest 1'" in text


# Records of others


def spoiled(change: Callable[[dict[str, Any]], object], more: dict[str, Any] | None = None) -> MemoryStorage:
    """A checkpoint whose record is another one."""
    storage, job = MemoryStorage(), Job()
    metadata = job.train._record_of(SECTIONS, None)
    change(metadata["train_state"])  # type: ignore[arg-type]
    with Checkpointer(storage) as checkpointer:
        checkpointer.save({**job.train._state(0, SECTIONS), **(more or {})}, iteration=1, metadata=metadata)
    return storage


def test_record_of_a_newer_version_is_no_resume() -> None:
    with pytest.raises(MismatchError, match="its record has version 99, this package knows 1"):
        resumed(spoiled(lambda record: record.update(version=99, sections="another kind")))


def test_section_that_is_not_known_is_an_error_unless_it_is_allowed() -> None:
    storage = spoiled(lambda record: record["sections"].append("ema"), {"ema": {"weight": torch.ones(2)}})
    with pytest.raises(MismatchError, match="has sections that this package does not know: ema"):
        resumed(storage)
    resumed(storage, allow=("ema",))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", "x"),
        ("version", 0),
        ("sections", 3),
        ("base", 3),
        ("base", {"location": 1, "digest": "x"}),
        ("environment", [1]),
        ("assets", 3),
        ("models", None),
        ("schedulers", [1]),
        ("scaler", "x"),
        ("arguments", {(1, 2): 3}),
        ("resumed_from", {"a": 1}),
    ],
)
def test_record_that_is_none_is_corrupt(name: str, value: object) -> None:
    with pytest.raises(CorruptionError, match="the record of its TrainState is none"):
        resumed(spoiled(lambda record: record.update({name: value})))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    directory = tmp_path / "tokenizer"
    (directory / "extra").mkdir(parents=True)
    (directory / "tokenizer.json").write_bytes(b'{"vocab": [1, 2]}\r\n\xff')
    (directory / "extra" / "merges.txt").write_text("a b")
    return directory


def test_tokenizer_that_changed_is_an_error_that_names_the_file(tokenizer: Path) -> None:
    storage = saved(assets={"tokenizer": tokenizer})
    resumed(storage, assets={"tokenizer": tokenizer})
    (tokenizer / "extra" / "merges.txt").write_text("a c")
    with pytest.raises(MismatchError, match=r"block: assets.tokenizer.extra/merges.txt.sha256"):
        resumed(storage, assets={"tokenizer": tokenizer})
    assert resumed(storage, assets={"tokenizer": tokenizer}, allow=("assets.tokenizer*",)).train.step == STEPS


def test_job_without_the_tokenizer_of_its_checkpoint_is_an_error(tokenizer: Path) -> None:
    with pytest.raises(MismatchError, match=r"block: assets.tokenizer.*<absent>"):
        resumed(saved(assets={"tokenizer": tokenizer}))


def test_assets_come_back_to_the_byte(tokenizer: Path, tmp_path: Path) -> None:
    storage = saved(assets={"tokenizer": tokenizer})
    with Checkpointer(storage) as checkpointer:
        extract_assets(checkpointer, tmp_path / "out")
    for file in ("tokenizer.json", "extra/merges.txt"):
        assert (tmp_path / "out" / "tokenizer" / file).read_bytes() == (tokenizer / file).read_bytes()


# Rates that are other ones


def scheduled(rate: float, make: Any = torch.optim.SGD, steps: int = 0, **options: Any) -> Any:
    """An optimizer, its scheduler and the training state of both."""
    model = nn.Linear(2, 2)
    optimizer = make(model.parameters(), lr=rate)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    train = TrainState(model, optimizer, scheduler=scheduler, **options)
    for _ in range(steps):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        scheduler.step()
        train.end_step(loss=1.0)
    return train, optimizer, scheduler


def saved_of(train: TrainState) -> MemoryStorage:
    storage = MemoryStorage()
    with Checkpointer(storage) as checkpointer:
        train.save(checkpointer)
    return storage


def test_rate_that_the_job_was_made_with_and_is_not_used_is_warned_of() -> None:
    storage = saved_of(scheduled(0.8, steps=2)[0])
    train, optimizer, _ = scheduled(0.5)
    with Checkpointer(storage) as checkpointer:
        report = train.load(checkpointer)
    (warning,) = report.warnings
    assert "initial_lr: 0.8 goes on, as stored; this job's 0.5 is not used" in warning
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)
    again = scheduled(0.8)[0]
    with Checkpointer(storage) as checkpointer:
        assert again.load(checkpointer).warnings == ()


def test_rate_is_not_overridden_where_its_optimizer_begins_anew() -> None:
    storage = saved_of(scheduled(0.001, torch.optim.AdamW, steps=2)[0])
    train, optimizer, _ = scheduled(0.1)
    with (
        Checkpointer(storage) as checkpointer,
        pytest.raises(MismatchError, match="the optimizer of this job begins anew"),
    ):
        train.load(checkpointer, allow=("optimizer",), overrides={"lr": 0.1})
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_optimizer_that_begins_anew_takes_the_rate_that_its_scheduler_is_at() -> None:
    storage = saved_of(scheduled(0.8, torch.optim.AdamW, steps=2)[0])
    train, optimizer, _ = scheduled(0.8, resume_check="error")
    with Checkpointer(storage) as checkpointer:
        train.load(checkpointer, allow=("optimizer",))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


def test_override_stays_in_force_when_the_same_command_is_started_again() -> None:
    def start(storage: MemoryStorage) -> float:
        train, optimizer, _ = scheduled(0.8, arguments={"lr": 0.8})
        with Checkpointer(storage) as checkpointer:
            train.load(checkpointer, overrides={"lr": 0.4})
            train.end_step(loss=1.0)
            train.save(checkpointer)
        return float(optimizer.param_groups[0]["lr"])

    storage = saved_of(scheduled(0.8, steps=2, arguments={"lr": 0.8})[0])
    assert [start(storage) for _ in range(3)] == [pytest.approx(0.1)] * 3


def test_lineage_of_resumes_goes_on() -> None:
    storage = saved_of(scheduled(0.8, steps=1)[0])
    recorded: list[Any] = []
    for number in range(3):
        train = scheduled(0.8)[0]
        with Checkpointer(storage) as checkpointer:
            train.load(checkpointer, overrides={"lr": 0.4} if number == 0 else None)
            train.end_step(loss=1.0)
            train.save(checkpointer)
            checkpointer.load(lambda contents: recorded.append(contents.metadata) or {})  # type: ignore[func-returns-value]
    resumes = recorded[-1]["train_state"]["resumed_from"]
    assert [(one["iteration"], one["overrides"]) for one in resumes] == [(1, {"lr": 0.4}), (2, {}), (3, {})]


def test_override_that_is_not_set_anywhere_is_warned_of() -> None:
    storage = saved_of(scheduled(0.8, steps=1, arguments={"weight_decay": 0.1})[0])
    train = scheduled(0.8, arguments={"weight_decay": 0.3})[0]
    with Checkpointer(storage) as checkpointer:
        report = train.load(checkpointer, overrides={"weight_decay": 0.3})
    assert report.warnings == (
        "overrides: 'weight_decay' is recorded, and not set: only 'lr' is. What is stored goes on",
    )


def test_groups_in_another_order_are_no_alarm() -> None:
    def make(order: int) -> Any:
        model = nn.Linear(2, 2)
        groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.01}][::order]
        optimizer = torch.optim.SGD(groups)
        return model, optimizer, TrainState(model, optimizer, resume_check="error")

    def run(made: Any, steps: int) -> None:
        model, optimizer, train = made
        for _ in range(steps):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            train.end_step(loss=1.0)

    first, second = make(1), make(-1)
    run(first, 8)
    with Checkpointer(saved_of(first[2])) as checkpointer:
        second[2].load(checkpointer)
    run(second, 6)
    assert second[2].verdict.status == "pass"


def test_scheduler_of_another_number_of_groups_is_an_error() -> None:
    storage = saved_of(scheduled(0.8, steps=1)[0])
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias]}], lr=0.8)
    train = TrainState(model, optimizer, scheduler=LambdaLR(optimizer, lambda step: 0.5**step))
    with (
        Checkpointer(storage) as checkpointer,
        pytest.raises(MismatchError, match=r"of 1 parameter groups is stored, and its optimizer has 2"),
    ):
        train.load(checkpointer)


def test_step_of_the_optimizer_that_was_not_told_is_an_error_at_the_save() -> None:
    train, optimizer, _ = scheduled(0.8)
    optimizer.step()
    with pytest.raises(CheckpointError, match=r"the optimizer has made a step .* end_step\(\) was not called for it"):
        saved_of(train)


def test_data_of_a_loader_that_keeps_one_ranks_position_are_known() -> None:
    class Loader:
        def __init__(self, rows: list[int]) -> None:
            self.dataset = rows

        def state_dict(self) -> dict[str, object]:
            return {"at": 1}

        def load_state_dict(self, _: dict[str, object]) -> None: ...

    storage = saved_of(TrainState(nn.Linear(2, 2), dataloader=Loader([1, 2, 3])))
    with Checkpointer(storage) as checkpointer:
        TrainState(nn.Linear(2, 2), dataloader=Loader([1, 2, 3])).load(checkpointer)
        other = TrainState(nn.Linear(2, 2), dataloader=Loader([1, 2, 4]))
        with pytest.raises(MismatchError, match="data: the position is one in other data: the fingerprint is"):
            other.load(checkpointer)
        other.load(checkpointer, allow=("data",))
