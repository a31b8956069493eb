"""Parity: any one file of a group is made again bit by bit, at a load or by repair; of two nothing is made up."""

from __future__ import annotations

import itertools
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

import distckpt
from distckpt import Checkpointer, CorruptionError, loading, protecting
from distckpt._C import crc32c, crc32c_blocks
from distckpt.checked_json import encode_record
from distckpt.coordinator import Coordinator
from distckpt.parity import group_files, read_record
from distckpt.shard_file import BLOCK_BYTES
from distckpt.storage import PosixStorage
from distckpt.storage.contract import read_all
from distckpt.testing import CrashingStorage, MemoryStorage, run_ranks
from tests.unit.damage import change, flip, newest
from tests.unit.protocol import tree
from tests.unit.saved_roots import RANKS, check_loads, make_state, save, saved_root

DAMAGES = ("gone", "flipped", "header", "cut", "longer", "empty")


@pytest.fixture(scope="module")
def saved() -> MemoryStorage:
    return saved_root(10, 20, parity=True)


@pytest.fixture
def storage(saved: MemoryStorage) -> MemoryStorage:
    return saved.power_cut()


def damage(storage: MemoryStorage, name: str, how: str) -> None:
    if how == "gone":
        storage.remove(name)
    elif how in ("flipped", "header"):
        change(storage, name, flip(BLOCK_BYTES + 1 if how == "flipped" else 30))
    elif how == "cut":
        change(storage, name, lambda content: content.__delitem__(slice(len(content) // 2, None)))
    else:
        change(storage, name, lambda content: content.append(0) if how == "longer" else content.clear())


@pytest.mark.parametrize("how", DAMAGES)
def test_load_makes_any_one_file_of_a_group_again(storage: MemoryStorage, how: str) -> None:
    directory, index = newest(storage)
    before = tree(storage)
    for file in index.files:
        damaged = storage.power_cut()
        damage(damaged, f"{directory}/{file.name}", how)
        check_loads(damaged, 20)
        assert tree(damaged) == before


def test_load_tells_what_was_made_again_on_every_rank(storage: MemoryStorage, caplog) -> None:
    directory, index = newest(storage)
    name = index.files[1].name
    damage(storage, f"{directory}/{name}", "flipped")

    def load(coordinator: Coordinator) -> tuple[str, ...]:
        with Checkpointer(storage, coordinator=coordinator) as checkpointer:
            report = checkpointer.load(make_state(0, coordinator))
            assert not report.fell_back_from
            return report.rebuilt

    assert run_ranks(RANKS, load) == [(name,)] * RANKS
    assert "made again from parity" in caplog.text


@pytest.mark.parametrize("how", DAMAGES)
def test_repair_makes_a_file_again(storage: MemoryStorage, how: str) -> None:
    directory, index = newest(storage)
    before = tree(storage)
    damage(storage, f"{directory}/{index.files[2].name}", how)
    report = distckpt.repair(storage)
    assert report.is_sound
    assert "made again from parity" in report.repaired[0]
    assert tree(storage) == before
    assert tree(storage.power_cut()) == before


def test_two_damaged_files_of_a_group_are_left_and_the_load_falls_back(storage: MemoryStorage) -> None:
    directory, index = newest(storage)
    for file in index.files[:2]:
        damage(storage, f"{directory}/{file.name}", "flipped")
    before = tree(storage)
    assert not distckpt.repair(storage).is_sound
    check_loads(storage, 10)
    assert tree(storage) == before


def test_damaged_file_beside_damaged_parity_is_left(storage: MemoryStorage) -> None:
    directory, index = newest(storage)
    damage(storage, f"{directory}/{index.files[0].name}", "flipped")
    for position in (0, -1):
        damaged = storage.power_cut()
        change(damaged, f"{directory}/parity-00000-{index.save_id}.bin", flip(position))
        before = tree(damaged)
        assert not distckpt.repair(damaged).is_sound
        check_loads(damaged, 10)
        assert tree(damaged) == before


def test_parity_of_other_files_is_refused(storage: MemoryStorage) -> None:
    directory, index = newest(storage)
    record = f"{directory}/parity-{index.save_id}.json"
    older = next(name for name in tree(storage) if "iter_0000010/parity-" in name and name.endswith(".json"))
    storage.replace(record, read_all(storage, older))
    damage(storage, f"{directory}/{index.files[0].name}", "gone")
    report = distckpt.repair(storage)
    assert any("is not the parity of the files" in why for why in report.damaged)


@pytest.mark.parametrize("position", [50, BLOCK_BYTES + 50, -100])
def test_what_parity_makes_is_compared_with_the_index_first(storage: MemoryStorage, position: int) -> None:
    """Wherever it is wrong, though its own checksums are right."""
    directory, index = newest(storage)
    lost = f"{directory}/{index.files[0].name}"
    record = read_record(storage, directory, index)
    assert record is not None
    [group] = record.groups
    data = bytearray(read_all(storage, f"{directory}/{group.name}")[: group.data_bytes])
    data[index.files[0].size_bytes + position if position < 0 else position] ^= 1
    table = np.empty(-(-len(data) // BLOCK_BYTES), np.uint32)
    crc32c_blocks(data, BLOCK_BYTES, table)
    wrong = msgspec.structs.replace(group, table_crc=crc32c(table))
    storage.replace(f"{directory}/{group.name}", bytes(data) + table.tobytes())
    storage.replace(
        f"{directory}/parity-{index.save_id}.json", encode_record(msgspec.structs.replace(record, groups=(wrong,)))
    )
    damage(storage, lost, "flipped")
    before = tree(storage)
    report = distckpt.repair(storage)
    assert not report.is_sound
    assert any("does not suffice" in why for why in report.damaged)
    check_loads(storage, 10)
    assert tree(storage) == before


class CutStorage(MemoryStorage):
    """What a power cut leaves right after a record of parity was put."""

    left: MemoryStorage | None = None

    def put_if_absent(self, name: str, data: bytes) -> bool:
        done = super().put_if_absent(name, data)
        if "/parity-" in name:
            self.left = self.power_cut()
        return done


def test_record_of_parity_never_names_what_a_power_cut_can_take() -> None:
    storage = CutStorage()
    save(storage, 1, parity=2)
    assert storage.left is not None
    names = [name for name in tree(storage.left) if "parity-" in name]
    assert len(names) == 3
    assert distckpt.verify(storage.left).is_sound


def test_groups_are_even_and_cover_every_file(storage: MemoryStorage) -> None:
    _, index = newest(storage)
    files = list(index.files) * 5
    for size in (1, 2, 4, 7, 15, 100):
        groups = group_files(files, size)
        assert [file for group in groups for file in group] == files
        assert max(map(len, groups)) <= size
        assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_rebuilding_that_fails_anywhere_leaves_nothing_half_made(storage: MemoryStorage) -> None:
    directory, index = newest(storage)
    before = tree(storage)
    damage(storage, f"{directory}/{index.files[0].name}", "flipped")
    damaged = tree(storage)
    counting = CrashingStorage(storage.power_cut())
    distckpt.repair(counting)
    first = next(n for n, call in enumerate(counting.calls, 1) if call.startswith("create"))
    for call in range(first, len(counting.calls) + 1):
        torn = storage.power_cut()
        with suppress(OSError):
            distckpt.repair(CrashingStorage(torn, fail_at=call))
        for left in (torn, torn.power_cut(), torn.power_cut(seed=call)):
            found = {name: content for name, content in tree(left).items() if "/.tmp-" not in name}
            assert found in (before, damaged)
            assert distckpt.repair(left).is_sound


def test_parity_that_cannot_be_made_is_reported_and_the_save_stands(monkeypatch) -> None:
    storage = MemoryStorage()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "injected")

    monkeypatch.setattr("distckpt.protecting.write_parity", refuse)

    def save_once(coordinator: Coordinator) -> tuple[int, tuple[str, ...]]:
        with Checkpointer(storage, coordinator=coordinator, parity=True) as checkpointer:
            report = checkpointer.save(make_state(30, coordinator), iteration=30)
        return report.parity_bytes, report.degraded

    reports = run_ranks(RANKS, save_once)
    assert all(size == 0 and "No space left" in degraded[-1] for size, degraded in reports)
    check_loads(storage, 30)


def test_parity_that_one_rank_cannot_make_leaves_nothing_of_the_others(monkeypatch) -> None:
    storage = MemoryStorage()
    write = protecting.write_parity

    def refuse_one(storage: MemoryStorage, directory: str, save_id: str, number: int, *rest: Any, **more: Any) -> Any:
        if number == 1:
            raise OSError(28, "No space left on device", "injected")
        return write(storage, directory, save_id, number, *rest, **more)

    monkeypatch.setattr(protecting, "write_parity", refuse_one)
    save(storage, 30, parity=1)
    assert not [name for name in tree(storage) if "parity-" in name]
    check_loads(storage, 30)


def test_load_that_cannot_mend_in_time_falls_back(monkeypatch) -> None:
    storage = saved_root(10, 20, parity=True)
    directory, index = newest(storage)
    damage(storage, f"{directory}/{index.files[0].name}", "flipped")
    before = tree(storage)

    def load(coordinator: Coordinator) -> list[int]:
        with Checkpointer(storage, coordinator=coordinator, timeout_s=20) as checkpointer:
            return list(checkpointer.load(make_state(0, coordinator)).fell_back_from)

    clock = itertools.count(step=15)
    monkeypatch.setattr(loading, "time", SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter))
    assert run_ranks(RANKS, load) == [[20]] * RANKS
    assert tree(storage) == before


def test_async_save_makes_parity_too_and_a_sweep_takes_it_with_its_checkpoint() -> None:
    storage = MemoryStorage()

    def save_two(coordinator: Coordinator) -> None:
        with Checkpointer(storage, coordinator=coordinator, parity=2, keep_last=1, removal_grace_s=0) as checkpointer:
            for iteration in (1, 2):
                report = checkpointer.async_save(make_state(iteration, coordinator), iteration=iteration).wait()
                assert report.parity_bytes > 0

    run_ranks(RANKS, save_two)
    assert {name.partition("/")[0] for name in tree(storage) if "parity-" in name} == {"iter_0000002"}
    assert not [name for name in tree(storage) if name.startswith("iter_0000001/")]


def test_files_on_a_real_disk_are_made_again(tmp_path) -> None:
    save(PosixStorage(tmp_path), 7, parity=3)
    [name] = [path for path in (tmp_path / "iter_0000007").iterdir() if path.name.startswith("shard-00001")]
    content = name.read_bytes()
    name.write_bytes(content[: len(content) // 2])
    check_loads(PosixStorage(tmp_path), 7)
    assert name.read_bytes() == content
    assert distckpt.verify(tmp_path).is_sound


def test_without_parity_damage_is_an_error() -> None:
    storage = saved_root(5)
    directory, index = newest(storage)
    damage(storage, f"{directory}/{index.files[0].name}", "flipped")
    with pytest.raises(CorruptionError, match="no good checkpoint"):
        check_loads(storage, 5)
