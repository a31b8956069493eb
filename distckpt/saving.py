"""One save, from the state to the commit: look -> plan -> snapshot -> write -> commit. Holds the order of things.

The plan of an earlier save is used again as long as every rank's state has the structure that it was made of. A rank
whose structure is the same copies its state first and asks the others afterwards, in the background: its training
waits for a copy, and for nobody else. A rank whose structure has changed asks first; then all plan anew, and ranks
that have copied already write only what they have copied.
"""

from __future__ import annotations

import operator
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import TypeAlias, TypeVar

import msgspec
import numpy as np

from distckpt.assembling import Commitment, Written, chunk_records, index_of, raw_json
from distckpt.commit import CommitFailed, iteration_directory, new_save_id, pending_marker
from distckpt.coordinator import agree
from distckpt.describing import Description, describe
from distckpt.errors import DistributedError
from distckpt.heartbeat import Heartbeat
from distckpt.host import peak_rss_bytes
from distckpt.index import ShardFile
from distckpt.json_value import encode_value
from distckpt.metrics import Metrics, known_metrics
from distckpt.offer import Offer, check_alike, check_free_space, free_space
from distckpt.planner import RankShards, SavePlan, check_replicas, join_values, plan_save
from distckpt.protecting import Saved
from distckpt.removing import discard, sweep
from distckpt.report import SaveReport, slowest_ranks
from distckpt.roots import claim_root
from distckpt.save_context import SaveContext
from distckpt.shard_file import DTYPES, file_name
from distckpt.share import Share, ShareMessage, adopt, give_shares
from distckpt.share_files import shared_metadata
from distckpt.staging import Snapshot, empty_snapshot, hold_in_place, take_snapshot
from distckpt.storage import new_file
from distckpt.transport import byte_checksums, peak_device_bytes, sample_checksums
from distckpt.writing import header_metadata, write_shard_file

State: TypeAlias = dict[str, object]
M = TypeVar("M")
D = TypeVar("D")


class _Order(msgspec.Struct, frozen=True):
    """What a rank is to do. share: None is the one that it has. save_id "": show your structure first."""

    save_id: str
    share: ShareMessage | None = None


class _Outcome(msgspec.Struct, frozen=True):
    size_bytes: int
    slowest: dict[str, tuple[int, float]]
    peak_rss_bytes: int
    device_bytes: int


