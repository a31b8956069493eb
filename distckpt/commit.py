"""The commit protocol: how files become a checkpoint, which one is newest, and how one is removed. Rank 0 runs it.

A save of iteration I by the job that holds epoch E:

 1. Claim. Before its first save the job creates writer-E, E one more than any there is, with put_if_absent. If a
    higher one is there afterwards, it is fenced as in step 5; else it removes the lower ones.
    Why: of two jobs on one root, exactly one holds the highest epoch, and everybody can see which.
 2. Announce. Make iter_I and put pending-<save_id> in it, which says E; touch it while the save goes on.
    Why: a sweep spares the files of a save that is under way. One that died it tells by the marker's age, or by
    an epoch that is no longer the highest: such a save cannot pass step 5 any more.
 3. Write. Every rank writes files whose names carry save_id, makes their content durable, and checks that
    the name still leads to the open file; all ranks report before anything else happens (agree).
    Why: no file of an older save is touched, so that until step 6 the old checkpoint is whole.
 4. Write the chunk table, then sync the directory.
    Why: the index must not name a file that a crash can lose.
 5. Fence. If a writer with a higher epoch is there, stop: FencedError.
    Why: a job that was given up (hung, partitioned) and wakes must not overrule its successor.
 6. Commit. put_if_absent(index-<epoch>-<commit_seq>.json), durable on return. The checkpoint now exists.
    If the name is taken by our own save_id, an earlier attempt succeeded and its reply was lost.
    Why the name: (epoch, commit_seq) orders all commits of a root without opening a file, also those of
    one iteration that was saved again and those of a job that passed step 5 just before it was fenced.
 7. Look again: if a file that the index names is gone, remove the index, durably, and fail: no checkpoint.
    If a higher epoch has come since step 5, the save counts as failed, committed or not.
    Why: to a sweep whose clock is ahead, or after a long silence of rank 0, our files were those of a dead save, and
    a sweep claims no epoch; the successor may take them for such too. Nothing that the save replaces has gone yet,
    and what is reported must stay. Once the index is there, no sweep that begins takes them.
 8. Tracker. Replace latest_checkpointed_iteration.txt. It is a convenience: "newest" is decided by 6.
 9. Protect, if that is asked for (distckpt.protecting): read everything back, then put verified-<save_id>; write
    parity files, sync the directory, then put their record.
    If it is not what was written: put unsound-<save_id>, and retention will let nothing go for its sake.
    Why now: nothing that the save replaces may go before it is known to be sound. Why in this order: a marker or
    record that survives a power cut must be true.
10. Remove the marker, retire what retention gives up, sweep.

Removing a checkpoint: a retired-<save_id> marker, a look whether it was labelled since that was decided, then the
index, sync the directory, and after a grace period the files. Why: without its index it is no checkpoint, so a crash
in between leaves garbage and never a half; who labels it meanwhile sees the marker, or is seen (distckpt.labels);
readers that have opened it get the grace period to finish.

I/O rules: after a failed write, fsync or close nothing is known of a file, so it is abandoned; what is tried again is
written as another file under another name. A file is finished only if its name still leads to it. No file changes
after the index that names it is there; repair alone replaces one, whole, by what the index says it was.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from distckpt.errors import CheckpointError, CheckpointNotFoundError, Committed, CorruptionError, FencedError
from distckpt.index import (
    MAX_INDEX_BYTES,
    Index,
    IndexHead,
    decode_index,
    decode_index_head,
    encode_index,
    names_in,
)
from distckpt.root_owner import encode_owner
from distckpt.storage import Storage, drop_cache

TRACKER = "latest_checkpointed_iteration.txt"
HEARTBEAT_S = 20.0
_ITERATION = re.compile(r"iter_(\d{7,})")
_INDEX = re.compile(r"index-(\d{6,})-(\d{6,})\.json")
_WRITER = re.compile(r"writer-(\d{6,})")
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EINVAL, errno.ENAMETOOLONG)  # A name in a head may be any text.


@dataclass(frozen=True, slots=True, order=True)
class Commit:
    """One committed index, by name only; ordered from oldest to newest."""

    epoch: int
    commit_seq: int
    iteration: int

    @property
    def directory(self) -> str:
        return iteration_directory(self.iteration)

    @property
    def name(self) -> str:
        return f"{self.directory}/index-{self.epoch:06d}-{self.commit_seq:06d}.json"


class CommitFailed(CheckpointError):
    """Publishing failed; `committed` says whether the checkpoint exists all the same."""

    def __init__(self, message: str, committed: Committed) -> None:
        super().__init__(message)
        self.committed: Committed = committed


def new_save_id() -> str:
    return os.urandom(16).hex()


def iteration_directory(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def iteration_of(directory: str) -> int | None:
    """The iteration whose directory has this name; None if none's has."""
    match = _ITERATION.fullmatch(directory)
    return int(match[1]) if match and directory == iteration_directory(int(match[1])) else None


