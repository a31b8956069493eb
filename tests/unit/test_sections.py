"""Sections of a training state that are not what they seem: an error names them, or they come back all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from distckpt import (
    Checkpointer,
    CheckpointError,
    CorruptionError,
    MismatchError,
    PerRank,
    ResumableSampler,
    ShardedTensor,
    TrainState,
)
from distckpt.coordinator import Coordinator, SingleProcess
from distckpt.testing import MemoryStorage, run_ranks
from tests.unit.damage import change, flip, newest


def trained(model: nn.Module, **options: Any) -> TrainState:
    return TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **options)


def saved(train: TrainState, **options: Any) -> MemoryStorage:
    storage = MemoryStorage()
    with Checkpointer(storage) as checkpointer:
        train.save(checkpointer, **options)
    return storage


def load(storage: MemoryStorage, train: TrainState, **options: Any) -> Any:
    with Checkpointer(storage) as checkpointer:
        return train.load(checkpointer, **options)


# Models whose state_dict() shows what is not their own memory


class TensorExtra(nn.Linear):
    """As Transformer Engine keeps its scales."""

    amax = 0.0

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.amax])

    def set_extra_state(self, state: Any) -> None:
        self.amax = float(state[0])


def test_extra_state_that_is_a_tensor_comes_back() -> None:
    model, again = TensorExtra(2, 2), TensorExtra(2, 2)
    model.amax = 7.0
    load(saved(TrainState(model)), TrainState(again))
    assert again.amax == 7.0


class Fused(nn.Module):
    """Stores its weight in two halves, and takes either back, as models do that changed their layout."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.qk = nn.Parameter(torch.full((4, 2), value))
        self.register_state_dict_post_hook(self._split)
        self.register_load_state_dict_pre_hook(self._fuse)

    @staticmethod
    def _split(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        halves = state.pop(f"{prefix}qk").detach().clone().chunk(2)
        state[f"{prefix}q"], state[f"{prefix}k"] = halves

    @staticmethod
    def _fuse(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        if f"{prefix}q" in state:
            state[f"{prefix}qk"] = torch.cat([state.pop(f"{prefix}q"), state.pop(f"{prefix}k")])


def test_parts_that_a_hook_makes_are_given_back_through_the_other_hook() -> None:
    again = Fused(0.0)
    load(saved(TrainState(Fused(3.0))), TrainState(again))
    assert again.qk.unique().tolist() == [3.0]


def test_meta_model_under_a_wrapper_becomes_real() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    with torch.device("meta"):
        again = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)))
    model = nn.Sequential(nn.Linear(2, 2))
    load(saved(TrainState(model)), TrainState(again))
    assert torch.equal(again(torch.eye(2)), model(torch.eye(2)))


def test_two_tensors_of_one_name_are_an_error() -> None:
    models = {"a": nn.ModuleDict({"b": nn.Linear(2, 2)}), "a.b": nn.Linear(2, 2)}
    with pytest.raises(CheckpointError, match=r"two tensors have the name 'a\.b\.(weight|bias)'"):
        saved(TrainState(models))


# Allowing


@pytest.mark.parametrize("given", ["model/*", "scheduler"])
def test_text_where_a_collection_is_expected_allows_nothing(given: str) -> None:
    storage = saved(trained(nn.Linear(2, 2)))
    train = trained(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="expected a collection"):
        load(storage, train, allow=given)
    with Checkpointer(storage) as checkpointer, pytest.raises(TypeError, match="expected a collection"):
        checkpointer.load({"a": 1}, allow=given)


def test_what_is_allowed_in_vain_is_warned_of() -> None:
    report = load(saved(trained(nn.Linear(2, 2))), trained(nn.Linear(2, 2)), allow=("optimiser/*", "optimizer"))
    assert report.warnings == ("allow: nothing had to be allowed as 'optimiser/*'",)


def test_keys_that_begin_anew_or_stay_unread_are_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    grown = nn.Sequential(*model, nn.Linear(2, 2))
    report = load(saved(TrainState(model)), TrainState(grown), allow=("model/2.*",))
    assert not report.is_whole
    assert "keys begun anew: model/2.bias, model/2.weight" in caplog.text


