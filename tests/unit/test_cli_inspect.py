"""`distckpt inspect`: a root, what a checkpoint holds and where, and whether a job can go on from it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from distckpt import Checkpointer, CheckpointNotFoundError, ShardedTensor, TrainState, label
from distckpt.cli import app
from distckpt.cli.inspect_text import time_text
from distckpt.commit import Commit, read_index
from distckpt.index import Index
from distckpt.inspecting import read_entry
from distckpt.storage import PosixStorage, Storage
from tests.unit.damage import change, flip, newest
from tests.unit.saved_roots import save
from tests.unit.test_cli import command, run


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
        read_entry(PosixStorage(root), Commit(9, 9, 9))


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of three ranks."""
    where: Path = tmp_path_factory.mktemp("spread")
    save(PosixStorage(where), 10, 20)
    return where


@pytest.fixture
def copied(spread: Path, tmp_path: Path) -> Path:
    where = tmp_path / "copied"
    shutil.copytree(spread, where)
    return where


def damaged(root: Path, edit: Callable[[str, Index], str]) -> None:
    storage = PosixStorage(root)
    directory, index = newest(storage)
    change(storage, edit(directory, index), flip(10))


def test_root_is_a_tree_of_its_checkpoints_before_the_newest_is_looked_into(copied: Path) -> None:
    label(copied, 10, add_tags=["release"], note="before the decay", pinned=True)
    (copied / "iter_0000030").mkdir()
    (copied / "iter_0000030" / f"shard-00001-of-00003-{'7' * 32}.safetensors").write_bytes(b"12345")
    code, said = run("inspect", copied)
    lines = said.splitlines()
    assert code == 0
    assert lines[0].startswith(f"{copied}: 2 checkpoints, ")
    assert lines[1].startswith("├── iter_0000020  ")
    assert lines[1].endswith("3 ranks  newest, tracker")
    assert lines[2].endswith("3 ranks  tag release, pinned")
    assert lines[3].strip() == "│   └── note: before the decay"
    assert "iter_0000030  no checkpoint: 5 bytes, " in lines[4]
    assert "shard files of 1 of 3 ranks are there" in lines[4]
    assert lines[6] == "iteration: 20"
    code, said = run("inspect", copied, "--json")
    found = json.loads(said)
    assert (code, found["iteration"], found["root"]["tracker"]) == (0, 20, 20)
    assert [one["iteration"] for one in found["root"]["checkpoints"]] == [20, 10]
    assert found["root"]["checkpoints"][1]["tags"] == ["release"]
    assert found["root"]["incomplete"][0]["bytes"] == 5


def test_iteration_or_its_directory_is_looked_into_alone(spread: Path) -> None:
    for arguments in ((spread / "iter_0000010",), (spread, "--iteration", 10)):
        code, said = run("inspect", *arguments)
        assert code == 0
        assert said.startswith("iteration: 10\n")
        assert "root" not in json.loads(run("inspect", *arguments, "--json")[1])


def test_summary_says_what_there_is(spread: Path) -> None:
    code, said = run("inspect", spread)
    assert code == 0
    assert "layout:    3 ranks\n" in said
    assert "3 shard files of 3 ranks, the largest " in said
    assert "tensors:   3, 9.4 MB: int64 9.4 MB, float32 0 bytes\n" in said
    assert "values:    1; 1 that differ by rank\n" in said
    contents = json.loads(run("inspect", spread, "--json")[1])["contents"]
    assert (contents["tensors"], contents["files"], contents["writers"]) == (3, 3, 3)


def test_root_that_was_never_saved_into_completely_is_only_a_tree(tmp_path: Path) -> None:
    (tmp_path / "iter_0000030").mkdir()
    (tmp_path / "iter_0000030" / f"shard-00001-of-00003-{'7' * 32}.safetensors").write_bytes(b"12345")
    code, said = run("inspect", tmp_path)
    assert code == 0
    assert "0 checkpoints, 5 bytes" in said
    assert "iter_0000030  no checkpoint" in said
    assert json.loads(run("inspect", tmp_path, "--json")[1])["root"]["checkpoints"] == []
    empty = CliRunner().invoke(app, ["inspect", str(tmp_path / "none")])
    assert isinstance(empty.exception, CheckpointNotFoundError)


