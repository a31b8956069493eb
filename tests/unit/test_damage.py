"""Any byte of a stored checkpoint that is not what was written is found, whatever part of whichever file it is in.

A load then takes the checkpoint before, on all ranks, whole.
"""

from __future__ import annotations

import errno
import os
import re

import pytest
import torch

from distckpt import Checkpointer, CorruptionError, DistributedError, PerRank, ShardedTensor
from distckpt.commit import list_commits, read_index
from distckpt.coordinator import Coordinator
from distckpt.index import Index
from distckpt.shard_file import BLOCK_BYTES
from distckpt.storage.contract import read_all
from distckpt.storage.memory import MemoryReadFile
from distckpt.testing import MemoryStorage, run_ranks
from tests.unit.damage import change, flip, newest

BLOCKS = 3


def make_state(version: int) -> dict[str, object]:
    weight = torch.full((BLOCKS * BLOCK_BYTES // 8,), version, dtype=torch.int64)
    return {"weight": weight, "bias": torch.full((3,), version), "random": PerRank(version), "step": version}


@pytest.fixture(scope="module")
def saved() -> MemoryStorage:
    """Iterations 10 and 20, by one rank."""
    storage = MemoryStorage()
    with Checkpointer(storage) as checkpointer:
        for iteration in (10, 20):
            checkpointer.save(make_state(iteration), iteration=iteration)
    return storage


@pytest.fixture
def storage(saved: MemoryStorage) -> MemoryStorage:
    return saved.power_cut()


def check_load_falls_back(storage: MemoryStorage, why: str) -> None:
    with Checkpointer(storage) as checkpointer:
        state = make_state(0)
        report = checkpointer.load(state)
        assert (report.iteration, list(report.fell_back_from)) == (10, [20])
        assert why in report.fell_back_from[20]
        expected = make_state(10)
        for key in ("weight", "bias"):
            assert torch.equal(state[key], expected[key])  # type: ignore[arg-type]
        assert state["step"] == 10
        assert isinstance(state["random"], PerRank)
        assert state["random"].value == 10
        with pytest.raises(CorruptionError, match=re.escape(why)):
            checkpointer.load(make_state(0), 20)
        assert checkpointer.read()["step"] == 10


def shard_positions(index: Index) -> dict[str, tuple[int, str]]:
    """Part of the shard file -> a byte in it, and what the error says."""
    file = index.files[0]
    return {
        "header length": (0, "header: crc32c"),
        "header": (100, "header: crc32c"),
        "header padding": (file.header_bytes - 1, "header: crc32c"),
        "first tensor bytes": (file.header_bytes, "block 0 (bytes 0-1048575): crc32c"),
        "a block in the middle": (BLOCK_BYTES + 5, "block 1 (bytes 1048576-2097151): crc32c"),
        "last tensor bytes": (file.per_rank[0] - 1, f"block {BLOCKS} (bytes"),
        "per-rank values": (file.per_rank[0], f"block {BLOCKS} (bytes"),
        "checksum table": (file.checksum_start, "checksum table: crc32c"),
        "end of the checksum table": (file.size_bytes - 1, "checksum table: crc32c"),
    }


@pytest.mark.parametrize(
    "part",
    [
        "header length",
        "header",
        "header padding",
        "first tensor bytes",
        "a block in the middle",
        "last tensor bytes",
        "per-rank values",
        "checksum table",
        "end of the checksum table",
    ],
)
def test_flipped_bit_in_a_shard_file_is_found(storage: MemoryStorage, part: str) -> None:
    directory, index = newest(storage)
    position, why = shard_positions(index)[part]
    change(storage, f"{directory}/{index.files[0].name}", flip(position))
    check_load_falls_back(storage, why)


def test_flipped_bit_in_per_rank_values_is_found_when_nothing_else_is_read(storage: MemoryStorage) -> None:
    directory, index = newest(storage)
    change(storage, f"{directory}/{index.files[0].name}", flip(index.files[0].per_rank[0] + 1))
    state: dict[str, object] = {"random": PerRank(0)}
    with Checkpointer(storage) as checkpointer:
        report = checkpointer.load(state, strict=False)
    assert list(report.fell_back_from) == [20]


def test_flipped_bit_in_the_chunk_table_is_found(storage: MemoryStorage) -> None:
    directory, index = newest(storage)
    table = index.chunk_table
    for position, why in (
        (0, "page 0: crc32c"),
        (table.records_bytes - 1, "page 0: crc32c"),
        (table.records_bytes, "the checksum of its trailer"),
        (table.size_bytes - 1, "the checksum of its trailer"),
    ):
        damaged = storage.power_cut()
        change(damaged, f"{directory}/{table.name}", flip(position))
        check_load_falls_back(damaged, why)


@pytest.mark.parametrize("lost", [1, 5000, 2 * BLOCK_BYTES])
def test_file_of_another_length_is_found(storage: MemoryStorage, lost: int) -> None:
    directory, index = newest(storage)
    size = index.files[0].size_bytes
    cut, longer = storage.power_cut(), storage.power_cut()
    change(cut, f"{directory}/{index.files[0].name}", lambda content: content.__delitem__(slice(size - lost, None)))
    check_load_falls_back(cut, f"{size - lost} bytes, the index says {size}")
    change(longer, f"{directory}/{index.files[0].name}", lambda content: content.extend(bytes(lost)))
    check_load_falls_back(longer, f"{size + lost} bytes, the index says {size}")


@pytest.mark.parametrize("change_by", [-1, 1])
def test_chunk_table_of_another_length_is_found(storage: MemoryStorage, change_by: int) -> None:
    directory, index = newest(storage)
    size = index.chunk_table.size_bytes
    content = (read_all(storage, f"{directory}/{index.chunk_table.name}") + b"\0")[: size + change_by]
    storage.replace(f"{directory}/{index.chunk_table.name}", content)
    check_load_falls_back(storage, f"{size + change_by} bytes, the index says {size}")


def test_missing_file_is_found(storage: MemoryStorage) -> None:
    directory, index = newest(storage)
    for name in (index.files[0].name, index.chunk_table.name):
        without = storage.power_cut()
        without.remove(f"{directory}/{name}")
        check_load_falls_back(without, name)


def test_sound_file_of_another_save_is_found(storage: MemoryStorage) -> None:
    directory, index = newest(storage)
    other = list_commits(storage)[1]
    other_index = read_index(storage, other)[0]
    assert other_index.files[0].size_bytes == index.files[0].size_bytes
    content = read_all(storage, f"{other.directory}/{other_index.files[0].name}")
    storage.replace(f"{directory}/{index.files[0].name}", content)
    check_load_falls_back(storage, "header: crc32c")


def test_damage_that_one_rank_meets_makes_all_ranks_fall_back() -> None:
    """Rank 1 alone reads the file that is damaged; rank 0 has filled its tensors from the newer one by then."""
    storage = MemoryStorage()

    def own(coordinator: Coordinator, version: int) -> dict[str, object]:
        data = torch.full((4,), version)
        return {"w": ShardedTensor.from_rank_offsets("w", data, (0, coordinator.rank, 2))}

    def save(coordinator: Coordinator) -> None:
        with Checkpointer(storage, coordinator=coordinator) as checkpointer:
            for iteration in (10, 20):
                checkpointer.save(own(coordinator, iteration), iteration=iteration)

    def load(coordinator: Coordinator) -> tuple[int, list[int], list[int]]:
        with Checkpointer(storage, coordinator=coordinator) as checkpointer:
            state = own(coordinator, 0)
            report = checkpointer.load(state)
        tensor = state["w"]
        assert isinstance(tensor, ShardedTensor)
        return report.iteration, list(report.fell_back_from), tensor.data.tolist()

    run_ranks(2, save)
    directory, index = newest(storage)
    (theirs,) = [file for file in index.files if file.rank == 1]
    change(storage, f"{directory}/{theirs.name}", flip(theirs.header_bytes))
    assert run_ranks(2, load) == [(10, [20], [10] * 4)] * 2


# What a storage answers when a file is opened


def refuse_to_open(storage: MemoryStorage, part: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the newest checkpoint with `part` in their names."""
    directory, _ = newest(storage)
    inner = storage.open

    def open_(name: str) -> MemoryReadFile:
        if name.startswith(directory) and part in name:
            raise OSError(code, os.strerror(code), name)
        return inner(name)

    monkeypatch.setattr(storage, "open", open_)


PARTS = ["/index-", "/chunks-", "/shard-"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("code", [errno.ENOENT, errno.EIO, errno.ESTALE])
def test_file_that_is_gone_or_unreadable_on_its_medium_is_damage(
    storage: MemoryStorage, part: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_open(storage, part, code, monkeypatch)
    check_load_falls_back(storage, os.strerror(code))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES])
def test_file_that_this_process_may_not_open_is_an_error_and_no_damage(
    storage: MemoryStorage, part: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_open(storage, part, code, monkeypatch)
    with Checkpointer(storage) as checkpointer:
        for call in (lambda: checkpointer.load(make_state(0)), checkpointer.read):
            with pytest.raises(OSError, match=re.escape(os.strerror(code))) as caught:
                call()
            assert caught.value.errno == code


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES])
def test_file_that_one_rank_may_not_open_is_an_error_of_all(
    storage: MemoryStorage, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = storage.power_cut()
    refuse_to_open(refused, "/shard-", code, monkeypatch)

    def load(coordinator: Coordinator) -> str:
        own = storage if coordinator.rank == 0 else refused
        state = {"weight": make_state(0)["weight"], "step": 0}
        with (
            Checkpointer(own, coordinator=coordinator, timeout_s=20) as checkpointer,
            pytest.raises(DistributedError, match=re.escape(os.strerror(code))) as caught,
        ):
            checkpointer.load(state, strict=False)
        assert list(caught.value.failures) == [1]
        assert state["step"] == 0
        return str(caught.value)

    first, second = run_ranks(2, load)
    assert first == second