# Scalers


def scaler(enabled: bool) -> torch.amp.GradScaler:
    made = torch.amp.GradScaler("cpu", enabled=enabled)
    made.scale(torch.ones(()))
    return made


def test_scaler_that_is_switched_off_resumes() -> None:
    report = load(saved(trained(nn.Linear(2, 2), scaler=scaler(False))), trained(nn.Linear(2, 2), scaler=scaler(False)))
    assert report.is_whole


def test_scale_that_a_scaler_would_drop_is_an_error_unless_it_is_allowed() -> None:
    storage = saved(trained(nn.Linear(2, 2), scaler=scaler(True)))
    with pytest.raises(MismatchError, match=r"^scaler: a scale is stored, and this job's scaler is switched off"):
        load(storage, trained(nn.Linear(2, 2), scaler=scaler(False)))
    load(storage, trained(nn.Linear(2, 2), scaler=scaler(False)), allow=("scaler",))


def test_scaler_that_is_switched_on_finds_no_scale() -> None:
    storage = saved(trained(nn.Linear(2, 2), scaler=scaler(False)))
    with pytest.raises(MismatchError, match="scaler/scale"):
        load(storage, trained(nn.Linear(2, 2), scaler=scaler(True)))


# Gradients


def accumulate(model: nn.Module, train: TrainState) -> None:
    model(torch.ones(1, 2)).sum().backward()
    train.end_micro_step()


def test_gradients_of_a_step_that_was_given_up_are_cleared_by_a_load() -> None:
    model = nn.Linear(2, 2)
    train = trained(model)
    storage = saved(train)
    accumulate(model, train)
    load(storage, train)
    assert train.micro_step == 0
    assert [parameter.grad for parameter in model.parameters()] == [None, None]


def test_gradients_replace_those_that_are_there() -> None:
    model = nn.Linear(2, 2)
    train = trained(model)
    accumulate(model, train)
    assert model.weight.grad is not None
    expected = model.weight.grad.clone()
    storage = saved(train)
    accumulate(model, train)
    load(storage, train)
    assert torch.equal(model.weight.grad, expected)
    assert train.micro_step == 1


def test_step_under_way_that_was_saved_without_its_gradients_cannot_go_on() -> None:
    model = nn.Linear(2, 2)
    train = trained(model)
    accumulate(model, train)
    storage = saved(train, sections=("model", "optimizer", "rng", "progress"))
    with pytest.raises(MismatchError, match="gradients: this job has one, and nothing is stored of it"):
        load(storage, trained(nn.Linear(2, 2)))


def test_gradients_that_are_kept_elsewhere_cannot_be_saved() -> None:
    train = trained(nn.Linear(2, 2))
    train.end_micro_step()
    with pytest.raises(CheckpointError, match="no parameter has a gradient: they are kept elsewhere"):
        saved(train)


def test_gradients_of_other_ranks_cannot_be_taken() -> None:
    model = nn.Linear(2, 2)
    train = trained(model)
    accumulate(model, train)
    state = train._state(0, ("model", "optimizer", "rng", "progress"))
    of_ranks = ShardedTensor("gradients.weight", torch.ones(3, 2, 2), global_shape=(3, 2, 2), global_offset=(0, 0, 0))
    storage = MemoryStorage()
    with Checkpointer(storage) as checkpointer:
        checkpointer.save({**state, "gradients": {"weight": of_ranks}}, iteration=1)
    with pytest.raises(
        MismatchError, match="a step was under way on 3 ranks, and of its 1 gradients this job can take 0"
    ):
        load(storage, trained(nn.Linear(2, 2)))


# The loop


def loader() -> DataLoader[Any]:
    data = TensorDataset(torch.arange(12))
    return DataLoader(data, batch_sampler=ResumableSampler(data, 2, shuffle=False, rank=0, world_size=1))


def first(batch: Any) -> int:
    return int(batch[0][0])


