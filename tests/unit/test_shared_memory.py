"""SharedMemory: one piece of memory for whoever opens its name, never in a forked child; and Targets."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from distckpt import _C


@pytest.fixture
def name() -> Iterator[str]:
    path = f"/dev/shm/distckpt-test-{os.getpid()}"
    yield path
    if os.path.exists(path):
        os.unlink(path)


def test_all_who_open_a_name_share_bytes_and_words_even_after_it_is_removed(name: str) -> None:
    first, second = _C.SharedMemory(name, 10_000), _C.SharedMemory(name, 10_000)
    assert os.stat(name).st_mode & 0o777 == 0o600
    os.unlink(name)
    first.reserve(0, 10_000)
    memoryview(first)[5000:5003] = b"abc"
    assert bytes(memoryview(second)[4999:5004]) == b"\0abc\0"
    assert memoryview(second).nbytes == 10_000
    first.store(3, 2**32 - 1)
    assert second.load(3) == 2**32 - 1
    assert bytes(memoryview(second)[12:16]) == b"\xff" * 4
    second.reserve(0, 10_000)
    second.populate(4097, 5000)
    assert first.load(3) == 2**32 - 1


def test_exchange_is_won_by_one(name: str) -> None:
    memories = [_C.SharedMemory(name, 4096) for _ in range(8)]
    memories[0].reserve(0, 4096)
    seen: list[int] = []
    threads = [
        threading.Thread(target=lambda i=i: seen.append(memories[i].exchange(0, 0, i + 1)))  # type: ignore[misc]
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen.count(0) == 1
    assert set(seen) == {0, memories[0].load(0)}


def test_memory_that_is_not_there_is_an_error_of_reserve(name: str) -> None:
    memory = _C.SharedMemory(name, 1 << 45)
    with pytest.raises(OSError, match="No space left") as caught:
        memory.reserve(0, 1 << 45)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, name)
    memory.reserve(0, 4096)
    memory.store(0, 1)


def test_file_that_does_not_lie_in_memory_is_refused(tmp_path: Path) -> None:
    if os.stat(tmp_path).st_dev == os.stat("/dev/shm").st_dev:
        pytest.skip("temporary files lie in memory here")
    with pytest.raises(OSError, match="map") as caught:
        _C.SharedMemory(str(tmp_path / "file"), 4096)
    assert caught.value.errno == errno.ENODEV


def test_what_lies_outside_is_refused(name: str) -> None:
    memory = _C.SharedMemory(name, 4096)
    for call in (
        lambda: memory.reserve(4097, 0),
        lambda: memory.reserve(1, 4096),
        lambda: memory.populate(4000, 97),
        lambda: memory.load(1024),
        lambda: memory.store(1024, 0),
        lambda: memory.exchange(1024, 0, 0),
        lambda: _C.SharedMemory(name, 0),
    ):
        with pytest.raises(ValueError, match=r"outside|no such word|size"):
            call()


FORKED = """
import mmap, os, sys
from distckpt import _C

memory = _C.SharedMemory(sys.argv[1], 1 << 20)
os.unlink(sys.argv[1])
memory.reserve(0, 1 << 20)
memory.store(0, 7)
where = "distckpt-test"
is_mapped = lambda: where in open("/proc/self/maps").read()
assert is_mapped()
child = os.fork()
if child == 0:
    others = [mmap.mmap(-1, 1 << 20) for _ in range(50)]  # one of them may lie where the memory was
    gone = not is_mapped()
    del memory
    for other in others:
        other[0] = 1
    os._exit(0 if gone else 1)
assert os.waitpid(child, 0)[1] == 0
assert memory.load(0) == 7
del memory
assert not is_mapped()
"""


def test_a_forked_child_does_not_have_the_memory(name: str) -> None:
    subprocess.run([sys.executable, "-c", FORKED, name], cwd=Path(__file__).parents[2], check=True, timeout=60)


def test_targets_are_copied_from_windows_in_any_order() -> None:
    content = np.random.default_rng(1).integers(0, 256, 4000, np.uint8)
    whole, rows, small = np.zeros(4000, np.uint8), np.zeros((20, 10), np.uint8), np.zeros(8, np.uint8)
    targets = _C.Targets(
        [
            (0, whole, 0, (4000,), (1,), (1,), 1),
            (100, rows, 0, (20, 10), (100, 1), (10, 1), 1),
            (2996, small, 0, (2,), (4,), (4,), 4),
        ]
    )
    for begin in (3000, 0, 2000, 1000):
        targets.copy_from(content[begin : begin + 1000], begin)
    assert (whole == content).all()
    assert (rows == content[100:2100].reshape(20, 100)[:, :10]).all()
    assert (small == content[2996:3004]).all()


def test_bad_targets_are_refused() -> None:
    data = np.zeros(8, np.uint8)
    target = (8, data, 0, (8,), (1,), (1,), 1)
    with pytest.raises(ValueError, match="ascending order"):
        _C.Targets([target, (0, *target[1:])])
    with pytest.raises(ValueError, match="outside the target"):
        _C.Targets([(8, data, 1, (8,), (1,), (1,), 1)])
    with pytest.raises(ValueError, match="source_start"):
        _C.Targets([target]).copy_from(b"abc", -1)
