"""What a reshard refuses: roots that are a job's, meshes and plans beyond all bounds, more files than may be open."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import distckpt
from distckpt import Checkpointer, PerRank, ShardedTensor
from distckpt.commit import list_commits, writer_epochs
from distckpt.coordinator import Coordinator
from distckpt.errors import CheckpointError, CheckpointNotFoundError, CorruptionError, DistributedError
from distckpt.geometry import Box
from distckpt.host import reserve_open_files
from distckpt.resharding import job
from distckpt.resharding.part import share_memory
from distckpt.resharding.plan_file import ReshardPlan, StageRule, TensorRule
from distckpt.storage import PosixStorage, Storage
from distckpt.testing import MemoryStorage, run_ranks
from tests.unit.damage import change, flip
from tests.unit.model_states import read_tensors
from tests.unit.test_resharding_cases import rows, save

STATE = {"w": torch.arange(24.0).reshape(12, 2)}
ROWS = ReshardPlan(tensors=(TensorRule(match="w", partition=("tp", None)),))


def save_one(root: Storage | Path, *iterations: int) -> None:
    with Checkpointer(root) as checkpointer:
        for iteration in iterations:
            checkpointer.save(STATE, iteration=iteration)


# The target's owner.


def test_job_that_goes_on_from_a_reshard_is_not_ended_by_another_one() -> None:
    source, target = MemoryStorage(), MemoryStorage()
    save_one(source, 1)
    distckpt.reshard(source, target, {"tp": 2}, plan=ROWS)
    with Checkpointer(target) as job:
        job.load({"w": torch.zeros(12, 2)})
        job.save(STATE, iteration=2)
        before = writer_epochs(target), list_commits(target)
        with pytest.raises(CheckpointError, match=r"a job saves to \(process \d+ on '.*Give a root of its own"):
            distckpt.reshard(source, target, {"tp": 3}, plan=ROWS)
        assert distckpt.reshard(source, target, {"tp": 2}, plan=ROWS).is_there
        assert (writer_epochs(target), list_commits(target)) == before
        job.save(STATE, iteration=3)
    assert [commit.iteration for commit in list_commits(target)] == [3, 2, 1]


def test_root_whose_writer_cannot_be_told_counts_as_a_jobs() -> None:
    source = MemoryStorage()
    save_one(source, 1)
    for content in (b'{"host": "golden", "pid": 1}', b"", b"[" * 100_000, b'{"reshards": 1}', bytes(2 << 20)):
        target = MemoryStorage()
        target.make_directory("")
        target.replace("writer-000003", content)
        with pytest.raises(CheckpointError, match="a job saves to"):
            distckpt.reshard(source, target, {"tp": 2}, plan=ROWS)
        assert target.list("") == ["writer-000003"]


def test_later_checkpoint_is_resharded_beside_one_that_the_source_has_pruned(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with Checkpointer(source, keep_last=1) as job:
        job.save(STATE, iteration=1)
        distckpt.reshard(source, target, {"tp": 2}, plan=ROWS)
        for iteration in (2, 3, 4):
            job.save(STATE, iteration=iteration)
    distckpt.reshard(source, target, {"tp": 2}, plan=ROWS)
    assert [commit.iteration for commit in list_commits(PosixStorage(target))] == [4, 1]
    other = tmp_path / "other"
    save_one(other, 9)
    with pytest.raises(CheckpointError, match="checkpoints of another run"):
        distckpt.reshard(other, target, {"tp": 2}, plan=ROWS)


# Bounds.


@pytest.mark.parametrize("mesh", [{"tp": 1 << 18}, {"tp": 1000, "pp": 1000, "dp": 1000}, {"ep": 10**100}], ids=str)
def test_mesh_of_more_ranks_than_there_can_be(mesh: dict[str, int]) -> None:
    source = MemoryStorage()
    save_one(source, 1)
    with pytest.raises(ValueError, match=r"a mesh of \d+ ranks, .*: at most 131072 expected"):
        distckpt.reshard(source, MemoryStorage(), mesh, plan=ROWS)


def test_tensor_in_more_parts_than_there_can_be() -> None:
    source = save(lambda _: {"flags": rows("flags", torch.zeros(1 << 20, dtype=torch.bool), 0, 1)})
    plan = ReshardPlan(tensors=(TensorRule(match="flags", partition=("tp",), blocks=(1 << 20,)),))
    with pytest.raises(CheckpointError, match=re.escape("'flags' (1048576,) would be cut into 2097152 parts")):
        distckpt.reshard(source, MemoryStorage(), {"tp": 2}, plan=plan)


def test_plan_for_many_ranks_looks_at_each_part_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not at those of all ranks for each of them."""
    whole = torch.arange(600.0)
    source, made = save(lambda _: {"w": rows("w", whole, 0, 1)}), 0
    plan = ReshardPlan(tensors=(TensorRule(match="w", partition=("tp",)),))
    check = Box.__post_init__

    def count(box: Box) -> None:
        nonlocal made
        made += 1
        check(box)

    monkeypatch.setattr(Box, "__post_init__", count)
    target = MemoryStorage()
    distckpt.reshard(source, target, {"tp": 200}, plan=plan)
    assert made < 200 * 20
    assert torch.equal(read_tensors(target)["w"], whole)


