"""Removing: making checkpoints none, and what belongs to none. Rank 0 does it; distckpt.commit says why it is safe.

A sweep goes by names and markers, and takes nothing that a checkpoint, a save under way, or a reader in its period of
grace may still want.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from distckpt.commit import (
    Commit,
    indexes_in,
    iteration_directories,
    iteration_directory,
    pending_marker,
    read_file,
    read_head,
    writer_epochs,
)
from distckpt.errors import CheckpointError
from distckpt.labels import read_labels
from distckpt.storage import Storage

STALE_AFTER_S = 600.0  # a pending marker that was not touched for so long belongs to a save that died
# A retired marker beside its index: somebody is about to remove that, or died before. It warns who labels meanwhile.
RETIRING_S = 60.0
_NO_LABELS: Mapping[Commit, int] = MappingProxyType({})
_SAVE_ID = re.compile(r"(?:^pending-|^retired-|-)([0-9a-f]{32})(?:\.|$)")


def saves_in(names: Iterable[str]) -> set[str]:
    """The save_ids that the names in an iteration's directory carry, of whatever files."""
    return {m[1] for m in map(_SAVE_ID.search, (n for n in names if not n.startswith(".tmp-"))) if m}


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


def retire(storage: Storage, commits: Iterable[Commit], labels: Mapping[Commit, int] = _NO_LABELS) -> list[Commit]:
    """Make checkpoints none: their indexes go; their files follow at a sweep after the grace period.

    labels: the number of each one's labels when it was decided that it goes, if it had any. One that was labelled since
    is spared. Returns those that are gone. Raises OSError.
    """
    retired: list[Commit] = []
    for commit in commits:
        try:
            save_id = read_head(storage, commit).save_id
        except (OSError, CheckpointError):
            continue  # Damaged: nothing says which files are its own, and `repair` may want them.
        marker = f"{commit.directory}/retired-{save_id}"
        is_own = storage.put_if_absent(marker, b"")
        # Only now: who labels it from here on finds the marker.
        if read_labels(storage, commit.directory, save_id, may_lack_rights=True).number != labels.get(commit, 0):
            if is_own:  # Another's stays: it may be about to remove the index.
                storage.remove(marker)
                storage.sync_directory(commit.directory)
            continue
        storage.remove(commit.name)
        storage.sync_directory(commit.directory)
        # It was committed: a marker of its save that is still there protects nothing any more.
        storage.remove(pending_marker(commit.iteration, save_id))
        retired.append(commit)
    return retired


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
    indexes = sum(bool(indexes_in(0, [name])) for name in names)
    return not has_leftovers and indexes == 1 and len({m[1] for m in map(_SAVE_ID.search, names) if m}) == 1


def _committed_save_ids(storage: Storage, iteration: int, names: Sequence[str]) -> set[str] | None:
    """Save ids of the committed checkpoints in a directory; None when one of them cannot be read."""
    try:
        return {read_head(storage, commit).save_id for commit in indexes_in(iteration, names)}
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
        pending, retired = f"{directory}/pending-{save_id}", f"{directory}/retired-{save_id}"
        if save_id in live:  # A crash came between the commit, or the retirement, and the end of it.
            is_being_retired = save_id in groups.retired and not _is_older(storage, retired, RETIRING_S)
            garbage += [f for f in markers if not (is_being_retired and f.startswith("retired-"))]
            continue
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
    is_fenced = epoch.isdigit() and int(epoch) < max(writer_epochs(storage), default=0)
    return is_fenced or _is_older(storage, marker, STALE_AFTER_S)


def _is_left_temporary(storage: Storage, name: str) -> bool:
    """Whether it is of a put_if_absent or replace that died; a young one may be of another job, under way."""
    return name.rpartition("/")[2].startswith(".tmp-") and _is_older(storage, name, STALE_AFTER_S)


def _is_older(storage: Storage, name: str, age_s: float) -> bool:
    try:
        return storage.age_s(name) >= age_s
    except FileNotFoundError:
        return False  # It went since it was listed: whoever removed it is at work here.
