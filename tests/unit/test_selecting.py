"""Selectors: what each means, that a load of one has no fall-back, and what an error says there is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from distckpt import (
    Checkpointer,
    CheckpointError,
    CheckpointNotFoundError,
    Copy,
    CorruptionError,
    DistributedError,
    label,
    repair,
    verify,
)
from distckpt.commit import Commit, Writer, list_commits, read_index, unsound_marker, verified_marker
from distckpt.coordinator import Coordinator
from distckpt.selecting import Selector, parse_selector, select_commits, select_one
from distckpt.storage import PosixStorage, Storage
from distckpt.testing import MemoryStorage, run_ranks
from tests.unit.damage import change, flip
from tests.unit.protocol import save


@pytest.fixture
def storage() -> MemoryStorage:
    """Losses 3, 1, 2, 1; accuracy is known of 20 and 30; 40 was saved again, without any."""
    storage = MemoryStorage()
    writer = Writer.claim(storage)
    save(writer, 10, metrics={"loss": 3.0})
    save(writer, 20, metrics={"loss": 1.0, "acc:top": 0.5})
    save(writer, 30, metrics={"loss": 2.0, "acc:top": 0.25})
    save(writer, 40, metrics={"loss": 0.0})
    save(writer, 40, metrics={"loss": 1.0, "nan": None})
    return storage


def selected(storage: Storage, selector: Selector) -> list[int]:
    return [commit.commit_seq for commit in select_commits(storage, selector)]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (None, [5, 4, 3, 2, 1]),
        ("latest", [5, 4, 3, 2, 1]),
        (20, [2]),
        ("20", [2]),
        ("step:20", [2]),
        ("step:0000020", [2]),
        (40, [5, 4]),
        ("best:loss", [5]),  # of equals the newest, and not what was replaced
        ("best:loss:min", [5]),
        ("best:loss:max", [1]),
        ("best:acc:top", [3]),
        ("best:acc:top:max", [2]),
        ("iter_0000030", [3]),
    ],
)
def test_selector_means(storage: MemoryStorage, selector: Selector, expected: list[int]) -> None:
    assert selected(storage, selector) == expected


def test_labels_decide_what_is_best(storage: MemoryStorage) -> None:
    label(storage, 10, metrics={"loss": 0.5, "eval": 1})
    assert selected(storage, "best:loss") == [1]
    assert selected(storage, "best:eval") == [1]


def test_best_is_never_one_that_is_known_to_be_bad(storage: MemoryStorage) -> None:
    (newest, *_, second, _) = list_commits(storage)
    storage.put_if_absent(unsound_marker(40, read_index(storage, newest)[0].save_id), b"")
    assert selected(storage, "best:loss") == [2]
    change(storage, second.name, flip(20))
    assert selected(storage, "best:loss") == [3]


def test_tag_names_whichever_has_it(storage: MemoryStorage) -> None:
    for iteration in (30, 10):
        label(storage, iteration, add_tags=["a", f"only{iteration}"])
    assert selected(storage, "tag:a") == [1]
    assert selected(storage, "tag:only30") == [3]


def test_latest_verified_is_the_newest_that_was_read_back() -> None:
    storage = MemoryStorage()
    for verified, iteration in ((True, 10), (True, 20), (False, 30)):
        with Checkpointer(storage, verify_after_save=verified) as checkpointer:
            checkpointer.save({"w": torch.ones(2)}, iteration=iteration)
            assert checkpointer.read("latest-verified" if iteration == 30 else None)
    assert [commit.iteration for commit in select_commits(storage, "latest-verified")] == [20]


def test_path_of_an_iteration_in_the_root_means_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = PosixStorage(tmp_path / "run")
    save(Writer.claim(root), 10)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("run")
    for path in (tmp_path / "run" / "iter_0000010", "run/iter_0000010/", "./link/iter_0000010", "iter_0000010"):
        assert [commit.iteration for commit in select_commits(root, path)] == [10]
    for wrong in ("other/iter_0000010", "run/model", str(tmp_path)):
        with pytest.raises(CheckpointNotFoundError, match="no iteration's directory in"):
            select_commits(root, wrong)


@pytest.mark.parametrize(
    "wrong", ["", "newest", "step:", "step:x", "step:-1", "best:", "tag:", "tag:a\n", "-1", "1.5", "latest-", "Latest"]
)
def test_word_that_is_no_selector_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"expected one of latest, latest-verified|no control characters"):
        parse_selector(wrong)


@pytest.mark.parametrize(
    ("selector", "says"),
    [
        (50, r"no checkpoint of iteration 50 under memory:: it has iterations \[10, 20, 30, 40\]"),
        ("latest-verified", "none was read back"),
        ("best:nan", "no checkpoint has this metric; metrics are acc:top, loss"),
        ("best:unknown", "no checkpoint has this metric; metrics are acc:top, loss"),
        ("tag:best", "tag:best: no checkpoint has this tag; tags are a, b"),
    ],
)
def test_error_says_what_there_is(storage: MemoryStorage, selector: Selector, says: str) -> None:
    label(storage, 10, add_tags=["b", "a"])
    with pytest.raises(CheckpointNotFoundError, match=says):
        select_commits(storage, selector)


@pytest.mark.parametrize("selector", [None, "latest-verified", "best:loss", "tag:a"])
def test_root_without_checkpoints_is_told_alike_whatever_was_selected(selector: str | None) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint under memory:"):
        select_commits(MemoryStorage(), selector)


# Where an iteration is given


@pytest.fixture
def trained() -> MemoryStorage:
    storage = MemoryStorage()
    with Checkpointer(storage) as checkpointer:
        for iteration in (10, 20, 30):
            checkpointer.save({"w": torch.full((4,), iteration)}, iteration=iteration, metrics={"loss": 1 / iteration})
    label(storage, 20, add_tags=["best"])
    return storage


@pytest.mark.parametrize(
    ("selector", "iteration"), [("tag:best", 20), ("best:loss:max", 10), ("step:20", 20), ("latest", 30)]
)
def test_all_ranks_load_what_is_selected(trained: MemoryStorage, selector: str, iteration: int) -> None:
    def load(coordinator: Coordinator) -> None:
        with Checkpointer(trained, coordinator=coordinator) as checkpointer:
            state = {"w": torch.zeros(4, dtype=torch.int64)}
            assert checkpointer.load(state, selector).iteration == iteration
            assert torch.equal(state["w"], torch.full((4,), iteration))
            assert torch.equal(checkpointer.read(selector)["w"], state["w"])  # type: ignore[arg-type]

    run_ranks(2, load)


@pytest.mark.parametrize("selector", ["tag:best", "best:loss:max", "step:20", 20])
def test_load_of_one_that_is_damaged_falls_back_to_no_other(trained: MemoryStorage, selector: str | int) -> None:
    commit = select_commits(trained, selector)[0]
    index = read_index(trained, commit)[0]
    change(trained, f"{commit.directory}/{index.files[0].name}", flip(4100))
    with Checkpointer(trained) as checkpointer:
        with pytest.raises(CorruptionError, match="no good checkpoint under memory:"):
            checkpointer.load({"w": torch.zeros(4, dtype=torch.int64)}, selector)
        assert checkpointer.load({"w": torch.zeros(4, dtype=torch.int64)}, "latest").iteration == 30


def test_ranks_that_select_differently_are_told(trained: MemoryStorage) -> None:
    def load(coordinator: Coordinator) -> None:
        with Checkpointer(trained, coordinator=coordinator) as checkpointer:
            with pytest.raises(CheckpointError, match="the ranks ask for different loads"):
                checkpointer.load({"w": torch.zeros(4)}, "tag:best" if coordinator.rank else "tag:other")
            with pytest.raises((DistributedError, ValueError), match="expected one of"):
                checkpointer.load({"w": torch.zeros(4)}, "nonsense" if coordinator.rank else None)

    run_ranks(2, load)


def test_verify_and_repair_take_selectors(trained: MemoryStorage) -> None:
    assert verify(trained, "tag:best").iteration == 20
    assert verify(trained, "best:loss").iteration == 30
    commit = Commit(1, 2, 20)
    index = read_index(trained, commit)[0]
    trained.remove(f"{commit.directory}/{index.chunk_table.name}")
    assert not verify(trained, "tag:best").is_sound
    assert repair(trained, "tag:best").is_sound
    assert verify(trained, "tag:best").is_sound


def test_verify_and_repair_take_the_directory_of_an_iteration(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        for iteration in (10, 20):
            checkpointer.save({"w": torch.ones(3)}, iteration=iteration)
    assert verify(tmp_path / "iter_0000010").iteration == 10
    assert repair(tmp_path / "iter_0000010").is_sound
    (tmp_path / "iter_0000020" / list_commits(PosixStorage(tmp_path))[0].name.rpartition("/")[2]).unlink()
    assert repair(tmp_path / "iter_0000020", force=True).is_sound
    assert verify(tmp_path).iteration == 20


# Two roots


def save_with_copies(near: Storage, far: Storage, losses: Mapping[int, float]) -> None:
    with Checkpointer(near, copy_to=Copy(far)) as checkpointer:
        for iteration, loss in losses.items():
            checkpointer.save({"w": torch.full((4,), iteration)}, iteration=iteration, metrics={"loss": loss})
            copier = checkpointer._after_commit.copier
            assert copier is not None
            assert copier._worker.wait(30)  # Else what is committed meanwhile is copied first.


def test_selected_checkpoint_is_read_from_its_copy_and_no_other_is() -> None:
    near, far = MemoryStorage(), MemoryStorage()
    save_with_copies(near, far, {10: 1.0, 20: 2.0, 30: 3.0})
    label(near, 20, metrics={"loss": 0.5})  # Of this the copy does not know: the nearest root decides.
    assert [commit.iteration for commit in select_commits(far, "best:loss")] == [10]
    commit = select_commits(near, "best:loss")[0]
    name = f"{commit.directory}/{read_index(near, commit)[0].files[0].name}"

    def load() -> int:
        with Checkpointer(near, copy_to=Copy(far)) as checkpointer:
            return checkpointer.load({"w": torch.zeros(4, dtype=torch.int64)}, "best:loss").iteration

    assert load() == 20
    change(near, name, flip(4100))
    assert load() == 20
    change(far, name, flip(4100))
    with pytest.raises(CorruptionError, match="for 'best:loss'"):
        load()


def test_best_latest_verified_and_tags_are_those_of_both_roots() -> None:
    """The nearest has given up what is best, and a later checkpoint there was not read back."""
    near = MemoryStorage()
    writer = Writer.claim(near)
    for iteration, loss in ((10, 3.0), (20, 1.0), (30, 2.0)):
        save(writer, iteration, metrics={"loss": loss})
    far = near.power_cut()
    oldest, best, newest = reversed(list_commits(near))
    label(near, 10, add_tags=["a"])
    label(far, 30, add_tags=["a"])
    label(far, 20, add_tags=["a"])
    for storage, commit in ((near, oldest), (far, best)):
        storage.put_if_absent(verified_marker(commit.iteration, read_index(storage, commit)[0].save_id), b"")
    near.remove(best.name)
    storages = [near, far]
    assert select_one(storages, "best:loss") == best
    assert select_one(storages, "latest-verified") == best
    assert select_one(storages, "tag:a") == best
    assert select_one(storages, "iter_0000020") == best
    label(near, 30, metrics={"loss": 0.5})
    assert select_one(storages, "best:loss") == newest
    label(far, 20, metrics={"loss": 0.25})
    assert select_one(storages, "best:loss") == best
    with pytest.raises(CheckpointNotFoundError, match=r"best:acc: .*metrics are loss.*has iterations \[10, 30\]; .*20"):
        select_one(storages, "best:acc")


def test_of_two_values_of_a_metric_that_of_the_nearest_root_counts() -> None:
    near = MemoryStorage()
    writer = Writer.claim(near)
    for iteration, loss in ((10, 1.0), (20, 2.0)):
        save(writer, iteration, metrics={"loss": loss})
    far = near.power_cut()
    label(near, 10, metrics={"loss": 3.0})
    assert select_one([near, far], "best:loss") == list_commits(near)[0]


def test_tag_that_only_the_copy_has_is_found_there() -> None:
    near, far = MemoryStorage(), MemoryStorage()
    save_with_copies(near, far, {10: 1.0, 20: 2.0})
    label(far, 10, add_tags=["kept"])
    with Checkpointer(near, copy_to=Copy(far)) as checkpointer:
        assert checkpointer.load({"w": torch.zeros(4, dtype=torch.int64)}, "tag:kept").iteration == 10
        with pytest.raises(CheckpointNotFoundError, match=r"tag:x: .*tags are kept.*memory:.*; memory: has"):
            checkpointer.load({"w": torch.zeros(4, dtype=torch.int64)}, "tag:x")
