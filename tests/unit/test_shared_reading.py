"""What several ranks of a host need is read by one of them: who reads what, and what each gets, on ranks as threads."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from distckpt import Checkpointer, DistributedError, ShardedTensor, filling, host_group, loading, shared_reading
from distckpt.coordinator import Coordinator
from distckpt.host_group import SLOTS, Board, Host, HostGroup, PeerFailed, group_ranks
from distckpt.index import Index
from distckpt.report import LoadReport
from distckpt.shard_file import BLOCK_BYTES
from distckpt.shared_reading import Windows, list_windows
from distckpt.storage import PosixStorage, ReadFile, Storage
from distckpt.testing import MemoryStorage, run_ranks

ROWS, COLUMNS = 1 << 10, 6 << 10  # 24 MiB of float32: a row is 24 KiB
WHOLE = torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS)


@contextmanager
def empty_memory_directory() -> Iterator[str]:
    """A directory of one's own below /dev/shm, in which nothing may be left behind."""
    path = tempfile.mkdtemp(prefix="distckpt-test-", dir=host_group.DIRECTORY)
    try:
        yield path
        assert os.listdir(path) == []
    finally:
        shutil.rmtree(path)


@pytest.fixture(autouse=True)
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with empty_memory_directory() as path:
        monkeypatch.setattr(host_group, "DIRECTORY", path)
        yield path


@pytest.fixture(scope="module")
def stored() -> MemoryStorage:
    """One rank's checkpoints 1 and 2 of the same tensor."""
    storage = MemoryStorage()
    with Checkpointer(storage) as checkpointer:
        for iteration in (1, 2):
            checkpointer.save({"w": WHOLE, "small": torch.arange(5)}, iteration=iteration)
    return storage


Cut = Callable[[int, int], tuple[slice, slice]]


