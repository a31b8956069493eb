"""After a commit: what rank 0 does once a checkpoint exists, off the training path. Nothing here can undo a commit.

A save has returned, or counts as done, before any of it. Whoever wants to see the outcome waits: iterations(), loads,
and the next save before it judges how much room there is.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial

from distckpt.commit import Commit, Writer, by_lineage, list_commits, read_tracker, unsound_commits
from distckpt.errors import FencedError
from distckpt.history_log import HistoryLine, append_line
from distckpt.removing import retire, sweep
from distckpt.retention import superfluous
from distckpt.storage import Storage
from distckpt.worker import Worker

logger = logging.getLogger("distckpt")


@dataclass(slots=True)
class AfterCommit:
    """The work that follows the commits of one Checkpointer, in their order. Rank 0's; safe to use from any thread.

    keep_last, grace_s: as of Checkpointer. timeout_s: how long the program's end waits for it.
    """

    storage: Storage
    keep_last: int | None
    grace_s: float
    timeout_s: float
    _worker: Worker = field(init=False)
    _free_before: int | None = None

    def __post_init__(self) -> None:
        self._worker = Worker("distckpt-clean-up", self.timeout_s)

    def begin(self, writer: Writer, line: HistoryLine, *, first_epoch: int, unsound: Collection[Commit]) -> None:
        """A checkpoint was committed, and what protects it is there. line: the history's. first_epoch, unsound: as of
        `superfluous`."""
        self._worker.submit(partial(self._clean_up, writer, first_epoch, frozenset(unsound)))
        self.log(line, writer)

    def log(self, line: HistoryLine, writer: Writer | None) -> None:
        """Have a line added to the history of the root, unless the writer has been fenced by then."""
        self._worker.submit(partial(self._log, line, writer))

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is done; False if it goes on after timeout_s."""
        return self._worker.wait(timeout_s)

    def take_free_before(self) -> int | None:
        """How many bytes were free before the cleaning up since this was asked last; None if there was none."""
        free, self._free_before = self._free_before, None
        return free

    def close(self, timeout_s: float) -> None:
        """Wait for it, and say so if it is left behind."""
        if not self.wait(timeout_s):
            logger.warning("cleaning up still goes on after %g s, and is no longer waited for", timeout_s)

    def _clean_up(self, writer: Writer, first_epoch: int, unsound: frozenset[Commit]) -> None:
        """Retention and sweep. What fails is tried again after the next commit."""
        storage = self.storage
        try:
            writer.check_fence()
            free = storage.free_space()
            if self._free_before is None and free is not None:
                self._free_before = free.size_bytes
            commits, tracked = list_commits(storage), read_tracker(storage)
            retire(
                storage,
                superfluous(
                    commits,
                    keep_last=self.keep_last,
                    tracked=tracked,
                    first_epoch=first_epoch,
                    order=[] if self.keep_last is None else by_lineage(storage, commits),
                    unsound=unsound | unsound_commits(storage, commits),
                ),
            )
            sweep(storage, grace_s=self.grace_s)
        except FencedError:
            return  # What lies here is a newer job's business now.
        except OSError as error:
            logger.warning("removing old checkpoints failed, the new one is safe: %s", error)

    def _log(self, line: HistoryLine, writer: Writer | None) -> None:
        try:
            if writer is not None:
                writer.check_fence()
            append_line(self.storage, line)
        except FencedError:
            return
        except OSError as error:
            logger.warning("the history of %s has no line of this %s: %s", self.storage.location, line.kind, error)


def log_load(storage: Storage, line: HistoryLine) -> None:
    """Add the line of a load, if there is a log: who only reads leaves nothing here that belongs to somebody else."""
    try:
        append_line(storage, line, make=False)
    except OSError as error:  # As on a file system that is mounted for reading.
        logger.debug("the history of %s has no line of this load: %s", storage.location, error)