def test_checkpoint_that_followed_another_than_the_one_before_says_which(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        state = {"w": torch.zeros(1)}
        for iteration in (1, 2):
            checkpointer.save(state, iteration=iteration)
        checkpointer.load(state, 1)
        checkpointer.save(state, iteration=3)
    lines = run("inspect", tmp_path)[1].splitlines()
    assert "  after 1  " in lines[1]
    assert "after" not in lines[2]


def test_tensors_are_listed_with_how_they_are_cut_and_where_they_lie(spread: Path) -> None:
    code, said = run("inspect", spread, "--tensors", "--sort", "size")
    lines = [line.split() for line in said.splitlines()]
    assert code == 0
    assert said.splitlines()[0] == "iteration 20, 3 tensors of 9.4 MB, 3 ranks"
    assert lines[1] == ["key", "dtype", "shape", "size", "split", "by", "chunks", "on", "ranks"]
    assert lines[2] == ["weight", "int64", "[9,", "131072]", "9.4", "MB", "3", "0-2"]
    assert lines[4] == ["empty", "float32", "[0,", "4]", "0", "bytes", "0"]
    found = json.loads(run("inspect", spread, "--keys", "w*", "--json")[1])
    assert found["matching"] == 1
    assert found["tensors"][0]["key"] == "weight"
    assert found["tensors"][0]["ranks"] == [0, 1, 2]
    code, said = run("inspect", spread, "--tensors", "--top", 1)
    assert (code, len(said.splitlines())) == (0, 4)
    assert said.endswith("and 2 more tensors: give a larger --top, or none\n")


def test_ranks_are_listed_with_what_their_files_hold(spread: Path) -> None:
    code, said = run("inspect", spread, "--ranks")
    rows = [line.split() for line in said.splitlines()]
    assert code == 0
    assert rows[1] == ["rank", "tensors", "chunks", "bytes", "of", "them", "files"]
    assert [row[0] for row in rows[2:]] == ["0", "1", "2"]
    ranks = json.loads(run("inspect", spread, "--ranks", "--keys", "weight", "--json")[1])["ranks"]
    assert [(one["tensors"], one["tensor_bytes"]) for one in ranks] == [(1, 3 << 20)] * 3


def test_tensor_is_shown_with_each_of_its_chunks(spread: Path) -> None:
    code, said = run("inspect", spread, "--key", "weight")
    lines = said.splitlines()
    assert code == 0
    assert lines[1] == "weight: int64 [9, 131072], 9.4 MB, 3 chunks, split by nothing"
    assert lines[3].split()[:3] == ["[0:3,", "0:131072]", "0"]
    assert lines[3].split()[-1].startswith("shard-00000-of-00003-")
    found = json.loads(run("inspect", spread, "--key", "weight", "--json")[1])
    assert [(one["rank"], one["offset"], one["bytes"]) for one in found["chunks"]] == [
        (rank, [3 * rank, 0], 3 << 20) for rank in range(3)
    ]
    low, high = map(int, lines[3].split()[-2].split("-"))
    assert (low, high) == (found["chunks"][0]["start"], found["chunks"][0]["start"] + (3 << 20) - 1)


def test_values_are_listed_and_one_is_shown_in_full(spread: Path) -> None:
    code, said = run("inspect", spread, "--values")
    lines = [line.split() for line in said.splitlines()]
    assert code == 0
    assert ["step", "2", "bytes", "20"] in lines
    assert ["random", "3", "rank3", "exact"] in lines
    assert run("inspect", spread, "--key", "step")[1].splitlines()[-1] == "step: 20"
    found = json.loads(run("inspect", spread, "--key", "random", "--json")[1])
    assert [one["value"] for one in found["held"]] == [{"%tuple": [20, rank]} for rank in range(3)]
    assert '{"%tuple":[20,1]}' in run("inspect", spread, "--key", "random")[1]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--key", "weigh"], "no tensor or value of this key; did you mean 'weight'"),
        (["--keys", "eight"], r"no key matches \(a glob is for the whole key"),
        (["--keys", "*eights"], "no key matches; there are bias, empty, weight"),
        (["--tensors", "--sort", "age"], "--sort age: expected one of key, size"),
    ],
)
def test_what_is_not_in_a_checkpoint_is_said_with_what_is(spread: Path, options: list[str], why: str) -> None:
    done = CliRunner().invoke(app, ["inspect", str(spread), *options])
    assert isinstance(done.exception, ValueError)
    assert re.search(why, str(done.exception))


