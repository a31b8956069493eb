"""One reshard: the order of things, and what its processes agree on. No torch.

It is a save in the target, by the rules of distckpt.commit, made by one process or several: rank 0 claims the target
and announces; every process writes its part of the files (distckpt.reshard_part), while all of them agree every second
that none has failed; then rank 0 commits. A journal beside the files says how far each part is: the same command,
started again, goes on under the same save_id.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from distckpt.assembling import join_records
from distckpt.checkpoint_files import OnBytes, is_damage
from distckpt.chunk_table import Chunks, encode_record
from distckpt.commit import (
    Commit,
    CommitFailed,
    Writer,
    iteration_directory,
    list_commits,
    new_save_id,
    pending_marker,
    read_index,
)
from distckpt.coordinator import Coordinator, agree
from distckpt.copying import check_is_of_one_run
from distckpt.errors import CheckpointError, DistributedError
from distckpt.heartbeat import Heartbeat
from distckpt.host import peak_rss_bytes
from distckpt.index import Index, PerRankEntry, ShardFile, Spec
from distckpt.removing import sweep
from distckpt.report import ReshardReport
from distckpt.reshard_content import read_kept_per_rank
from distckpt.reshard_files import (
    PlannedFiles,
    TargetFile,
    cut_lots,
    digest_of,
    lay_out_files,
    place_tensors,
    plan_files,
)
from distckpt.reshard_part import JOURNAL_S, Journal, PartPlan, PartWriter, journal_name, read_journal, window_bytes
from distckpt.reshard_planning import PlannedReshard, Request, plan_reshard
from distckpt.reshard_steps import PlacedTensor
from distckpt.roots import check_place, claim_root
from distckpt.selecting import open_selected, select_commits
from distckpt.shard_file import FORMAT, FORMAT_VERSION
from distckpt.storage import PosixStorage, Storage, new_file

logger = logging.getLogger("distckpt")
M = TypeVar("M")
D = TypeVar("D")
_STEP_S = 1.0
_GRACE_S = 60.0  # of readers of what is swept in the target
_JOURNAL = re.compile(r"reshard-00000-([0-9a-f]{32})\.json")


class _Found(msgspec.Struct, frozen=True):
    """The commit that rank 0 chose."""

    epoch: int
    commit_seq: int
    iteration: int


class _Order(msgspec.Struct, frozen=True):
    """What rank 0 decided. parts: how many the files are written in. is_there: nothing is to be done."""

    save_id: str
    parts: int
    is_resumed: bool = False
    is_there: bool = False


class _Outcome(msgspec.Struct, frozen=True):
    """What a rank has written: its files, by number in the target, and how much it moved."""

    files: dict[int, ShardFile]
    bytes_read: int
    bytes_written: int
    peak_rss_bytes: int


class _Totals(msgspec.Struct, frozen=True):
    files: int
    size_bytes: int
    bytes_read: int
    bytes_written: int
    peak_rss_bytes: int


@dataclass(frozen=True, slots=True)
class _Target:
    """The files of the target, and where each tensor lies in them."""

    planned: PlannedFiles
    files: Sequence[TargetFile]
    tensors: Sequence[PlacedTensor]


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
        self, source: str | os.PathLike[str] | Storage, iteration: int | str | None, request: Request
    ) -> PlannedReshard:
        """What is to be done, alike on all ranks. Collective; writes nothing."""
        storage, selector = open_selected(source, iteration)
        planned: list[PlannedReshard] = []

        def choose(_: Sequence[None]) -> list[_Found]:
            commit = select_commits(storage, selector)[0]
            return [_Found(commit.epoch, commit.commit_seq, commit.iteration)] * self.coordinator.world_size

        def plan() -> str:
            commit = Commit(found.epoch, found.commit_seq, found.iteration)
            planned.append(plan_reshard(storage, commit, request))
            window_bytes(self.memory_bytes, self.jobs, converts=planned[0].converts)
            return _digest(planned[0])

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

        def begin(_: Sequence[None]) -> list[_Order]:
            return [self._begin(planned)] * self.coordinator.world_size

        order = self._agree("begin", lambda: None, begin, type(None), _Order)
        if order.is_there:
            return self._report(planned, order, _Totals(0, 0, 0, 0, peak_rss_bytes()))
        marker = pending_marker(planned.index.iteration, order.save_id)
        with Heartbeat(self.target, marker, active=self.coordinator.rank == 0):
            target = self._lay_out(planned, order)
            outcome = self._write(planned, order, target)

            def commit(outcomes: Sequence[_Outcome]) -> list[_Totals]:
                return [self._commit(planned, order, target, outcomes)] * self.coordinator.world_size

            totals = self._agree("commit", lambda: outcome, commit, _Outcome, _Totals)
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

    def _begin(self, planned: PlannedReshard) -> _Order:
        """Rank 0: look at the target, claim it, and announce."""
        self._check_target(planned)
        there = _find_twin(self.target, planned)
        if there is not None:
            return _Order(there, 1, is_there=True)
        journal = _find_journal(self.target, planned)
        self._writer = claim_root(self.target)
        save_id = new_save_id() if journal is None else journal.save_id
        parts = self.coordinator.world_size if journal is None else journal.parts
        self.target.make_directory(iteration_directory(planned.index.iteration))
        # Before the sweep: whoever began this, its marker is of an epoch that has ended, and it is ours now.
        marker = pending_marker(planned.index.iteration, save_id)
        self.target.replace(marker, str(self._writer.epoch).encode())
        sweep(self.target, grace_s=_GRACE_S)
        self._check_room(planned, save_id)
        return _Order(save_id, parts, is_resumed=journal is not None)

    def _check_target(self, planned: PlannedReshard) -> None:
        source, target = planned.storage, self.target
        check_place(target)
        if _is_same_directory(source, target):
            raise CheckpointError(
                f"{target.location} is the root that is read: a reshard there would end the job that saves to it. "
                f"Give a root of its own."
            )
        check_is_of_one_run(source, target, planned.commit)

    def _check_room(self, planned: PlannedReshard, save_id: str) -> None:
        free = self.target.free_space()
        directory = iteration_directory(planned.index.iteration)
        there = 0
        for name in self.target.list(directory):
            if name.startswith("shard-") and save_id in name:
                file = self.target.open(f"{directory}/{name}")
                there += file.size_bytes
                file.close()
        needed = int(planned.layout.bytes_by_rank.sum()) - there
        if free is not None and needed > free.size_bytes:
            raise CheckpointError(
                f"not enough space: the new checkpoint takes {needed} bytes more in {self.target.location}, which has "
                f"{free.size_bytes} bytes free"
            )

    def _lay_out(self, planned: PlannedReshard, order: _Order) -> _Target:
        index, content = planned.index, planned.content
        files = plan_files(planned.layout, content, planned.firsts, order.parts)
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
        return _Target(files, laid_out, place_tensors(files, laid_out, planned.sources))

    def _write(self, planned: PlannedReshard, order: _Order, target: _Target) -> _Outcome:
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

    def _commit(self, planned: PlannedReshard, order: _Order, target: _Target, outcomes: Sequence[_Outcome]) -> _Totals:
        """Rank 0. Raises DistributedError that says whether the new checkpoint exists."""
        assert self._writer is not None
        found = {number: file for outcome in outcomes for number, file in outcome.files.items()}
        files = [found[number] for number in range(len(target.files))]
        directory = iteration_directory(planned.index.iteration)
        try:
            index, table = _index_of(planned, order.save_id, target, files, self._writer)
            self.target.remove(f"{directory}/{index.chunk_table.name}")  # Of a try that was cut short here.
            with new_file(self.target, f"{directory}/{index.chunk_table.name}", len(table)) as file:
                file.write(0, table)
            self._writer.publish(index)
        except (CommitFailed, OSError) as error:
            committed = error.committed if isinstance(error, CommitFailed) else "no"
            raise DistributedError(
                f"resharding iteration {planned.index.iteration}: {error}",
                failures={0: str(error)},
                committed=committed,
            ) from error
        for part in range(order.parts):
            self.target.remove(journal_name(directory, order.save_id, part))
        self.target.remove(pending_marker(planned.index.iteration, order.save_id))
        return _Totals(
            len(files) + 1,
            sum(file.size_bytes for file in files) + len(table),
            sum(outcome.bytes_read for outcome in outcomes),
            sum(outcome.bytes_written for outcome in outcomes),
            max(outcome.peak_rss_bytes for outcome in outcomes),
        )

    def _report(self, planned: PlannedReshard, order: _Order, totals: _Totals) -> ReshardReport:
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
            seconds=time.perf_counter() - self._started,
            is_resumed=order.is_resumed,
            is_there=order.is_there,
            notes=planned.content.notes,
            peak_rss_bytes=totals.peak_rss_bytes,
        )
        if self.coordinator.rank == 0:
            logger.info("iteration %d is resharded for %s in %s", report.iteration, mesh, report.target)
        return report


class _Writing:
    """The parts that a rank writes, one after the other, in a thread."""

    def __init__(self, job: ReshardJob, planned: PlannedReshard, order: _Order, target: _Target) -> None:
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

    def outcome(self, bytes_written: int) -> _Outcome:
        return _Outcome(self._files, self._bytes_read, bytes_written, peak_rss_bytes())

    def _run(self) -> None:
        try:
            coordinator = self._job.coordinator
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
        window = window_bytes(job.memory_bytes, min(job.jobs, max(1, lots)), converts=planned.converts)
        writer = PartWriter(
            planned.storage,
            planned.commit.directory,
            planned.stored,
            job.target,
            plan,
            window_bytes=window,
            on_bytes=job.count,
        )
        with self._lock:
            self._writer = writer
            if self._is_stopped:
                writer.stop()
        finished = writer.run(job.jobs)
        self._bytes_read += writer.bytes_read
        if finished is not None:
            self._files.update(zip(plan.own, finished, strict=True))


def _plan_part(job: ReshardJob, planned: PlannedReshard, order: _Order, target: _Target, part: int) -> PartPlan:
    directory = iteration_directory(planned.index.iteration)
    low, high = target.planned.bounds[part : part + 2]
    tensors = [target.tensors[t] for t in target.planned.order[low:high]]
    own = [number for number, file in enumerate(target.files) if file.planned.part == part]
    journal = None
    if order.is_resumed:
        name = journal_name(directory, order.save_id, part)
        try:
            journal = read_journal(job.target, name)
        except FileNotFoundError:
            logger.info("%s: part %d begins anew, it had not begun", job.target.location, part)
    return PartPlan(
        part=part,
        parts=order.parts,
        digest=_digest(planned),
        save_id=order.save_id,
        directory=directory,
        tensors=tensors,
        files=target.files,
        own=own,
        lots=cut_lots(tensors, job.jobs),
        journal=journal,
    )


def _digest(planned: PlannedReshard) -> str:
    return digest_of(planned.index.save_id, planned.layout, planned.content, planned.sources)


def _is_same_directory(a: Storage, b: Storage) -> bool:
    if not isinstance(a, PosixStorage) or not isinstance(b, PosixStorage):
        return a is b
    return os.path.exists(b.location) and os.path.samefile(a.location, b.location)


def _find_twin(target: Storage, planned: PlannedReshard) -> str | None:
    """The save_id of a checkpoint of the target that is what this reshard would make."""
    specs = {tensor.key: tensor.spec for tensor in planned.layout.tensors}
    for commit in list_commits(target):
        if commit.iteration != planned.index.iteration:
            continue
        try:
            index, _ = read_index(target, commit)
        except (CheckpointError, OSError) as error:
            if not is_damage(error):
                raise
            continue
        found = {key: _spec_of(entry) for key, entry in index.tensors.items()}
        is_alike = index.mesh == dict(planned.layout.mesh.sizes) and index.values == dict(planned.content.values)
        if index.parent == planned.index.save_id and is_alike and found == specs:
            return index.save_id
        return None  # The newest of the iteration counts.
    return None


def _spec_of(entry: Spec) -> Spec:
    return Spec(**{name: getattr(entry, name) for name in Spec.__struct_fields__})


def _find_journal(target: Storage, planned: PlannedReshard) -> Journal | None:
    """Of a reshard that would write the same, and was cut short."""
    directory, digest = iteration_directory(planned.index.iteration), _digest(planned)
    for match in filter(None, map(_JOURNAL.fullmatch, target.list(directory))):
        name = journal_name(directory, match[1], 0)
        try:
            journal = read_journal(target, name)
        except (CheckpointError, OSError) as error:
            logger.warning("%s is passed over: %s", name, error)
            continue
        if journal.digest == digest:
            return journal
        logger.warning("%s is of a reshard with other options, which is given up", name)
    return None


def _index_of(
    planned: PlannedReshard, save_id: str, target: _Target, files: Sequence[ShardFile], writer: Writer
) -> tuple[Index, bytes]:
    """The index of the target and the content of its chunk table."""
    layout, source = planned.layout, planned.index
    specs: Mapping[str, Spec] = {tensor.key: tensor.spec for tensor in layout.tensors}
    records = {
        tensor.key: encode_record(Chunks(tensor.offsets, tensor.shapes, tensor.outputs, tensor.starts), tensor.shape)
        for tensor in target.tensors
    }
    joined = join_records(specs, records)
    first_file = {file.rank: number for number, file in reversed(list(enumerate(files)))}
    per_rank = {
        key: PerRankEntry(
            axes=kept.axes,
            on_change=kept.kind.on_change,
            holders=tuple((at, first_file[rank]) for at, (rank, _) in kept.holders.items()),
        )
        for key, kept in planned.content.per_rank.items()
    }
    index = Index(
        format=FORMAT,
        version=FORMAT_VERSION,
        save_id=save_id,
        epoch=writer.epoch,
        commit_seq=writer.commit_seq,
        iteration=source.iteration,
        parent=source.save_id,
        created_unix_s=time.time(),
        world_size=layout.mesh.world_size,
        mesh=dict(layout.mesh.sizes),
        tensors=joined.tensors,
        values=dict(planned.content.values),
        metadata=source.metadata,
        metrics=source.metrics,
        per_rank=per_rank,
        files=tuple(files),
        chunk_table=joined.table(save_id),
    )
    return index, joined.content