# Open files.


def test_limit_of_open_files_is_raised_as_far_as_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(100, 5000)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    reserve_open_files(1)
    reserve_open_files(2000)
    assert limits[-1][0] > 2000
    assert limits[-1][1] == 5000
    with pytest.raises(OSError, match=r"\d+ files are to be open at a time, the limit is 5000: raise it"):
        reserve_open_files(5000)


def test_one_rank_more_than_files_may_be_open_is_an_error_before_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = MemoryStorage(), tmp_path / "target"
    save_one(source, 1)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    with pytest.raises(OSError, match="the limit is 64"):
        distckpt.reshard(source, target, {"tp": 12}, plan=ROWS)
    assert not [name for name in PosixStorage(target).list("iter_0000001") if name.startswith("shard-")]


# What was passed over in silence.


@pytest.mark.parametrize(
    ("axis", "owner", "counts", "message"),
    [
        ("pp", None, (1, 2), "stages of 'pp', but no tensor is split over it"),
        ("pp", "pp", (1, 2), r"counts of 'pp' are \[1, 2\], 1 numbers expected"),
    ],
    ids=["an axis that nothing lies on", "more stages than there are"],
)
def test_stages_of_a_plan_that_mean_nothing(
    axis: str, owner: str | None, counts: tuple[int, ...], message: str
) -> None:
    source = MemoryStorage()
    save_one(source, 1)
    rule = TensorRule(match="w", partition=("tp", None), owner=owner, at=None if owner is None else 0)
    plan = ReshardPlan(stages={axis: StageRule(counts=counts)}, tensors=(rule,))
    with pytest.raises(CheckpointError, match=message):
        distckpt.reshard(source, MemoryStorage(), {"tp": 2}, plan=plan)


@pytest.mark.parametrize("jobs", [1, 4, 32])
def test_more_threads_get_more_memory_if_nothing_is_said(jobs: int) -> None:
    source = MemoryStorage()
    save_one(source, 1)
    assert distckpt.preview_reshard(source, {"tp": 1}, jobs=jobs).memory_bytes >= 256 << 20
    assert distckpt.reshard(source, MemoryStorage(), {"tp": 1}, jobs=jobs, dtype="bfloat16").iteration == 1
    with pytest.raises(CheckpointError, match="too little"):
        distckpt.preview_reshard(source, {"tp": 1}, jobs=jobs, memory_bytes=16 << 20)


def test_iteration_that_is_older_than_what_is_there_is_refused() -> None:
    """It would be the newest of the target, which a job resumes from, and retention keep it instead of the other."""
    source, target = MemoryStorage(), MemoryStorage()
    for iteration in (1, 2, 3):
        save_one(source, iteration)
    distckpt.reshard(source, target, {"tp": 2}, plan=ROWS, iteration=2)
    with pytest.raises(CheckpointError, match=r"has iteration 2 already, which .* saved after iteration 1, and"):
        distckpt.reshard(source, target, {"tp": 2}, plan=ROWS, iteration=1)
    distckpt.reshard(source, target, {"tp": 2}, plan=ROWS, iteration=3)
    assert [commit.iteration for commit in list_commits(target)] == [3, 2]


def test_damage_of_other_iterations_does_not_keep_one_from_being_resharded() -> None:
    source, target = MemoryStorage(), MemoryStorage()
    for iteration in (1, 2, 3):
        save_one(source, iteration)
    distckpt.reshard(source, target, {"tp": 2}, plan=ROWS, iteration=1)
    damage = flip(20)
    for storage in (source, target):
        change(storage, list_commits(storage)[0].name, damage)
    distckpt.reshard(source, target, {"tp": 2}, plan=ROWS, iteration=1)
    distckpt.reshard(source, target, {"tp": 2}, plan=ROWS, iteration=2)
    assert list_commits(target)[0].iteration == 2


def test_what_is_left_out_may_be_damaged() -> None:
    source = MemoryStorage()
    state = {f"{word}{number:04}": torch.ones(1) for number in range(3000) for word in "ab"}
    with Checkpointer(source) as checkpointer:
        checkpointer.save(state, iteration=1)
    table = next(name for name in source.list("iter_0000001") if name.startswith("chunks-"))
    size = source.open(f"iter_0000001/{table}").size_bytes
    change(source, f"iter_0000001/{table}", flip(size // 2))
    report = distckpt.reshard(source, MemoryStorage(), {"tp": 1}, select=["a00*"])
    assert report.bytes_written


def test_source_may_have_a_path_that_is_not_utf_8(tmp_path: Path) -> None:
    source = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"bad\xff"))
    save_one(PosixStorage(source), 1)
    report = distckpt.reshard(source, tmp_path / "target", {"tp": 2}, plan=ROWS)
    assert report.iteration == 1
    assert distckpt.reshard(source, tmp_path / "target", {"tp": 2}, plan=ROWS).is_there