def test_damaged_index_is_a_line_and_exit_code_1(copied: Path) -> None:
    damaged(copied, lambda directory, _: f"{directory}/index-000001-000002.json")
    for options in ([], ["--tensors"], ["--iteration", "20"], ["--html", str(copied / "page.html")]):
        code, said = run("inspect", copied, *options)
        assert code == 1, options
        assert "iteration 20: DAMAGED: iter_0000020/index-000001-000002.json: " in said
        found = json.loads(run("inspect", copied, *options, "--json")[1])
        assert found["damage"].startswith("iter_0000020/index-000001-000002.json: ")
        assert "contents" not in found
    assert not (copied / "page.html").exists()
    assert run("inspect", copied, "--iteration", 10)[0] == 0


def test_damaged_chunk_table_is_a_line_where_it_is_needed(copied: Path) -> None:
    damaged(copied, lambda directory, index: f"{directory}/{index.chunk_table.name}")
    assert run("inspect", copied)[0] == 0
    for options in (["--tensors"], ["--ranks"], ["--key", "weight"]):
        code, said = run("inspect", copied, *options)
        assert code == 1
        assert re.search(r"iteration 20: DAMAGED: .*page 0: crc32c is", said)
    assert run("inspect", copied, "--key", "step")[0] == 0


def test_missing_file_is_told_beside_what_is_known(copied: Path) -> None:
    next((copied / "iter_0000020").glob("shard-00001*")).unlink()
    code, said = run("inspect", copied, "--tensors")
    assert code == 1
    assert "DAMAGED: iter_0000020/shard-00001" in said
    assert "weight" in said
    code, said = run("inspect", copied)
    assert code == 1
    assert "resumable: " in said


def test_checkpoint_that_goes_while_it_is_read_is_gone_and_not_damaged(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(storage: Storage, commit: Commit) -> object:
        storage.remove(commit.name)
        return read_index(storage, commit)

    monkeypatch.setattr(sys.modules["distckpt.cli.inspect"], "read_index", read)  # Not the command of this name.
    done = CliRunner().invoke(app, ["inspect", str(copied)])
    assert isinstance(done.exception, CheckpointNotFoundError)
    assert str(done.exception) == "iter_0000020/index-000001-000002.json: it was removed meanwhile"


def test_text_from_disk_cannot_do_things_to_a_terminal(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        state = {"\x1b[31mred\n": torch.zeros(1), "value": "\x1b]0;title\x07\x9b2J\u202e", "[bold]": 1}
        checkpointer.save(state, iteration=1, metadata={"\x1b[2J": "\u202e"})
    for options in ([], ["--tensors"], ["--values"], ["--key", "value"], ["--ranks"]):
        code, said = run("inspect", tmp_path, *options)
        assert code == 0
        assert not any(character in said for character in "\x1b\x07\x9b\u202e")
    assert "[bold]" in run("inspect", tmp_path, "--values")[1]


def test_time_that_no_calendar_has_is_told_all_the_same() -> None:
    assert time_text(0) == "1970-01-01 00:00:00 UTC"
    for impossible in (1e300, -1e300, 1e12):
        assert time_text(impossible) == f"{impossible:g} s after 1970"


def test_inspect_runs_without_torch(spread: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for options in ([], ["--tensors", "--ranks", "--values"], ["--key", "random"], ["--html", page]):
        done = command("inspect", spread, *options)
        assert (done.returncode, done.stderr) == (0, ""), options
    assert page.stat().st_size > 10_000
