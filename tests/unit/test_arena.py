"""How much memory the Arena takes, what it does where it gets none, and how shards are arranged in it."""

from __future__ import annotations

import errno

import pytest
import torch

from distckpt import arena
from distckpt._C import Memory
from distckpt.arena import Arena, Region, arrange
from distckpt.testing import FakeAccelerator


def test_memory_is_kept_from_save_to_save() -> None:
    kept = Arena()
    assert kept.reserve(10_000) is None
    kept.memory[:3] = b"abc"
    assert kept.reserve(5_000) is None
    assert bytes(kept.memory[:3]) == b"abc"
    assert len(kept) == 10_000


def test_it_grows_when_more_is_asked_for() -> None:
    growing = Arena()
    assert growing.reserve(100) is None
    assert growing.reserve(200) is None
    assert len(growing.memory) == 200


def test_more_than_it_may_take_is_refused_and_nothing_is_held() -> None:
    bounded = Arena(max_bytes=1000)
    assert bounded.reserve(1000) is None
    assert bounded.reserve(1001) is not None
    assert len(bounded) == 0
    assert bounded.reserve(1000) is None


def test_by_default_it_takes_half_of_what_is_left_divided_by_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "available_memory_bytes", lambda: 80_000)
    shared = Arena(ranks_on_host=4)
    assert shared.bound() == 10_000
    assert shared.reserve(10_001) is not None
    assert shared.reserve(10_000) is None


def test_what_it_has_itself_counts_as_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "available_memory_bytes", lambda: 80_000)
    only = Arena()
    assert only.reserve(40_000) is None
    monkeypatch.setattr(arena, "available_memory_bytes", lambda: 40_000)
    assert only.bound() == 40_000


def test_host_without_memory_is_a_refusal_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(size: int) -> Memory:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(arena, "Memory", refuse)
    assert "no memory" in (Arena().reserve(100) or "")


def test_refused_huge_pages_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small:
        huge_pages = False

        def __len__(self) -> int:
            return 100

        def populate(self, *, threads: int) -> None:
            pass

    monkeypatch.setattr(arena, "Memory", lambda size: Small())
    on_small_pages = Arena()
    assert on_small_pages.reserve(100) is None
    assert "huge pages are refused" in on_small_pages.degraded[0]


def test_page_locks_go_with_the_memory_and_stay_when_it_is_abandoned() -> None:
    accelerator = FakeAccelerator()
    tensors = [accelerator.put(torch.ones(3)), torch.ones(3)]
    locked = Arena()
    assert locked.reserve(100) is None
    for _ in range(2):
        locked.page_lock(accelerator.transports(), tensors)
    assert accelerator.counts["register"] == 1
    assert locked.reserve(200) is None
    assert accelerator.counts["release"] == 1
    locked.page_lock(accelerator.transports(), tensors)
    locked.abandon()
    assert len(locked) == 0
    assert accelerator.counts["release"] == 1


def test_host_tensors_lock_no_pages() -> None:
    accelerator = FakeAccelerator()
    unlocked = Arena()
    assert unlocked.reserve(100) is None
    unlocked.page_lock(accelerator.transports(), [torch.ones(3)])
    assert accelerator.counts["register"] == 0


def test_each_file_begins_at_a_page_as_its_data_do_on_storage() -> None:
    regions, size = arrange([([4, 2], [0, 100], 130), ([7], [0], 8192), ([], [], 0), ([1], [0], 5)])
    assert regions == [Region(4, 0), Region(2, 100), Region(7, 4096), Region(1, 12288)]
    assert size == 16384
