"""Copying: a committed checkpoint, whole and checked, from one root to another. No torch.

It is a save in the target, by the same rules: a marker first; files, each made durable under a temporary name before
it gets its own; the directory synced; the index last, byte for byte, under the name that it has in the source, which
keeps its place in the order of commits; then the tracker. Every byte is checked against the index as it is read, so
that damage is found and never copied. What is there already under its name was whole when it got that: it is checked,
and not copied again, so that a copy that was cut short goes on where it stopped.

The order of commits goes by (epoch, commit_seq): a target should hold copies of one root only, whose jobs look at both
before they claim an epoch (Writer.claim).
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import msgspec

from distckpt._C import Memory, crc32c
from distckpt.checkpoint_files import BlockFile, CheckedFile, OnBytes, is_damage
from distckpt.chunk_table import PAGE_BYTES, check_pages
from distckpt.commit import (
    TRACKER,
    Commit,
    list_commits,
    pending_marker,
    read_file,
    read_head,
    read_index,
    read_tracker,
    writer_epochs,
)
from distckpt.errors import CheckpointError, CorruptionError
from distckpt.heartbeat import Heartbeat
from distckpt.index import MAX_INDEX_BYTES, Index
from distckpt.labels import Labels, ReadLabels, change_labels, read_labels
from distckpt.parity import ParityRecord, open_parity, put_record, read_record
from distckpt.report import CopyReport
from distckpt.roots import check_place
from distckpt.selecting import open_selected, select_commits
from distckpt.storage import PosixStorage, Storage, WriteFile, new_file

logger = logging.getLogger("distckpt")
_WINDOW_BYTES = 8 << 20
_CHECKED_BYTES = 64 << 20  # of what is there already, between two words to on_bytes
_STEP_S = 0.2
_OpenFile: TypeAlias = Callable[[Storage], BlockFile]
OFFLINE = b"copy"  # content of the marker of a copy that no job makes: it dies of age alone


def copy_checkpoint(
    source: str | os.PathLike[str] | Storage,
    target: str | os.PathLike[str] | Storage,
    iteration: int | str | None = None,
    *,
    max_bytes_per_s: float | None = None,
    on_bytes: OnBytes = lambda _: None,
) -> CopyReport:
    """Copy the newest checkpoint under a root, or the selected one, to another root, which is made if missing.

    Called again after it was cut short, it goes on; of a checkpoint that is there already nothing is copied. Parity
    and labels go with it; that it was read back does not, as the copy was not. on_bytes: told how many bytes were
    copied, or found there, since it was told last.

    Raises CheckpointNotFoundError; CorruptionError if what is to be copied is damaged; CheckpointError if the target
    lies in an iteration, holds checkpoints of another run, or another one in its place; OSError.
    """
    if max_bytes_per_s is not None and not max_bytes_per_s > 0:
        raise ValueError(f"max_bytes_per_s={max_bytes_per_s}: expected more than 0, or None")
    source, selector = open_selected(source, iteration)
    target = PosixStorage(target) if isinstance(target, (str, os.PathLike)) else target
    commit = select_commits(source, selector)[0]
    check_place(target)
    check_is_of_one_run(source, target, commit)
    limit = max_bytes_per_s or 0.0
    return copy_commit(source, target, commit, marker=OFFLINE, max_bytes_per_s=limit, on_bytes=on_bytes)


def check_is_of_one_run(source: Storage, target: Storage, commit: Commit) -> None:
    """Raise CheckpointError if the target is another run's: nothing there shares a save or a parent with the source,
    and a job saves there, or this commit would not be the newest there. A run's old copies need share nothing."""
    theirs = list_commits(target)
    if not theirs or (not writer_epochs(target) and max(theirs) < commit):
        return
    if _saves_and_parents(source, list_commits(source)).isdisjoint(_saves_and_parents(target, theirs)):
        raise CheckpointError(
            f"{target.location} holds checkpoints of another run than {source.location}: their order would be mixed, "
            f"and neither run could tell which is newest. Copy to a root of its own. Nothing was written."
        )


def _saves_and_parents(storage: Storage, commits: Iterable[Commit]) -> set[str]:
    found: set[str] = set()
    for commit in commits:
        with suppress(CheckpointError, FileNotFoundError):
            head = read_head(storage, commit)
            found |= {head.save_id, head.parent or head.save_id}
    return found


