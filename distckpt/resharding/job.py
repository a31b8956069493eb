"""One reshard: the order of things, and what its processes agree on. No torch.

It is a save in the target, by the rules of distckpt.commit, made by one process or several: rank 0 claims the target
and announces; every process writes its part of the files (part.py), while all of them agree every second that none has
failed; then rank 0 commits. A journal beside the files says how far each part is: the same command, started again, goes
on under the same save_id.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from distckpt.checkpoint_files import OnBytes
from distckpt.commit import Commit, Writer, iteration_directory, list_commits, pending_marker
from distckpt.coordinator import Coordinator, agree, default_coordinator
from distckpt.errors import CheckpointError, CheckpointNotFoundError, CorruptionError
from distckpt.heartbeat import Heartbeat
from distckpt.host import peak_rss_bytes, reserve_open_files
from distckpt.index import ShardFile
from distckpt.parity import read_record
from distckpt.report import ReshardReport
from distckpt.resharding.committing import Order, Outcome, TargetFiles, Totals, begin, commit
from distckpt.resharding.content import read_kept_per_rank
from distckpt.resharding.part import (
    JOURNAL_S,
    PartPlan,
    PartWriter,
    check_journal,
    default_memory,
    journal_name,
    read_journal,
)
from distckpt.resharding.plan_file import ReshardPlan, plan_of
from distckpt.resharding.planning import PlannedReshard, Request, ReshardPreview, plan_reshard, preview_of
from distckpt.resharding.target_files import cut_lots, lay_out_files, place_tensors, plan_files
from distckpt.resharding.target_layout import TargetMesh
from distckpt.selecting import open_selected, select_commits
from distckpt.storage import PosixStorage, Storage
from distckpt.tensor_source import OPEN_FILES

logger = logging.getLogger("distckpt")
M = TypeVar("M")
D = TypeVar("D")
_STEP_S = 1.0
_HANDLES_PER_SOURCE = 2  # one that reads past the page cache


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
    memory_bytes: int | None = None,
    jobs: int = 1,
    coordinator: Coordinator | None = None,
    timeout_s: float = 600.0,
    on_bytes: OnBytes = lambda _: None,
    on_plan: Callable[[ReshardPreview], None] = lambda _: None,
) -> ReshardReport:
    """Rewrite the newest checkpoint under a root, or the selected one, for a mesh of other sizes, into another root.

    mesh: axis -> size; axes that are not named get size 1. select, drop: globs of keys. dtype: what floating-point
    tensors are converted to. memory_bytes: what each process takes for it, whatever the size of the checkpoint; if None
    256 MiB, or as much as `jobs`, the threads of each process, need. on_bytes: told how many bytes of tensors this
    process has written since it was told last. on_plan: told what will be done, once, before anything is written.

    Collective: all ranks of the coordinator call it alike; by default that of torch.distributed or mpirun, else one
    process. Called again after it was cut short, it goes on.

    Raises CheckpointNotFoundError; CorruptionError if what is read is damaged; CheckpointError for what cannot be done
    as asked, and a target that is another run's; FencedError; DistributedError on several ranks; OSError.
    """
    coordinator = default_coordinator() if coordinator is None else coordinator
    if jobs < 1:
        raise ValueError(f"jobs={jobs}: at least 1 expected")
    memory_bytes = default_memory(jobs) if memory_bytes is None else memory_bytes
    job = ReshardJob(
        coordinator,
        timeout_s,
        PosixStorage(target) if isinstance(target, (str, os.PathLike)) else target,
        jobs,
        memory_bytes,
        on_bytes,
    )
    planned = job.plan(
        source,
        iteration,
        lambda: Request(TargetMesh.of(mesh), plan_of(plan), tuple(select), tuple(drop), dtype),
    )
    on_plan(preview_of(planned, memory_bytes, jobs))
    return job.run(planned)


class _Found(msgspec.Struct, frozen=True):
    """The commit that rank 0 chose."""

    epoch: int
    commit_seq: int
    iteration: int


@dataclass(slots=True)
class ReshardJob:
    """One reshard; the same calls in the same order on every rank: plan(), then run().

    memory_bytes: of this process. on_bytes: told how many bytes of tensors it has written.
    """

    coordinator: Coordinator
    timeout_s: float
    target: Storage
    jobs: int
    memory_bytes: int
    on_bytes: OnBytes
    _bytes_written: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)  # of the one before
    _writer: Writer | None = None  # rank 0's
    _started: float = field(default_factory=time.perf_counter)

    def plan(
        self,
        source: str | os.PathLike[str] | Storage,
        iteration: int | str | None,
        make_request: Callable[[], Request],
    ) -> PlannedReshard:
        """What is to be done, alike on all ranks. Collective; writes nothing."""
        planned: list[PlannedReshard] = []

        def choose(_: Sequence[None]) -> list[_Found]:
            storage, selector = open_selected(source, iteration)
            commit = select_commits(storage, selector)[0]
            return [_Found(commit.epoch, commit.commit_seq, commit.iteration)] * self.coordinator.world_size

        def plan() -> str:
            storage, _ = open_selected(source, iteration)
            commit = Commit(found.epoch, found.commit_seq, found.iteration)
            planned.append(plan_reshard(storage, commit, make_request()))
            planned[0].lot_memory(self.memory_bytes, self.jobs)
            return planned[0].digest

        def compare(digests: Sequence[str]) -> Sequence[str]:
            for rank, digest in enumerate(digests):
                if digest != digests[0]:
                    raise CheckpointError(
                        f"rank {rank} plans another target than rank 0: give all ranks the same options"
                    )
            return digests

        found = self._agree("choose", lambda: None, choose, type(None), _Found)
        self._agree("plan", plan, compare, str, str)
        return planned[0]

    def run(self, planned: PlannedReshard) -> ReshardReport:
        """Write and commit. Collective."""

        def decide(_: Sequence[None]) -> list[Order]:
            order, self._writer = begin(self.target, planned, self.coordinator.world_size)
            return [order] * self.coordinator.world_size

        order = self._agree("begin", lambda: None, decide, type(None), Order)
        if order.is_there:
            return self._report(planned, order, Totals(0, 0, 0, 0, peak_rss_bytes()))
        marker = pending_marker(planned.index.iteration, order.save_id)
        with Heartbeat(self.target, marker, active=self.coordinator.rank == 0):
            files = self._lay_out(planned, order)
            outcome = self._write(planned, order, files)

            def publish(outcomes: Sequence[Outcome]) -> list[Totals]:
                assert self._writer is not None
                totals = commit(self.target, planned, order, files, outcomes, self._writer)
                return [totals] * self.coordinator.world_size

            totals = self._agree("commit", lambda: outcome, publish, Outcome, Totals)
        return self._report(planned, order, totals)

    def _agree(
        self,
        phase: str,
        local: Callable[[], M],
        decide: Callable[[Sequence[M]], Sequence[D]],
        message: type[M],
        decision: type[D],
    ) -> D:
        return agree(
            self.coordinator,
            f"reshard {phase}",
            local,
            decide,
            message=message,
            decision=decision,
            timeout_s=self.timeout_s,
        )

    def _lay_out(self, planned: PlannedReshard, order: Order) -> TargetFiles:
        """What lies where in the target, alike on all ranks. Collective."""
        index, content = planned.index, planned.content
        found: list[TargetFiles] = []

        def lay_out() -> None:
            files = plan_files(planned.layout, content, planned.turns, order.parts)
            with _explaining(planned):
                per_rank = read_kept_per_rank(planned.storage, planned.commit.directory, index, content.per_rank)
            laid_out = lay_out_files(
                files,
                content,
                per_rank,
                save_id=order.save_id,
                iteration=index.iteration,
                metadata=bytes(index.metadata),
                metrics=index.metrics,
            )
            found.append(TargetFiles(files, laid_out, place_tensors(files, laid_out, planned.sources)))

        self._agree("lay out", lay_out, lambda ranks: [None] * len(ranks), type(None), type(None))
        return found[0]

    def _write(self, planned: PlannedReshard, order: Order, target: TargetFiles) -> Outcome:
        """Write this rank's parts, in a thread of its own, while all ranks tell each other every second that they live.

        What strikes this rank in between, even an interrupt, is raised in the next agreement, as the others wait there.
        """
        writing = _Writing(self, planned, order, target)
        noted = time.monotonic()
        error: BaseException | None = None
        writing.start()
        try:
            while True:
                try:
                    writing.ended.wait(_STEP_S)
                    if time.monotonic() - noted > JOURNAL_S:
                        writing.note()
                        noted = time.monotonic()
                    if self._writer is not None:
                        self._writer.check_fence()
                except BaseException as struck:
                    error = struck

                def tell(error: BaseException | None = error) -> bool:
                    if error is not None or writing.error is not None:
                        raise error or writing.error or AssertionError
                    return writing.ended.is_set()

                if self._agree("at work", tell, lambda done: [all(done)] * len(done), bool, bool):
                    return writing.outcome(self._bytes_written)
        finally:
            writing.stop()

    def count(self, size_bytes: int) -> None:
        """Bytes of tensors that were written. Any thread."""
        with self._lock:
            self._bytes_written += size_bytes
        self.on_bytes(size_bytes)

    def _report(self, planned: PlannedReshard, order: Order, totals: Totals) -> ReshardReport:
        mesh = planned.layout.mesh
        report = ReshardReport(
            iteration=planned.index.iteration,
            save_id=order.save_id,
            source=planned.storage.location,
            target=self.target.location,
            mesh=dict(mesh.sizes),
            world_size=mesh.world_size,
            files=totals.files,
            bytes=totals.size_bytes,
            bytes_written=totals.bytes_written,
            bytes_read=totals.bytes_read,
            total_s=time.perf_counter() - self._started,
            is_resumed=order.is_resumed,
            is_there=order.is_there,
            notes=planned.content.notes if order.is_there else planned.notes(self.memory_bytes, self.jobs),
            peak_rss_bytes=totals.peak_rss_bytes,
        )
        if self.coordinator.rank == 0:
            logger.info("iteration %d is resharded for %s in %s", report.iteration, mesh, report.target)
        return report


class _Writing:
    """The parts that a rank writes, one after the other, in a thread."""

    def __init__(self, job: ReshardJob, planned: PlannedReshard, order: Order, target: TargetFiles) -> None:
        self.ended = threading.Event()
        self.error: BaseException | None = None
        self._job, self._planned, self._order, self._target = job, planned, order, target
        self._files: dict[int, ShardFile] = {}
        self._bytes_read = 0
        self._writer: PartWriter | None = None
        self._lock = threading.Lock()  # of the writer
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="distckpt-reshard", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def note(self) -> None:
        """Have the journal say how far it is. Raises OSError."""
        with self._lock:
            writer = None if self.ended.is_set() else self._writer
        if writer is not None:
            writer.note()

    def stop(self) -> None:
        """End it, if it has not ended, within a step."""
        with self._lock:
            self._is_stopped = True
            if self._writer is not None:
                self._writer.stop()
        self._thread.join()

    def outcome(self, bytes_written: int) -> Outcome:
        return Outcome(self._files, self._bytes_read, bytes_written, peak_rss_bytes())

    def _run(self) -> None:
        try:
            coordinator = self._job.coordinator
            with _explaining(self._planned):
                for part in range(coordinator.rank, self._order.parts, coordinator.world_size):
                    self._run_part(part)
        except BaseException as error:
            self.error = error
        finally:
            self.ended.set()

    def _run_part(self, part: int) -> None:
        job, planned, target = self._job, self._planned, self._target
        plan = _plan_part(job, planned, self._order, target, part)
        lots = len(plan.lots if plan.journal is None else plan.journal.lots)
        sources = min(OPEN_FILES, len(planned.index.files))
        reserve_open_files(len(plan.own) + lots * _HANDLES_PER_SOURCE * sources)
        writer = PartWriter(
            planned.storage,
            planned.commit.directory,
            planned.stored,
            job.target,
            plan,
            memory=planned.lot_memory(job.memory_bytes, min(job.jobs, max(1, lots))),
            on_bytes=job.count,
            check_fence=Writer(job.target, self._order.epoch, 0).check_fence,
        )
        with self._lock:
            self._writer = writer
            if self._is_stopped:
                writer.stop()
        finished = writer.run(job.jobs)
        self._bytes_read += writer.bytes_read
        if finished is not None:
            self._files.update(zip(plan.own, finished, strict=True))


@contextmanager
def _explaining(planned: PlannedReshard) -> Iterator[None]:
    """Errors for damage to the source, or for its being gone, are raised with what can be done."""
    try:
        yield
    except CorruptionError as error:
        if _has_parity(planned):
            raise CorruptionError(
                f"{error} The checkpoint has parity, from which it may be mended: distckpt repair "
                f"{planned.storage.location} --iteration {planned.index.iteration}. Then the same command goes on."
            ) from error
        raise
    except FileNotFoundError as error:  # The files of one that was removed stay for a while after it.
        if planned.commit not in list_commits(planned.storage):
            raise CheckpointNotFoundError(
                f"{planned.commit.name} of {planned.storage.location}: it was removed while it was being read. Pin "
                f"what a job may retire (distckpt pin), or name another --iteration"
            ) from error
        raise


def _has_parity(planned: PlannedReshard) -> bool:
    with suppress(CheckpointError, OSError):
        return read_record(planned.storage, planned.commit.directory, planned.index) is not None
    return False


def _plan_part(job: ReshardJob, planned: PlannedReshard, order: Order, target: TargetFiles, part: int) -> PartPlan:
    directory = iteration_directory(planned.index.iteration)
    low, high = target.planned.bounds[part : part + 2]
    tensors = [target.tensors[t] for t in target.planned.order[low:high]]
    own = [number for number, file in enumerate(target.files) if file.planned.part == part]
    journal = None
    if order.is_resumed:
        name = journal_name(directory, order.save_id, part)
        try:
            journal = read_journal(job.target, name)
            check_journal(journal, name, tensors, [target.files[number].layout for number in own])
        except FileNotFoundError:
            logger.info("%s: part %d begins anew, it had not begun", job.target.location, part)
    return PartPlan(
        part=part,
        parts=order.parts,
        digest=planned.digest,
        save_id=order.save_id,
        directory=directory,
        tensors=tensors,
        files=target.files,
        own=own,
        lots=cut_lots(tensors, job.jobs),
        journal=journal,
    )
