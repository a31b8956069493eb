"""What reports say of memory and of the slowest rank: the same on every rank, of all ranks."""

from __future__ import annotations

import types

import pytest
import torch

from distckpt import Checkpointer, LoadReport, SaveReport
from distckpt.coordinator import Coordinator
from distckpt.host import peak_rss_bytes
from distckpt.report import slowest_ranks
from distckpt.testing import MemoryStorage, run_ranks
from distckpt.transport import devices, peak_device_bytes
from tests.unit.saved_roots import make_state


def use_memory(monkeypatch: pytest.MonkeyPatch, *bytes_by_call: int) -> None:
    """What is told of the memory of each rank that asks."""
    left = {"rss": list(bytes_by_call), "device": [n // 10 for n in bytes_by_call]}
    for module in ("saving", "loading"):
        monkeypatch.setattr(f"distckpt.{module}.peak_rss_bytes", lambda: left["rss"].pop())
        monkeypatch.setattr(f"distckpt.{module}.peak_device_bytes", lambda: left["device"].pop())


def test_reports_of_all_ranks_have_the_highest_memory_of_any(monkeypatch: pytest.MonkeyPatch) -> None:
    use_memory(monkeypatch, 20, 50, 30, 200, 300, 500)

    def run(coordinator: Coordinator) -> tuple[SaveReport, LoadReport]:
        with Checkpointer(storage, coordinator=coordinator) as checkpointer:
            saved = checkpointer.save(make_state(1, coordinator), iteration=1)
            return saved, checkpointer.load(make_state(0, coordinator))

    storage = MemoryStorage()
    for saved, loaded in run_ranks(3, run):
        assert (saved.peak_rss_bytes, saved.device_bytes) == (500, 50)
        assert (loaded.peak_rss_bytes, loaded.device_bytes) == (50, 5)


def test_slowest_rank_of_each_phase_of_a_load_is_the_same_everywhere() -> None:
    storage = MemoryStorage()

    def run(coordinator: Coordinator) -> LoadReport:
        with Checkpointer(storage, coordinator=coordinator) as checkpointer:
            checkpointer.save(make_state(1, coordinator), iteration=1)
            return checkpointer.load(make_state(0, coordinator))

    first, second, third = run_ranks(3, run)
    assert first.slowest == second.slowest == third.slowest
    assert set(first.slowest) == {"match", "read", "apply"}
    assert all(rank in range(3) and seconds > 0 for rank, seconds in first.slowest.values())


def test_slowest_rank_is_the_one_with_most_seconds() -> None:
    assert slowest_ranks(("a", "b"), [{"a": 1.0}, {"a": 3.0, "b": 0.5}, {"a": 2.0}]) == {"a": (1, 3.0), "b": (1, 0.5)}


def test_peak_memory_counts_what_this_process_has_touched() -> None:
    held = torch.ones(50 << 18)  # 50 MiB
    assert held.nbytes < peak_rss_bytes() < 1 << 45


@pytest.mark.parametrize(("is_initialized", "expected"), [(True, 7), (False, 0)])
def test_device_memory_is_asked_of_the_device_module_unless_that_would_start_it(
    monkeypatch: pytest.MonkeyPatch, is_initialized: bool, expected: int
) -> None:
    module = types.SimpleNamespace(max_memory_allocated=lambda: 7, is_initialized=lambda: is_initialized)
    monkeypatch.setattr(devices.torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(devices.torch, "get_device_module", lambda _: module)
    assert peak_device_bytes() == expected


def test_device_memory_is_0_where_nothing_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.accelerator.is_available():
        assert peak_device_bytes() == 0
    monkeypatch.setattr(devices.torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(devices.torch, "get_device_module", lambda _: types.SimpleNamespace())
    assert peak_device_bytes() == 0