def test_save_with_a_batch_in_hand_is_an_error() -> None:
    train = TrainState(nn.Linear(2, 2), dataloader=loader())
    batches = train.batches()
    next(batches)
    with pytest.raises(CheckpointError, match=r"neither end_step\(\) nor end_micro_step\(\) was called for it"):
        saved(train)
    train.end_step()
    saved(train)


def test_loops_that_are_left_and_begun_anew_go_on() -> None:
    train = TrainState(nn.Linear(2, 2), dataloader=loader())
    seen = []
    for _ in range(3):
        for batch in train.batches():
            seen.append(first(batch))
            if len(seen) % 2 == 0:
                break
    assert seen == [0, 2, 4, 6, 8, 10]
    one, other = train.batches(), train.batches()
    assert [first(next(one)), first(next(other)), first(next(one))] == [0, 2, 4]


def test_several_steps_on_one_batch_can_be_saved() -> None:
    """As reinforcement learning makes them."""
    train = TrainState(nn.Linear(2, 2), dataloader=loader())
    next(train.batches())
    for _ in range(2):
        train.end_step()
        saved(train)


def test_loader_without_any_batch_is_an_error() -> None:
    class Empty:
        def state_dict(self) -> dict[str, object]:
            return {"at": 0}

        def load_state_dict(self, _: dict[str, object]) -> None: ...

        def __iter__(self) -> Iterator[int]:
            return iter(())

    with pytest.raises(CheckpointError, match="no batch at all"):
        next(TrainState(nn.Linear(2, 2), dataloader=Empty()).batches())


# What was stored is hostile, or of another time


def rewritten(edit: Callable[[dict[str, Any]], object]) -> MemoryStorage:
    """A checkpoint as of a TrainState, but for what `edit` does to its state."""
    state = trained(nn.Linear(2, 2))._state(0, ("model", "optimizer", "rng", "progress"))
    edit(state)
    storage = MemoryStorage()
    with Checkpointer(storage) as checkpointer:
        checkpointer.save(state, iteration=1)
    return storage