def by_rows(rank: int, size: int) -> tuple[slice, slice]:
    return slice(rank * ROWS // size, (rank + 1) * ROWS // size), slice(0, COLUMNS)


def by_columns(rank: int, size: int) -> tuple[slice, slice]:
    return slice(0, ROWS), slice(rank * COLUMNS // size, (rank + 1) * COLUMNS // size)


def replicas(rank: int, size: int) -> tuple[slice, slice]:
    return slice(0, ROWS), slice(0, COLUMNS)


def unevenly(rank: int, size: int) -> tuple[slice, slice]:
    """Rank 0 takes all of it, the last rank one row."""
    return slice(0, ROWS) if rank == 0 else slice(ROWS - ROWS // rank + ROWS // size, ROWS), slice(0, COLUMNS)


def make_target(cut: Cut, rank: int, size: int) -> ShardedTensor:
    part = cut(rank, size)
    data = torch.zeros_like(WHOLE[part])
    return ShardedTensor("w", data, global_shape=(ROWS, COLUMNS), global_offset=tuple(s.start for s in part))


def load(storage: Storage, coordinator: Coordinator, cut: Cut, timeout_s: float = 30) -> LoadReport:
    """Load this rank's part and look whether it is right."""
    target = make_target(cut, coordinator.rank, coordinator.world_size)
    with Checkpointer(storage, coordinator=coordinator, timeout_s=timeout_s) as checkpointer:
        report = checkpointer.load({"w": target}, strict=False)
    assert torch.equal(target.data, WHOLE[cut(coordinator.rank, coordinator.world_size)])
    return report


def over_read(reports: list[LoadReport]) -> float:
    return sum(report.bytes_read for report in reports) / WHOLE.nbytes


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("cut", [by_rows, by_columns, replicas, unevenly])
def test_a_host_reads_once_what_its_ranks_need(stored: MemoryStorage, cut: Cut, size: int) -> None:
    reports = run_ranks(size, lambda coordinator: load(stored, coordinator, cut))
    assert over_read(reports) <= 1.05
    assert {report.not_shared for report in reports} == {None}
    assert sum(report.bytes_read > WHOLE.nbytes / size / 8 for report in reports) >= 2 or cut is unevenly


def test_ranks_without_a_common_block_read_alone_and_take_no_memory(
    stored: MemoryStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Board, "take_room", None)
    reports = run_ranks(2, lambda coordinator: load(stored, coordinator, by_rows))
    assert over_read(reports) <= 1.05


def test_reading_full_tensors_without_a_template_is_shared_too(stored: MemoryStorage) -> None:
    opened: list[int] = []

    def read(coordinator: Coordinator) -> None:
        with Checkpointer(CountingStorage(stored, opened), coordinator=coordinator, timeout_s=30) as checkpointer:
            assert torch.equal(cast(Any, checkpointer.read())["w"], WHOLE)

    run_ranks(4, read)
    assert sum(opened) <= 1.05 * WHOLE.nbytes


class CountingStorage:
    """Counts the bytes that are read of shard files."""

    def __init__(self, inner: Storage, sizes: list[int]) -> None:
        self._inner: Any = inner
        self._sizes = sizes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def open(self, name: str) -> ReadFile:
        file = self._inner.open(name)
        return cast(ReadFile, _CountedFile(file, self._sizes) if "/shard-" in name else file)


class _CountedFile:
    def __init__(self, inner: Any, sizes: list[int]) -> None:
        self._inner, self._sizes = inner, sizes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def read_into(self, offset: int, buffer: Any) -> None:
        self._sizes.append(memoryview(buffer).nbytes)
        self._inner.read_into(offset, buffer)


def test_bytes_read_is_what_each_rank_reads_of_shard_files(stored: MemoryStorage) -> None:
    def run(coordinator: Coordinator) -> None:
        sizes: list[int] = []
        report = load(cast(Storage, CountingStorage(stored, sizes)), coordinator, replicas)
        assert report.bytes_read == sum(sizes)

    run_ranks(3, run)


def test_many_small_tensors_of_several_files_are_shared(tmp_path: Path) -> None:
    def run(coordinator: Coordinator) -> int:
        rank = coordinator.rank
        with Checkpointer(tmp_path, coordinator=coordinator, timeout_s=30) as checkpointer:
            own = {
                f"{rank}/{i}": ShardedTensor(
                    f"{rank}/{i}", torch.full((900,), 1000.0 * rank + i), global_shape=(900,), global_offset=(0,)
                )
                for i in range(2000)
            }
            checkpointer.save({"t": own}, iteration=1)
            names = [f"{r}/{i}" for r in range(3) for i in range(2000)]
            state = {
                name: ShardedTensor(name, torch.zeros(900), global_shape=(900,), global_offset=(0,)) for name in names
            }
            report = checkpointer.load({"t": state}, strict=False)
        for name, tensor in state.items():
            r, i = map(int, name.split("/"))
            assert torch.equal(tensor.data, torch.full((900,), 1000.0 * r + i))
        return report.bytes_read

    headers = 3 * 3 * 400_000  # every rank reads the header of every file that it needs
    assert sum(run_ranks(3, run)) <= 1.05 * 6000 * 3600 + headers


# Who is in a group, and how much memory it takes


def test_ranks_are_grouped_by_machine_and_memory(directory: str) -> None:
    room = 1 << 30
    hosts = [Host("a", "1", room), Host("b", "1", room), Host("a", "1", room), Host("a", "2", room)]
    groups = group_ranks(hosts, 8)
    assert [group.ranks for group in groups] == [[0, 2], [1], [0, 2], [3]]
    assert groups[0] is groups[2]
    assert len({group.nonce for group in groups}) == 3
    assert groups[1].obstacle is None
    assert groups[0].obstacle == f"only 2 of the 3 ranks of this host share one {directory}"


def test_rings_are_smaller_where_there_are_many_ranks_or_little_room() -> None:
    def window(size: int, room: int) -> int:
        return group_ranks([Host("a", "1", room)] * size, 100)[0].window_bytes >> 20

    assert [window(size, 1 << 30) for size in (2, 4, 8, 16, 64)] == [4, 4, 2, 1, 1]
    assert [window(4, room << 20) for room in (65, 33, 17, 16, 1)] == [4, 2, 1, 0, 0]
    assert SLOTS * 4 << 20 <= 32 << 20  # beside the 32 MiB in which a BlockIO reads


def test_too_little_room_is_reported_and_everyone_reads_alone(
    stored: MemoryStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "this_host", lambda: Host("a", "1", 1 << 20))
    reports = run_ranks(2, lambda coordinator: load(stored, coordinator, replicas))
    assert over_read(reports) >= 2
    assert all("has room for 1048576 bytes, " in (report.not_shared or "") for report in reports)


@pytest.mark.parametrize("victims", [{0}, {1}, {0, 1, 2}])
def test_memory_that_one_rank_does_not_get_makes_all_read_alone(
    stored: MemoryStorage, victims: set[int], directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(host_group.SharedMemory):
        def reserve(self, begin: int, size: int) -> None:
            if begin and int(threading_name()) in victims:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().reserve(begin, size)

    monkeypatch.setattr(host_group, "SharedMemory", Full)
    reports = run_ranks(3, lambda coordinator: load(stored, coordinator, replicas))
    assert over_read(reports) >= 3
    assert {report.not_shared for report in reports} == {f"{directory} is full"}


def test_rank_that_can_make_no_file_in_memory_is_waited_for_by_nobody(
    stored: MemoryStorage, directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = os.path.join(directory, "not a directory")
    Path(refused).touch()
    with monkeypatch.context() as patch:
        patch.setattr(host_group, "DIRECTORY", refused)
        without = host_group.this_host()
    os.unlink(refused)
    monkeypatch.setattr(loading, "this_host", lambda: without if threading_name() == "1" else host_group.this_host())
    reports = run_ranks(3, lambda coordinator: load(stored, coordinator, replicas))
    assert [report.not_shared for report in reports] == [
        (others := f"only 2 of the 3 ranks of this host share one {directory}"),
        f"no shared memory: [Errno 20] Not a directory: {refused!r}",
        others,
    ]


@pytest.mark.parametrize("victims", [{0}, {2}, {0, 1, 2}])
def test_memory_that_one_rank_cannot_open_makes_all_read_alone(
    stored: MemoryStorage, victims: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = host_group.SharedMemory

    def refuse(path: str, size: int) -> host_group.SharedMemory:
        if int(threading_name()) in victims:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return inner(path, size)

    monkeypatch.setattr(host_group, "SharedMemory", refuse)
    monkeypatch.setattr(host_group, "JOIN_TIMEOUT_S", 0.2)
    reports = run_ranks(3, lambda coordinator: load(stored, coordinator, replicas))
    assert over_read(reports) >= 3
    for rank, report in enumerate(reports):
        assert ("Permission denied" if rank in victims else "not all ranks") in (report.not_shared or "")


def threading_name() -> str:
    return threading.current_thread().name.removeprefix("rank ")


# Failures


def flip_on_disk(root: Path, iteration: int, position: int) -> None:
    (path,) = (root / f"iter_{iteration:07d}").glob("shard-*")
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_damage_that_only_the_reader_of_a_window_sees_makes_all_fall_back(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        for iteration in (1, 2):
            checkpointer.save({"w": WHOLE}, iteration=iteration)
    flip_on_disk(tmp_path, 2, 9 << 20)
    reports = run_ranks(4, lambda coordinator: load(PosixStorage(tmp_path), coordinator, replicas))
    for report in reports:
        assert report.iteration == 1
        (why,) = report.fell_back_from.values()
        # One rank met the block, and nobody else's word is taken for it.
        assert "CorruptionError" in why
        assert "block 9" in why
        assert "more ranks" not in why


def test_failure_of_one_rank_before_it_reads_stops_the_others_at_once(
    stored: MemoryStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = filling.plan_reads

    def fail(*arguments: Any) -> Any:
        if threading_name() == "1":
            raise MemoryError("no memory for the plan")
        return plan(*arguments)

    monkeypatch.setattr(filling, "plan_reads", fail)

    def run(coordinator: Coordinator) -> str:
        with pytest.raises(DistributedError) as caught:
            load(stored, coordinator, replicas, timeout_s=1000)
        assert list(caught.value.failures) == [1]
        return str(caught.value)

    first, *others = run_ranks(3, run, timeout_s=60)
    assert "no memory for the plan" in first
    assert others == [first] * 2


def test_a_rank_that_falls_silent_is_named(stored: MemoryStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck(CountingStorage):
        def open(self, name: str) -> ReadFile:
            if "/shard-" in name:
                time.sleep(4)
            return super().open(name)

    def run(coordinator: Coordinator) -> str:
        storage = cast(Storage, Stuck(stored, []) if coordinator.rank == 1 else stored)
        with pytest.raises(DistributedError) as caught:
            load(storage, coordinator, replicas, timeout_s=3)
        return str(caught.value)

    for rank, text in enumerate(run_ranks(3, run)):
        if rank != 1:  # which had been given up on when it came back
            assert re.search(r"rank 1 of this host has been silent for 1.5 s; it was to (read|take) bytes \d", text)


def test_board_of_a_rank_that_failed_stops_whoever_waits() -> None:
    group = HostGroup([3, 5], os.urandom(8).hex(), 1 << 20, None)

    def run(coordinator: Coordinator) -> None:
        rank = group.ranks[coordinator.rank]
        with pytest.raises(ZeroDivisionError if rank == 5 else PeerFailed):
            enter(rank)

    def enter(rank: int) -> None:
        with Board(group, rank, 4, 1000) as board:
            assert board.exchange(bytes([rank] * 4)) == [b"\x03" * 4, b"\x05" * 4]
            if rank == 5:
                raise ZeroDivisionError
            board.wait(lambda: False, lambda: (1, "live"))

    run_ranks(2, run)


# The list of windows


def make_index(*sizes: int) -> Index:
    return cast(Index, SimpleNamespace(files=[SimpleNamespace(checksum_start=size, name="f") for size in sizes]))


def make_rows(needs: list[str], blocks: list[int]) -> list[bytes]:
    """needs: of each rank the blocks of all files, as 1 and 0; files are separated by a space."""
    return [
        b"".join(np.packbits([int(c) for c in part]).tobytes() for part in need.split())
        for need in needs
        if [len(part) for part in need.split()] == blocks
    ]


def list_of(needs: list[str]) -> Windows:
    blocks = [len(part) for part in needs[0].split()]
    return list_windows(make_rows(needs, blocks), make_index(*(n * BLOCK_BYTES - 5 for n in blocks)), 4)


def test_windows_are_the_blocks_that_several_need_in_order_of_file_and_position() -> None:
    windows = list_of(["1111100001 110", "0011110011 010", "0000000010 011"])
    assert windows.file.tolist() == [0, 0, 0, 1]
    assert windows.first.tolist() == [0, 4, 8, 0]
    index = make_index(10 * BLOCK_BYTES - 5, 3 * BLOCK_BYTES - 5)
    wanted = [windows.ranges(w, index) for w in range(4)]
    ends = [[(a // BLOCK_BYTES, -(-b // BLOCK_BYTES)) for a, b in ranges] for ranges in wanted]
    assert ends == [[(2, 4)], [(4, 5)], [(8, 10)], [(1, 2)]]
    assert wanted[2][-1][1] == 10 * BLOCK_BYTES - 5
    assert [windows.users(w) for w in range(4)] == [[0, 1], [0, 1], [0, 1, 2], [0, 1, 2]]
    assert [windows.begin(w) // BLOCK_BYTES for w in range(4)] == [2, 4, 8, 1]


def test_every_window_is_published_by_one_of_its_users_and_all_publish_alike() -> None:
    windows = list_of(["1" * 400, "1" * 400, "1" * 200 + "0" * 200])
    assert sorted(np.bincount(windows.publisher[:50])) == [16, 17, 17]
    assert np.bincount(windows.publisher[50:]).tolist() == [25, 25]
    assert all(windows.publisher[w] in windows.users(w) for w in range(100))
    for position in range(3):
        own = windows.slot[windows.publisher == position].tolist()
        assert own == [k % SLOTS for k in range(len(own))]


def test_little_that_is_read_twice_is_not_worth_sharing() -> None:
    assert len(list_of(["1" * 50 + "0" * 49, "0" * 49 + "1" * 50]).file) == 0
    assert len(list_of(["1" * 5 + "0" * 4, "0" * 4 + "1" * 5]).file) == 1


def test_files_that_an_index_claims_to_be_endless_are_not_shared_and_take_no_memory() -> None:
    endless = shared_reading.row_bytes(make_index(*[1 << 62] * 4))
    (group, _) = group_ranks([Host("a", "1", 1 << 30)] * 2, endless)
    assert group.window_bytes == 0
    assert not Board(group, 0, endless, 10).is_entered
