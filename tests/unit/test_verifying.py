"""verify: every damaged byte is found, named, and told apart from what cannot be read."""

from __future__ import annotations

import errno
import time

import pytest

import distckpt
from distckpt import CheckpointNotFoundError
from distckpt.commit import TRACKER, list_commits
from distckpt.index import Index
from distckpt.shard_file import BLOCK_BYTES
from distckpt.storage import PosixStorage
from distckpt.storage.contract import read_all
from distckpt.testing import CrashingStorage, MemoryStorage
from tests.unit.damage import change, flip, newest
from tests.unit.protocol import clean_up
from tests.unit.saved_roots import RANKS, save, saved_root


@pytest.fixture(scope="module")
def saved() -> MemoryStorage:
    return saved_root(10, 20, parity=2)


@pytest.fixture
def storage(saved: MemoryStorage) -> MemoryStorage:
    return saved.power_cut()


def test_undamaged_checkpoint_is_sound_and_read_whole(storage: MemoryStorage) -> None:
    report = distckpt.verify(storage)
    assert report.is_sound
    assert (report.iteration, report.files) == (20, RANKS)
    assert report.bytes_read == report.bytes > RANKS * BLOCK_BYTES
    assert not report.warnings
    assert distckpt.verify(storage, 10).iteration == 10


