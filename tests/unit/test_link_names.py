"""Readable names: links that follow what exists, and touch nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distckpt
from distckpt import Checkpointer, CheckpointError, LinkNames
from distckpt.commit import TRACKER, Writer, iteration_directories
from distckpt.storage import PosixStorage
from distckpt.testing import MemoryStorage

NAMES = LinkNames("{run}--val_loss={val_loss:.2f}-step={step}", {"run": "gpt"})


def links_in(root: Path) -> dict[str, str]:
    return {path.name: os.readlink(path) for path in root.iterdir() if path.is_symlink()}


def run_job(root: Path, losses: dict[int, float | None], names: LinkNames = NAMES, **options: object) -> None:
    options = {"removal_grace_s": 0} | options
    with Checkpointer(root, io_backend="threads", link_names=names, **options) as checkpointer:  # type: ignore[arg-type]
        for iteration, loss in losses.items():
            metrics = None if loss is None else {"val_loss": loss}
            checkpointer.save({"w": torch.full((3,), float(iteration))}, iteration=iteration, metrics=metrics)


# Links of a job


def test_checkpoints_have_readable_names_that_lead_to_them(tmp_path: Path) -> None:
    run_job(tmp_path, {1000: 2.334, 2000: 1.9, 3000: None, 4000: float("nan")})
    assert links_in(tmp_path) == {
        "gpt--val_loss=2.33-step=1000": "./iter_0001000",
        "gpt--val_loss=1.90-step=2000": "./iter_0002000",
        "gpt--val_loss=none-step=3000": "./iter_0003000",
        "gpt--val_loss=none-step=4000": "./iter_0004000",
    }
    assert (tmp_path / "gpt--val_loss=2.33-step=1000").samefile(tmp_path / "iter_0001000")
    assert [iteration for iteration, _ in iteration_directories(PosixStorage(tmp_path))] == [1000, 2000, 3000, 4000]
    assert distckpt.verify(tmp_path).is_sound


def test_links_are_taken_for_the_directories_that_they_lead_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "run"
    run_job(root, {1000: 2.334, 2000: 1.9})
    link = root / "gpt--val_loss=2.33-step=1000"
    assert [entry.iteration for entry in distckpt.catalog(link)] == [1000]
    assert distckpt.label(link, None, note="by its name").iteration == 1000
    assert distckpt.label(root, link, note="by its path").iteration == 1000
    monkeypatch.chdir(root)
    assert distckpt.verify(root, f"./{link.name}").iteration == 1000
    with Checkpointer(root) as checkpointer:
        assert checkpointer.load({"w": torch.zeros(3)}, str(link)).iteration == 1000
    with Checkpointer(link) as checkpointer, pytest.raises(CheckpointError, match="is no place for checkpoints"):
        checkpointer.save({"w": torch.zeros(3)}, iteration=3000)


def test_links_of_removed_checkpoints_go_and_others_stay(tmp_path: Path) -> None:
    tmp_path.joinpath("best").symlink_to("iter_0000001")
    tmp_path.joinpath("elsewhere").symlink_to("/nowhere")
    run_job(tmp_path, {1: 0.5, 2: 0.5, 3: 0.5}, keep_last=1)
    expected = {"best": "iter_0000001", "elsewhere": "/nowhere", "gpt--val_loss=0.50-step=3": "./iter_0000003"}
    assert links_in(tmp_path) == expected


def test_iteration_that_is_saved_again_has_one_link_with_its_new_name(tmp_path: Path) -> None:
    run_job(tmp_path, {1: 0.5})
    run_job(tmp_path, {1: 0.25})
    assert links_in(tmp_path) == {"gpt--val_loss=0.25-step=1": "./iter_0000001"}


def test_equal_names_get_the_iteration(tmp_path: Path) -> None:
    run_job(tmp_path, {1: 0.5, 2: 0.5, 3: 0.7}, LinkNames("loss={val_loss}"))
    expected = {"loss=0.5-1": "./iter_0000001", "loss=0.5-2": "./iter_0000002", "loss=0.7": "./iter_0000003"}
    assert links_in(tmp_path) == expected


def test_name_that_another_file_has_is_left_to_it(tmp_path: Path) -> None:
    (tmp_path / "loss=0.5").write_text("mine")
    run_job(tmp_path, {1: 0.5}, LinkNames("loss={val_loss}"))
    run_job(tmp_path, {2: 0.7}, LinkNames("loss={val_loss}"))
    assert (tmp_path / "loss=0.5").read_text() == "mine"
    assert links_in(tmp_path) == {"loss=0.5-1": "./iter_0000001", "loss=0.7": "./iter_0000002"}


def test_longer_name_of_one_never_takes_the_name_of_another(tmp_path: Path) -> None:
    run_job(tmp_path, {1: 5, 2: 5, 3: None}, LinkNames("a-{val_loss}"))
    run_job(tmp_path, {4: None}, LinkNames("a-{val_loss}"))
    assert sorted(links_in(tmp_path).values()) == [f"./iter_000000{n}" for n in (1, 2, 3, 4)]


def test_links_that_a_crash_took_or_left_are_put_right_after_the_next_commit(tmp_path: Path) -> None:
    run_job(tmp_path, {1: 0.5})
    (tmp_path / "gpt--val_loss=0.50-step=1").unlink()
    (tmp_path / "old").symlink_to("./iter_0000077")
    run_job(tmp_path, {2: 0.5})
    assert links_in(tmp_path).keys() == {"gpt--val_loss=0.50-step=1", "gpt--val_loss=0.50-step=2"}


def test_job_that_was_fenced_changes_no_link(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, link_names=NAMES, io_backend="threads") as checkpointer:
        checkpointer.save({"w": torch.zeros(3)}, iteration=1)
        assert checkpointer.iterations() == [1]
        Writer.claim(PosixStorage(tmp_path))
        (tmp_path / "of a newer job").symlink_to("./iter_0000077")
        checkpointer._after_commit._clean_up(checkpointer._save_context.writer, 0, frozenset())  # type: ignore[arg-type]
    assert "of a newer job" in links_in(tmp_path)


def test_links_that_cannot_be_made_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    run_job(tmp_path, {1: 0.5})
    assert f"the readable names in {tmp_path} are not up to date" in caplog.text
    assert distckpt.history(tmp_path)[-1].kind == "save"


# Templates


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{step", "expected '}' before end of string"),
        ("{}", "{}: expected a name alone"),
        ("{0}", "{0}: expected a name alone"),
        ("{val[0]}", "expected a name alone"),
        ("{step!r}", "expected a name alone"),
        ("{step:{width}}", "expected a name alone"),
        ("{step:.2q}", "{step:.2q}: "),
        ("{val_loss:d}", "{val_loss:d}: "),
        ("{run:d}", "{run:d}: "),
    ],
)
def test_bad_template_is_an_error_at_once(template: str, said: str) -> None:
    with pytest.raises(ValueError, match="link_names") as caught:
        LinkNames(template, {"run": "gpt"})
    assert said in str(caught.value)


def test_values_cannot_take_the_names_of_the_checkpoint() -> None:
    with pytest.raises(ValueError, match="'step' is the checkpoint's own"):
        LinkNames("{step}", {"step": 7})


def test_links_need_a_directory() -> None:
    with pytest.raises(ValueError, match="links are made in directories, and memory: is none"):
        Checkpointer(MemoryStorage(), link_names=NAMES)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("a/b\0c\nd", "a_b_c_d"),
        ("..", "_.."),
        (".tmp-0", "_.tmp-0"),
        ("iter_0000001", "_iter_0000001"),
        ("writer-000009", "_writer-000009"),
        (TRACKER, f"_{TRACKER}"),
        ("history.jsonl", "_history.jsonl"),
        ("", "_"),
        ("  x ", "x"),
        ("é" * 300, "é" * 100),
    ],
)
def test_names_are_made_fit_for_files(value: str, name: str) -> None:
    assert LinkNames("{run}", {"run": value}).name_of(1, {}) == name


@given(st.text(), st.dictionaries(st.sampled_from(["val_loss", "acc"]), st.none() | st.floats(allow_nan=False)))
def test_any_name_is_one_that_a_directory_takes(text: str, metrics: dict[str, float | None]) -> None:
    name = LinkNames("{run}{val_loss}{acc:.1f}", {"run": text}).name_of(5, metrics)
    assert name
    assert name == name.strip()
    assert "/" not in name
    assert "\0" not in name
    assert not name.startswith((".", "iter_", "writer-"))
    assert len(name.encode()) <= 201
