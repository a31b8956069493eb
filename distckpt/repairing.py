"""repair: make of what is stored what it should be, where that can be known. Changes what is damaged, nothing else.

Without `force` nothing becomes a checkpoint that was none: an index is only made again where a damaged one lies.
Everything is checked before anything is replaced, and is replaced whole, so that a repair may be killed and run again.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Collection
from functools import partial

import msgspec

from distckpt.checkpoint_files import OnBytes, is_damage
from distckpt.commit import (
    TRACKER,
    Commit,
    Writer,
    indexes_in,
    iteration_directories,
    iteration_directory,
    list_commits,
    newest_iteration,
    read_index,
    read_tracker,
)
from distckpt.errors import CheckpointNotFoundError, CorruptionError
from distckpt.index import Index, encode_index
from distckpt.parity import find_rebuildable, read_record, rebuild_file
from distckpt.rebuilding import rebuild_index, rebuild_table
from distckpt.removing import is_under_way, saves_in
from distckpt.selecting import open_selected, select_commits, selector_text
from distckpt.storage import Storage
from distckpt.surroundings import not_found
from distckpt.verifying import damaged_files, verify_commit

_ATTEMPTS, _PAUSE_S = 3, 0.5  # to read an index that the storage fails to read


class RepairReport(msgspec.Struct, frozen=True, kw_only=True):
    """repaired: what was mended (would be, of a dry run). damaged: what cannot be, and why.

    is_sound: whether nothing is damaged, or is any more.
    """

    is_sound: bool
    repaired: tuple[str, ...]
    damaged: tuple[str, ...]


def repair(
    root: str | os.PathLike[str] | Storage,
    iteration: int | str | None = None,
    *,
    force: bool = False,
    dry_run: bool = False,
    on_bytes: OnBytes = lambda _: None,
) -> RepairReport:
    """Mend the tracker and the newest checkpoint under a root, or the selected one.

    A damaged index or chunk table is made again from the headers of the shard files, of which every block is checked
    first; a shard file that is damaged or gone is made again from parity, if there is any. force: an index that is
    missing altogether is made again too, which makes the files of the iteration the newest checkpoint: say so only if
    it is known that they are of a save that had been committed, and stop the job that saves here. dry_run: look, and
    report what would be done.

    Raises CheckpointNotFoundError; CheckpointError for a format that is newer than this package; OSError for what may
    not be read or written.
    """
    storage, selector = open_selected(root, iteration)
    work = _Repair(storage, dry_run, on_bytes)
    if isinstance(selector, str):
        commits = select_commits(storage, selector)
    else:
        commits = [commit for commit in list_commits(storage) if selector is None or commit.iteration == selector]
    if commits:
        work.mend_commit(commits[0])
    elif isinstance(selector, int) and saves_in(storage.list(iteration_directory(selector))):
        work.mend_lost_index(selector, force)
    else:
        _raise_not_found(storage, selector)
    work.mend_tracker()
    is_sound = not work.damaged and not (dry_run and work.repaired)
    return RepairReport(is_sound=is_sound, repaired=tuple(work.repaired), damaged=tuple(work.damaged))


def _raise_not_found(storage: Storage, selector: int | str | None) -> None:
    which = selector_text(selector)
    committed = sorted({commit.iteration for commit in list_commits(storage)})
    if committed:
        raise CheckpointNotFoundError(f"no checkpoint{which} under {storage.location}: it has iterations {committed}")
    with_files = [i for i, directory in iteration_directories(storage) if saves_in(storage.list(directory))]
    if not with_files:
        raise not_found(storage)
    what = f"iterations {with_files} have shard files, but no index: name one of them with --iteration"
    raise CheckpointNotFoundError(f"no checkpoint{which} under {storage.location}; {what}")


def rebuild_damaged(storage: Storage, commit: Commit, on_bytes: OnBytes) -> list[str]:
    """Make the shard files of a commit again that are damaged, from parity; the names of those that were.

    Empty if it has no parity, if that does not suffice, or if nothing is found to be damaged. on_bytes: told of what
    has been read and written; it may raise, to give up. Raises OSError.
    """
    try:
        index, _ = read_index(storage, commit)
        record = read_record(storage, commit.directory, index)
        if record is None:
            return []
        damaged = damaged_files(verify_commit(storage, commit, on_bytes=on_bytes))
        rebuildable = find_rebuildable(record, damaged)
        for name, group in rebuildable.items():
            rebuild_file(storage, commit.directory, index, name, group, on_bytes)
    except (CorruptionError, CheckpointNotFoundError):
        return []
    return list(rebuildable)


class _Repair:
    """One repair, and what came of it."""

    def __init__(self, storage: Storage, dry_run: bool, on_bytes: OnBytes) -> None:
        self.repaired: list[str] = []
        self.damaged: list[str] = []
        self._storage = storage
        self._dry_run = dry_run
        self._on_bytes = on_bytes

    def _mend(self, what: str, action: Callable[[], object]) -> None:
        if not self._dry_run:
            action()
        self.repaired.append(what)

    def mend_commit(self, commit: Commit) -> None:
        """The index; or, if that is sound, first the shard files that parity can make again, then the chunk table."""
        index = self._readable_index(commit)
        if index is None:
            self._mend_index(commit)
            return
        report = verify_commit(self._storage, commit, on_bytes=self._on_bytes)
        mended = self._mend_files(commit, index, damaged_files(report))
        left = [fault for fault in report.faults if fault.file.rpartition("/")[2] not in mended]
        table = f"{commit.directory}/{index.chunk_table.name}"
        if any(fault.file == table for fault in left):
            self._mend_table(commit, index, table)
        self.damaged += [
            fault.problem if fault.problem.startswith(fault.file) else f"{fault.file}: {fault.problem}"
            for fault in left
            if fault.file != table
        ]

    def _mend_files(self, commit: Commit, index: Index, damaged: Collection[str]) -> set[str]:
        """The names of those that could be made again from parity."""
        mended = set[str]()
        try:
            record = read_record(self._storage, commit.directory, index) if damaged else None
            for name, group in find_rebuildable(record, damaged).items():
                rebuild = partial(rebuild_file, self._storage, commit.directory, index, name, group, self._on_bytes)
                self._mend(f"{commit.directory}/{name}: made again from parity", rebuild)
                mended.add(name)
        except CorruptionError as error:
            self.damaged.append(f"what is left of {commit.directory} does not suffice: {error}")
        return mended

    def _readable_index(self, commit: Commit) -> Index | None:
        """None if it is damaged: nothing else is reason enough to make it again."""
        for attempt in range(_ATTEMPTS):
            try:
                return read_index(self._storage, commit, past_cache=True)[0]
            except CorruptionError:
                return None
            except FileNotFoundError:
                if commit not in list_commits(self._storage):
                    raise CheckpointNotFoundError(f"{commit.name}: it was removed meanwhile") from None
                if attempt == _ATTEMPTS - 1:
                    raise
            except OSError as error:
                if error.errno not in (errno.EIO, errno.ESTALE):
                    raise
            time.sleep(_PAUSE_S)
        return None  # The disk cannot read it.

    def _mend_index(self, commit: Commit) -> None:
        """One that is there, but damaged: the save was committed. Whose it is, only the names of files can say."""
        names = self._storage.list(commit.directory)
        others = [self._readable_index(other) for other in indexes_in(commit.iteration, names) if other != commit]
        known = {index.save_id for index in others if index is not None}
        known |= {name.partition("-")[2] for name in names if name.startswith("retired-")}
        announced = {i for i in saves_in(names) - known if is_under_way(self._storage, commit.iteration, i)}
        saves = sorted(saves_in(names) - known)
        if len(saves) != 1 or announced or None in others:
            why = f"files of {len(saves)} saves lie there that no other index has ({', '.join(saves) or 'none'})"
            if announced:
                why += f"; of these {', '.join(sorted(announced))} may be under way: try again when its job has ended"
            self.damaged.append(f"{commit.name}: damaged, and it cannot be told of which save it was: {why}")
            return
        rebuilt = self._rebuild(partial(rebuild_index, self._storage, commit.iteration, saves[0]), commit.directory)
        if rebuilt is not None:
            index, content = rebuilt
            index = msgspec.structs.replace(index, epoch=commit.epoch, commit_seq=commit.commit_seq)
            what = f"{commit.name}: made again, with its chunk table"
            self._mend(what, lambda: self._replace(commit, index, content))

    def _mend_table(self, commit: Commit, index: Index, name: str) -> None:
        rebuilt = self._rebuild(partial(rebuild_table, self._storage, index), name)
        if rebuilt is not None:
            # Its records may come in another order than they did, so the index is written again, too.
            self._mend(f"{name}: made again", lambda: self._replace(commit, *rebuilt))

    def _rebuild(self, rebuild: Callable[..., tuple[Index, bytes]], what: str) -> tuple[Index, bytes] | None:
        try:
            return rebuild(on_bytes=self._on_bytes)
        except (CorruptionError, OSError) as error:
            if not is_damage(error):
                raise
            self.damaged.append(f"{what}: it cannot be made again from the shard files: {error}")
            return None

    def _replace(self, commit: Commit, index: Index, table: bytes) -> None:
        if commit not in list_commits(self._storage):  # Retention took it while the files were read.
            raise CheckpointNotFoundError(f"{commit.name}: it was removed meanwhile")
        self._storage.replace(f"{commit.directory}/{index.chunk_table.name}", table)
        self._storage.replace(commit.name, encode_index(index))

    def mend_lost_index(self, iteration: int, force: bool) -> None:
        """Of an iteration without any index: of a save that was aborted, or retired, unless somebody knows better."""
        directory = iteration_directory(iteration)
        names = self._storage.list(directory)
        saves = sorted(saves_in(names))
        if len(saves) > 1:
            self.damaged.append(f"{directory}: it has no index, and files of {len(saves)} saves: {', '.join(saves)}")
        elif is_under_way(self._storage, iteration, saves[0]):
            self.damaged.append(f"{directory}: a save is under way there; wait for it, or stop its job")
        elif not force:
            self.damaged.append(
                f"{directory}: it has no index, as after a save that was aborted. If it is known to have been "
                f"committed, --force makes the index again, and this the newest checkpoint"
            )
        else:
            rebuilt = self._rebuild(partial(rebuild_index, self._storage, iteration, saves[0]), directory)
            if rebuilt is not None:
                self._mend(f"{directory}: committed again, as the newest", lambda: self._commit(*rebuilt))

    def _commit(self, index: Index, table: bytes) -> None:
        directory = iteration_directory(index.iteration)
        writer = Writer.claim(self._storage)
        self._storage.replace(f"{directory}/{index.chunk_table.name}", table)
        writer.publish(msgspec.structs.replace(index, epoch=writer.epoch, commit_seq=writer.commit_seq))

    def mend_tracker(self) -> None:
        """Have it name the newest checkpoint whose index is sound."""
        named = read_tracker(self._storage)  # First: a commit that comes now is newer than this.
        newest = self._newest()
        if newest is None or newest == named:
            return
        was = "missing or damaged" if named is None else f"naming {named}"
        self._mend(f"{TRACKER}: it was {was}, now it names {newest}", self._write_tracker)

    def _write_tracker(self) -> None:
        newest, written = self._newest(), None
        while newest != written:  # A job may commit, and write it, while this does.
            self._storage.replace(TRACKER, str(newest).encode())
            newest, written = self._newest(), newest

    def _newest(self) -> int | None:
        try:
            return newest_iteration(self._storage)
        except CorruptionError:
            return None  # Nothing that it could name.
