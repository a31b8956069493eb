"""A job that is given the wrong directory, or finds an incomplete one: it is told, and never begins in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from distckpt import Checkpointer, CheckpointError, CheckpointNotFoundError, TrainState


def job(steps: int = 0) -> TrainState:
    model = nn.Linear(2, 2)
    train = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(steps):
        train.end_step()
    return train


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs beside each other; b has the newer checkpoint."""
    for name, steps in (("a", 3), ("b", 2)):
        with Checkpointer(tmp_path / name) as checkpointer:
            train = job(steps - 1)
            train.save(checkpointer)
            train.end_step()
            train.save(checkpointer)
    return tmp_path


def resume(path: Path) -> int | None:
    train = job()
    with Checkpointer(path) as checkpointer:
        return None if train.resume(checkpointer) is None else train.step


def test_parent_of_runs_is_an_error_that_lists_them_and_says_which_is_newest(runs: Path) -> None:
    with pytest.raises(CheckpointNotFoundError) as got:
        resume(runs)
    said = str(got.value)
    assert f"checkpoints: {runs / 'a'}: 2, the newest of iteration 3" in said
    assert f"give {runs / 'b'}, the one with the newest complete checkpoint, as the root" in said


@pytest.mark.parametrize("below", ["", "deeper"])
def test_directory_of_an_iteration_is_an_error_that_names_the_root(runs: Path, below: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match=f"iteration 3 of {runs / 'a'}"):
        resume(runs / "a" / "iter_0000003" / below)


def test_job_that_would_save_into_the_directory_of_an_iteration_is_stopped(runs: Path) -> None:
    with (
        Checkpointer(runs / "a" / "iter_0000003") as checkpointer,
        pytest.raises(CheckpointError, match=f"no place for checkpoints: it lies in iteration 3 of {runs / 'a'}"),
    ):
        job().save(checkpointer)


@pytest.mark.parametrize("name", ["checkpoint-1000", "global_step1000"])
def test_run_of_another_program_is_an_error_that_names_its_checkpoints(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointNotFoundError, match=name):
        resume(tmp_path)


def test_weights_of_another_program_are_named_at_a_first_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    assert resume(tmp_path) is None
    assert "not saved by distckpt (model): pytorch_model.bin" in caplog.text


@pytest.mark.parametrize("exists", [True, False])
def test_empty_directory_is_a_first_start_with_a_warning(
    runs: Path, exists: bool, caplog: pytest.LogCaptureFixture
) -> None:
    if exists:
        (runs / "c").mkdir()
    assert resume(runs / "c") is None
    assert f"this job starts at step 0: no checkpoint under {runs / 'c'}" in caplog.text


def test_save_that_was_never_committed_is_named_at_a_first_start(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    for index in (runs / "a").rglob("index-*"):
        index.unlink()
    assert resume(runs / "a") is None
    assert "incomplete: iter_0000003: no index: its save ended before it was committed" in caplog.text


def test_newest_directory_that_is_incomplete_is_passed_over_and_named(
    runs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (index,) = (runs / "a" / "iter_0000003").glob("index-*")
    index.unlink()
    assert resume(runs / "a") == 2
    assert "latest_checkpointed_iteration.txt says 3; the newest committed checkpoint is 2" in caplog.text


def test_newest_checkpoint_that_lost_a_file_is_passed_over_and_named(
    runs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (shard,) = (runs / "a" / "iter_0000003").glob("shard-*")
    shard.unlink()
    assert resume(runs / "a") == 2
    assert "iteration 3 is damaged and was passed over" in caplog.text


def test_selector_that_names_nothing_is_an_error_and_no_first_start(runs: Path) -> None:
    with Checkpointer(runs / "a") as checkpointer:
        for selector in ("tag:release", "best:val_loss", 7):
            with pytest.raises(CheckpointNotFoundError):
                job().resume(checkpointer, selector)