def put(section: str, name: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda state: state[section].__setitem__(name, value)


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], type[CheckpointError], str]] = {
    "no section": (
        lambda state: state.update(progress=3),
        CorruptionError,
        "stored as 'progress' is a int, and no section",
    ),
    "by rank": (lambda state: state.update(progress=PerRank(3)), CheckpointError, "progress/losses"),
    "negative step": (put("progress", "step", -5), CheckpointError, "progress: step -5"),
    "truth as a step": (put("progress", "step", True), CheckpointError, "progress: step True"),
    "losses": (put("progress", "losses", torch.ones(2, 2, dtype=torch.float64)), CheckpointError, "progress/losses"),
    "steps": (put("progress", "last_steps", [3]), CheckpointError, "no stored history"),
    "gradients": (lambda state: state.update(gradients=3), MismatchError, "gradients: it is stored"),
    "streams": (put("rng", "global", PerRank(3)), CheckpointError, "rng/global: stored is a int"),
    "python": (put("rng", "global", PerRank({"python": {}})), CheckpointError, "random-number state of 'python'"),
    "numpy": (put("rng", "global", PerRank({"numpy": [1]})), CheckpointError, "random-number state of 'numpy'"),
    "torch": (put("rng", "global", PerRank({"torch": 10**30})), CheckpointError, "random-number state of 'torch'"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_section_that_is_none_is_an_error_that_names_it(kind: str) -> None:
    edit, error, text = HOSTILE[kind]
    with pytest.raises(error, match=text):
        load(rewritten(edit), trained(nn.Linear(2, 2)))


def test_refusal_after_a_fall_back_says_that_values_may_be_undefined() -> None:
    storage = MemoryStorage()
    train = trained(nn.Linear(2, 2))
    with Checkpointer(storage) as checkpointer:
        train.save(checkpointer, sections=("model", "rng", "progress"))
        train.end_step()
        train.save(checkpointer)
    with pytest.raises(MismatchError, match=r"optimizer: this job has one(.|\n)*Nothing was changed"):
        load(storage, trained(nn.Linear(2, 2)), iteration=0)
    directory, index = newest(storage)
    change(storage, f"{directory}/{index.files[0].name}", flip(index.files[0].header_bytes))
    with pytest.raises(MismatchError, match=r"optimizer: this job has one(.|\n)*fell back to it(.|\n)*1 damaged:"):
        load(storage, trained(nn.Linear(2, 2)))


def test_number_that_the_smaller_type_cannot_hold_is_an_error() -> None:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight[0, 0] = 1e5
    with pytest.raises(CheckpointError, match=r"'model/weight': stored is 100000, more than a torch.float16 can hold"):
        load(saved(TrainState(model)), TrainState(nn.Linear(2, 2, dtype=torch.float16)), convert_dtypes=True)
    load(saved(TrainState(model)), TrainState(nn.Linear(2, 2, dtype=torch.bfloat16)), convert_dtypes=True)


def test_section_that_cannot_be_loaded_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="expected a collection of model, optimizer"):
        load(saved(trained(nn.Linear(2, 2))), trained(nn.Linear(2, 2)), sections=("assets",))


def test_position_of_another_kind_of_loader_is_begun_anew_when_allowed() -> None:
    class Own:
        at = 3

        def state_dict(self) -> dict[str, object]:
            return {"at": self.at}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.at = state["at"]

    storage = saved(TrainState(nn.Linear(2, 2), dataloader=Own()))
    train = TrainState(nn.Linear(2, 2), dataloader=loader())
    with pytest.raises(MismatchError, match="the position of another kind of loader"):
        load(storage, train)
    report = load(storage, train, allow=("data",))
    assert str(report.data) == "inexact, because the position is that of another kind of loader"
    assert report.load.unexpected == ("data/loader",)


def test_data_that_rightly_begin_with_the_first_batch_are_no_alarm() -> None:
    """Not shuffled, resumed at the end of an epoch."""
    train = TrainState(nn.Linear(2, 2), dataloader=loader(), resume_check="error")
    batches = train.batches()
    for _ in range(6):
        next(batches)
        train.end_step(loss=1.0)
    storage = saved(train)
    again = TrainState(nn.Linear(2, 2), dataloader=loader(), resume_check="error")
    load(storage, again)
    batches = again.batches()
    for _ in range(6):
        next(batches)
        again.end_step(loss=1.0)
    assert again.verdict.status == "pass"


def test_gradients_are_no_part_of_a_checkpoint_between_steps() -> None:
    model = nn.Linear(2, 2)
    train = trained(model)
    accumulate(model, train)
    train.end_step()
    assert "gradients" not in train._state(0, ("model", "gradients", "progress"))


def test_sharded_model_on_the_meta_device_is_an_error() -> None:
    class FullySharded(nn.Linear):
        def unshard(self) -> None: ...

    with torch.device("meta"):
        model = FullySharded(2, 2)
    storage = saved(TrainState(nn.Linear(2, 2)))
    with pytest.raises(
        MismatchError, match=r"on the meta device, and an optimizer or fully_shard already refers to it"
    ):
        load(storage, TrainState(model), allow=("models.*",))


def test_ranks_draw_different_numbers_after_a_change_of_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr("distckpt.training.random_streams.seed_all", seeds.append)
    storage = saved(TrainState(nn.Linear(2, 2)))

    def resume(coordinator: Coordinator) -> None:
        with Checkpointer(storage, coordinator=coordinator, timeout_s=20) as checkpointer:
            TrainState(nn.Linear(2, 2), coordinator=coordinator).load(checkpointer)

    run_ranks(2, resume)
    assert len(set(seeds)) == 2


def test_coordinators_that_a_training_state_makes_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Counted] = []

    class Counted(SingleProcess):
        closed = 0

        def close(self) -> None:
            self.closed += 1

    def make() -> Counted:
        made.append(Counted())
        return made[-1]

    for module in ("progress", "run_record"):
        monkeypatch.setattr(f"distckpt.training.{module}.default_coordinator", make)
    train = trained(nn.Linear(2, 2))
    for _ in range(8):
        train.end_step(loss=1.0)
    load(saved(train), train)
    for _ in range(5):
        train.end_step(loss=1.0)
    assert [coordinator.closed for coordinator in made] == [1, 1]
