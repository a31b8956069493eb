"""Copier: the committed checkpoints of a job, copied to a second root in the background of rank 0. No torch.

One at a time, the newest first, in a thread of its own: a slow copy delays neither saves nor cleaning up. The one that
is being copied is not retired meanwhile; one that retention takes before its turn is not copied. What fails is tried
again, after a pause where that may help, and after later commits. A job that was replaced by a newer one, in either
root, copies no more.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial

from distckpt.cataloging import Record, survey, tag_holders
from distckpt.commit import (
    Commit,
    Writer,
    list_commits,
    pending_marker,
    read_head,
    unsound_commits,
)
from distckpt.copying import copy_commit, copy_labels
from distckpt.errors import CheckpointError, FencedError
from distckpt.history_log import HistoryLine, line_of, line_of_failure
from distckpt.pruning import retire_superfluous
from distckpt.removing import sweep
from distckpt.retention import Retention
from distckpt.storage import Storage
from distckpt.worker import Worker
from distckpt.writing import may_pass

logger = logging.getLogger("distckpt")
RETRY_AFTER_S = (1.0, 5.0, 20.0)  # one try more for each
_STOP_S = 5.0  # for a copy that was told to end to do so
_ROUNDS = 3  # in which a copy that failed is tried again, each after a commit


@dataclass(frozen=True, slots=True)
class Copy:
    """Where a job's checkpoints are copied to in the background; loads fall back to it.

    root: directory, or a Storage, that every rank sees; of copies of this one run only. keep_last: how many iterations
    to keep there, all if None. max_bytes_per_s: None is no limit. removal_grace_s: as of Checkpointer, there.
    """

    root: str | os.PathLike[str] | Storage
    keep_last: int | None = None
    max_bytes_per_s: float | None = None
    removal_grace_s: float = 60.0

    def __post_init__(self) -> None:
        if self.keep_last is not None and self.keep_last < 1:
            raise ValueError(f"keep_last={self.keep_last}: at least the newest checkpoint is kept; None keeps all")
        if self.max_bytes_per_s is not None and not self.max_bytes_per_s > 0:
            raise ValueError(f"max_bytes_per_s={self.max_bytes_per_s}: expected more than 0, or None")


class _Stopped(Exception):
    """Nobody waits for the copy any more."""


@dataclass(slots=True)
class Copier:
    """Copies from one root to another. Rank 0's; safe to use from any thread.

    log: takes the line of a copy. No lock is held over anything that can take time: saves must not wait for it.
    """

    source: Storage
    target: Storage
    wanted: Copy
    timeout_s: float
    world_size: int
    log: Callable[[HistoryLine, Writer], None]
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _held: Commit | None = None  # which is being copied
    _retiring: set[Commit] = field(default_factory=set)
    _waiting: set[Commit] = field(default_factory=set)
    _failures: Counter[Commit] = field(default_factory=Counter)
    _stop: threading.Event = field(default_factory=threading.Event)
    _has_looked_back: bool = False
    _worker: Worker = field(init=False)

    def __post_init__(self) -> None:
        self._worker = Worker("distckpt-copy", self.timeout_s)

    def submit(self, commit: Commit, writer: Writer, *, first_epoch: int) -> None:
        """Copy a commit when its turn comes. first_epoch: the oldest epoch whose copies may go."""
        with self._lock:
            self._waiting.add(commit)
        self._worker.submit(partial(self._work, writer, first_epoch))

    @contextmanager
    def giving_up(self) -> Iterator[Callable[[Commit], bool]]:
        """For whoever retires checkpoints of the source in the body: asks of each whether it may go. One that is being
        copied may not; the copy of one that may does not begin meanwhile."""
        try:
            yield self._may_retire
        finally:
            with self._lock:
                self._retiring.clear()

    def _may_retire(self, commit: Commit) -> bool:
        with self._lock:
            if commit == self._held:
                return False
            self._retiring.add(commit)
            return True

    def close(self, timeout_s: float) -> None:
        """Wait for what is being copied, and for the newest that is not yet; then stop."""
        with self._lock:
            self._waiting = {max(self._waiting)} if self._waiting else set()
        if not self._worker.wait(timeout_s):
            self._stop.set()
            left = self._held
            what = "a copy" if left is None else f"copying iteration {left.iteration}"
            logger.warning(
                "%s to %s is not done after %g s, and is given up; the next job goes on with it",
                what,
                self.target.location,
                timeout_s,
            )
            if not self._worker.wait(_STOP_S):
                self._worker.abandon()

    def _work(self, writer: Writer, first_epoch: int) -> None:
        if not self._has_looked_back:
            self._look_back()
        tried: set[Commit] = set()
        while (commit := self._hold_next(tried)) is not None:
            tried.add(commit)
            try:
                self._copy(commit, writer)
                self._tidy(writer, first_epoch)
            except FencedError as error:
                logger.warning("%s is copied to no more: %s", self.target.location, error)
                with self._lock:
                    self._waiting.clear()
            except _Stopped:
                return
            finally:
                with self._lock:
                    self._held = None

    def _look_back(self) -> None:
        """Once: what earlier jobs of this root committed, and did not get to copy."""
        try:
            missing = set(list_commits(self.source)).difference(list_commits(self.target))
            earlier = missing - unsound_commits(self.source, missing)
        except OSError as error:
            logger.warning("what was not copied to %s yet is not known: %s", self.target.location, error)
            return
        self._has_looked_back = True
        with self._lock:
            self._waiting.update(earlier)

    def _hold_next(self, tried: set[Commit]) -> Commit | None:
        with self._lock:
            left = self._waiting - tried - self._retiring
            self._held = None if self._stop.is_set() else max(left, default=None)
            return self._held

    def _copy(self, commit: Commit, writer: Writer) -> None:
        pauses = iter(RETRY_AFTER_S)
        tries = 1
        while True:
            try:
                self._copy_once(commit, writer, tries)
                return
            except (_Stopped, FencedError):
                raise
            except (CheckpointError, OSError) as error:
                pause = next(pauses, None) if may_pass(error) else None
                if pause is None or self._is_gone(commit):
                    self._give_up(commit, error, writer)
                    return
                logger.warning(
                    "copying iteration %d to %s: %s; it is tried again in %g s",
                    commit.iteration,
                    self.target.location,
                    error,
                    pause,
                )
            if self._stop.wait(pause):
                raise _Stopped
            tries += 1

    def _copy_once(self, commit: Commit, writer: Writer, tries: int) -> None:
        writer.check_fences()
        if self._is_outlived(commit):
            with self._lock:
                self._waiting.discard(commit)
            return
        if commit in unsound_commits(self.source, [commit]):
            raise CheckpointError("it was read back, and was not what was written")
        self._make_room(writer)
        report = copy_commit(
            self.source,
            self.target,
            commit,
            marker=str(writer.epoch).encode(),
            max_bytes_per_s=self.wanted.max_bytes_per_s or 0.0,
            may_publish=writer.check_fences,
            on_bytes=self._look_up,
        )
        with self._lock:
            self._waiting.discard(commit)
        self.log(line_of(replace(report, tries=tries), self.world_size), writer)
        logger.info("copied iteration %d to %s in %.1f s", commit.iteration, self.target.location, report.total_s)

    def _is_outlived(self, commit: Commit) -> bool:
        """Whether retention there would take it at once."""
        newer = {other.iteration for other in list_commits(self.target) if other > commit}
        has_enough = self.wanted.keep_last is not None and len(newer) >= self.wanted.keep_last
        return (has_enough or commit.iteration in newer) and commit not in _protected(_labelled(self.source))

    def _look_up(self, _: int) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _is_gone(self, commit: Commit) -> bool:
        with suppress(OSError):
            return commit not in list_commits(self.source)
        return False

    def _give_up(self, commit: Commit, error: Exception, writer: Writer) -> None:
        """For now, or for good."""
        self._failures[commit] += 1
        is_gone = self._is_gone(commit)
        with self._lock:
            if is_gone or self._failures[commit] >= _ROUNDS:
                self._waiting.discard(commit)
        if is_gone:
            logger.warning("iteration %d was removed before it was copied", commit.iteration)
            return
        logger.warning("iteration %d was not copied to %s: %s", commit.iteration, self.target.location, error)
        self.log(line_of_failure("failed copy", commit.iteration, error, self.world_size), writer)

    def _make_room(self, writer: Writer) -> None:
        """Sweep the target, but not what the copies that wait have there: they go on with it."""
        with self._lock:
            waiting = set(self._waiting)
        for commit in waiting:
            with suppress(FileNotFoundError, CheckpointError):
                marker = pending_marker(commit.iteration, read_head(self.source, commit).save_id)
                if marker.rpartition("/")[2] in self.target.list(commit.directory):
                    self.target.replace(marker, str(writer.epoch).encode())
        sweep(self.target, grace_s=self.wanted.removal_grace_s)

    def _tidy(self, writer: Writer, first_epoch: int) -> None:
        """After a copy: labels that came since, then retention there. What fails is done after the next one."""
        try:
            writer.check_fences()
            spared = self._bring_labels()
            retire_superfluous(
                self.target,
                Retention(keep_last=self.wanted.keep_last),
                first_epoch=first_epoch,
                may_retire=lambda commit: commit not in spared,
            )
            self._make_room(writer)
        except OSError as error:
            logger.warning("cleaning up in %s failed, the copies are safe: %s", self.target.location, error)

    def _bring_labels(self) -> set[Commit]:
        """To all copies; those that must stay, as they are protected in the source, or that may not be known."""
        records = _labelled(self.source)
        spared = _protected(records)
        there = set(list_commits(self.target))
        for record in records:
            if record.head is None:
                spared.add(record.commit)
            elif record.commit in there:
                try:
                    copy_labels(self.source, self.target, record.commit, record.head.save_id)
                except (CheckpointError, FileNotFoundError) as error:
                    logger.warning("the labels of %s are not brought over: %s", record.commit.name, error)
                    spared.add(record.commit)
        return spared


def _labelled(storage: Storage) -> list[Record]:
    return survey(storage, list_commits(storage), labelled_only=True)


def _protected(records: Iterable[Record]) -> set[Commit]:
    """Those that no retention may take, going by their labels; ones that cannot be read may have been a pin."""
    records = list(records)
    read = {r.commit for r in records if r.labels.labels.pinned or r.labels.damage is not None}
    return read | set(tag_holders(records).values())
