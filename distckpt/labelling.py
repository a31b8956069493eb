"""Labelling: one change of what is said of a checkpoint: tags, note, pin, metrics. By one process, beside any job."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial

import msgspec

from distckpt.cataloging import CheckpointEntry, Record, entry_of, survey, tag_holders
from distckpt.commit import Commit, list_commits, read_head
from distckpt.errors import CheckpointError, CheckpointNotFoundError, CorruptionError
from distckpt.labels import MAX_TAG_NUMBER, Labels, change_labels
from distckpt.metrics import MAX_METRICS, Metrics, check_name, known_metrics
from distckpt.selecting import Selector, open_selected, select_commits
from distckpt.storage import PosixStorage, Storage

MAX_NOTE_LENGTH = 10_000
MAX_TAGS = 1000
_ATTEMPTS = 20


def label(
    root: str | os.PathLike[str] | Storage,
    iteration: Selector = "latest",
    *,
    add_tags: Iterable[str] = (),
    remove_tags: Iterable[str] = (),
    note: str | None = None,
    pinned: bool | None = None,
    metrics: Mapping[str, float] | None = None,
) -> CheckpointEntry:
    """Change the labels of one committed checkpoint; what is not given stays. Durable on return; not collective.

    iteration: any selector; see distckpt.selecting. add_tags: a tag names one checkpoint of a root, and is taken from
    the one that had it. remove_tags: those that it does not have are left alone. note: "" removes it. pinned: whether
    retention may never remove it; tagged ones it does not remove either. metrics: added to those of the save, and win
    over them. Who may read the checkpoint may read its labels: in a root given as a path they have the mode and, if
    this process may give it, the group of its index.

    Raises CheckpointNotFoundError, also when the checkpoint is removed meanwhile; CorruptionError if its index is
    damaged, or labels have numbers that leave no higher ones; ValueError; OSError.
    """
    added, removed = _tags(add_tags), _tags(remove_tags)
    twice = sorted(added & removed)
    if twice:
        raise ValueError(f"tag {twice[0]!r} is to be added and to be removed")
    if note is not None:
        _check_note(note)
    measured = known_metrics(metrics)
    storage, selector = open_selected(root, iteration)
    commit = select_commits(storage, selector)[0]
    try:
        save_id = read_head(storage, commit).save_id
        if isinstance(root, (str, os.PathLike)):
            storage = _with_access_of(storage, commit)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"{commit.name}: it was removed meanwhile") from error
    # First from where a move that died has left them: they would name that checkpoint again.
    _take_from_others(storage, removed, commit)

    def change(labels: Labels) -> Labels:
        return _changed(labels, numbers, removed, note, pinned, measured)

    for _ in range(_ATTEMPTS):
        numbers = _next_numbers(storage, added, commit)
        change_labels(storage, commit, save_id, change)
        if not added or _holds(storage, commit, added):
            break
    else:
        raise CheckpointError(f"{commit.name}: others move the tags {sorted(added)} all the time; try again")
    _take_from_others(storage, added, commit)
    return _entry(storage, commit)


def _tags(tags: Iterable[str]) -> set[str]:
    if isinstance(tags, str):
        raise TypeError(f"tags: expected several, not the text {tags!r}")
    return {check_name("tag", tag) for tag in tags}


def _check_note(note: str) -> None:
    if len(note) > MAX_NOTE_LENGTH:
        raise ValueError(f"a note of {len(note)} characters, at most {MAX_NOTE_LENGTH} expected")
    if not all(line.isprintable() for line in note.split("\n")):
        raise ValueError("a note has no control characters but line breaks")


def _changed(
    labels: Labels,
    numbers: Mapping[str, int],
    removed: set[str],
    note: str | None,
    pinned: bool | None,
    metrics: Metrics,
) -> Labels:
    """numbers: of the tags to add."""
    tags = {tag: number for tag, number in labels.tags.items() if tag not in removed} | dict(numbers)
    all_metrics = labels.metrics | metrics
    if len(tags) > MAX_TAGS or len(all_metrics) > MAX_METRICS:
        raise ValueError(f"a checkpoint has at most {MAX_TAGS} tags and {MAX_METRICS} metrics added later")
    return msgspec.structs.replace(
        labels,
        tags=tags,
        note=labels.note if note is None else note,
        pinned=labels.pinned if pinned is None else bool(pinned),
        metrics=all_metrics,
    )


def _with_access_of(storage: Storage, commit: Commit) -> Storage:
    """The same root, where new files have mode and group of a commit's index, whatever the umask of who labels it.
    Raises OSError."""
    status = os.stat(os.path.join(storage.location, commit.name))
    mode = stat.S_IMODE(status.st_mode) & 0o666 | 0o600
    if not mode & 0o044 and status.st_uid != os.geteuid():
        return storage  # With that mode its owner could not read what another has written.
    try:
        return PosixStorage(storage.location, file_mode=mode, group=status.st_gid)
    except ValueError:  # A group that this process is not in.
        return PosixStorage(storage.location, file_mode=mode)


def _labelled(storage: Storage) -> list[Record]:
    """All that have labels. Raises OSError if some may not be read: a tag's number could be among them."""
    return survey(storage, list_commits(storage), labelled_only=True, may_lack_rights=False)


def _next_numbers(storage: Storage, tags: set[str], commit: Commit) -> dict[str, int]:
    """For each tag a number with which this checkpoint has it: its own if it has it already, else the highest."""
    if not tags:
        return {}
    records = _labelled(storage)
    holders = tag_holders(records)
    numbers = {}
    for tag in tags:
        highest = max((record.labels.labels.tags.get(tag, 0) for record in records), default=0)
        if highest == MAX_TAG_NUMBER:
            raise CorruptionError(
                f"{holders[tag].directory}: its labels give the tag {tag!r} the number {highest}, and none is "
                f"higher. No tag is moved so often: remove it from there first"
            )
        numbers[tag] = highest if holders.get(tag) == commit else highest + 1
    return numbers


def _holds(storage: Storage, commit: Commit, tags: set[str]) -> bool:
    holders = tag_holders(_labelled(storage))
    return all(holders.get(tag) == commit for tag in tags)


def _take_from_others(storage: Storage, tags: set[str], commit: Commit) -> None:
    """Take tags from checkpoints that had them before this one did."""
    if not tags:
        return
    records = _labelled(storage)
    own = next((record.labels.labels.tags for record in records if record.commit == commit), {})
    for record in records:
        had = record.labels.labels.tags
        older = {(tag, had[tag]) for tag in tags & had.keys()}
        older = {(tag, number) for tag, number in older if (number, record.commit) < (own.get(tag, 0), commit)}
        if older and record.head is not None:
            with suppress(CheckpointNotFoundError):  # It is being removed, and its tags with it.
                change_labels(storage, record.commit, record.head.save_id, partial(_without, older))


def _without(tags: set[tuple[str, int]], labels: Labels) -> Labels:
    """Of the tags those that have not been put there anew, with other numbers."""
    return msgspec.structs.replace(labels, tags=dict(labels.tags.items() - tags))


def _entry(storage: Storage, commit: Commit) -> CheckpointEntry:
    records = survey(storage, list_commits(storage), labelled_only=True)
    own = [record for record in records if record.commit == commit] or survey(storage, [commit])
    if not own:
        raise CheckpointNotFoundError(f"{commit.name}: it was removed meanwhile")
    return entry_of(own[0], tag_holders(records), time.time(), storage)
