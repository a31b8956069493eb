"""repair: make of what is stored what it should be, where that can be known. Changes what is damaged, nothing else.

Without `force` nothing becomes a checkpoint that was none: an index is only made again where a damaged one lies.
Everything is checked before anything is replaced, and is replaced whole, so that a repair may be killed and run again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import msgspec

from distckpt.checkpoint_files import is_damage, read_chunks
from distckpt.commit import (
    TRACKER,
    Commit,
    Writer,
    indexes_in,
    is_under_way,
    iteration_directories,
    iteration_directory,
    list_commits,
    newest_iteration,
    read_index,
    read_tracker,
)
from distckpt.errors import CheckpointError, CheckpointNotFoundError, CorruptionError
from distckpt.index import Index, encode_index
from distckpt.parity import find_rebuildable, read_record, rebuild_file
from distckpt.rebuilding import rebuild, saves_in
from distckpt.storage import PosixStorage, Storage
from distckpt.verifying import OnBytes, damaged_files, verify_commit


class RepairReport(msgspec.Struct, frozen=True, kw_only=True):
    """repaired: what was mended (would be, of a dry run). damaged: what is still damaged, and why."""

    is_sound: bool
    repaired: tuple[str, ...]
    damaged: tuple[str, ...]


def repair(
    root: str | os.PathLike[str] | Storage,
    iteration: int | None = None,
    *,
    force: bool = False,
    dry_run: bool = False,
    on_bytes: OnBytes = lambda _: None,
) -> RepairReport:
    """Mend the tracker and the newest checkpoint under a root, or that of one iteration.

    A damaged index or chunk table is made again from the headers of the shard files, of which every block is checked
    first; a shard file that is damaged or gone is made again from parity, if there is any. force: an index that is
    missing altogether is made again too, which makes the files of the iteration the newest checkpoint: say so only if
    it is known that they are of a save that had been committed, and stop the job that saves here. dry_run: look, and
    report what would be done.

    Raises CheckpointNotFoundError; CheckpointError for a format that is newer than this package; OSError for what may
    not be read or written.
    """
    storage = PosixStorage(root) if isinstance(root, (str, os.PathLike)) else root
    work = _Repair(storage, dry_run, on_bytes)
    commits = [commit for commit in list_commits(storage) if iteration is None or commit.iteration == iteration]
    if commits:
        work.mend_commit(commits[0])
    elif iteration is not None and saves_in(storage.list(iteration_directory(iteration))):
        work.mend_lost_index(iteration, force)
    else:
        _raise_not_found(storage, iteration)
    work.mend_tracker()
    return RepairReport(is_sound=not work.damaged, repaired=tuple(work.repaired), damaged=tuple(work.damaged))


def _raise_not_found(storage: Storage, iteration: int | None) -> None:
    with_files = [i for i, directory in iteration_directories(storage) if saves_in(storage.list(directory))]
    which = "" if iteration is None else f" of iteration {iteration}"
    what = f"; iterations {with_files} have shard files, but no index: name one of them" if with_files else ""
    raise CheckpointNotFoundError(f"no checkpoint{which} under {storage.location}{what}")


def rebuild_damaged(storage: Storage, commit: Commit) -> list[str]:
    """Make the shard files of a commit again that are damaged, from parity; the names of those that were.

    Empty if it has no parity, if that does not suffice, or if nothing is found to be damaged. Raises OSError.
    """
    try:
        index, _ = read_index(storage, commit)
        record = read_record(storage, commit.directory, index)
        if record is None:
            return []
        damaged = damaged_files(verify_commit(storage, commit))
        rebuildable = find_rebuildable(record, damaged)
        for name, group in rebuildable.items():
            rebuild_file(storage, commit.directory, index, name, group)
    except CorruptionError:
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
        """The index and the chunk table of a commit; of its shard files it is said which are damaged."""
        index = self._readable_index(commit)
        if index is None:
            self._mend_index(commit)
            return
        if not self._has_sound_table(commit, index):
            self._mend_table(commit, index)
            return
        self._mend_files(commit, index)

    def _mend_files(self, commit: Commit, index: Index) -> None:
        report = verify_commit(self._storage, commit, on_bytes=self._on_bytes)
        damaged, mended = damaged_files(report), set[str]()
        if damaged:
            try:
                record = read_record(self._storage, commit.directory, index)
                for name, group in find_rebuildable(record, damaged).items():
                    rebuild = partial(rebuild_file, self._storage, commit.directory, index, name, group)
                    self._mend(f"{commit.directory}/{name}: made again from parity", rebuild)
                    mended.add(f"{commit.directory}/{name}")
            except (CorruptionError, OSError) as error:
                if not is_damage(error):
                    raise
                self.damaged.append(f"what is left of {commit.directory} does not suffice: {error}")
        self.damaged += [f"{fault.file}: {fault.problem}" for fault in report.faults if fault.file not in mended]

    def _readable_index(self, commit: Commit) -> Index | None:
        try:
            return read_index(self._storage, commit)[0]
        except (CheckpointError, OSError) as error:
            if not is_damage(error):
                raise
            return None

    def _has_sound_table(self, commit: Commit, index: Index) -> bool:
        try:
            read_chunks(self._storage, commit.directory, index, list(index.tensors))
        except (CheckpointError, OSError) as error:
            if not is_damage(error):
                raise
            return False
        return True

    def _mend_index(self, commit: Commit) -> None:
        """One that is there, but damaged: the save was committed. Whose it is, only the files can say."""
        names = self._storage.list(commit.directory)
        others = [self._readable_index(other) for other in indexes_in(commit.iteration, names) if other != commit]
        taken = {index.save_id for index in others if index is not None}
        saves = sorted(
            save_id
            for save_id in saves_in(names) - taken
            if f"retired-{save_id}" not in names and not is_under_way(self._storage, commit.iteration, save_id)
        )
        if len(saves) != 1:
            has = f"files of {len(saves)} saves lie there: {', '.join(saves)}" if saves else "no shard files lie there"
            self.damaged.append(f"{commit.name}: damaged, and {has}; it cannot be told of which it was the index")
            return
        rebuilt = self._rebuild(commit.iteration, saves[0])
        if rebuilt is not None:
            index, content = rebuilt
            index = msgspec.structs.replace(index, epoch=commit.epoch, commit_seq=commit.commit_seq)
            self._mend(
                f"{commit.name}: made again, with its chunk table", lambda: self._replace(commit, index, content)
            )

    def _mend_table(self, commit: Commit, index: Index) -> None:
        rebuilt = self._rebuild(commit.iteration, index.save_id)
        if rebuilt is None:
            return
        found, content = rebuilt
        name = f"{commit.directory}/{index.chunk_table.name}"
        if found.files != index.files or found.tensors.keys() != index.tensors.keys():
            self.damaged.append(f"{name}: damaged, and the shard files are not those that the index names")
            return
        # Its records may come in another order than they did, so the index is written again, too.
        index = msgspec.structs.replace(index, tensors=found.tensors, chunk_table=found.chunk_table)
        self._mend(f"{name}: made again", lambda: self._replace(commit, index, content))

    def _rebuild(self, iteration: int, save_id: str) -> tuple[Index, bytes] | None:
        try:
            return rebuild(self._storage, iteration, save_id, on_bytes=self._on_bytes)
        except (CorruptionError, OSError) as error:
            if not is_damage(error):
                raise
            self.damaged.append(f"iteration {iteration} cannot be made again from its shard files: {error}")
            return None

    def _replace(self, commit: Commit, index: Index, table: bytes) -> None:
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
            rebuilt = self._rebuild(iteration, saves[0])
            if rebuilt is not None:
                self._mend(f"{directory}: committed again, as the newest", lambda: self._commit(*rebuilt))

    def _commit(self, index: Index, table: bytes) -> None:
        directory = iteration_directory(index.iteration)
        writer = Writer.claim(self._storage)
        self._storage.replace(f"{directory}/{index.chunk_table.name}", table)
        writer.publish(msgspec.structs.replace(index, epoch=writer.epoch, commit_seq=writer.commit_seq))

    def mend_tracker(self) -> None:
        """Have it name the newest checkpoint whose index is sound."""
        try:
            newest = newest_iteration(self._storage)
        except CorruptionError:
            return  # Nothing that it could name.
        named = read_tracker(self._storage)
        if newest is not None and newest != named:
            was = "missing or damaged" if named is None else f"naming {named}"
            self._mend(
                f"{TRACKER}: it was {was}, now it names {newest}",
                lambda: self._storage.replace(TRACKER, str(newest).encode()),
            )