def copy_commit(
    source: Storage,
    target: Storage,
    commit: Commit,
    *,
    marker: bytes,
    max_bytes_per_s: float = 0.0,
    may_publish: Callable[[], None] = lambda: None,
    on_bytes: OnBytes = lambda _: None,
) -> CopyReport:
    """The same of one commit. marker: what the pending marker says, the epoch of the job that copies. may_publish:
    raises if the copy must not become a checkpoint any more, or may be none although it was published. on_bytes may
    raise, to give up. max_bytes_per_s: 0 is no limit."""
    started = time.perf_counter()
    index, data = read_index(source, commit)
    copy = _Copy(source, target, commit, index, _throttled(on_bytes, max_bytes_per_s))
    total = sum(file.size_bytes for file in index.files) + index.chunk_table.size_bytes
    if not copy.is_there(data):
        pending = pending_marker(commit.iteration, index.save_id)
        target.make_directory(commit.directory)
        target.replace(pending, marker)  # Whoever began this copy before, it is ours now.
        # It was retired here once: its files are no garbage any more. In this order: one of the two is always there.
        target.remove(f"{commit.directory}/retired-{index.save_id}")
        with Heartbeat(target, pending, active=True):
            copy.copy_files()
            # Directory first: the index must not name a file that a crash can lose.
            target.sync_directory(commit.directory)
            may_publish()
            if not target.put_if_absent(commit.name, data) and not copy.is_there(data):
                raise CheckpointError(f"{commit.name} was put into {target.location} meanwhile, of another save")
            may_publish()  # Again: a newer job may have swept our files away before the index was there.
            copy.check_names()
        target.remove(pending)
    if list_commits(target)[0] == commit and read_tracker(target) != commit.iteration:
        target.replace(TRACKER, str(commit.iteration).encode())
    copy_labels(source, target, commit, index.save_id)
    return CopyReport(
        iteration=commit.iteration,
        save_id=index.save_id,
        source=source.location,
        target=target.location,
        bytes=total,
        bytes_copied=copy.bytes_copied,
        total_s=time.perf_counter() - started,
    )


def copy_labels(source: Storage, target: Storage, commit: Commit, save_id: str) -> None:
    """Add the labels of a checkpoint to those of its copy, which has labels of its own: nothing is taken from it.

    Raises CheckpointNotFoundError if the copy is, or may be, removed meanwhile; CheckpointError; OSError.
    """
    found = read_labels(source, commit.directory, save_id)
    if found.number:
        change_labels(target, commit, save_id, partial(_with_labels, found))


def _with_labels(found: ReadLabels, labels: Labels) -> Labels:
    """The labels of a copy, with those of its source. What cannot be read there may have been a pin."""
    of_source = found.labels
    tags = {tag: max(number, labels.tags.get(tag, 0)) for tag, number in of_source.tags.items()}
    return msgspec.structs.replace(
        labels,
        tags=labels.tags | tags,
        note=of_source.note or labels.note,
        pinned=labels.pinned or of_source.pinned or found.damage is not None,
        metrics=labels.metrics | of_source.metrics,
    )


