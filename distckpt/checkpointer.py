"""Checkpointer: a root directory of iterations, saved and loaded by all ranks of a job. Sees every layer."""

from __future__ import annotations

import atexit
import logging
import operator
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike, fspath
from typing import Literal, TypeAlias, TypeVar

import torch

from distckpt.adapters import ADAPTERS
from distckpt.commit import list_commits, newest_iteration, read_tracker, retire, sweep
from distckpt.coordinator import Coordinator, agree, default_coordinator
from distckpt.errors import CheckpointError, FencedError
from distckpt.index import Mesh
from distckpt.loading import Load, LoadContext, read_all
from distckpt.planner import check_places
from distckpt.report import LoadReport, SaveReport
from distckpt.retention import superfluous
from distckpt.saving import Save, SaveContext
from distckpt.staging import Arena
from distckpt.state_dict import flatten
from distckpt.storage import PosixStorage, Storage

logger = logging.getLogger("distckpt")
State: TypeAlias = dict[str, object]
T = TypeVar("T")
TIMEOUT_S = 1800.0
PREPARE_SLACK_BYTES = 16 << 20  # headers, checksum table, PerRank values


class PendingSave:
    """An async save. Its failure is raised by wait(), or else by the next call on the Checkpointer, once.

    A failure that the program ends without having met is logged as an error; the exit code is the program's own.
    """

    def __init__(self, work: Callable[[], SaveReport]) -> None:
        self._report: SaveReport | None = None
        self._error: BaseException | None = None
        self._is_known = False
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, args=(work,), name="distckpt-save")

    def start(self) -> None:
        self._thread.start()

    def _run(self, work: Callable[[], SaveReport]) -> None:
        try:
            self._report = work()
        except BaseException as error:
            self._error = error
            atexit.register(self._report_unseen_error)
        with self._lock:
            self._has_ended = True
        for callback in self._callbacks:
            callback()

    def _report_unseen_error(self) -> None:
        """At the end of the program, which has waited for the thread: a failed save must not pass in silence."""
        logger.error("an async save failed, and nothing waited for it: %s", self._error)

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Have it called when the save has ended, well or not, in the save's thread; at once if it has."""
        with self._lock:
            if not self._has_ended:
                self._callbacks.append(callback)
                return
        callback()

    def wait_staged(self) -> None:
        """Return when the caller may change the tensors; an eager save has returned so."""

    def done(self) -> bool:
        """Whether the save has ended, well or not."""
        return not self._thread.is_alive()

    def wait(self, timeout_s: float | None = None) -> SaveReport:
        """Wait for the end of the save. Raises its error, or TimeoutError while it goes on."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"the save is still under way after {timeout_s} s")
        if self._error is not None:
            self._mark_known()
            raise self._error
        assert self._report is not None
        return self._report

    def take_unseen_error(self) -> BaseException | None:
        """Wait for the end of the save. Its error, unless somebody has seen it; now somebody has."""
        self._thread.join()
        error = None if self._is_known else self._error
        self._mark_known()
        return error

    def _mark_known(self) -> None:
        self._is_known = True
        atexit.unregister(self._report_unseen_error)


class Checkpointer:
    """Saves and loads the iterations under one root directory.

    Collective: all ranks make it, and call save, async_save, load, read and close in the same order.

    root: directory, or a Storage. mesh: axis -> (this rank's coordinate, size); names are the caller's; without
    it the mesh is {"rank": (rank, world size)}. coordinator: default_coordinator() if None; closed by the caller.
    keep_last: number of newest iterations to keep, all if None; what earlier jobs saved is kept until this one has
    loaded from here. timeout_s: how long a rank may be silent, in one
    phase of a save or load, before the others give up on it. removal_grace_s: how long the files of a removed
    checkpoint stay for readers that have it open.
    """

    def __init__(
        self,
        root: str | PathLike[str] | Storage,
        *,
        mesh: Mapping[str, tuple[int, int]] | None = None,
        coordinator: Coordinator | None = None,
        keep_last: int | None = None,
        timeout_s: float = TIMEOUT_S,
        removal_grace_s: float = 60.0,
        io_backend: str = "",
    ) -> None:
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last={keep_last}: at least the newest checkpoint is kept; None keeps all")
        self._owns_coordinator = coordinator is None
        self._coordinator = default_coordinator() if coordinator is None else coordinator
        own_place = {"rank": (self._coordinator.rank, self._coordinator.world_size)} if mesh is None else mesh
        self._mesh, storage = agree_on_place(self._coordinator, root, own_place, io_backend, timeout_s)
        self._storage = storage
        self._keep_last = keep_last
        self._grace_s = removal_grace_s
        self._save_context = SaveContext(
            storage=storage,
            coordinator=self._coordinator,
            mesh=self._mesh,
            arena=Arena(),
            timeout_s=timeout_s,
            backend=getattr(storage, "io_backend", type(storage).__name__),
            removal_grace_s=removal_grace_s,
        )
        self._load_context = LoadContext(storage, self._coordinator, self._mesh, timeout_s)
        self._pending: PendingSave | None = None
        self._calls = 0
        self._has_resumed = False
        self._closed = False
        self._guards: list[torch.utils.hooks.RemovableHandle] = []

    def save(self, state: State, *, iteration: int, metadata: object = None) -> SaveReport:
        """Save; durable, and a checkpoint, on return. metadata: JSON values kept in the index.

        Raises, the same on every rank: InvalidShardingError, DistributedError, FencedError, CheckpointError.
        """
        save = self._begin(state, iteration, metadata, in_place=True)
        return self._finish(save, is_async=False)

    def async_save(
        self,
        state: State,
        *,
        iteration: int,
        metadata: object = None,
        snapshot: Literal["eager", "lazy"] = "eager",
    ) -> PendingSave:
        """Copy the state and save the copy in the background. On return the caller may change the tensors.

        An earlier save is waited for first, and its failure raised. "lazy" copies as "eager" does for now.
        """
        if snapshot not in ("eager", "lazy"):
            raise ValueError(f"snapshot={snapshot!r}: expected 'eager' or 'lazy'")
        save = self._begin(state, iteration, metadata, in_place=False)
        self._pending = PendingSave(lambda: self._finish(save, is_async=True))
        self._pending.start()
        return self._pending

    def _begin(self, state: State, iteration: int, metadata: object, *, in_place: bool) -> Save:
        label = self._label("save")
        save = Save(self._save_context, state, iteration, metadata, label, unseen=self._settle())
        save.plan()
        save.stage(in_place=in_place)
        return save

    def _finish(self, save: Save, *, is_async: bool) -> SaveReport:
        report = save.finish(is_async=is_async)
        self._save_context.parent = report.save_id
        if self._coordinator.rank == 0:
            self._clean_up()
            logger.info(
                "saved iteration %d: %.1f MB in %.2f s, training stood still for %.3f s",
                report.iteration,
                report.bytes / 1e6,
                report.total_s,
                report.stall_s,
            )
        return report

    def _clean_up(self) -> None:
        """Retention and sweep, after a commit. What fails is tried again after the next one."""
        writer = self._save_context.writer
        assert writer is not None
        first_epoch = 0 if self._has_resumed else writer.epoch
        try:
            writer.check_fence()
            commits, tracked = list_commits(self._storage), read_tracker(self._storage)
            retire(
                self._storage,
                superfluous(commits, keep_last=self._keep_last, tracked=tracked, first_epoch=first_epoch),
            )
            sweep(self._storage, grace_s=self._grace_s)
        except FencedError:
            return  # What lies here is a newer job's business now.
        except OSError as error:
            logger.warning("removing old checkpoints failed, the new one is safe: %s", error)

    def load(
        self,
        state: State,
        iteration: int | None = None,
        *,
        strict: bool = True,
        device: torch.device | str = "cpu",
    ) -> LoadReport:
        """Fill the state in place: tensors, values in their containers, PerRank values, objects.

        iteration: None is the newest good one; damaged ones are passed over, by all ranks, and reported. strict:
        whether a key that is missing, or stored below a container of the state but not in it, is an error.
        device: where a tensor on the meta device is made; it replaces the meta tensor in the state.

        Raises, the same on every rank: CheckpointNotFoundError, MismatchError (nothing was changed), CorruptionError
        (nothing good is left to fall back to; the state is undefined), DistributedError.
        """
        label = self._label("load")
        unseen = self._settle()
        load = Load(self._load_context, state, iteration, strict, torch.device(device), label, unseen=unseen)
        report, index = load.run()
        self._has_resumed = True
        self._save_context.parent = index.save_id
        if self._coordinator.rank == 0:
            logger.info(
                "loaded iteration %d: %.1f MB in %.2f s",
                report.iteration,
                report.bytes / 1e6,
                report.total_s,
            )
        return report

    def read(self, iteration: int | None = None, keys: Iterable[str] | None = None) -> State:
        """The stored state without a template: full tensors on the CPU, values; PerRank values are left out.

        keys: keys, or paths of containers, to read; all if None. A ShardedTensor stands under its key in the
        container in which it was saved. Raises what load raises; MismatchError for keys that are not there.
        """
        label = self._label("read")
        return read_all(self._load_context, iteration, keys, label, unseen=self._settle())

    def latest_iteration(self) -> int | None:
        """The iteration that load() would take first; None if there is no committed one. Collective."""
        found = self._ask_leader("latest", lambda: [newest_iteration(self._storage)])
        return found[0]

    def iterations(self) -> list[int]:
        """Committed iterations, ascending. Collective."""
        return self._ask_leader("iterations", lambda: sorted({c.iteration for c in list_commits(self._storage)}))

    def _ask_leader(self, phase: str, question: Callable[[], list[T]]) -> list[T]:
        """Every rank gets rank 0's answer."""
        label = self._label("ask")
        unseen = self._settle()

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
        """Populate staging memory for a state like this now, so that the first save stalls no longer than the next."""
        self._check_open("prepare")
        flat = flatten(state, ADAPTERS)
        size = sum(shard.data.nbytes for leaf in flat.tensors for shard in leaf.shards)
        self._save_context.arena.reserve(size + PREPARE_SLACK_BYTES)

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """Call before_mutation() ahead of every step of this optimizer."""
        self._check_open("guard")
        self._guards.append(optimizer.register_step_pre_hook(lambda *_: self.before_mutation()))

    def before_mutation(self) -> None:
        """Return when the tensors of a save under way may change. Custom loops call it before they change them."""
        if self._pending is not None:
            self._pending.wait_staged()

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
        pending, self._pending = self._pending, None
        return None if pending is None else pending.take_unseen_error()

    def close(self) -> None:
        """Wait for the save under way, raise its failure if nobody has seen it, free memory and connections."""
        try:
            unseen = self._settle()
            if unseen is not None:
                raise unseen
        finally:
            self.release()

    def release(self) -> None:
        """Free memory and connections without waiting for a save; for callbacks of one that has ended."""
        self._closed = True
        for handle in self._guards:
            handle.remove()
        self._save_context.arena.release()
        if self._owns_coordinator:
            self._coordinator.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def agree_on_place(
    coordinator: Coordinator,
    root: str | PathLike[str] | Storage,
    mesh: Mapping[str, tuple[int, int]],
    io_backend: str,
    timeout_s: float,
) -> tuple[Mesh, Storage]:
    """Open the root and check the mesh, on all ranks or on none."""
    opened: list[Storage] = []

    def local() -> dict[str, tuple[int, int]]:
        if isinstance(root, (str, PathLike)):
            opened.append(PosixStorage(fspath(root), io_backend=io_backend))
        else:
            opened.append(root)
        return {axis: (operator.index(at), operator.index(size)) for axis, (at, size) in mesh.items()}

    def decide(ranks: Sequence[dict[str, tuple[int, int]]]) -> list[None]:
        check_places(ranks)
        return [None] * len(ranks)

    message = dict[str, tuple[int, int]]
    agree(coordinator, "open", local, decide, message=message, decision=type(None), timeout_s=timeout_s)
    return {axis: (operator.index(at), operator.index(size)) for axis, (at, size) in mesh.items()}, opened[0]