def test_memory_without_end_is_not_taken() -> None:
    assert share_memory(1 << 62, 1, converts=False, begun_blocks=1).window_bytes <= 4 << 30


@pytest.mark.parametrize("dim", [0, 1])
def test_each_byte_is_read_once_if_there_is_memory_for_a_block_of_all_that_are_begun(dim: int) -> None:
    source, target, parts = MemoryStorage(), MemoryStorage(), 40
    # 2 MiB for each of 40 ranks: two tensors cut by rows, in the middle of blocks, or one cut by columns.
    whole = torch.arange(parts << 19, dtype=torch.int32).reshape(((2, 5120, 2048), (1, 4096, 5120))[dim])
    partition = ("tp", None) if dim == 0 else (None, "tp")

    def save_parts(coordinator: Coordinator) -> None:
        at = coordinator.rank
        state = {
            f"w{i}": ShardedTensor.from_rank_offsets(
                f"w{i}", one.chunk(parts, dim)[at].contiguous(), (dim, at, parts), partition=partition
            )
            for i, one in enumerate(whole)
        }
        with Checkpointer(source, coordinator=coordinator, mesh={"tp": (at, parts)}) as checkpointer:
            checkpointer.save(state, iteration=1)

    run_ranks(parts, save_parts)
    needed = (40 << 20) + (2 * (parts + 2) << 20)
    (note,) = distckpt.preview_reshard(source, {"tp": 2}, memory_bytes=needed - 1).notes
    assert re.match(r"up to 40 blocks are begun at a time.* a memory of 124 MiB", note)
    assert not distckpt.preview_reshard(source, {"tp": 2}, memory_bytes=needed).notes
    report = distckpt.reshard(source, target, {"tp": 2}, memory_bytes=needed)
    assert not report.notes
    assert whole.nbytes <= report.bytes_read <= whole.nbytes + parts * (16 << 10)  # Headers and tables of checksums.
    found = read_tensors(target)
    assert all(torch.equal(found[f"w{i}"], one) for i, one in enumerate(whole))


def test_damaged_source_with_parity_says_how_to_mend_it(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with Checkpointer(source, parity=1) as checkpointer:
        checkpointer.save(STATE, iteration=1)
    (file,) = (source / "iter_0000001").glob("shard-*")
    content = bytearray(file.read_bytes())
    content[content.index(b"\x00\x00\x80?")] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptionError, match=r"has parity, .*: distckpt repair .*source --iteration 1\. Then"):
        distckpt.reshard(source, target, {"tp": 2}, plan=ROWS)
    distckpt.repair(source, 1)
    distckpt.reshard(source, target, {"tp": 2}, plan=ROWS)
    assert torch.equal(read_tensors(PosixStorage(target))["w"], STATE["w"])


def test_source_that_is_removed_meanwhile_is_told_from_one_that_lost_a_file(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with Checkpointer(source) as checkpointer:
        checkpointer.save({**STATE, "random": PerRank([1])}, iteration=1)
    (file,) = (source / "iter_0000001").glob("shard-*")
    lost, away = lambda _: file.rename(tmp_path / "file"), lambda _: shutil.rmtree(file.parent)
    for drop in ([], ["random"]):  # With it the file is read before anything is written.
        with pytest.raises(FileNotFoundError, match=file.name):
            distckpt.reshard(source, target, {"tp": 1}, plan=ROWS, drop=drop, on_plan=lost)
        (tmp_path / "file").rename(file)
    shutil.copytree(source, tmp_path / "copy")
    for drop in ([], ["random"]):
        with pytest.raises(CheckpointNotFoundError, match=r"iter_0000001/index-.*: it was removed while.*distckpt pin"):
            distckpt.reshard(source, target, {"tp": 1}, plan=ROWS, drop=drop, on_plan=away)
        shutil.copytree(tmp_path / "copy", source, dirs_exist_ok=True)


def test_rank_that_cannot_read_the_source_is_an_error_of_all_ranks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = MemoryStorage(), MemoryStorage()
    save_one(source, 1)
    errors: dict[int, DistributedError] = {}
    read, first = job.read_kept_per_rank, iter([OSError(errno.EIO, "not read")])

    def read_or_fail(*arguments: Any) -> Mapping[int, Mapping[str, msgspec.Raw]]:
        for error in first:
            raise error
        return read(*arguments)

    monkeypatch.setattr(job, "read_kept_per_rank", read_or_fail)

    def run(coordinator: Coordinator) -> None:
        with pytest.raises(
            DistributedError, match=r"'reshard lay out' failed on rank .* of 2: OSError: .*not read"
        ) as e:
            distckpt.reshard(source, target, {"tp": 2}, plan=ROWS, coordinator=coordinator)
        errors[coordinator.rank] = e.value

    run_ranks(2, run)
    assert len({str(error) for error in errors.values()}) == 1
    assert not list_commits(target)