@dataclass(slots=True)
class Save:
    """One save under way; the same calls in the same order on every rank.

    look(), then either plan(), hold() and finish() in one thread, or stage() in the caller's and finish() in any.
    """

    context: SaveContext
    iteration: int
    metadata: object
    metrics: Mapping[str, float] | None
    label: str
    unseen: BaseException | None = None  # of an earlier save: raised everywhere if any rank has not seen it
    staged: threading.Event = field(default_factory=threading.Event)  # set when the state may change
    stall_s: float = 0.0  # how long the caller has waited; kept by the caller until finish()
    waiting_since: float | None = None  # when the caller began to wait for `staged`, if it does
    _metadata: bytes = b"null"
    _metrics: Metrics = field(default_factory=dict)
    _described: Description | None = None
    _share: Share | None = None
    _snapshot: Snapshot | None = None
    _samples: dict[int, int] = field(default_factory=dict)
    _offers: Sequence[Offer] = ()  # rank 0's, and so are the next two
    _plan: SavePlan | None = None
    _values: dict[str, bytes] = field(default_factory=dict)
    _order: _Order | None = None
    _written: Written | None = None
    _error: BaseException | None = None  # what struck this rank outside of an agreement; raised in the next one
    _seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("plan", "stage", "write", "commit"), 0.0))
    _degraded: list[str] = field(default_factory=list)
    _started: float = field(default_factory=time.perf_counter)

    def look(self, state: State | Callable[[], State]) -> None:
        """Describe the state, and see whether an earlier plan fits it. What fails is raised by plan(), everywhere."""
        try:
            if self.unseen is not None:
                raise self.unseen
            self.iteration = operator.index(self.iteration)
            if self.iteration < 0:
                raise ValueError(f"iteration {self.iteration} is negative")
            self._metadata = encode_value(self.metadata, "metadata")
            self._metrics = known_metrics(self.metrics)
            self._described = describe(state() if callable(state) else state, self.context.mesh)
        except BaseException as error:  # Even an exit: the other ranks are waiting in plan().
            self._error = error
            return
        share = self.context.share
        if share is not None and share.structure == self._described.structure:
            self._share = share

    def plan(self) -> None:
        """Agree on who writes what. Collective. Raises what all ranks raise; then nothing has been written."""
        started = time.perf_counter()
        try:
            order = self._agree("plan", self._offer, self._decide_plan, Offer, _Order)
            if not order.save_id:
                order = self._agree("plan anew", self._show_structure, self._decide_anew, RankShards, _Order)
        except BaseException:
            self.context.share = None  # All ranks plan in their calls next time, and so learn of failures together.
            self._discard()
            raise
        if order.share is not None:
            self._adopt(order.share)
        self._order = order
        self._seconds["plan"] = time.perf_counter() - started

    def _adopt(self, message: ShareMessage) -> None:
        self._share = self.context.share = adopt(message, self._known_description(), self._plan)

    def _agree(
        self,
        phase: str,
        local: Callable[[], M],
        decide: Callable[[Sequence[M]], Sequence[D]],
        message: type[M],
        decision: type[D],
    ) -> D:
        return agree(
            self.context.coordinator,
            f"{self.label}: {phase}",
            local,
            decide,
            message=message,
            decision=decision,
            timeout_s=self.context.timeout_s,
            committed_if_lost="unknown" if phase.startswith("commit") else "no",
        )

    def _offer(self) -> Offer:
        described = self._known_description()
        free = free_space(self.context.storage)
        plan_id = None if self._share is None else self._share.plan_id
        values = described.value_message()
        return Offer(
            self.iteration, self._metadata, self._metrics, plan_id, values, free.filesystem_id, free.size_bytes
        )

    def _known_description(self) -> Description:
        if self._error is not None:
            raise self._error
        assert self._described is not None
        return self._described

    def _decide_plan(self, offers: Sequence[Offer]) -> list[_Order]:
        """Rank 0."""
        check_alike(offers)
        self._offers = offers
        if self._share is None or any(offer.plan_id != self._share.plan_id for offer in offers):
            return [_Order("")] * len(offers)
        self._plan = self._share.plan
        return [self._open()] * len(offers)

    def _show_structure(self) -> RankShards:
        copied = None if self._snapshot is None else np.sort(np.array(list(self._snapshot.parts), np.int32)).tobytes()
        return self._known_description().structure.message(self.context.mesh, copied)

    def _decide_anew(self, ranks: Sequence[RankShards]) -> list[_Order]:
        """Rank 0."""
        self._plan = plan_save(ranks)
        order = self._open()
        return [msgspec.structs.replace(order, share=share) for share in give_shares(self._plan, len(ranks))]

    def _open(self) -> _Order:
        """Rank 0, for all that is planned: make sure that it may be written, and announce it."""
        context, offers, plan = self.context, self._offers, self._plan
        assert plan is not None
        self._values = join_values(plan, [offer.values for offer in offers])
        if context.writer is None:
            context.writer = claim_root(context.storage, context.second)
        context.writer.check_fence()
        # Before space is judged: what dead and retired saves left may be what fills the disk.
        context.after_commit.wait(context.timeout_s / 2)
        sweep(context.storage, grace_s=context.removal_grace_s)
        check_free_space(offers, plan, free_space(context.storage), context.after_commit.take_free_before())
        self._order = _Order(new_save_id())
        context.writer.announce(self.iteration, self.save_id)
        return self._order

    @property
    def save_id(self) -> str:
        assert self._order is not None
        return self._order.save_id

    def hold(self) -> None:
        """Write the state from where it lies: it stays as it is until finish() returns. After plan()."""
        self._guarded_step(self._hold)

    def before_change(self) -> bool:
        """What Snapshot.before_change() does. In the thread that is about to change the state."""
        snapshot = self._snapshot
        return snapshot is None or snapshot.before_change()

    def stage(self, find_guarded: Callable[[], frozenset[int]] = frozenset) -> None:
        """Copy what this rank writes; plan() first if no earlier plan fits. The state may change once `staged` is set.

        find_guarded: addresses of storages that are copied by finish() only; see Guards.memory. A state that is more
        than the Arena takes is written before this returns. Raises what plan() raises; other failures finish() raises.
        """
        if self._share is None:
            self.plan()
        refusal: str | None = None

        def copy() -> None:
            nonlocal refusal
            assert self._share is not None
            refusal = self.context.arena.reserve(max(1, self._share.image_bytes))
            if refusal is None:
                self._copy(find_guarded())

        self._guarded_step(copy)
        if refusal is not None:
            self._degraded.append(f"{refusal}: they were written while training waited")
            if self._order is None:
                self.plan()
            self.hold()
            with self._heartbeat():
                self._write()
            self.staged.set()
        elif self._snapshot is None or not self._snapshot.is_left:
            self.staged.set()
        if self._error is not None:
            self._error.__traceback__ = None  # It leads to the caller's frames, which hold the state.

    @property
    def interrupt(self) -> BaseException | None:
        """What interrupted this rank, and is to be raised by it once the others are sure to learn of it."""
        return None if isinstance(self._error, Exception) else self._error

    def _guarded_step(self, step: Callable[[], None]) -> None:
        """A step between agreements: its failure, even an exit, is kept for the next, as the other ranks wait there."""
        started = time.perf_counter()
        try:
            step()
        except BaseException as error:
            self._error = error if self._error is None else self._error
        if self._snapshot is not None and self._described is not None:
            self._described.tensors.clear()  # The copies are all that is needed: let memory go that nobody else holds.
        self._seconds["stage"] += time.perf_counter() - started

    def _hold(self) -> None:
        share, described = self._share, self._described
        assert share is not None
        assert described is not None
        tensors = {n: described.tensors[n] for n in share.shards}
        snapshot = hold_in_place(tensors, self.context.transports)
        self._sample_left_out(share, described, snapshot)
        self._snapshot = snapshot

    def _copy(self, guarded: frozenset[int]) -> None:
        share, described, context = self._share, self._described, self.context
        assert share is not None
        assert described is not None
        tensors = {n: described.tensors[n] for n in share.shards}
        self._snapshot = empty_snapshot(tensors, share.regions, context.arena, context.transports)
        self._sample_left_out(share, described, self._snapshot)
        take_snapshot(
            self._snapshot,
            tensors,
            share.regions,
            context.arena,
            context.transports,
            lambda tensor: bool(guarded) and tensor.untyped_storage().data_ptr() in guarded,
            lambda n: f"{described.shards[n][0]!r} {described.shards[n][2]}",
        )

    def _sample_left_out(self, share: Share, described: Description, snapshot: Snapshot) -> None:
        """Of the replicas that will not be in memory when the files are written; the others are sampled there."""
        numbers = [n for n in share.replicated if not isinstance(snapshot.parts.get(n), memoryview)]
        samples = sample_checksums([described.tensors[n] for n in numbers], self.context.transports)
        self._samples = dict(zip(numbers, samples.tolist(), strict=True))

    def finish(self) -> SaveReport:
        """Copy what was left, write, and make the checkpoint exist. Collective; any thread.

        Raises DistributedError, FencedError or CheckpointError, the same on all ranks, when it does not, or may not.
        """
        try:
            self._complete_snapshot()
            if self._order is None:
                self.plan()
            return self._commit()
        finally:
            self._snapshot = self._described = None
            self._offers = ()

    @property
    def saved(self) -> Saved:
        """What was committed, once finish() has returned."""
        assert self._written is not None
        writer = self.context.writer
        return Saved(self.iteration, self.save_id, self._written.files, None if writer is None else writer.published)

    def _complete_snapshot(self) -> None:
        snapshot = self._snapshot
        try:
            if snapshot is not None:
                self._guarded_step(lambda: snapshot.complete(self.context.timeout_s))
                if snapshot.is_under_way:
                    self.context.arena.abandon()
        finally:
            if self.waiting_since is not None:  # Here, and not when the caller wakes up: the save may have ended then.
                self.stall_s += time.perf_counter() - self.waiting_since
            self.staged.set()

    def _commit(self) -> SaveReport:
        started, written_s = time.perf_counter(), self._seconds["write"]
        try:
            with self._heartbeat():
                self._write()
                outcome = self._agree(f"commit {self.save_id}", self._tell, self._decide_commit, Written, _Outcome)
        except BaseException as error:
            if getattr(error, "committed", "no") == "no":
                self._discard()
            raise
        self._seconds["commit"] = time.perf_counter() - started - (self._seconds["write"] - written_s)
        return self._report(outcome)

    def _heartbeat(self) -> Heartbeat:
        marker = pending_marker(self.iteration, self.save_id)
        return Heartbeat(self.context.storage, marker, active=self.context.coordinator.rank == 0)

    def _write(self) -> None:
        """Write this rank's files, once. A failure is raised in the agreement on the commit."""
        if self._written is not None or self._error is not None:
            return
        started = time.perf_counter()
        try:
            self._written = self._write_files()
        except BaseException as error:
            self._error = error
        self._seconds["write"] = time.perf_counter() - started

    def _write_files(self) -> Written:
        context, share, described, snapshot = self.context, self._share, self._described, self._snapshot
        assert share is not None
        assert described is not None
        assert snapshot is not None
        per_rank = msgspec.json.encode(raw_json({key: described.per_rank[key] for key in share.per_rank}))
        shared = self._shared_metadata()
        rank = context.coordinator.rank
        common = header_metadata(self.save_id, self.iteration, rank, context.mesh)
        names = (file_name(rank, part, context.coordinator.world_size, self.save_id) for part in count())
        files: list[ShardFile] = []
        file_of, start_of = np.zeros(len(share.shards), np.int32), np.zeros(len(share.shards), np.int64)
        for number, file in enumerate(share.files):
            metadata = common | file.metadata | ({} if number else shared)
            layout = file.plan.lay_out(b"{}" if number else per_rank, metadata)
            written = write_shard_file(
                context.storage,
                iteration_directory(self.iteration),
                names,
                layout,
                [snapshot.parts[n] for n in file.numbers],
                rank=rank,
                mesh={axis: at for axis, (at, _) in context.mesh.items()},
                max_bytes_per_s=context.max_write_bytes_per_s,
            )
            files.append(written)
            at = np.searchsorted(share.shards, file.numbers)
            file_of[at], start_of[at] = number, layout.starts
        return Written(
            files, file_of.tobytes(), start_of.tobytes(), self._sample_replicas(share, described, snapshot), {}
        )

    def _sample_replicas(self, share: Share, described: Description, snapshot: Snapshot) -> bytes:
        copied = {n: part for n in share.replicated if isinstance(part := snapshot.parts.get(n), memoryview)}
        item_bytes = [DTYPES[described.shards[n][1].dtype].item_bytes for n in copied]
        sums = byte_checksums(list(copied.values()), item_bytes).tolist()
        samples = self._samples | dict(zip(copied, sums, strict=True))
        return np.array([samples[n] for n in share.replicated], np.uint32).tobytes()

    def _shared_metadata(self) -> dict[str, str | msgspec.Raw]:
        """What belongs to no tensor: in the header of rank 0's first file."""
        return {} if self._plan is None else shared_metadata(raw_json(self._values), self._metadata, self._metrics)

    def _tell(self) -> Written:
        if self._error is not None:
            raise self._error
        assert self._written is not None
        memory = {"peak_rss_bytes": peak_rss_bytes(), "device_bytes": peak_device_bytes()}
        return msgspec.structs.replace(self._written, seconds=self._seconds, **memory)

    def _decide_commit(self, ranks: Sequence[Written]) -> list[_Outcome]:
        """Rank 0."""
        plan, writer = self._plan, self.context.writer
        assert plan is not None
        assert writer is not None
        check_replicas(plan, [written.samples for written in ranks])
        who = Commitment(
            save_id=self.save_id,
            epoch=writer.epoch,
            commit_seq=writer.commit_seq,
            iteration=self.iteration,
            parent=self.context.parent,
            world_size=self.context.coordinator.world_size,
            metadata=self._metadata,
            metrics=self._metrics,
        )
        try:
            records = self.context.records = chunk_records(plan, ranks, self.context.records)
            name = f"{iteration_directory(self.iteration)}/{records.table(self.save_id).name}"
            with new_file(self.context.storage, name, len(records.content)) as file:
                file.write(0, records.content)
            writer.publish(index_of(who, plan, self._values, ranks, records))
        except CommitFailed as error:
            raise DistributedError(
                f"saving iteration {self.iteration}: {error}",
                failures={0: str(error)},
                committed=error.committed,
            ) from error
        except OSError as error:  # The chunk table: nothing was published yet.
            raise DistributedError(
                f"saving iteration {self.iteration}: {error}", failures={0: str(error)}, committed="no"
            ) from error
        outcome = _Outcome(
            sum(file.size_bytes for written in ranks for file in written.files) + len(records.content),
            slowest_ranks(("plan", "stage", "write"), [written.seconds for written in ranks]),
            max(written.peak_rss_bytes for written in ranks),
            max(written.device_bytes for written in ranks),
        )
        return [outcome] * len(ranks)

    def _discard(self) -> None:
        """After a failure: rank 0 removes what was written, as far as it can; the next sweep takes the rest."""
        if self.context.coordinator.rank == 0 and self._order is not None:
            with suppress(OSError):
                discard(self.context.storage, self.iteration, self.save_id)

    def _report(self, outcome: _Outcome) -> SaveReport:
        s = self._seconds
        return SaveReport(
            iteration=self.iteration,
            save_id=self.save_id,
            bytes=outcome.size_bytes,
            plan_s=s["plan"],
            stage_s=s["stage"],
            stall_s=self.stall_s,
            write_s=s["write"],
            commit_s=s["commit"],
            total_s=time.perf_counter() - self._started,
            slowest=outcome.slowest,
            peak_rss_bytes=outcome.peak_rss_bytes,
            device_bytes=outcome.device_bytes,
            backend=self.context.backend,
            degraded=(*getattr(self.context.storage, "degraded", ()), *self.context.arena.degraded, *self._degraded),
        )

    def prepare(self) -> None:
        """Instead of a save, after look(): agree on a plan for a state like this, and reserve the memory for its copy.

        Collective. Raises what plan() raises.
        """

        def decide(ranks: Sequence[RankShards]) -> list[ShareMessage]:
            self._plan = plan_save(ranks)
            return give_shares(self._plan, len(ranks))

        message = self._agree("prepare", self._show_structure, decide, RankShards, ShareMessage)
        described = self._known_description()
        self._adopt(message)
        assert self._share is not None
        if self.context.arena.reserve(max(1, self._share.image_bytes)) is None:
            self.context.arena.page_lock(self.context.transports, described.tensors)