def iteration_directories(storage: Storage) -> list[tuple[int, str]]:
    """(iteration, directory name) of all iteration directories, committed or not, ascending."""
    found = ((iteration_of(name), name) for name in storage.list(""))
    return sorted((iteration, name) for iteration, name in found if iteration is not None)


def indexes_in(iteration: int, names: Iterable[str]) -> list[Commit]:
    """The commits among the names of an iteration's directory."""
    return [Commit(int(m[1]), int(m[2]), iteration) for m in map(_INDEX.fullmatch, names) if m]


def list_commits(storage: Storage) -> list[Commit]:
    """Every commit under the root, newest first. Nothing is opened: an index may still turn out to be damaged."""
    earlier: dict[int, list[str]] = {}
    while True:
        names = {
            iteration: [name for name in storage.list(directory) if name.startswith(("index-", "retired-"))]
            for iteration, directory in iteration_directories(storage)
        }
        commits = [commit for iteration, found in names.items() for commit in indexes_in(iteration, found)]
        # Listings are no snapshot: a checkpoint may have been replaced, between two of them, by one in a directory
        # that was listed before. That leaves its marker, and another look then finds the new one, or more markers.
        is_retired = any(name.startswith("retired-") for found in names.values() for name in found)
        if names == earlier or (commits and not is_retired):
            return sorted(commits, reverse=True)
        earlier = names


def read_file(storage: Storage, name: str, max_bytes: int, *, past_cache: bool = False) -> bytes:
    """A small file, whole. Raises CorruptionError if it is larger than max_bytes."""
    file = storage.open(name)
    try:
        if past_cache:
            drop_cache(file)
        if file.size_bytes > max_bytes:
            raise CorruptionError(f"{name}: {file.size_bytes} bytes, at most {max_bytes} expected")
        data = bytearray(file.size_bytes)
        file.read_into(0, data)
        return bytes(data)
    except EOFError as error:
        raise CorruptionError(f"{name}: {error}") from error
    finally:
        file.close()


def read_index(storage: Storage, commit: Commit, *, past_cache: bool = False) -> tuple[Index, bytes]:
    """The validated index of a commit, and its bytes. past_cache: read what lies on the storage, not what this host
    remembers of it. Raises CorruptionError, or OSError if it is gone."""
    data = read_file(storage, commit.name, MAX_INDEX_BYTES, past_cache=past_cache)
    return decode_index_of(commit, data), data


def decode_index_of(commit: Commit, data: bytes) -> Index:
    """Decode an index and check that it is the one that its name says."""
    index = decode_index(data, name=commit.name)
    _check_name(commit, index)
    return index


def read_head(storage: Storage, commit: Commit) -> IndexHead:
    """The same of an index without its tensors: which checkpoint it is of. Raises as read_index does."""
    return decode_head_of(commit, read_file(storage, commit.name, MAX_INDEX_BYTES))


def decode_head_of(commit: Commit, data: bytes) -> IndexHead:
    """As decode_index_of, of the head."""
    head = decode_index_head(data, name=commit.name)
    _check_name(commit, head)
    return head


def _check_name(commit: Commit, index: Index | IndexHead) -> None:
    found = Commit(index.epoch, index.commit_seq, index.iteration)
    if found != commit:
        raise CorruptionError(f"{commit.name}: it is the index of {found.name}")


