"""The commit protocol: how files become a checkpoint, which one is newest, and how one is removed. Rank 0 runs it.

A save of iteration I by the job that holds epoch E:

 1. Claim. Before its first save the job creates writer-E, E one more than any there is, with put_if_absent.
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
 7. Look again: if a higher epoch has come since step 5, the save counts as failed, committed or not.
    Why: the successor may take our files for those of a dead save, and what is reported must stay.
 8. Tracker. Replace latest_checkpointed_iteration.txt. It is a convenience: "newest" is decided by 6.
 9. Protect, if that is asked for (distckpt.protecting): read everything back, then put verified-<save_id>; write
    parity files, sync the directory, then put their record.
    If it is not what was written: put unsound-<save_id>, and retention will let nothing go for its sake.
    Why now: nothing that the save replaces may go before it is known to be sound. Why in this order: a marker or
    record that survives a power cut must be true.
10. Remove the marker, retire what retention gives up, sweep.

Removing a checkpoint: a retired-<save_id> marker, then the index, sync the directory, and after a grace period the
files. Why: without its index it is no checkpoint, so a crash in between leaves garbage and never a half; readers
that have opened it get the grace period to finish.

I/O rules: after a failed write, fsync or close nothing is known of a file, so it is abandoned; what is tried again is
written as another file under another name. A file is finished only if its name still leads to it. No file changes
after the index that names it is there; repair alone replaces one, whole, by what the index says it was.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from distckpt.errors import CheckpointError, CheckpointNotFoundError, Committed, CorruptionError, FencedError
from distckpt.index import MAX_INDEX_BYTES, Index, IndexHead, decode_index, decode_index_head, encode_index
from distckpt.storage import Storage, drop_cache

TRACKER = "latest_checkpointed_iteration.txt"
STALE_AFTER_S = 600.0  # a pending marker that was not touched for so long belongs to a save that died
HEARTBEAT_S = 20.0
_ITERATION = re.compile(r"iter_(\d{7,})")
_INDEX = re.compile(r"index-(\d{6,})-(\d{6,})\.json")
_WRITER = re.compile(r"writer-(\d{6,})")
_SAVE_ID = re.compile(r"(?:^pending-|^retired-|-)([0-9a-f]{32})(?:\.|$)")


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


def iteration_directories(storage: Storage) -> list[tuple[int, str]]:
    """(iteration, directory name) of all iteration directories, committed or not, ascending."""
    found = ((_ITERATION.fullmatch(name), name) for name in storage.list(""))
    return sorted((int(m[1]), name) for m, name in found if m and name == iteration_directory(int(m[1])))


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


def _read_save_id(storage: Storage, commit: Commit) -> str:
    """Of an index that is undamaged and the one that its name says. Raises as read_index does."""
    head = decode_index_head(read_file(storage, commit.name, MAX_INDEX_BYTES), name=commit.name)
    _check_name(commit, head)
    return head.save_id


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


def newest_verified_iteration(storage: Storage) -> int | None:
    """The newest iteration whose newest commit was read back after it was saved; None if none was. Raises OSError."""
    newest: dict[int, Commit] = {}
    for commit in list_commits(storage):
        newest.setdefault(commit.iteration, commit)
    for commit in newest.values():
        try:
            save_id = _read_save_id(storage, commit)
        except (CorruptionError, FileNotFoundError):
            continue
        marker = verified_marker(commit.iteration, save_id)
        if marker.rpartition("/")[2] in storage.list(commit.directory):
            return commit.iteration
    return None


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
    """A job's right to write under a root: its epoch, and the number that its next commit gets."""

    storage: Storage
    epoch: int
    commit_seq: int
    published: Commit | None = None  # the last one

    @classmethod
    def claim(cls, storage: Storage) -> Writer:
        """Step 1. Raises OSError."""
        storage.make_directory("")
        owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
        while True:
            claimed = _writers(storage)
            # Of commits too: a root may have been copied without its writer files.
            epoch = max([*claimed, *(commit.epoch for commit in list_commits(storage))], default=0) + 1
            if storage.put_if_absent(f"writer-{epoch:06d}", owner):
                break
        for old in claimed:
            storage.remove(f"writer-{old:06d}")
        commits = list_commits(storage)
        return cls(storage, epoch, max((c.commit_seq for c in commits), default=0) + 1)

    def check_fence(self) -> None:
        """Step 5. Raises FencedError."""
        newest = max(_writers(self.storage), default=self.epoch)
        if newest > self.epoch:
            raise FencedError(
                f"{self.storage.location}: this job writes with epoch {self.epoch}, but a newer job has claimed epoch "
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

    def _is_committed(self, commit: Commit, save_id: str) -> Committed:
        """After a put of the index that may have had its effect or not."""
        try:
            if _read_save_id(self.storage, commit) != save_id:
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


def _writers(storage: Storage) -> list[int]:
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
            save_id = _read_save_id(storage, commit)
        except (CheckpointError, FileNotFoundError):
            unsound.add(commit)  # It may be the very index that was damaged.
            continue
        if f"unsound-{save_id}" in names:
            unsound.add(commit)
    return unsound


def is_under_way(storage: Storage, iteration: int, save_id: str) -> bool:
    """Whether a save that is not committed may still be: it was announced, and its job has not been seen to die."""
    marker = pending_marker(iteration, save_id)
    is_announced = f"pending-{save_id}" in storage.list(iteration_directory(iteration))
    return is_announced and not _is_dead(storage, marker)


def discard(storage: Storage, iteration: int, save_id: str) -> None:
    """Remove the files of a save that was not committed; its marker goes last. Raises OSError.

    Does nothing if the save is committed after all, as one may be that was interrupted, or if that cannot be told.
    """
    directory = iteration_directory(iteration)
    names = storage.list(directory)
    committed = _committed_save_ids(storage, iteration, names)
    if committed is None or save_id in committed:
        return
    own = [name for name in names if save_id in name]
    for name in sorted(own, key=lambda name: name.startswith("pending-")):
        storage.remove(f"{directory}/{name}")
    storage.remove_directory(directory)


def retire(storage: Storage, commits: Iterable[Commit]) -> None:
    """Make checkpoints none: their indexes go; their files follow at a sweep after the grace period."""
    for commit in commits:
        try:
            save_id = _read_save_id(storage, commit)
        except (OSError, CheckpointError):
            continue  # Damaged: nothing says which files are its own, and `repair` may want them.
        storage.put_if_absent(f"{commit.directory}/retired-{save_id}", b"")
        storage.remove(commit.name)
        storage.sync_directory(commit.directory)


@dataclass(slots=True)
class _Sweep:
    """What one iteration directory holds, by save_id."""

    files: dict[str, list[str]] = field(default_factory=dict)
    pending: set[str] = field(default_factory=set)
    retired: set[str] = field(default_factory=set)


def sweep(storage: Storage, *, grace_s: float) -> list[str]:
    """Remove what belongs to no checkpoint: files of dead saves, retired ones past `grace_s`, left temporaries.

    Spares saves with a live marker, and every directory whose index cannot be read. Returns the names removed.
    """
    removed = [name for name in storage.list("") if _is_left_temporary(storage, name)]
    for name in removed:
        storage.remove(name)
    if removed:
        storage.sync_directory("")
    for iteration, directory in iteration_directories(storage):
        try:
            removed += [f"{directory}/{name}" for name in _sweep_directory(storage, iteration, grace_s)]
        except FileNotFoundError:
            continue  # It went since it was listed: whoever removed it is at work here.
    return removed


def _sweep_directory(storage: Storage, iteration: int, grace_s: float) -> list[str]:
    """Of an iteration; the names removed. Raises FileNotFoundError if another job removes the directory meanwhile."""
    directory = iteration_directory(iteration)
    garbage = _garbage(storage, iteration, grace_s)
    if garbage:
        # Again: another job may have committed while this directory was being listed, and then neither its
        # marker nor its index need be in the first list. The index is there before the marker goes, so a
        # second list, begun after the first, shows one of them.
        confirmed = set(_garbage(storage, iteration, grace_s))
        garbage = [name for name in garbage if name in confirmed]
        # First: a power cut must not bring back an index whose absence is seen here, but not durable.
        storage.sync_directory(directory)
    for name in garbage:
        storage.remove(f"{directory}/{name}")
    if garbage:
        storage.sync_directory(directory)
        storage.remove_directory(directory)
    return garbage


def _is_tidy(names: Sequence[str]) -> bool:
    """Whether a directory holds the files of one committed checkpoint and nothing else, going by the names."""
    has_leftovers = any(name.startswith(("pending-", "retired-", ".tmp-")) for name in names)
    indexes = sum(bool(_INDEX.fullmatch(name)) for name in names)
    return not has_leftovers and indexes == 1 and len({m[1] for m in map(_SAVE_ID.search, names) if m}) == 1


def _committed_save_ids(storage: Storage, iteration: int, names: Sequence[str]) -> set[str] | None:
    """Save ids of the committed checkpoints in a directory; None when one of them cannot be read."""
    try:
        return {_read_save_id(storage, commit) for commit in indexes_in(iteration, names)}
    except (OSError, CheckpointError):
        return None


def _garbage(storage: Storage, iteration: int, grace_s: float) -> list[str]:
    """Names to remove from an iteration's directory, files before the markers that explain them."""
    directory = iteration_directory(iteration)
    names = storage.list(directory)
    live = None if _is_tidy(names) else _committed_save_ids(storage, iteration, names)
    if live is None:
        return []
    groups = _Sweep()
    garbage: list[str] = []
    for name in names:
        match = _SAVE_ID.search(name)
        if name.startswith(".tmp-"):
            if _is_left_temporary(storage, f"{directory}/{name}"):
                garbage.append(name)
        elif match:
            save_id = match[1]
            groups.files.setdefault(save_id, []).append(name)
            if name.startswith("pending-"):
                groups.pending.add(save_id)
            elif name.startswith("retired-"):
                groups.retired.add(save_id)
    for save_id, files in groups.files.items():
        markers = [f for f in files if f.startswith(("pending-", "retired-"))]
        if save_id in live:
            garbage += markers  # A crash came between the commit, or the retirement, and the end of it.
            continue
        pending, retired = f"{directory}/pending-{save_id}", f"{directory}/retired-{save_id}"
        is_under_way = save_id in groups.pending and not _is_dead(storage, pending)
        has_grace = save_id in groups.retired and not _is_older(storage, retired, grace_s)
        if not is_under_way and not has_grace:
            garbage += [f for f in files if f not in markers] + markers
    return garbage


def _is_dead(storage: Storage, marker: str) -> bool:
    """Whether the save that a pending marker announces can no longer be committed."""
    try:
        epoch = read_file(storage, marker, 32)
    except FileNotFoundError:
        return False  # It went since it was listed: whoever removed it is at work here.
    is_fenced = epoch.isdigit() and int(epoch) < max(_writers(storage), default=0)
    return is_fenced or _is_older(storage, marker, STALE_AFTER_S)


def _is_left_temporary(storage: Storage, name: str) -> bool:
    """Whether it is of a put_if_absent or replace that died; a young one may be of another job, under way."""
    return name.rpartition("/")[2].startswith(".tmp-") and _is_older(storage, name, STALE_AFTER_S)


def _is_older(storage: Storage, name: str, age_s: float) -> bool:
    try:
        return storage.age_s(name) >= age_s
    except FileNotFoundError:
        return False  # It went since it was listed: whoever removed it is at work here.
