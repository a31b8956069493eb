"""Checkpointer: a root directory of iterations, saved and loaded by all ranks of a job. Sees every layer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from typing import Literal, TypeVar

import torch

from distckpt.after_commit import AfterCommit, CommittedSave, log_load
from distckpt.arena import Arena
from distckpt.candidates import newest_in
from distckpt.commit import Commit, list_commits, newest_iteration, newest_verified_iteration
from distckpt.contents import Contents
from distckpt.coordinator import Coordinator, agree, default_coordinator
from distckpt.copier import Copy
from distckpt.errors import CheckpointError, DistributedError, FencedError
from distckpt.filling import DeviceOf
from distckpt.guarding import Guards
from distckpt.history_log import line_of, line_of_failure
from distckpt.link_names import LinkNames, Links
from distckpt.loading import Load, LoadContext, State, read_all
from distckpt.opening import open_roots
from distckpt.pending import PendingSave
from distckpt.protecting import Protection, protect
from distckpt.report import LoadReport, SaveReport
from distckpt.retention import Retention
from distckpt.save_context import SaveContext
from distckpt.saving import Save
from distckpt.storage import PosixStorage, Storage
from distckpt.transport import Transports

logger = logging.getLogger("distckpt")
T = TypeVar("T")
TIMEOUT_S = 1800.0
PARITY_GROUP = 8  # shard files


class Checkpointer:
    """Saves and loads the iterations under one root directory.

    Collective: all ranks make it, and call save, async_save, load, read and close in the same order.

    root: directory, or a Storage. mesh: axis -> (this rank's coordinate, size); names are the caller's; without
    it the mesh is {"rank": (rank, world size)}. coordinator: default_coordinator() if None; closed by the caller.
    keep_last: number of newest iterations to keep, all if None; retention: more rules, instead of it. What earlier jobs
    saved is kept until this one has loaded from here. timeout_s: how long a rank may be silent, in one
    phase of a save or load, before the others give up on it. removal_grace_s: how long the files of a removed
    checkpoint stay for readers that have it open. max_staging_bytes: memory that this rank's async saves may take, by
    default half of what the host and its control groups have left, divided by the ranks on the host; a state that is
    more is written while training waits. max_write_bytes_per_s: of this rank, while it writes; None is no limit.
    parity: make one file more for each group of so many shard files (8 if True), from which any one of them that is
    damaged or lost is made again. verify_after_save: read everything back, past the page cache, before the save
    counts as done. Both are done after the commit, in the background of an async save. on_error: "warn" logs an async
    save that failed, and lets training go on; the max_failures-th in a row is raised, and so is any FencedError.
    after_commit: what rank 0 calls after each commit, in a background thread, with a CommittedSave; what it raises is
    logged. copy_to: a second root, to which rank 0 copies what was committed, in the background, and from which loads
    take what the first one does not have, or has damaged. close() waits for both, timeout_s at most. file_mode, group:
    permission bits and group of all that is written, as of PosixStorage. link_names: readable names of checkpoints, as
    symbolic links in the root, which must be a directory.
    """

    def __init__(
        self,
        root: str | PathLike[str] | Storage,
        *,
        mesh: Mapping[str, tuple[int, int]] | None = None,
        coordinator: Coordinator | None = None,
        keep_last: int | None = None,
        retention: Retention | None = None,
        timeout_s: float = TIMEOUT_S,
        removal_grace_s: float = 60.0,
        io_backend: str = "",
        max_staging_bytes: int | None = None,
        max_write_bytes_per_s: float | None = None,
        parity: bool | int = False,
        verify_after_save: bool = False,
        on_error: Literal["raise", "warn"] = "raise",
        max_failures: int = 3,
        after_commit: Sequence[Callable[[CommittedSave], object]] = (),
        copy_to: Copy | None = None,
        file_mode: int | None = None,
        group: str | int | None = None,
        link_names: LinkNames | None = None,
    ) -> None:
        if max_staging_bytes is not None and max_staging_bytes < 0:
            raise ValueError(f"max_staging_bytes={max_staging_bytes}: expected at least 0, or None")
        if max_write_bytes_per_s is not None and not max_write_bytes_per_s > 0:
            raise ValueError(f"max_write_bytes_per_s={max_write_bytes_per_s}: expected more than 0, or None")
        if keep_last is not None and retention is not None:
            raise ValueError("keep_last and retention are both given: give Retention(keep_last=...) alone")
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last={keep_last}: at least the newest checkpoint is kept; None keeps all")
        if on_error not in ("raise", "warn"):
            raise ValueError(f"on_error={on_error!r}: expected 'raise' or 'warn'")
        if max_failures < 1:
            raise ValueError(f"max_failures={max_failures}: expected at least 1")
        if link_names is not None and not isinstance(root, (str, PathLike, PosixStorage)):
            raise ValueError(f"link_names: links are made in directories, and {root.location} is none")
        if parity < 0:
            raise ValueError(f"parity={parity}: expected True, or the number of files in a group")
        self._owns_coordinator = coordinator is None
        self._coordinator = default_coordinator() if coordinator is None else coordinator
        own_place = {"rank": (self._coordinator.rank, self._coordinator.world_size)} if mesh is None else mesh
        self._protection = Protection(PARITY_GROUP if parity is True else int(parity), bool(verify_after_save))
        opened = open_roots(
            self._coordinator,
            root,
            None if copy_to is None else copy_to.root,
            mesh=own_place,
            protection=self._protection,
            io_backend=io_backend,
            file_mode=file_mode,
            group=group,
            timeout_s=timeout_s,
        )
        self._mesh, self._storages = opened.mesh, opened.storages
        self._storage = storage = opened.storages[0]
        kept = Retention(keep_last=keep_last) if retention is None else retention
        self._after_commit = AfterCommit(
            storage, kept, removal_grace_s, timeout_s, self._coordinator.world_size, tuple(after_commit)
        )
        if link_names is not None:
            assert isinstance(storage, PosixStorage)
            self._after_commit.links = Links(storage, link_names)
        if copy_to is not None:
            self._after_commit.copy_to(opened.storages[1], copy_to)
        transports = Transports()
        self._save_context = SaveContext(
            storage=storage,
            coordinator=self._coordinator,
            mesh=self._mesh,
            arena=Arena(max_staging_bytes, opened.neighbours),
            timeout_s=timeout_s,
            backend=getattr(storage, "io_backend", type(storage).__name__),
            removal_grace_s=removal_grace_s,
            max_write_bytes_per_s=max_write_bytes_per_s or 0.0,
            transports=transports,
            after_commit=self._after_commit,
            second=opened.storages[1] if copy_to is not None else None,
        )
        self._load_context = LoadContext(opened.storages, self._coordinator, self._mesh, timeout_s, transports)
        self._tolerated_failures = max_failures - 1 if on_error == "warn" else 0
        self._failures = 0  # of async saves, in a row
        self._is_fenced = False
        self._unsound: set[Commit] = set()  # rank 0's: commits that are not what was written
        self._pending: PendingSave | None = None
        self._calls = 0
        self._has_resumed = False
        self._closed = False
        self._saving: Save | None = None  # whose snapshot may still be being copied
        self._guards = Guards(self.before_mutation)

    @property
    def rank(self) -> int:
        """This process's number among those that made this Checkpointer."""
        return self._coordinator.rank

    @property
    def world_size(self) -> int:
        return self._coordinator.world_size

    def save(
        self,
        state: State | Callable[[], State],
        *,
        iteration: int,
        metadata: object = None,
        metrics: Mapping[str, float] | None = None,
    ) -> SaveReport:
        """Save; durable, and a checkpoint, on return.

        state: or a function that makes it, whose failure on one rank is one of all. metadata: JSON values kept in the
        index. metrics: numbers that it is judged by, by name, the same on all ranks; `label` adds others later.

        Raises, the same on every rank: InvalidShardingError, DistributedError, FencedError, CheckpointError.
        """
        started = time.perf_counter()
        save = self._look(state, iteration, metadata, metrics)
        with self._logging_failure(save):
            save.plan()
            save.hold()
            return self._finish(save, started)

    def async_save(
        self,
        state: State | Callable[[], State],
        *,
        iteration: int,
        metadata: object = None,
        metrics: Mapping[str, float] | None = None,
        snapshot: Literal["eager", "lazy"] = "eager",
    ) -> PendingSave:
        """Copy the state and save the copy in the background. An earlier save is waited for first, its failure raised.

        "eager": on return the caller may change the tensors. "lazy": parameters and state of guarded optimizers are
        copied in the background too, and guarded steps wait for what is not copied yet; whatever else changes them
        calls before_mutation() first. The rest is copied on return.
        """
        if snapshot not in ("eager", "lazy"):
            raise ValueError(f"snapshot={snapshot!r}: expected 'eager' or 'lazy'")
        started = time.perf_counter()
        save = self._look(state, iteration, metadata, metrics)
        try:
            with self._logging_failure(save):
                save.stage(self._guards.memory if snapshot == "lazy" else frozenset)
        except (CheckpointError, OSError) as error:
            self._note_failure(error)
            if self._must_raise(error):
                raise
            return PendingSave.failed(error)
        save.stall_s = time.perf_counter() - started
        pending = PendingSave(lambda: self._finish_async(save), save.staged, self._save_context.timeout_s)
        self._pending, self._saving = pending, save
        interrupt = save.interrupt
        if interrupt is not None:
            pending.mark_known()
        pending.start()  # After an interrupt too: the other ranks learn of it there.
        if interrupt is not None:
            raise interrupt
        return pending

    def _look(
        self, state: State | Callable[[], State], iteration: int, metadata: object, metrics: Mapping[str, float] | None
    ) -> Save:
        label = self._label("save")
        save = Save(self._save_context, iteration, metadata, metrics, label, unseen=self._settle())
        save.look(state)
        return save

    def _finish_async(self, save: Save) -> SaveReport:
        """In the background. Failures are counted here: whether anybody waits for them differs between ranks."""
        try:
            with self._logging_failure(save):
                return self._finish(save)
        except (CheckpointError, OSError) as error:
            self._note_failure(error)
            raise

    @contextmanager
    def _logging_failure(self, save: Save) -> Iterator[None]:
        """Have rank 0 say in the history that a save fails in the body."""
        try:
            yield
        except Exception as error:
            if self._coordinator.rank == 0:
                line = line_of_failure("failed save", save.iteration, error, self._coordinator.world_size)
                self._after_commit.log(line, self._save_context.writer)
            raise

    def _note_failure(self, error: BaseException) -> None:
        """The same on all ranks, as is the failure."""
        self._failures += 1
        self._is_fenced = self._is_fenced or isinstance(error, FencedError)

    def _must_raise(self, error: BaseException) -> bool:
        """Whether the failure of an async save is to be raised. Else it is logged."""
        if not isinstance(error, (CheckpointError, OSError)):
            return True
        # Once fenced, always: what is raised of it by the next call is another error, of an agreement.
        if self._is_fenced or self._failures > self._tolerated_failures:
            return True
        if self._coordinator.rank == 0:
            logger.warning("an async save failed, training goes on (failure %d in a row): %s", self._failures, error)
        return False

    def _finish(self, save: Save, waiting_since: float | None = None) -> SaveReport:
        """waiting_since: when the call began that returns after this; None if training goes on meanwhile."""
        report = self._protect(save, save.finish())
        if waiting_since is not None:
            report = replace(report, stall_s=time.perf_counter() - waiting_since)
        self._save_context.parent = report.save_id
        self._failures = 0
        if self._coordinator.rank == 0:
            self._begin_after_commit(report)
            logger.info(
                "saved iteration %d: %.1f MB in %.2f s, training stood still for %.3f s",
                report.iteration,
                report.bytes / 1e6,
                report.total_s,
                report.stall_s,
            )
        return report

    def _protect(self, save: Save, report: SaveReport) -> SaveReport:
        """Read back, and make parity, before what it replaces may go."""
        if not self._protection.is_wanted:
            return report
        context, saved = self._save_context, save.saved
        try:
            done = protect(
                context.storage,
                context.coordinator,
                saved,
                self._protection,
                label=save.label,
                timeout_s=context.timeout_s,
                max_bytes_per_s=context.max_write_bytes_per_s,
            )
        except DistributedError:
            if saved.commit is not None:
                self._unsound.add(saved.commit)
            raise
        if done.problem is not None and self._coordinator.rank == 0:
            logger.warning("iteration %d has no parity: %s", report.iteration, done.problem)
        return replace(
            report,
            verified=done.is_verified,
            parity_bytes=done.parity_bytes,
            protect_s=done.seconds,
            total_s=report.total_s + done.seconds,
            degraded=(*report.degraded, *([] if done.problem is None else [f"no parity: {done.problem}"])),
        )

    def _begin_after_commit(self, report: SaveReport) -> None:
        """Rank 0: have done in the background what follows a commit."""
        writer = self._save_context.writer
        assert writer is not None
        self._after_commit.begin(
            writer,
            report,
            first_epoch=0 if self._has_resumed else writer.epoch,
            unsound=self._unsound,
        )

    def _wait_for_clean_up(self) -> None:
        """Rank 0, before it looks at what there is; in half of the time that the others wait for it."""
        self._after_commit.wait(self._save_context.timeout_s / 2)

    def load(
        self,
        state: State | Callable[[Contents], State],
        iteration: int | str | None = None,
        *,
        strict: bool = True,
        allow: Sequence[str] = (),
        device: DeviceOf = "cpu",
        convert_dtypes: bool = False,
    ) -> LoadReport:
        """Fill the state in place: tensors, values in their containers, PerRank values, objects.

        state: or a function that makes the state that fits the checkpoint which was found; it is called again for
        another one that the load falls back to.

        iteration: None or "latest" is the newest good one; damaged ones are passed over, by all ranks, and reported. A
        number, or any other selector ("best:val_loss", "tag:NAME"; see distckpt.selecting), names one. strict:
        whether a key that is missing, or stored below a container of the state but not in it, is an error.
        allow: patterns (as of fnmatch) of keys for which it is none.
        device: where a tensor on the meta device is made; it replaces the meta tensor in the state. Or that by path
        ({"model": "cuda:0", "optimizer": "cpu"}), of which the longest that leads to the tensor counts.
        convert_dtypes: fill tensors from stored ones of another floating-point type; else that is an error.

        Raises, the same on every rank: CheckpointNotFoundError, MismatchError (nothing was changed), CorruptionError
        (nothing good is left to fall back to; the state is undefined), DistributedError.
        """
        label = self._label("load")
        unseen = self._settle()
        self._wait_for_clean_up()
        load = Load(self._load_context, state, iteration, strict, device, label, convert_dtypes, allow, unseen)
        report, index = load.run()
        self._has_resumed = not load.leaves_newer  # Else what was not loaded must not go for what was.
        self._save_context.parent = index.save_id
        if self._coordinator.rank == 0:
            logger.info(
                "loaded iteration %d: %.1f MB in %.2f s",
                report.iteration,
                report.bytes / 1e6,
                report.total_s,
            )
            log_load(self._storage, line_of(report, self._coordinator.world_size))
        return report

    def read(self, iteration: int | str | None = None, keys: Iterable[str] | None = None) -> State:
        """The stored state without a template: full tensors on the CPU, values; PerRank values are left out.

        keys: keys, or paths of containers, to read; all if None. A ShardedTensor stands under its key in the
        container in which it was saved. Raises what load raises; MismatchError for keys that are not there.
        """
        label = self._label("read")
        unseen = self._settle()
        self._wait_for_clean_up()
        return read_all(self._load_context, iteration, keys, label, unseen=unseen)

    def latest_iteration(self, *, verified: bool = False) -> int | None:
        """The iteration that load() would take first; None if there is no committed one. Collective.

        verified: the newest of those that were read back after they were saved (verify_after_save).
        """
        newest = newest_verified_iteration if verified else newest_iteration
        return self._ask_leader("latest", lambda: [newest_in(self._storages, newest)])[0]

    def iterations(self) -> list[int]:
        """Committed iterations of the root, and of copy_to, ascending. Collective."""
        return self._ask_leader(
            "iterations", lambda: sorted({c.iteration for root in self._storages for c in list_commits(root)})
        )

    def _ask_leader(self, phase: str, question: Callable[[], list[T]]) -> list[T]:
        """Every rank gets rank 0's answer."""
        label = self._label("ask")
        unseen = self._settle()
        self._wait_for_clean_up()

        def local() -> None:
            if unseen is not None:
                raise unseen

        return agree(
            self._coordinator,
            f"{label}: {phase}",
            local,
            lambda ranks: [question()] * len(ranks),
            message=type(None),
            decision=list,
            timeout_s=self._load_context.timeout_s,
        )

    def prepare(self, state: State) -> None:
        """Plan, and populate memory, for a state like this, so that the first save stalls no longer than the next.

        Collective. Raises InvalidShardingError, DistributedError or CheckpointError, the same on every rank.
        """
        label = self._label("prepare")
        save = Save(self._save_context, 0, None, None, label, unseen=self._settle())
        save.look(state)
        save.prepare()

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """Have every step of this optimizer wait for a lazy snapshot that is still being copied.

        Raises TypeError for what is no torch optimizer: it has no hook ahead of its step.
        """
        self._check_open("guard")
        self._guards.add(optimizer)

    def before_mutation(self) -> None:
        """Return when the tensors of a save under way may change. Custom loops call it before they change them."""
        pending, save = self._pending, self._saving
        if pending is None or save is None or save.staged.is_set():
            return
        if save.before_change():
            return
        save.waiting_since = time.perf_counter()
        pending.wait_staged()

    def _label(self, verb: str) -> str:
        self._check_open(verb)
        self._calls += 1
        return f"{verb} {self._calls}"

    def _check_open(self, verb: str) -> None:
        if self._closed:
            raise CheckpointError(f"{verb}: this Checkpointer is closed")

    def _settle(self) -> BaseException | None:
        """Wait for the save under way; returns its failure if nobody has seen it on this rank.

        It is not raised here, but where all ranks agree next: whether it was seen may differ between them.
        """
        unseen = None if self._pending is None else self._pending.take_unseen_error()
        self._pending = self._saving = None  # Only now: if the wait was interrupted, the save goes on.
        return unseen if unseen is not None and self._must_raise(unseen) else None

    def close(self) -> None:
        """Wait for the save under way and, at most timeout_s, for what follows it; free memory and connections, raise
        the save's failure if nobody has seen it.

        If the wait is interrupted nothing is freed, as the save goes on; close() may be called again.
        """
        unseen = self._settle()
        self._after_commit.close(self._save_context.timeout_s)
        self.release()
        if unseen is not None:
            raise unseen

    def release(self) -> None:
        """Free memory and connections without waiting for a save; for callbacks of one that has ended."""
        self._closed = True
        self._pending = self._saving = None
        self._guards.remove()
        self._save_context.arena.release()
        if self._owns_coordinator:
            self._coordinator.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