def newest_iteration(storage: Storage) -> int | None:
    """The iteration of the newest commit whose index is sound; None if there is no commit at all.

    Raises CorruptionError if all indexes are damaged, OSError if one cannot be read: "nothing there" would make
    a job start afresh beside its checkpoints.
    """
    damaged: dict[Commit, str] = {}
    # Listed anew each time: an index that is gone was replaced since it was listed.
    while left := [commit for commit in list_commits(storage) if commit not in damaged]:
        try:
            return read_index(storage, left[0])[0].iteration
        except (CorruptionError, FileNotFoundError) as error:
            damaged[left[0]] = str(error)
    if damaged:
        raise CorruptionError(f"{storage.location}: no index is sound: {'; '.join(damaged.values())}")
    return None


def newest_by_iteration(commits: Iterable[Commit]) -> list[Commit]:
    """Without those whose iteration was committed again, newest first."""
    newest: dict[int, Commit] = {}
    for commit in sorted(commits, reverse=True):
        newest.setdefault(commit.iteration, commit)
    return list(newest.values())


def newest_verified(*storages: Storage) -> Commit | None:
    """The newest commit of roots that was read back after it was saved, if its iteration was not committed again; None
    if none was. Raises OSError."""
    commits = {commit for storage in storages for commit in list_commits(storage)}
    for commit in newest_by_iteration(commits):
        if any(_is_verified(storage, commit) for storage in storages):
            return commit
    return None


def _is_verified(storage: Storage, commit: Commit) -> bool:
    try:
        save_id = read_head(storage, commit).save_id
    except (CorruptionError, FileNotFoundError):
        return False
    return verified_marker(commit.iteration, save_id).rpartition("/")[2] in storage.list(commit.directory)


def newest_verified_iteration(storage: Storage) -> int | None:
    """The iteration of newest_verified()."""
    commit = newest_verified(storage)
    return None if commit is None else commit.iteration


def by_lineage(storage: Storage, commits: Sequence[Commit]) -> list[Commit]:
    """Commits, given newest first, in the order in which a load falls back: each is followed by the one that its job
    had loaded or saved before it, so that a run which was rolled back stays on its branch."""
    heads: dict[Commit, IndexHead] = {}
    for commit in commits:
        with suppress(CheckpointError, OSError):  # Of one that cannot be read nothing is known but its name.
            heads[commit] = read_head(storage, commit)
    return order_by_lineage(commits, heads)


def order_by_lineage(commits: Sequence[Commit], heads: Mapping[Commit, IndexHead]) -> list[Commit]:
    """The same, of heads that have been read."""
    of_save = {head.save_id: commit for commit, head in heads.items()}
    ordered: dict[Commit, None] = {}
    for newest in commits:
        following: Commit | None = newest
        while following is not None and following not in ordered:
            ordered[following] = None
            parent = heads[following].parent if following in heads else None
            following = None if parent is None else of_save.get(parent)
    return list(ordered)


def find_commits(storage: Storage, iteration: int | None) -> list[Commit]:
    """Commits that a load may use, best first: all, or those of one iteration. Raises CheckpointNotFoundError."""
    commits = list_commits(storage)
    wanted = [c for c in commits if iteration is None or c.iteration == iteration]
    if not wanted:
        known = sorted({c.iteration for c in commits})
        has = f"it has iterations {known[-10:]}" if known else "it has no committed checkpoint"
        which = "" if iteration is None else f" of iteration {iteration}"
        raise CheckpointNotFoundError(f"no checkpoint{which} under {storage.location}: {has}")
    return wanted


def read_tracker(storage: Storage) -> int | None:
    """The iteration that the tracker names; None when it is missing or is not a number."""
    try:
        text = read_file(storage, TRACKER, 64)
    except (FileNotFoundError, CorruptionError):
        return None
    return int(text) if re.fullmatch(rb"\d{1,18}\s*", text) else None