def positions(index: Index) -> dict[str, tuple[str, int]]:
    """Every region of every file of a checkpoint -> (file, a byte in it)."""
    found = {}
    for file in index.files:
        regions = {
            "header length": 0,
            "header": 100,
            "header padding": file.header_bytes - 1,
            "checksum table": file.checksum_start,
            "end of the checksum table": file.size_bytes - 1,
            "per-rank values": file.per_rank[0],
        }
        blocks = -(-file.checksum_start // BLOCK_BYTES)
        regions |= {f"block {n}": max(n * BLOCK_BYTES, file.header_bytes) for n in range(blocks)}
        found |= {f"rank {file.rank}, {region}": (file.name, at) for region, at in regions.items()}
    table = index.chunk_table
    found |= {"chunk table": (table.name, 0), "chunk table trailer": (table.name, table.records_bytes)}
    name = f"index-{index.epoch:06d}-{index.commit_seq:06d}.json"
    return found | {"index": (name, 5), "index checksum": (name, -3)}


def test_flipped_bit_in_every_region_of_every_file_is_found_with_its_file(storage: MemoryStorage) -> None:
    directory, index = newest(storage)
    regions = positions(index)
    assert len(regions) > 25
    for region, (name, position) in regions.items():
        damaged = storage.power_cut()
        change(damaged, f"{directory}/{name}", flip(position))
        report = distckpt.verify(damaged)
        assert not report.is_sound, region
        assert {fault.file for fault in report.faults} == {f"{directory}/{name}"}, region


@pytest.mark.parametrize("name", ["parity-00000", "parity-00001", "parity-"])
def test_flipped_bit_in_parity_is_found(storage: MemoryStorage, name: str) -> None:
    directory, index = newest(storage)
    own = [f for f in storage.list(directory) if f.startswith(name) and f.endswith("json") == (name == "parity-")]
    for position in (0, -1 if name != "parity-" else -3):
        damaged = storage.power_cut()
        change(damaged, f"{directory}/{own[0]}", flip(position))
        assert {fault.file for fault in distckpt.verify(damaged).faults} == {f"{directory}/{own[0]}"}
    assert index.save_id in own[0]


def test_all_damaged_blocks_are_found_and_not_only_the_first(storage: MemoryStorage) -> None:
    directory, index = newest(storage)
    names = [index.files[0].name, index.files[2].name]
    for name in names:
        change(storage, f"{directory}/{name}", flip(BLOCK_BYTES + 1))
        change(storage, f"{directory}/{name}", flip(2 * BLOCK_BYTES + 1))
    found = sorted((fault.file.rpartition("/")[2], fault.problem) for fault in distckpt.verify(storage).faults)
    assert [name for name, _ in found] == [names[0], names[0], names[1], names[1]]
    assert ["block 1 " in problem for _, problem in found] == [True, False, True, False]
    assert ["block 2 " in problem for _, problem in found] == [False, True, False, True]


def test_files_that_are_gone_cut_short_or_of_another_save_are_found(storage: MemoryStorage) -> None:
    directory, index = newest(storage)
    gone, short, other, swapped = (storage.power_cut() for _ in range(4))
    first, second = (f"{directory}/{file.name}" for file in index.files[:2])
    gone.remove(first)
    change(short, first, lambda content: content.__delitem__(slice(len(content) - 1, None)))
    older = list_commits(other)[1].directory
    [old_file] = [name for name in other.list(older) if name.startswith("shard-00000")]
    other.replace(first, read_all(other, f"{older}/{old_file}"))
    swapped.replace(first, read_all(storage, second))
    swapped.replace(second, read_all(storage, first))
    assert {fault.file for fault in distckpt.verify(gone).faults} == {first}
    assert {fault.file for fault in distckpt.verify(short).faults} == {first}
    assert {fault.file for fault in distckpt.verify(other).faults} == {first}
    assert {fault.file for fault in distckpt.verify(swapped).faults} == {first, second}


def test_sample_reads_less_and_finds_damage_sooner_or_later(storage: MemoryStorage) -> None:
    directory, index = newest(storage)
    change(storage, f"{directory}/{index.files[1].name}", flip(BLOCK_BYTES + 7))
    found = [not distckpt.verify(storage, sample=0.3).is_sound for _ in range(40)]
    assert any(found)
    assert not all(found)
    with pytest.raises(ValueError, match="sample=0"):
        distckpt.verify(storage, sample=0)


def test_wrong_tracker_is_a_warning(storage: MemoryStorage) -> None:
    storage.replace(TRACKER, b"10")
    report = distckpt.verify(storage)
    assert report.is_sound
    assert "says 10" in report.warnings[0]


def test_what_says_nothing_of_the_checkpoint_is_raised(storage: MemoryStorage) -> None:
    with pytest.raises(CheckpointNotFoundError):
        distckpt.verify(MemoryStorage())
    refused = OSError(errno.EACCES, "Permission denied", "injected")
    opens = CrashingStorage(storage)
    distckpt.verify(opens, jobs=1)
    call = next(number for number, name in enumerate(opens.calls, 1) if "shard-00001" in name)
    with pytest.raises(PermissionError):
        distckpt.verify(CrashingStorage(storage, fail_at=call, error=refused), jobs=1)


def test_files_on_a_real_disk_are_read_and_on_bytes_is_told_of_each(tmp_path) -> None:
    save(PosixStorage(tmp_path), 7)
    told: list[int] = []
    report = distckpt.verify(tmp_path, on_bytes=told.append)
    assert report.is_sound
    assert sum(told) >= report.bytes


def test_checkpoint_that_retention_takes_meanwhile_is_not_damaged(storage: MemoryStorage) -> None:
    newest_commit, older = list_commits(storage)
    with pytest.raises(CheckpointNotFoundError, match="removed while it was being verified"):
        distckpt.verify(storage, older.iteration, on_bytes=lambda _: clean_up(storage, keep_last=1, grace_s=0))
    assert distckpt.verify(storage).iteration == newest_commit.iteration


def test_verify_that_is_given_up_reads_no_further(storage: MemoryStorage) -> None:
    told: list[int] = []

    def give_up(size: int) -> None:
        told.append(size)
        if len(told) == 4:
            raise KeyboardInterrupt
        if len(told) > 4:  # The thread may have begun the next file before the caller could stop it.
            time.sleep(2)

    with pytest.raises(KeyboardInterrupt):
        distckpt.verify(storage, jobs=1, on_bytes=give_up)
    assert len(told) <= 5
