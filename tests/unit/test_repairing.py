"""repair: what can be known is made again, exactly; nothing becomes a checkpoint that was none unless it is forced."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest
import torch

import distckpt
from distckpt import Checkpointer, CheckpointNotFoundError, CorruptionError
from distckpt._C import crc32c_blocks
from distckpt.commit import TRACKER, list_commits, read_index, read_tracker
from distckpt.coordinator import Coordinator
from distckpt.index import Index
from distckpt.rebuilding import rebuild_index
from distckpt.shard_file import BLOCK_BYTES
from distckpt.storage.contract import read_all
from distckpt.testing import CrashingStorage, MemoryStorage, run_ranks
from tests.unit.damage import change, flip, newest
from tests.unit.protocol import tree
from tests.unit.saved_roots import check_loads, save, saved_root


@pytest.fixture(scope="module")
def saved() -> MemoryStorage:
    return saved_root(10, 20)


@pytest.fixture
def storage(saved: MemoryStorage) -> MemoryStorage:
    return saved.power_cut()


def known(index: Index) -> dict[str, object]:
    """What of an index the shard files say too."""
    fields = json.loads(distckpt.index.encode_index(index).splitlines()[0])
    lost = ("epoch", "commit_seq", "parent", "created_unix_s", "tensors", "chunk_table")
    specs = {key: {k: v for k, v in entry.items() if k != "record"} for key, entry in fields["tensors"].items()}
    return {key: value for key, value in fields.items() if key not in lost} | {"tensors": specs}


def test_rebuilt_index_says_what_the_index_said(storage: MemoryStorage) -> None:
    _, index = newest(storage)
    rebuilt, _ = rebuild_index(storage, 20, index.save_id)
    assert known(rebuilt) == known(index)


@pytest.mark.parametrize("named", [b"", b"10", b"garbage", None])
def test_tracker_is_made_to_name_the_newest_checkpoint(storage: MemoryStorage, named: bytes | None) -> None:
    storage.remove(TRACKER)
    if named is not None:
        storage.replace(TRACKER, named)
    before = tree(storage)
    looked = distckpt.repair(storage, dry_run=True)
    assert tree(storage) == before
    report = distckpt.repair(storage)
    assert report.is_sound
    assert not looked.is_sound
    assert report.repaired == looked.repaired
    assert "now it names 20" in report.repaired[0]
    assert read_tracker(storage) == 20
    assert distckpt.repair(storage).repaired == ()


def test_damaged_index_is_made_again_and_keeps_its_place(storage: MemoryStorage) -> None:
    commit = list_commits(storage)[0]
    change(storage, commit.name, flip(50))
    report = distckpt.repair(storage)
    assert report.is_sound
    assert "made again" in report.repaired[0]
    assert list_commits(storage)[0] == commit
    assert distckpt.verify(storage).is_sound
    check_loads(storage, 20)
    check_loads(storage, 10, iteration=10)


@pytest.mark.parametrize("damage", ["gone", "flipped"])
def test_chunk_table_is_made_again(storage: MemoryStorage, damage: str) -> None:
    directory, index = newest(storage)
    name = f"{directory}/{index.chunk_table.name}"
    if damage == "gone":
        storage.remove(name)
    else:
        change(storage, name, flip(3))
    assert distckpt.repair(storage).is_sound
    assert distckpt.verify(storage).is_sound
    repaired = read_index(storage, list_commits(storage)[0])[0]
    assert (repaired.parent, repaired.created_unix_s) == (index.parent, index.created_unix_s)
    check_loads(storage, 20)


def test_lost_index_is_made_again_only_by_force(storage: MemoryStorage) -> None:
    commit = list_commits(storage)[0]
    storage.remove(commit.name)
    before = tree(storage)
    refused = distckpt.repair(storage, 20)
    assert not refused.is_sound
    assert "--force" in refused.damaged[0]
    assert {name: content for name, content in tree(storage).items() if name != TRACKER} == {
        name: content for name, content in before.items() if name != TRACKER
    }
    assert distckpt.repair(storage, 20, force=True).is_sound
    assert list_commits(storage)[0].iteration == 20
    assert list_commits(storage)[0] > commit
    check_loads(storage, 20)
    assert read_tracker(storage) == 20


def test_save_under_way_is_no_lost_index(storage: MemoryStorage) -> None:
    commit = list_commits(storage)[0]
    _, index = newest(storage)
    storage.remove(commit.name)
    storage.put_if_absent(f"{commit.directory}/pending-{index.save_id}", str(commit.epoch).encode())
    report = distckpt.repair(storage, 20, force=True)
    assert "a save is under way" in report.damaged[0]
    assert list_commits(storage)[0].iteration == 10


@pytest.mark.parametrize("damage", ["block", "header", "gone", "first gone", "cut"])
def test_nothing_damaged_gets_a_new_checksum(storage: MemoryStorage, damage: str) -> None:
    commit = list_commits(storage)[0]
    directory, index = newest(storage)
    name = f"{directory}/{index.files[0 if damage == 'first gone' else 1].name}"
    if damage in ("gone", "first gone"):
        storage.remove(name)
    elif damage == "cut":
        change(storage, name, lambda content: content.__delitem__(slice(len(content) - 4, None)))
    else:
        change(storage, name, flip(BLOCK_BYTES + 9 if damage == "block" else 200))
    change(storage, commit.name, flip(50))
    before = tree(storage)
    report = distckpt.repair(storage)
    assert not report.is_sound
    assert "cannot be made again" in report.damaged[0]
    assert {k: v for k, v in tree(storage).items() if k != TRACKER} == {k: v for k, v in before.items() if k != TRACKER}


def test_file_of_which_no_other_speaks_is_missed(storage: MemoryStorage) -> None:
    """Each rank holds tensors of its own: those of a file that is gone leave no hole in any other."""

    def save_own(coordinator: Coordinator) -> None:
        with Checkpointer(storage, coordinator=coordinator) as checkpointer:
            checkpointer.save({f"of {coordinator.rank}": torch.ones(9)}, iteration=30)

    run_ranks(3, save_own)
    directory, index = newest(storage)
    storage.remove(f"{directory}/{index.files[2].name}")
    with pytest.raises(CorruptionError, match="0 files of rank 2"):
        rebuild_index(storage, 30, index.save_id)


def test_damaged_index_beside_files_of_two_saves_is_left(storage: MemoryStorage) -> None:
    commit = list_commits(storage)[0]
    _, index = newest(storage)
    other = "0" * 32
    for name in [name for name in storage.list(commit.directory) if index.save_id in name]:
        content = tree(storage)[f"{commit.directory}/{name}"]
        storage.put_if_absent(f"{commit.directory}/{name.replace(index.save_id, other)}", content)
    change(storage, commit.name, flip(50))
    report = distckpt.repair(storage)
    assert "files of 2 saves" in report.damaged[0]


def test_older_save_is_not_taken_for_one_whose_index_is_damaged(storage: MemoryStorage) -> None:
    """Two saves of one iteration, both indexes damaged; of the newer one only the chunk table is left."""
    save(storage, 20)
    newer, older = (commit for commit in list_commits(storage) if commit.iteration == 20)
    names = storage.list(newer.directory)
    save_id = read_index(storage, newer)[0].save_id
    for name in names:
        if name.startswith("shard-") and save_id in name:
            storage.remove(f"{newer.directory}/{name}")
    for commit in (newer, older):
        change(storage, commit.name, flip(50))
    before = tree(storage)
    report = distckpt.repair(storage, 20)
    assert "files of 2 saves" in report.damaged[0]
    assert {k: v for k, v in tree(storage).items() if k != TRACKER} == {k: v for k, v in before.items() if k != TRACKER}


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_index_that_cannot_be_read_once_is_not_made_again(storage: MemoryStorage, code: int, monkeypatch) -> None:
    monkeypatch.setattr("distckpt.repairing._PAUSE_S", 0.0)
    before = tree(storage)
    commit = list_commits(storage)[0]
    counting = CrashingStorage(storage)
    distckpt.repair(counting)
    call = next(n for n, name in enumerate(counting.calls, 1) if name == f"open {commit.name}")
    failing = CrashingStorage(storage, fail_at=call, error=OSError(code, os.strerror(code), "injected"))
    if code == errno.EIO:
        assert distckpt.repair(failing).is_sound
    else:
        with pytest.raises(PermissionError):
            distckpt.repair(failing)
    assert tree(storage) == before


def test_table_is_made_again_beside_what_a_second_try_of_a_write_has_left(storage: MemoryStorage) -> None:
    directory, index = newest(storage)
    content = read_all(storage, f"{directory}/{index.files[0].name}")
    storage.put_if_absent(f"{directory}/{index.files[0].name.replace('-of-', '.7-of-')}", content)
    storage.remove(f"{directory}/{index.chunk_table.name}")
    assert distckpt.repair(storage).is_sound
    check_loads(storage, 20)


def test_table_is_made_again_once_parity_has_made_the_file_that_is_gone() -> None:
    storage = saved_root(10, 20, parity=True)
    directory, index = newest(storage)
    storage.remove(f"{directory}/{index.chunk_table.name}")
    storage.remove(f"{directory}/{index.files[1].name}")
    report = distckpt.repair(storage)
    assert report.is_sound
    assert len(report.repaired) == 2
    assert distckpt.verify(storage).is_sound
    check_loads(storage, 20)


HOSTILE = {
    "offset": (b'"weight@0,0"', b'"weight@9223372036854775807,0"'),
    "digits": (b'"weight@0,0"', b'"weight@' + b"9" * 2500 + b',0"'),
    "partition": (b'\\"global_shape\\":[5]', b'\\"partition\\":[null,null],\\"global_shape\\":[5]'),
    "blocks": (b'\\"global_shape\\":[5]', b'\\"blocks\\":[2],\\"global_shape\\":[5]'),
    "dtype of an empty tensor": (b'\\"global_shape\\":[0,4]', b'\\"dtype\\":\\"f\\",\\"global_shape\\":[0,4]'),
    "dimensions": (b'\\"global_shape\\":[0,4]', b'\\"global_shape\\":[0' + b",4" * 40 + b"]"),
    "tensor and value": (b'{\\"step\\":', b'{\\"bias\\":'),
    "rank": (b'"rank":"0"', b'"rank":"-1"'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header_makes_no_index(storage: MemoryStorage, name: str) -> None:
    """With checksums that are right: what is made of it must pass what every index must pass."""
    directory, index = newest(storage)
    old, new = HOSTILE[name]
    first = f"{directory}/{index.files[0].name}"
    content = read_all(storage, first)
    file = index.files[0]
    text = content[8 : file.header_bytes].rstrip()
    assert old in text, text[:600]
    text = text.replace(old, new, 1)
    assert len(text) <= file.header_bytes - 8, "no room for it in the padding"
    body = content[:8] + text.ljust(file.header_bytes - 8) + content[file.header_bytes : file.checksum_start]
    table = np.empty(-(-len(body) // BLOCK_BYTES), np.uint32)
    crc32c_blocks(body, BLOCK_BYTES, table)
    storage.replace(first, body + table.tobytes())
    change(storage, list_commits(storage)[0].name, flip(50))
    report = distckpt.repair(storage)
    assert not report.is_sound
    assert not any("made again, with" in what for what in report.repaired)


def test_repair_that_is_interrupted_anywhere_can_be_run_again(storage: MemoryStorage) -> None:
    directory, index = newest(storage)
    change(storage, list_commits(storage)[0].name, flip(50))
    storage.remove(f"{directory}/{index.chunk_table.name}")
    storage.replace(TRACKER, b"")
    counting = CrashingStorage(storage.power_cut())
    distckpt.repair(counting)
    assert len(counting.calls) > 10
    for call in range(1, len(counting.calls) + 1):
        for moment in ("before", "after"):
            torn = storage.power_cut()
            crashing = CrashingStorage(torn, fail_at=call, moment=moment)  # type: ignore[arg-type]
            try:
                distckpt.repair(crashing)
            except OSError:
                assert crashing.failed
            for left in (torn, torn.power_cut(), torn.power_cut(seed=call)):
                assert distckpt.repair(left).is_sound
                assert distckpt.verify(left).is_sound
                assert read_tracker(left) == 20


def test_where_nothing_is_it_says_so(storage: MemoryStorage) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint under"):
        distckpt.repair(MemoryStorage())
    for commit in list_commits(storage):
        storage.remove(commit.name)
    with pytest.raises(CheckpointNotFoundError, match=r"iterations \[10, 20\] have shard files"):
        distckpt.repair(storage)


def test_iteration_that_is_not_there_is_told_which_are() -> None:
    storage = MemoryStorage()
    save(storage, 1, 2)
    with pytest.raises(CheckpointNotFoundError, match=r"of iteration 7 under .*: it has iterations \[1, 2\]$"):
        distckpt.repair(storage, 7)