@dataclass(slots=True)
class _Copy:
    """One copy under way."""

    source: Storage
    target: Storage
    commit: Commit
    index: Index
    on_bytes: OnBytes
    bytes_copied: int = 0
    _window: memoryview = field(default_factory=lambda: memoryview(Memory(_WINDOW_BYTES)))

    def is_there(self, data: bytes) -> bool:
        """Whether the target has this very index. Raises CheckpointError if another one has its name."""
        try:
            found = read_file(self.target, self.commit.name, MAX_INDEX_BYTES)
        except FileNotFoundError:
            return False
        if found != data:
            raise CheckpointError(
                f"{self.target.location} has another {self.commit.name} than {self.source.location}: it holds "
                f"checkpoints of another job. Copy to a root of its own."
            )
        self.target.sync_directory(self.commit.directory)  # What can be seen can still be lost.
        return True

    def copy_files(self) -> None:
        """All that belongs to the checkpoint but its index. Raises CorruptionError or OSError."""
        directory, index = self.commit.directory, self.index
        there = set(self.target.list(directory))
        parity = self._parity()
        self._check_room(there, parity)
        for file in index.files:
            open_file = partial(CheckedFile, directory=directory, expected=file)
            self._copy_file(file.name, file.size_bytes, open_file, there)
        self._copy_table(there)
        if parity is not None:
            self._copy_parity(parity, there)

    def check_names(self) -> None:
        """After the index was put: that nobody has swept away a file that it names, or there is no copy. Raises
        CheckpointError."""
        directory = self.commit.directory
        named = {self.index.chunk_table.name, *(file.name for file in self.index.files)}
        gone = sorted(named - set(self.target.list(directory)))
        if gone:
            self.target.remove(self.commit.name)
            self.target.sync_directory(directory)
            raise CheckpointError(
                f"{self.target.location}: {len(gone)} files of iteration {self.commit.iteration} were removed while it "
                f"was copied, {gone[0]} first: it is not there. Copy it again."
            )

    def _parity(self) -> ParityRecord | None:
        """A checkpoint whose parity is damaged is copied without it."""
        try:
            return read_record(self.source, self.commit.directory, self.index)
        except CorruptionError as error:
            logger.warning("iteration %d is copied without its parity: %s", self.commit.iteration, error)
            return None

    def _copy_parity(self, parity: ParityRecord, there: set[str]) -> None:
        directory = self.commit.directory
        try:
            for group in parity.groups:
                open_group = partial(open_parity, directory=directory, group=group)
                self._copy_file(group.name, group.size_bytes, open_group, there)
        except (CorruptionError, FileNotFoundError) as error:
            logger.warning("iteration %d is copied without its parity: %s", self.commit.iteration, error)
            for group in parity.groups:
                self.target.remove(f"{directory}/{group.name}")
        else:
            put_record(self.target, directory, self.index.save_id, parity.groups)

    def _check_room(self, there: set[str], parity: ParityRecord | None) -> None:
        free = self.target.free_space()
        table = self.index.chunk_table
        sizes = {table.name: table.size_bytes} | {file.name: file.size_bytes for file in self.index.files}
        sizes |= {group.name: group.size_bytes for group in (parity.groups if parity else ())}
        needed = sum(size for name, size in sizes.items() if name not in there)
        if free is not None and needed > free.size_bytes:
            raise CheckpointError(
                f"not enough space: the copy of iteration {self.commit.iteration} takes {needed} bytes more in "
                f"{self.target.location}, which has {free.size_bytes} bytes free"
            )

    def _copy_file(
        self, name: str, size_bytes: int, open_file: Callable[[Storage], BlockFile], there: set[str]
    ) -> None:
        if name in there and self._is_whole(open_file):
            self.on_bytes(size_bytes)
            return
        with open_file(self.source) as file, self._put(name, size_bytes) as out:
            for begin in range(0, size_bytes, _WINDOW_BYTES):
                got = file.read_stored(begin, self._window)
                out.write(begin, self._window[:got])
                self.bytes_copied += got
                self.on_bytes(got)

    def _is_whole(self, open_file: _OpenFile) -> bool:
        """Whether what the target has under a name is what the index says."""
        try:
            with open_file(self.target) as file:
                for begin in range(0, file.data_bytes, _CHECKED_BYTES):
                    if any(True for _ in file.faults([(begin, min(begin + _CHECKED_BYTES, file.data_bytes))])):
                        return False
                    self.on_bytes(0)  # It may want to give up.
                return True
        except (CorruptionError, OSError) as error:
            if not is_damage(error):
                raise
            return False

    def _copy_table(self, there: set[str]) -> None:
        table = self.index.chunk_table
        if table.name in there and self._has_table():
            self.on_bytes(table.size_bytes)
            return
        content = _read_table(self.source, self.commit.directory, self.index)
        with self._put(table.name, table.size_bytes) as out:
            out.write(0, content)
        self.bytes_copied += len(content)
        self.on_bytes(len(content))

    def _has_table(self) -> bool:
        try:
            _read_table(self.target, self.commit.directory, self.index)
        except (CorruptionError, OSError) as error:
            if not is_damage(error):
                raise
            return False
        return True

    @contextmanager
    def _put(self, name: str, size_bytes: int) -> Iterator[WriteFile]:
        """A file of the target that the body writes. It gets its name when it is whole and durable, not before."""
        directory = self.commit.directory
        temporary = f"{directory}/.tmp-{secrets.token_hex(16)}"
        try:
            with new_file(self.target, temporary, size_bytes) as out:
                yield out
            self.target.move(temporary, f"{directory}/{name}")
        except BaseException:
            with suppress(OSError):
                self.target.remove(temporary)
            raise


def _read_table(storage: Storage, directory: str, index: Index) -> bytes:
    """The chunk table, checked. Raises CorruptionError or OSError."""
    table = index.chunk_table
    name = f"{directory}/{table.name}"
    data = read_file(storage, name, table.size_bytes)
    trailer = data[table.records_bytes :]
    if len(data) != table.size_bytes or crc32c(trailer) != table.trailer_crc:
        raise CorruptionError(f"{name}: its length, or the checksum of its trailer, is not what the index says")
    if len(trailer) != 4 * -(-table.records_bytes // PAGE_BYTES):
        raise CorruptionError(f"{name}: the index gives it a trailer of impossible size")
    check_pages(data[: table.records_bytes], 0, trailer, where=name)
    return data


def _throttled(on_bytes: OnBytes, max_bytes_per_s: float) -> OnBytes:
    """Take so long between words that no more bytes go by in a second; 0 is no limit."""
    started, total = time.monotonic(), 0

    def tell(step: int) -> None:
        nonlocal total
        total += step
        on_bytes(step)
        while max_bytes_per_s and (left := started + total / max_bytes_per_s - time.monotonic()) > 0:
            time.sleep(min(left, _STEP_S))
            on_bytes(0)  # It may want to give up.

    return tell
