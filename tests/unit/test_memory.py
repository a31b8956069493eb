"""Memory: aligned, zeroed, writable through the buffer protocol, never in a child process."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distckpt import _C

HUGE_PAGE = 2 << 20


def address(memory: _C.Memory) -> int:
    return np.frombuffer(memory, np.uint8).ctypes.data


def virtual_bytes() -> int:
    """Size of this process's address space."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGESIZE")


@pytest.mark.parametrize("size", [1, 4096, HUGE_PAGE - 1, HUGE_PAGE, HUGE_PAGE + 1, 5 * HUGE_PAGE])
def test_memory_is_aligned_zeroed_and_of_the_asked_size(size: int) -> None:
    memory = _C.Memory(size)
    view = memoryview(memory)
    assert len(memory) == view.nbytes == size
    assert (view.format, view.ndim, view.itemsize, view.readonly, view.c_contiguous) == (
        "B",
        1,
        1,
        False,
        True,
    )
    assert address(memory) % HUGE_PAGE == 0
    assert not np.frombuffer(memory, np.uint8).any()


def test_empty_memory_is_an_empty_buffer() -> None:
    memory = _C.Memory(0)
    memory.populate()
    assert len(memory) == 0
    assert bytes(memory) == b""


def test_views_share_the_memory() -> None:
    memory = _C.Memory(10_000)
    np.frombuffer(memory, np.uint16)[:] = 0x4142
    memoryview(memory)[9998:] = b"xy"
    assert bytes(memory) == b"BA" * 4999 + b"xy"


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [1, 4097, 70 << 20])
def test_populate_makes_pages_resident_and_keeps_their_contents(size: int, threads: int) -> None:
    memory = _C.Memory(size)
    view = np.frombuffer(memory, np.uint8)
    view[0] = view[-1] = 7
    memory.populate(threads=threads)
    assert view[0] == view[-1] == 7
    assert not view[1:-1].any()
    assert resident_bytes(address(memory)) >= size


def resident_bytes(start: int) -> int:
    """Resident size of the mapping that holds the address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            begin, end = (int(bound, 16) for bound in words[0].split("-"))
            inside = begin <= start < end
        elif inside and words[0] == "Rss:":
            return int(words[1]) * 1024
    return 0


def test_whether_huge_pages_were_accepted_is_told() -> None:
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not switch.exists() or "[never]" in switch.read_text():
        assert not _C.Memory(HUGE_PAGE).huge_pages
    else:
        assert isinstance(_C.Memory(HUGE_PAGE).huge_pages, bool)


def test_memory_lives_as_long_as_its_last_buffer() -> None:
    size = 1 << 30  # Never touched, and far more than anything else that may come and go meanwhile.
    before = virtual_bytes()
    memory = _C.Memory(size)
    view = memoryview(memory)[HUGE_PAGE:]
    del memory
    gc.collect()
    view[:4] = b"live"
    assert virtual_bytes() - before > size // 2
    del view
    gc.collect()
    assert virtual_bytes() - before < size // 2


@pytest.mark.parametrize("size", [-1, 1 << 63, -(1 << 70)])
def test_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=r"size|overflow"):
        _C.Memory(size)


def test_more_than_the_address_space_is_an_os_error() -> None:
    with pytest.raises(OSError, match="mmap"):
        _C.Memory((1 << 62) + 1)


@pytest.mark.parametrize("threads", [0, -1])
def test_populating_on_no_thread_is_refused(threads: int) -> None:
    with pytest.raises(ValueError, match="threads"):
        _C.Memory(1).populate(threads=threads)


def test_child_does_not_inherit_memory_and_frees_none_of_its_own() -> None:
    program = f"""
import mmap, os, sys
import numpy as np
sys.path.append({os.path.dirname(_C.__file__)!r})
import _C
memory = _C.Memory(64 << 20)
start = np.frombuffer(memory, np.uint8).ctypes.data
memoryview(memory)[:6] = b"parent"
child = os.fork()
if child == 0:
    ranges = [line.split()[0].split("-") for line in open("/proc/self/maps")]
    inherited = any(int(a, 16) <= start < int(b, 16) for a, b in ranges)
    # Fill the hole, so that unmapping the parent's range would take this away.
    other = [mmap.mmap(-1, 64 << 20) for _ in range(8)]
    del memory
    for region in other:
        region[:] = bytes(len(region))
    os._exit(1 if inherited else 0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert bytes(memoryview(memory)[:6]) == b"parent"
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
