"""What each of eight processes does in test_shared_reads.py: every check_ function runs on all of them, in order.

python shared_read_ranks.py <directory> <memory>    prints a line of JSON, [name, "ok" or a traceback], for each check
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import distckpt
from distckpt import CorruptionError, ShardedTensor, host_group, loading
from distckpt.host_group import Host
from distckpt.report import LoadReport
from tests.distributed.checks import run_checks
from tests.unit.test_shared_reading import WHOLE, Cut, by_columns, by_rows, flip_on_disk, make_target, replicas

WORLD_SIZE = 8
Checkpointer = partial(distckpt.Checkpointer, timeout_s=30.0)


def _load(root: Path, cut: Cut) -> list[LoadReport]:
    """Load this rank's part, look whether it is right; the reports of all ranks."""
    rank = dist.get_rank()
    target = make_target(cut, rank, WORLD_SIZE)
    with Checkpointer(root) as checkpointer:
        report = checkpointer.load({"w": target})
    assert torch.equal(target.data, WHOLE[cut(rank, WORLD_SIZE)])
    reports: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(reports, report)
    return reports


def _save(root: Path, iterations: int) -> None:
    with Checkpointer(root) as checkpointer:
        for iteration in range(1, iterations + 1):
            checkpointer.save({"w": WHOLE}, iteration=iteration)


def _over_read(reports: list[LoadReport]) -> float:
    return sum(report.bytes_read for report in reports) / WHOLE.nbytes


def check_one_file_is_read_once_for_eight_ranks(root: Path) -> None:
    _save(root / "whole", 1)
    for cut in (by_rows, by_columns, replicas):
        reports = _load(root / "whole", cut)
        assert _over_read(reports) <= 1.05, reports
        assert {report.not_shared for report in reports} == {None}


def check_files_of_several_ranks_are_read_once(root: Path) -> None:
    rank = dist.get_rank()
    own = ShardedTensor.from_rank_offsets("w", WHOLE[by_rows(rank, WORLD_SIZE)].clone(), (0, rank, WORLD_SIZE))
    with Checkpointer(root / "parts") as checkpointer:
        checkpointer.save({"w": own}, iteration=1)
    for cut in (by_columns, replicas):
        assert _over_read(_load(root / "parts", cut)) <= 1.05


def check_ranks_of_two_hosts_share_with_their_own(root: Path) -> None:
    host = Host(f"host {dist.get_rank() % 2}", "memory", 1 << 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "this_host", lambda: host)
        reports = _load(root / "whole", by_columns)
    assert 1.95 <= _over_read(reports) <= 2.1


def check_damage_in_any_block_makes_all_fall_back_together(root: Path) -> None:
    for number, position in enumerate((5 << 20, 20 << 20)):
        path = root / f"damaged-{number}"
        _save(path, 2)
        if dist.get_rank() == 0:
            flip_on_disk(path, 2, position)
        dist.barrier()
        for report in _load(path, by_columns):
            assert report.iteration == 1
            assert f"block {position >> 20} " in report.fell_back_from[2]
            assert "more ranks" not in report.fell_back_from[2]
        with Checkpointer(path) as checkpointer, pytest.raises(CorruptionError, match=f"block {position >> 20} "):
            checkpointer.load({"w": make_target(replicas, 0, 1)}, iteration=2)


if __name__ == "__main__":
    host_group.DIRECTORY = sys.argv[2]
    run_checks(globals(), WORLD_SIZE)
