"""Wrong-level paths: what an error says of what lies around, and that no root begins inside an iteration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distckpt import Checkpointer, CheckpointError, CheckpointNotFoundError, save, verify
from distckpt.commit import Writer, new_save_id
from distckpt.coordinator import Coordinator
from distckpt.roots import open_root
from distckpt.storage import PosixStorage
from distckpt.surroundings import MAX_NAMES
from distckpt.testing import MemoryStorage, run_ranks
from tests.unit import protocol


def make_root(path: Path, *iterations: int, created_unix_s: float = 0.0) -> Path:
    writer = Writer.claim(PosixStorage(path))
    for iteration in iterations:
        protocol.save(writer, iteration, created_unix_s=created_unix_s)
    return path


def said(path: Path) -> str:
    """What a load from there says."""
    with Checkpointer(path) as checkpointer, pytest.raises(CheckpointNotFoundError) as raised:
        checkpointer.load({"w": torch.zeros(3)})
    message = str(raised.value)
    assert message.startswith(f"no checkpoint under {path}: it has no committed checkpoint\n")
    return message


def test_parent_of_roots_lists_them_and_says_which_is_newest(tmp_path: Path) -> None:
    make_root(tmp_path / "run1", 900, created_unix_s=10)
    make_root(tmp_path / "run2", 10, 20, created_unix_s=30)
    make_root(tmp_path / "run3", created_unix_s=40)
    (tmp_path / "logs").mkdir()
    message = said(tmp_path)
    assert f"\n  checkpoints: {tmp_path}/run2: 2, the newest of iteration 20" in message
    assert f"\n  checkpoints: {tmp_path}/run1: 1, the newest of iteration 900" in message
    assert message.endswith(f"\n  give {tmp_path}/run2, the one with the newest complete checkpoint, as the root")
    assert "logs" not in message
    assert "run3" not in message


def test_damaged_newest_index_is_not_called_complete(tmp_path: Path) -> None:
    root = make_root(tmp_path / "run", 10, 20)
    next((root / "iter_0000020").glob("index-*")).write_bytes(b"")
    assert f"checkpoints: {root}: 2, the newest of iteration 10" in said(tmp_path)


@pytest.mark.parametrize("inside", ["iter_0000010", "iter_0000010/model", "iter_0000010/a/b"])
def test_path_in_an_iteration_is_told_its_root_and_iteration(tmp_path: Path, inside: str) -> None:
    root = make_root(tmp_path / "run", 10, 20)
    (root / inside).mkdir(parents=True, exist_ok=True)
    assert f"it lies in iteration 10 of {root}, give that as the root, and iteration 10" in said(root / inside)


def test_path_in_an_incomplete_iteration_is_told_so(tmp_path: Path) -> None:
    root = make_root(tmp_path / "run", 10)
    protocol.write_files(make_iteration(PosixStorage(root), 20), 20, new_save_id())
    message = said(root / "iter_0000020")
    assert f"it lies in iteration 20 of {root}, which is incomplete" in message
    assert "its newest checkpoint is iteration 10" in message


def make_iteration(storage: PosixStorage, iteration: int) -> PosixStorage:
    storage.make_directory(f"iter_{iteration:07d}")
    return storage


def test_missing_directory_is_called_missing_and_its_neighbours_named_but_not_recommended(tmp_path: Path) -> None:
    """It may be mistyped; or a first start, beside its base or the runs of others."""
    make_root(tmp_path / "run7", 10)
    message = said(tmp_path / "run77")
    assert (
        f"\n  there is no directory {tmp_path}/run77; around it are these:\n  checkpoints: {tmp_path}/run7: 1"
        in message
    )
    assert "as the root" not in message


def test_root_to_which_links_lead_is_told_once_by_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "a_link").symlink_to("run7")
    make_root(tmp_path / "run7", 10)
    (tmp_path / "link").symlink_to("run7")
    (tmp_path / "itself").symlink_to(".")
    message = said(tmp_path)
    assert message.count("checkpoints: ") == 1
    assert message.endswith(f"\n  give {tmp_path}/run7 as the root")


def test_incomplete_iterations_are_listed_as_incomplete_and_why(tmp_path: Path) -> None:
    storage = make_iteration(PosixStorage(tmp_path), 10)
    save_id = new_save_id()
    name = f"iter_0000010/shard-00001-of-00004-{save_id}.safetensors"
    storage.put_if_absent(name, b"")
    message = said(tmp_path)
    assert "incomplete: iter_0000010: no index: its save ended before it was committed" in message
    assert "shard files of 1 of 4 ranks are there" in message


def test_incomplete_saves_are_told_of_any_storage() -> None:
    storage = MemoryStorage()
    Writer.claim(storage).announce(10, new_save_id())
    with (
        Checkpointer(storage) as checkpointer,
        pytest.raises(CheckpointNotFoundError, match="incomplete: iter_0000010"),
    ):
        checkpointer.load({"w": torch.zeros(3)})


def test_iteration_that_is_asked_for_and_incomplete_is_told_why(tmp_path: Path) -> None:
    root = make_root(tmp_path, 10)
    protocol.write_files(make_iteration(PosixStorage(root), 20), 20, new_save_id())
    with pytest.raises(
        CheckpointNotFoundError, match=r"it has iterations \[10\]\n  incomplete: iter_0000020: no index"
    ):
        verify(root, 20)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("pytorch_model.bin", "model"),
        ("model.safetensors", "model"),
        ("model-00001-of-00002.safetensors", "model"),
        ("checkpoint-1000", "Hugging Face Trainer"),
        ("global_step1000", "DeepSpeed"),
        ("mp_rank_00", "Megatron-LM or DeepSpeed"),
        (".metadata", "torch.distributed.checkpoint"),
        ("consolidated.00.pth", "consolidated weights"),
        ("last.ckpt", "Lightning or NeMo"),
        ("model.pt", "a file of torch.save"),
    ],
)
def test_checkpoints_of_other_programs_are_named(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).mkdir()
    assert said(tmp_path).endswith(f"\n  not saved by distckpt ({kind}): {name}")


def test_nothing_around_says_nothing_more(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(CheckpointNotFoundError) as raised:
        verify(tmp_path / "a")
    assert str(raised.value) == f"no checkpoint under {tmp_path}/a: it has no committed checkpoint"


def test_no_more_than_so_many_names_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[str] = []
    listed = PosixStorage.list

    def counted(self: PosixStorage, directory: str) -> object:
        looked_at.append(self.location)
        return listed(self, directory)

    for i in range(MAX_NAMES + 50):
        (tmp_path / str(i)).mkdir()
    monkeypatch.setattr(PosixStorage, "list", counted)
    with pytest.raises(CheckpointNotFoundError):
        verify(tmp_path)
    assert len(set(looked_at)) <= MAX_NAMES + 10


def candidates(path: Path) -> list[str]:
    with pytest.raises(CheckpointNotFoundError) as raised:
        verify(path)
    return [Path(candidate).name for candidate in raised.value.candidates]


def test_candidates_are_the_checkpoints_that_a_wrong_path_leads_past(tmp_path: Path) -> None:
    """A job that finds some had better not start afresh; one that begins beside others may."""
    run = make_root(tmp_path / "all" / "run", 10)
    (run / "iter_0000010" / "model").mkdir()
    assert candidates(tmp_path / "all") == ["run"]
    assert candidates(run / "iter_0000010" / "model") == ["run"]
    assert candidates(tmp_path / "all" / "new") == []
    (tmp_path / "all" / "new").mkdir()
    (tmp_path / "all" / "new" / "model.safetensors").touch()
    Writer.claim(PosixStorage(tmp_path / "all" / "new")).announce(10, new_save_id())
    assert candidates(tmp_path / "all" / "new") == []
    (tmp_path / "all" / "new" / "checkpoint-500").mkdir()
    assert candidates(tmp_path / "all" / "new") == ["checkpoint-500"]


def test_all_ranks_learn_of_candidates(tmp_path: Path) -> None:
    make_root(tmp_path / "run", 10)

    def load(coordinator: Coordinator) -> None:
        with Checkpointer(tmp_path, coordinator=coordinator) as checkpointer:
            with pytest.raises(CheckpointNotFoundError) as raised:
                checkpointer.load({"w": torch.zeros(3)})
            assert raised.value.candidates == (str(tmp_path / "run"),)

    run_ranks(2, load)


# Saving


@pytest.mark.parametrize("inside", ["iter_0000010", "iter_0000010/model", "iter_0000099"])
def test_no_root_begins_inside_an_iteration(tmp_path: Path, inside: str) -> None:
    root = make_root(tmp_path / "run", 10)
    before = sorted(root.rglob("*"))
    with (
        Checkpointer(root / inside) as checkpointer,
        pytest.raises(CheckpointError, match="is no place for checkpoints"),
    ):
        checkpointer.save({"w": torch.zeros(3)}, iteration=20)
    assert sorted(root.rglob("*")) == before


def test_directory_that_only_looks_like_an_iteration_may_be_saved_to(tmp_path: Path) -> None:
    save({"w": torch.zeros(3)}, tmp_path / "iter_0000010")
    assert verify(tmp_path / "iter_0000010").iteration == 0
    save({"w": torch.zeros(3)}, tmp_path / "iter_0000010")


def test_iteration_directory_stands_for_its_root_unless_it_is_one(tmp_path: Path) -> None:
    root = make_root(tmp_path / "run", 10)
    storage, iteration = open_root(root / "iter_0000010")
    assert (storage.location, iteration) == (str(root), 10)
    for path in (root, root / "iter_0000011", tmp_path):
        storage, iteration = open_root(path)
        assert (storage.location, iteration) == (str(path), None)
    own = make_root(tmp_path / "iter_0000005", 7)
    assert open_root(own)[1] is None
