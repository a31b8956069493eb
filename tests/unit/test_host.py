"""Which host this is, and what control groups leave of its memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from distckpt.host import available_memory_bytes, host_id

GIB = 1 << 30


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A host with 100 GiB to take, and this process in the group /job/worker of version 2."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {100 << 20} kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/job/worker\n")
    return tmp_path / "proc"


def make_group(path: Path, limit: object, used: int, *, reclaimable: int = 0) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "memory.max").write_text(f"{limit}\n")
    (path / "memory.current").write_text(f"{used}\n")
    (path / "memory.stat").write_text(f"anon 5\ninactive_file {reclaimable}\n")


def test_host_id_stays_the_same() -> None:
    assert host_id() == host_id() != ""


def test_this_machine_says_something_plausible() -> None:
    assert 0 < available_memory_bytes() < 1 << 50


def test_without_groups_the_host_decides(proc: Path, tmp_path: Path) -> None:
    assert available_memory_bytes(proc, tmp_path / "none") == 100 * GIB


def test_group_limit_less_its_use_decides(proc: Path, tmp_path: Path) -> None:
    make_group(tmp_path / "cg" / "job" / "worker", 8 * GIB, 3 * GIB)
    assert available_memory_bytes(proc, tmp_path / "cg") == 5 * GIB


def test_page_cache_that_can_be_dropped_is_available(proc: Path, tmp_path: Path) -> None:
    make_group(tmp_path / "cg" / "job" / "worker", 8 * GIB, 3 * GIB, reclaimable=GIB)
    assert available_memory_bytes(proc, tmp_path / "cg") == 6 * GIB


def test_tightest_of_the_groups_around_the_process_decides(proc: Path, tmp_path: Path) -> None:
    make_group(tmp_path / "cg" / "job" / "worker", "max", 3 * GIB)
    make_group(tmp_path / "cg" / "job", 4 * GIB, 3 * GIB)
    make_group(tmp_path / "cg", 50 * GIB, 3 * GIB)
    assert available_memory_bytes(proc, tmp_path / "cg") == GIB


def test_group_of_a_container_is_found_at_the_root_of_its_mount(proc: Path, tmp_path: Path) -> None:
    make_group(tmp_path / "cg", 2 * GIB, GIB)
    assert available_memory_bytes(proc, tmp_path / "cg") == GIB


def test_group_over_its_limit_leaves_nothing(proc: Path, tmp_path: Path) -> None:
    make_group(tmp_path / "cg", GIB, 2 * GIB)
    assert available_memory_bytes(proc, tmp_path / "cg") == 0


def test_version_1_group_is_read(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("5:cpu,cpuacct:/x\n4:memory:/job\n")
    group = tmp_path / "cg" / "memory" / "job"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text(f"{8 * GIB}\n")
    (group / "memory.usage_in_bytes").write_text(f"{6 * GIB}\n")
    (group / "memory.stat").write_text(f"total_inactive_file {GIB}\n")
    assert available_memory_bytes(proc, tmp_path / "cg") == 3 * GIB


def test_nothing_known_is_no_bound(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path, tmp_path) == 1 << 62
