"""After a commit: what rank 0 does once a checkpoint exists, off the training path. Nothing here can undo a commit.

A save has returned, or counts as done, before any of it. Whoever wants to see the outcome of cleaning up waits:
iterations(), loads, and the next save before it judges how much room there is. Hooks and copies have threads of their
own, so that a slow one delays neither cleaning up nor the others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

from distckpt.commit import Commit, Writer
from distckpt.copier import Copier, Copy
from distckpt.errors import FencedError
from distckpt.history_log import HistoryLine, append_line, line_of
from distckpt.link_names import Links
from distckpt.pruning import retire_superfluous
from distckpt.removing import sweep
from distckpt.report import SaveReport
from distckpt.retention import Retention
from distckpt.storage import Storage
from distckpt.worker import Worker

logger = logging.getLogger("distckpt")
_LAST_LINES_S = 2.0


@dataclass(frozen=True, slots=True)
class CommittedSave:
    """What a hook is told. location: of the root; directory: the iteration's, below it."""

    report: SaveReport
    location: str
    directory: str


@dataclass(slots=True)
class AfterCommit:
    """The work that follows the commits of one Checkpointer, in their order. Rank 0's; safe to use from any thread.

    retention, grace_s: as of Checkpointer. timeout_s: how long the program's end waits for it. hooks: called with each
    commit, one after the other. copier, links: None if nothing is copied, or linked to; nothing is either
    if the writer has not claimed the second root.
    """

    storage: Storage
    retention: Retention
    grace_s: float
    timeout_s: float
    world_size: int = 1
    hooks: Sequence[Callable[[CommittedSave], object]] = ()
    copier: Copier | None = None
    links: Links | None = None
    _worker: Worker = field(init=False)
    _hook_worker: Worker = field(init=False)
    _hook: str | None = None  # the one that is being called
    _free_before: int | None = None

    def __post_init__(self) -> None:
        self._worker = Worker("distckpt-clean-up", self.timeout_s)
        self._hook_worker = Worker("distckpt-hooks", self.timeout_s)

    def copy_to(self, target: Storage, wanted: Copy) -> None:
        """Copy what is committed from now on."""
        self.copier = Copier(self.storage, target, wanted, self.timeout_s, self.world_size, self.log)

    def begin(self, writer: Writer, report: SaveReport, *, first_epoch: int, unsound: Collection[Commit]) -> None:
        """A checkpoint was committed, and what protects it is there. first_epoch, unsound: see `retire_superfluous`."""
        commit = writer.published
        assert commit is not None
        self._worker.submit(partial(self._clean_up, writer, first_epoch, frozenset(unsound)))
        self.log(line_of(report, self.world_size), writer)
        # After the save's line in the history, which comes before the copy's.
        if self.copier is not None and writer.second is not None:
            self.copier.submit(commit, writer, first_epoch=first_epoch)
        told = CommittedSave(report, self.storage.location, commit.directory)
        for hook in self.hooks:
            self._hook_worker.submit(partial(self._call, hook, told))

    def log(self, line: HistoryLine, writer: Writer | None) -> None:
        """Have a line added to the history of the root, unless the writer has been fenced by then."""
        self._worker.submit(partial(self._log, line, writer))

    def wait(self, timeout_s: float) -> bool:
        """Wait until cleaning up is done; False if it goes on after timeout_s."""
        return self._worker.wait(timeout_s)

    def take_free_before(self) -> int | None:
        """How many bytes were free before the cleaning up since this was asked last; None if there was none."""
        free, self._free_before = self._free_before, None
        return free

    def close(self, timeout_s: float) -> None:
        """Wait for all of it, so long at the most, and say what is left behind."""
        deadline = time.monotonic() + timeout_s
        is_idle = self.wait(timeout_s)
        if not is_idle:
            self._worker.abandon()
            logger.warning("cleaning up still goes on after %g s, and is no longer waited for", timeout_s)
        if self.copier is not None:
            self.copier.close(max(0.0, deadline - time.monotonic()))
            self.wait(_LAST_LINES_S if is_idle else 0.0)  # It has its lines from the copies.
        if not self._hook_worker.wait(max(0.0, deadline - time.monotonic())):
            left_out = self._hook_worker.abandon()
            logger.warning(
                "the hook %s has not returned after %g s, and is no longer waited for; calls left out: %d",
                self._hook,
                timeout_s,
                left_out,
            )

    def _clean_up(self, writer: Writer, first_epoch: int, unsound: frozenset[Commit]) -> None:
        """Retention and sweep. What fails is tried again after the next commit."""
        storage, copier = self.storage, self.copier
        try:
            writer.check_fence()
            free = storage.free_space()
            if self._free_before is None and free is not None:
                self._free_before = free.size_bytes
            retire = partial(retire_superfluous, storage, self.retention, first_epoch=first_epoch, unsound=unsound)
            if copier is None:
                retire()
            else:
                with copier.giving_up() as may_retire:
                    retire(may_retire=may_retire)
            sweep(storage, grace_s=self.grace_s)
        except FencedError:
            return  # What lies here is a newer job's business now.
        except OSError as error:
            logger.warning("removing old checkpoints failed, the new one is safe: %s", error)
        if self.links is not None:
            try:
                self.links.update()
            except OSError as error:
                logger.warning("the readable names in %s are not up to date: %s", storage.location, error)

    def _log(self, line: HistoryLine, writer: Writer | None) -> None:
        try:
            if writer is not None:
                writer.check_fence()
            # A save that never claimed the root leaves nothing there: it may be no place for checkpoints.
            append_line(self.storage, line, make=writer is not None)
        except (FencedError, FileNotFoundError):  # There is no root (yet) that this job may write to.
            return
        except OSError as error:
            logger.warning("the history of %s has no line of this %s: %s", self.storage.location, line.kind, error)

    def _call(self, hook: Callable[[CommittedSave], object], told: CommittedSave) -> None:
        self._hook = getattr(hook, "__qualname__", None) or repr(hook)
        try:
            hook(told)
        except Exception as error:
            logger.warning(
                "the hook %s failed after iteration %d was committed: %s: %s",
                self._hook,
                told.report.iteration,
                type(error).__name__,
                error,
            )


def log_load(storage: Storage, line: HistoryLine) -> None:
    """Add the line of a load, if there is a log: who only reads leaves nothing here that belongs to somebody else."""
    try:
        append_line(storage, line, make=False)
    except OSError as error:  # As on a file system that is mounted for reading.
        logger.debug("the history of %s has no line of this load: %s", storage.location, error)
