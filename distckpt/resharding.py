"""Resharding: a checkpoint rewritten for another mesh, through a fixed amount of memory. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from distckpt.checkpoint_files import OnBytes
from distckpt.coordinator import Coordinator, default_coordinator
from distckpt.report import ReshardReport
from distckpt.reshard_job import ReshardJob
from distckpt.reshard_part import window_bytes
from distckpt.reshard_plan import ReshardPlan, read_plan
from distckpt.reshard_planning import Request, ReshardPreview, plan_reshard, preview_of
from distckpt.selecting import open_selected, select_commits
from distckpt.storage import PosixStorage, Storage
from distckpt.target_layout import TargetMesh

MEMORY_BYTES = 256 << 20


def reshard(
    source: str | os.PathLike[str] | Storage,
    target: str | os.PathLike[str] | Storage,
    mesh: Mapping[str, int],
    *,
    iteration: int | str | None = None,
    plan: ReshardPlan | str | os.PathLike[str] | None = None,
    select: Sequence[str] = (),
    drop: Sequence[str] = (),
    dtype: str | None = None,
    memory_bytes: int = MEMORY_BYTES,
    jobs: int = 1,
    coordinator: Coordinator | None = None,
    timeout_s: float = 600.0,
    on_bytes: OnBytes = lambda _: None,
    on_plan: Callable[[ReshardPreview], None] = lambda _: None,
) -> ReshardReport:
    """Rewrite the newest checkpoint under a root, or the selected one, for a mesh of other sizes, into another root.

    mesh: axis -> size; axes that are not named get size 1. select, drop: globs of keys. dtype: what floating-point
    tensors are converted to. memory_bytes: what each process takes for it, whatever the size of the checkpoint. jobs:
    threads of each process. on_bytes: told how many bytes of tensors this process has written since it was told last.
    on_plan: told what will be done, once, before anything is written.

    Collective: all ranks of the coordinator call it alike; by default that of torch.distributed or mpirun, else one
    process. Called again after it was cut short, it goes on.

    Raises CheckpointNotFoundError; CorruptionError if what is read is damaged; CheckpointError for what cannot be done
    as asked, and a target that is another run's; FencedError; DistributedError on several ranks; OSError.
    """
    coordinator = default_coordinator() if coordinator is None else coordinator
    request = Request(TargetMesh.of(mesh), _plan_of(plan), tuple(select), tuple(drop), dtype)
    if jobs < 1:
        raise ValueError(f"jobs={jobs}: at least 1 expected")
    job = ReshardJob(coordinator, timeout_s, _storage(target), jobs, memory_bytes, on_bytes)
    planned = job.plan(source, iteration, request)
    on_plan(preview_of(planned, memory_bytes))
    return job.run(planned)


def preview_reshard(
    source: str | os.PathLike[str] | Storage,
    mesh: Mapping[str, int],
    *,
    iteration: int | str | None = None,
    plan: ReshardPlan | str | os.PathLike[str] | None = None,
    select: Sequence[str] = (),
    drop: Sequence[str] = (),
    dtype: str | None = None,
    memory_bytes: int = MEMORY_BYTES,
    jobs: int = 1,
) -> ReshardPreview:
    """What reshard() would do. Writes nothing; one process. Raises as that does."""
    request = Request(TargetMesh.of(mesh), _plan_of(plan), tuple(select), tuple(drop), dtype)
    storage, selector = open_selected(source, iteration)
    planned = plan_reshard(storage, select_commits(storage, selector)[0], request)
    window_bytes(memory_bytes, jobs, converts=planned.converts)
    return preview_of(planned, memory_bytes)


def _storage(root: str | os.PathLike[str] | Storage) -> Storage:
    return PosixStorage(root) if isinstance(root, (str, os.PathLike)) else root


def _plan_of(plan: ReshardPlan | str | os.PathLike[str] | None) -> ReshardPlan:
    if plan is None:
        return ReshardPlan()
    return plan if isinstance(plan, ReshardPlan) else read_plan(Path(plan))