def tracker_warning(storage: Storage, newest: Commit) -> str | None:
    """What is wrong with the tracker, given the newest commit; None when it names that."""
    try:
        named = read_tracker(storage)
    except OSError as error:
        return f"{TRACKER} cannot be read ({error}); the newest committed checkpoint is {newest.iteration}"
    if named == newest.iteration:
        return None
    says = "is missing or damaged" if named is None else f"says {named}"
    return f"{TRACKER} {says}; the newest committed checkpoint is {newest.iteration}"


@dataclass(slots=True)
class Writer:
    """A job's right to write under a root: its epoch, and the number that its next commit gets.

    second: where its checkpoints are copied to.
    """

    storage: Storage
    epoch: int
    commit_seq: int
    published: Commit | None = None  # the last one
    second: Storage | None = None

    @classmethod
    def claim(
        cls, storage: Storage, second: Storage | None = None, *, above: int = 0, reshards: str | None = None
    ) -> Writer:
        """Step 1, in both roots: the order of commits must be one over them, although one may have been wiped. above:
        epoch that is to be exceeded, too. reshards: as of RootOwner. Raises FencedError, OSError."""
        roots = [storage] if second is None else [storage, second]
        for root in roots:
            root.make_directory("")
        while True:
            epoch = max(above, *map(highest_epoch, roots)) + 1
            if all(root.put_if_absent(f"writer-{epoch:06d}", encode_owner(reshards)) for root in roots):
                break
        commit_seq = max((commit.commit_seq for root in roots for commit in list_commits(root)), default=0) + 1
        writer = cls(storage, epoch, commit_seq, second=second)
        writer.check_fences()  # A second job may have had this number since we looked, and a third removed its file.
        for root in roots:
            for old in writer_epochs(root):
                if old < epoch:
                    root.remove(f"writer-{old:06d}")
        return writer

    def check_fence(self) -> None:
        """Step 5. Raises FencedError."""
        self._check_fence_of(self.storage)

    def check_fences(self) -> None:
        """The same of both roots, before a copy becomes a checkpoint. Raises FencedError."""
        self._check_fence_of(self.storage)
        if self.second is not None:
            self._check_fence_of(self.second)

    def _check_fence_of(self, root: Storage) -> None:
        newest = max(writer_epochs(root), default=self.epoch)
        if newest > self.epoch:
            raise FencedError(
                f"{root.location}: this job writes with epoch {self.epoch}, but a newer job has claimed epoch "
                f"{newest}. Stop this job, or give it a root of its own."
            )

    def announce(self, iteration: int, save_id: str) -> None:
        """Step 2. Raises FencedError or OSError."""
        self.check_fence()
        directory = iteration_directory(iteration)
        marker, content = pending_marker(iteration, save_id), str(self.epoch).encode()
        self.storage.make_directory(directory)
        try:
            self.storage.put_if_absent(marker, content)
        except FileNotFoundError:  # A job that was fenced has removed the directory, since nothing was in it.
            self.storage.make_directory(directory)
            self.storage.put_if_absent(marker, content)

    def publish(self, index: Index) -> None:
        """Steps 4 (its sync) to 8. Raises FencedError, or CommitFailed saying whether the checkpoint exists."""
        commit = Commit(self.epoch, self.commit_seq, index.iteration)
        try:
            # Directory first: the index must not name a file that a crash can lose.
            self.storage.sync_directory(commit.directory)
            self.check_fence()
        except OSError as error:
            raise CommitFailed(str(error), "no") from error
        data = encode_index(index)
        if len(data) > MAX_INDEX_BYTES:
            raise CommitFailed(
                f"the index has {len(data)} bytes, readers take {MAX_INDEX_BYTES}. Large values fit in tensors: "
                f"{_largest_values(index)}",
                "no",
            )
        # Now, not after success: of a failed commit it may never be known whether it took its number.
        self.commit_seq += 1
        try:
            self._put_index(commit, index.save_id, data)
        except OSError as error:
            raise CommitFailed(str(error), self._is_committed(commit, index.save_id)) from error
        self._check_files(commit, index)
        try:
            self.check_fence()
        except (FencedError, OSError) as error:
            raise CommitFailed(f"a newer job may have claimed the root in the meantime: {error}", "unknown") from error
        self.published = commit
        try:
            self.storage.replace(TRACKER, str(index.iteration).encode())
        except OSError as error:
            raise CommitFailed(
                f"the checkpoint is committed, but the tracker is not updated: {error}", "yes"
            ) from error

    def _put_index(self, commit: Commit, save_id: str, data: bytes) -> None:
        if self.storage.put_if_absent(commit.name, data):
            return
        committed = self._is_committed(commit, save_id)
        if committed == "unknown":
            raise CommitFailed(f"{commit.name} is there already, and whose it is cannot be read", committed)
        if committed == "no":
            raise FencedError(f"{commit.name} is there already, of another save: another job writes to this root")

    def _check_files(self, commit: Commit, index: Index) -> None:
        """After the index is there. Raises CommitFailed."""
        try:
            gone = missing_files(self.storage, commit, index, self.storage.list(commit.directory))
            if gone:
                self.storage.remove(commit.name)
                self.storage.sync_directory(commit.directory)
        except OSError as error:
            raise CommitFailed(f"whether its files are still there cannot be told: {error}", "unknown") from error
        if gone:
            more = f" and {len(gone) - 1} more files" if len(gone) > 1 else ""
            raise CommitFailed(
                f"{commit.directory}/{gone[0]}{more} of this save went while it was under way, and its index was "
                f"removed. A prune, or another job, took it for a save that had died: its marker looked older than "
                f"the limit for that. Look whether the hosts' clocks agree, and save again.",
                "no",
            )

    def _is_committed(self, commit: Commit, save_id: str) -> Committed:
        """After a put of the index that may have had its effect or not."""
        try:
            if read_head(self.storage, commit).save_id != save_id:
                return "no"
            self.storage.sync_directory(commit.directory)  # What can be seen can still be lost.
            return "yes"
        except FileNotFoundError:
            return "no"
        except (OSError, CheckpointError):
            return "unknown"


