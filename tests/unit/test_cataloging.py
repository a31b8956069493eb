"""The catalog of a root: checkpoints, saves that are none, and bytes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from distckpt import Checkpointer, catalog, incomplete_saves, label
from distckpt.cataloging import disk_usage
from distckpt.commit import Commit, Writer, list_commits, new_save_id, read_index, unsound_marker
from distckpt.index import encode_index
from distckpt.removing import STALE_AFTER_S, retire, sweep
from distckpt.storage import PosixStorage
from distckpt.storage.contract import read_all
from distckpt.testing import MemoryStorage
from tests.unit.damage import change, flip
from tests.unit.protocol import Clock, save, tree, write_files
from tests.unit.saved_roots import saved_root


def test_entry_says_what_index_labels_and_markers_say() -> None:
    storage = MemoryStorage()
    with Checkpointer(storage, verify_after_save=True, mesh={"tp": (0, 1)}) as checkpointer:
        checkpointer.save({"w": torch.ones(3)}, iteration=10)
        checkpointer.save({"w": torch.ones(3)}, iteration=20, metadata=(1, "a"), metrics={"loss": 2.0, "acc": 0.5})
    label(storage, 20, add_tags=["best"], note="n", metrics={"loss": 1.0})
    newer, older = catalog(storage)
    assert (newer.iteration, newer.epoch, newer.commit_seq, newer.directory) == (20, 1, 2, "iter_0000020")
    assert (newer.parent, older.parent) == (older.save_id, None)
    assert (newer.world_size, newer.mesh, newer.metadata) == (1, {"tp": 1}, (1, "a"))
    assert newer.metrics == {"loss": 1.0, "acc": 0.5}
    assert (newer.tags, newer.note, newer.pinned, newer.verified, newer.unsound) == (("best",), "n", False, True, False)
    assert newer.damage is newer.labels_damage is None
    assert newer.age_s is not None
    assert 0 <= newer.age_s < 3600


def test_bytes_are_those_of_all_files_of_the_checkpoint() -> None:
    storage = saved_root(10, parity=True)
    (entry,) = catalog(storage)
    own = [name for name in storage.list(entry.directory) if entry.save_id in name or name.startswith("index-")]
    record = f"parity-{entry.save_id}.json"
    sizes = {name: len(read_all(storage, f"{entry.directory}/{name}")) for name in own}
    assert record in sizes
    assert entry.bytes == sum(sizes.values())


def test_damaged_index_is_an_entry_that_says_why() -> None:
    storage = MemoryStorage()
    writer = Writer.claim(storage)
    for iteration in (10, 20, 30):
        save(writer, iteration)
    label(storage, 20, add_tags=["best"], pinned=True)
    storage.put_if_absent(unsound_marker(10, catalog(storage)[2].save_id), b"")
    change(storage, list_commits(storage)[1].name, flip(20))
    entries = {entry.iteration: entry for entry in catalog(storage)}
    assert (entries[20].save_id, entries[20].world_size, entries[20].bytes) == ("", None, 0)
    assert "crc32c" in (entries[20].damage or "")
    # There is nobody else's that its labels could be.
    assert (entries[20].tags, entries[20].pinned) == (("best",), True)
    assert [entries[i].unsound for i in (10, 20, 30)] == [True, False, False]


def test_checkpoint_of_which_a_file_is_missing_is_an_entry_that_says_which() -> None:
    storage = saved_root(10, 20)
    (shard, *_) = [name for name in storage.list("iter_0000020") if name.startswith("shard-")]
    storage.remove(f"iter_0000020/{shard}")
    newer, older = catalog(storage)
    assert newer.damage == f"iter_0000020/{shard} is missing"
    assert older.damage is None


def test_file_names_of_a_hostile_index_are_looked_for_nowhere_else() -> None:
    storage = MemoryStorage()
    save_id = save(Writer.claim(storage), 10)
    index, _ = read_index(storage, list_commits(storage)[0])
    for number, name in enumerate(("../writer-000001", "/etc/passwd", "n" * 5000, "", "a\0b"), 2):
        table = msgspec.structs.replace(index.chunk_table, name=name)
        hostile = msgspec.structs.replace(index, commit_seq=number, chunk_table=table)
        storage.put_if_absent(Commit(1, number, 10).name, encode_index(hostile))
    assert [entry.damage is None for entry in catalog(storage)] == [False] * 5 + [True]
    assert catalog(storage)[-1].save_id == save_id


def test_labels_of_one_of_two_checkpoints_are_not_given_to_a_damaged_one() -> None:
    storage = MemoryStorage()
    writer = Writer.claim(storage)
    save(writer, 10)
    label(storage, 10, pinned=True)
    save(writer, 10)
    assert [entry.pinned for entry in catalog(storage)] == [False, True]
    change(storage, Commit(1, 2, 10).name, flip(20))
    assert [(entry.damage is None, entry.pinned) for entry in catalog(storage)] == [(False, False), (True, True)]
    change(storage, Commit(1, 1, 10).name, flip(20))
    assert [entry.pinned for entry in catalog(storage)] == [False, False]


def test_checkpoint_that_is_removed_meanwhile_is_left_out() -> None:
    class Removed(MemoryStorage):
        is_gone = False

        def open(self, name):  # type: ignore[no-untyped-def]
            if "iter_0000010/index" in name and not self.is_gone:
                self.is_gone = True
                retire(self, [Commit(1, 1, 10)])
            return super().open(name)

    storage = Removed()
    writer = Writer.claim(storage)
    for iteration in (10, 20):
        save(writer, iteration)
    assert [entry.iteration for entry in catalog(storage)] == [20]


def one_retired_of_two() -> tuple[MemoryStorage, Clock, Writer]:
    """Iteration 20 is there, and 10 is being removed."""
    clock = Clock()
    storage = MemoryStorage(clock=clock)
    writer = Writer.claim(storage)
    for iteration in (10, 20):
        save(writer, iteration)
    sweep(storage, grace_s=0)
    retire(storage, [Commit(1, 1, 10)])
    return storage, clock, writer


def test_saves_that_are_no_checkpoints_are_named_apart() -> None:
    storage, clock, writer = one_retired_of_two()
    died = new_save_id()
    writer.announce(30, died)
    write_files(storage, 30, died)
    clock.now_s += STALE_AFTER_S
    under_way = new_save_id()
    writer.announce(40, under_way)
    found = {save.iteration: save for save in incomplete_saves(storage)}
    assert {i: s.state for i, s in found.items()} == {10: "retired", 30: "died", 40: "under way"}
    assert (found[30].save_id, found[30].age_s, found[30].bytes) == (died, STALE_AFTER_S, 1 + 32 + 32)
    assert "shard files of 1 of 1 ranks are there" in found[30].why
    assert "no shard files" in found[40].why
    assert [entry.iteration for entry in catalog(storage)] == [20]
    before = tree(storage)
    disk_usage(storage)
    assert tree(storage) == before


def test_files_of_a_damaged_index_are_not_called_a_save_that_died() -> None:
    storage = MemoryStorage()
    save(Writer.claim(storage), 10)
    sweep(storage, grace_s=0)
    storage.replace(list_commits(storage)[0].name, b"")
    assert incomplete_saves(storage) == []


def test_usage_counts_every_byte_once() -> None:
    storage, _, _ = one_retired_of_two()
    write_files(storage, 20, new_save_id())
    storage.put_if_absent("iter_0000020/notes.txt", b"12345")
    usage = {one.iteration: one for one in disk_usage(storage)}
    assert (usage[10].retired_bytes, usage[10].committed_bytes) == (64, 0)
    assert (usage[20].incomplete_bytes, usage[20].other_bytes) == (64, 5)
    for iteration, one in usage.items():
        files = tree(storage, f"iter_{iteration:07d}")
        assert one.total_bytes == sum(len(data) for data in files.values())


def test_directory_of_an_iteration_means_that_iteration(tmp_path: Path) -> None:
    writer = Writer.claim(PosixStorage(tmp_path))
    for iteration in (10, 20):
        save(writer, iteration)
    assert [entry.iteration for entry in catalog(tmp_path)] == [20, 10]
    assert [entry.iteration for entry in catalog(tmp_path / "iter_0000010")] == [10]
    assert [one.iteration for one in disk_usage(tmp_path / "iter_0000010")] == [10]


@pytest.mark.parametrize("field", ["metrics", "files", "metadata", "created_unix_s"])
def test_hostile_head_is_damage(field: str) -> None:
    """Fields that only a catalog reads, of a wrong type, under a right checksum."""
    from distckpt._C import crc32c
    from distckpt.checked_json import checked_body

    storage = MemoryStorage()
    save(Writer.claim(storage), 10)
    (commit,) = list_commits(storage)
    index = msgspec.json.decode(checked_body(read_all(storage, commit.name), name=""))
    index[field] = {"metrics": {"loss": "low"}, "files": 3, "metadata": {"%bytes": 3}, "created_unix_s": "now"}[field]
    body = msgspec.json.encode(index) + b"\n"
    storage.replace(commit.name, body + msgspec.json.encode({"crc32c": f"{crc32c(body):08x}"}) + b"\n")
    (entry,) = catalog(storage)
    assert entry.damage is not None
