"""write_checked and read_checked do the same on every backend, with or without operations of its own for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distckpt import Checkpointer, writing
from distckpt._C import crc32c_blocks
from distckpt.storage import PosixStorage, Storage, checked, read_checked, write_checked
from distckpt.storage.checked import WINDOW_BYTES, CheckedReadFile, CheckedWriteFile
from distckpt.testing import MemoryStorage

BLOCK = 1 << 20
SIZE = WINDOW_BYTES + 3 * BLOCK + 12_345


@pytest.fixture(params=["memory", "threads", "best"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "memory":
        return MemoryStorage()
    return PosixStorage(tmp_path, io_backend="threads" if request.param == "threads" else "")


@pytest.fixture
def content() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)


def sums_of(content: np.ndarray) -> np.ndarray:
    sums = np.empty(-(-len(content) // BLOCK), np.uint32)
    crc32c_blocks(content, BLOCK, sums)
    return sums


def write(storage: Storage, content: np.ndarray, cuts: list[int]) -> np.ndarray:
    storage.make_directory("")
    parts = [part.data for part in np.split(content, cuts)]
    sums = np.empty(-(-len(content) // BLOCK), np.uint32)
    file = storage.create("f")
    write_checked(file, parts, BLOCK, sums)
    file.finish(len(content) + sums.nbytes)
    return sums


@pytest.mark.parametrize("cuts", [[], [0, 1, 1, BLOCK - 1, BLOCK + 7, WINDOW_BYTES, SIZE]])
def test_parts_and_their_sums_follow_each_other(storage: Storage, content: np.ndarray, cuts: list[int]) -> None:
    sums = write(storage, content, cuts)
    assert (sums == sums_of(content)).all()
    file = storage.open("f")
    found = bytearray(file.size_bytes)
    file.read_into(0, found)
    file.close()
    assert bytes(found) == content.tobytes() + sums.tobytes()


def test_targets_get_what_lies_in_the_ranges(storage: Storage, content: np.ndarray) -> None:
    sums = write(storage, content, [])
    low, high = 2 * BLOCK - 100, WINDOW_BYTES + BLOCK + 50
    target = np.zeros(high - low, np.uint8)
    file = storage.open("f")
    ranges = [(BLOCK, WINDOW_BYTES + 2 * BLOCK)]
    targets = [(low, target.data, 0, (high - low,), (1,), (1,), 1)]
    assert read_checked(file, ranges, BLOCK, SIZE, sums, targets) is None
    file.close()
    assert (target == content[low:high]).all()


@pytest.mark.parametrize("block", [0, 5, SIZE // BLOCK])
def test_block_with_another_sum_is_named(storage: Storage, content: np.ndarray, block: int) -> None:
    sums = write(storage, content, [])
    wrong = sums.copy()
    wrong[block] ^= 1
    file = storage.open("f")
    assert read_checked(file, [(0, SIZE)], BLOCK, SIZE, wrong, []) == (block, int(sums[block]))
    file.close()


def test_posix_files_have_operations_of_their_own(tmp_path: Path) -> None:
    storage = PosixStorage(tmp_path)
    file = storage.create("f")
    assert isinstance(file, CheckedWriteFile)
    file.finish(0)
    opened = storage.open("f")
    assert isinstance(opened, CheckedReadFile)
    opened.close()


def test_rate_is_kept_by_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a backend that has no operation of its own; the clock stands still but for the waits."""
    now = [100.0]
    monkeypatch.setattr(checked.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(checked.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    data = bytes(3 * checked.WINDOW_BYTES)
    sums = np.empty(len(data) // BLOCK, np.uint32)
    storage = MemoryStorage()
    storage.make_directory("")
    write_checked(storage.create("f"), [data], BLOCK, sums, max_bytes_per_s=1e6)
    assert now[0] - 100 == pytest.approx(len(data) / 1e6)


@pytest.mark.parametrize("limit", [None, 5e9])
def test_limit_of_a_checkpointer_reaches_the_file(limit: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def see(*_: object, max_bytes_per_s: float) -> None:
        seen.append(max_bytes_per_s)
        raise OSError("seen")

    monkeypatch.setattr(writing, "write_checked", see)
    checkpointer = Checkpointer(MemoryStorage(), max_write_bytes_per_s=limit)
    with checkpointer, pytest.raises(OSError, match="seen"):
        checkpointer.save({"a": torch.ones(3)}, iteration=1)
    assert seen == [limit or 0.0]