def _largest_values(index: Index) -> str:
    largest = sorted(index.values.items(), key=lambda item: -len(bytes(item[1])))[:3]
    return ", ".join(f"{key!r} ({len(bytes(value))} bytes)" for key, value in largest)


def highest_epoch(storage: Storage) -> int:
    """Of all jobs that have claimed this root, or committed to it: a copy may lack writer files. 0 if there was none.
    Raises OSError."""
    return max([*writer_epochs(storage), *(commit.epoch for commit in list_commits(storage))], default=0)


def missing_files(storage: Storage, commit: Commit, index: Index | IndexHead, names: Iterable[str]) -> list[str]:
    """Those that an index names and that are not there. names: of its directory, listed when the index was there, or
    before. Raises OSError."""
    listed = set(names)
    return [name for name in names_in(index) if name not in listed and _is_gone(storage, f"{commit.directory}/{name}")]


def _is_gone(storage: Storage, name: str) -> bool:
    """Asked for by name: a listing may come from what this host remembers of the directory."""
    try:
        storage.open(name).close()
    except ValueError:
        return True
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        return True
    return False


def writer_epochs(storage: Storage) -> list[int]:
    """Of the jobs that have claimed this root."""
    return [int(m[1]) for m in map(_WRITER.fullmatch, storage.list("")) if m]


def pending_marker(iteration: int, save_id: str) -> str:
    return f"{iteration_directory(iteration)}/pending-{save_id}"


def verified_marker(iteration: int, save_id: str) -> str:
    return f"{iteration_directory(iteration)}/verified-{save_id}"


def unsound_marker(iteration: int, save_id: str) -> str:
    return f"{iteration_directory(iteration)}/unsound-{save_id}"


def unsound_commits(storage: Storage, commits: Iterable[Commit]) -> set[Commit]:
    """Those that were read back after they were saved, and were not what was written. Raises OSError."""
    unsound = set()
    for commit in commits:
        names = storage.list(commit.directory)
        if not any(name.startswith("unsound-") for name in names):
            continue
        try:
            save_id = read_head(storage, commit).save_id
        except (CheckpointError, FileNotFoundError):
            unsound.add(commit)  # It may be the very index that was damaged.
            continue
        if f"unsound-{save_id}" in names:
            unsound.add(commit)
    return unsound
