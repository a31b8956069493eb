"""`distckpt inspect`: what a checkpoint holds, and whether a job can go on from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from distckpt import Checkpointer, CheckpointNotFoundError, ShardedTensor, TrainState
from distckpt.cli import app
from distckpt.cli.inspect import _entry
from distckpt.commit import Commit
from distckpt.storage import PosixStorage
from tests.unit.test_cli import run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where: Path = tmp_path_factory.mktemp("run")
    model = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    train = TrainState(model, optimizer, arguments={"lr": 1e-3, "hf_token": "hidden one"})
    model(torch.ones(1, 4)).sum().backward()
    with Checkpointer(where) as checkpointer:
        for _ in range(2):
            optimizer.step()
            train.end_step()
            train.save(checkpointer, metrics={"val_loss": 1 / train.step})
        train.end_step()
        train.save(checkpointer, sections=("model",))
    return where


def test_checkpoint_is_shown_with_its_sections_and_what_it_was_made_with(root: Path) -> None:
    code, said = run("inspect", root, "--iteration", "best:val_loss")
    assert code == 0
    assert said.startswith("iteration: 2\nresumable: yes\nsaved:     ")
    assert "metrics:   val_loss 0.5" in said
    assert "arguments.lr" in said
    assert "hidden one" not in said
    rows = [line.replace("│", "").split() for line in said.splitlines()]
    assert ["model", "2", "40", "bytes"] in rows
    assert any(row[:2] == ["optimizer", "6"] and row[3:] == ["88", "bytes"] for row in rows)
    assert any(row[:2] == ["rng", "1"] for row in rows)


def test_checkpoint_without_its_optimizer_is_not_resumable(root: Path) -> None:
    code, said = run("inspect", root)
    assert code == 0
    assert "resumable: no, because it was saved without optimizer, progress, rng" in said


def test_json_has_the_same(root: Path) -> None:
    code, said = run("inspect", root, "--iteration", 2, "--json")
    assert code == 0
    found = json.loads(said)
    assert found["iteration"] == 2
    assert found["resumable"]["is_resumable"] is True
    assert found["sections"][0] == {"name": "model", "tensors": 2, "values": 0, "per_rank": 0, "bytes": 40}


def test_tensor_with_a_key_of_its_own_counts_where_it_stood(tmp_path: Path) -> None:
    part = ShardedTensor("layers.0.weight", torch.ones(2), global_shape=(2,), global_offset=(0,))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save({"net": {"deep": [part]}, "loose": part_at_the_root()}, iteration=1)
    code, said = run("inspect", tmp_path, "--json")
    assert code == 0
    assert [(s["name"], s["tensors"]) for s in json.loads(said)["sections"]] == [("/", 1), ("net", 1)]


def part_at_the_root() -> ShardedTensor:
    return ShardedTensor("free", torch.ones(2), global_shape=(2,), global_offset=(0,))


def test_what_is_not_there_is_an_error_that_says_what_is(root: Path) -> None:
    done = CliRunner().invoke(app, ["inspect", str(root), "--iteration", "tag:release"])
    assert isinstance(done.exception, CheckpointNotFoundError)
    assert "no checkpoint has this tag; there are no tags" in str(done.exception)


def test_checkpoint_that_is_removed_while_it_is_inspected_is_told_as_that(root: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="it was removed meanwhile"):
        _entry(PosixStorage(root), Commit(9, 9, 9))
