"""Catalog: what lies under a root: its checkpoints, saves that are none, and how many bytes they take. Changes nothing.

No torch: it reads indexes and labels, never tensors. A checkpoint that is removed meanwhile is left out.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

import msgspec

from distckpt.checkpoint_files import is_damage
from distckpt.commit import (
    Commit,
    decode_head_of,
    indexes_in,
    iteration_directories,
    list_commits,
    missing_files,
    read_file,
)
from distckpt.errors import CheckpointError
from distckpt.index import MAX_INDEX_BYTES, IndexHead
from distckpt.json_value import decode_value
from distckpt.labels import NO_LABELS, ReadLabels, labelled_saves, read_labels
from distckpt.metrics import Metrics
from distckpt.removing import is_under_way, saves_in
from distckpt.roots import open_root
from distckpt.storage import Storage

_SHARD = re.compile(r"shard-(\d{5,})(?:\.\d+)?-of-(\d{5,})-([0-9a-f]{32})\.safetensors")


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of one commit. head: None if its index is damaged, and `damage` says why. size_bytes: of its index,
    the files that it names, and parity; 0 if that is not known. missing: files that its index names and that are not
    there. has_parity: from which they may be made again."""

    commit: Commit
    head: IndexHead | None
    damage: str | None
    labels: ReadLabels
    is_verified: bool
    is_unsound: bool
    size_bytes: int
    missing: tuple[str, ...] = ()
    has_parity: bool = False

    @property
    def is_good(self) -> bool:
        """Whether nothing is known against it."""
        return self.head is not None and not self.is_unsound and not self.missing

    @property
    def metrics(self) -> Metrics:
        """Of its save, and those that were added later, which win."""
        saved = {} if self.head is None else self.head.metrics
        return dict(sorted((saved | self.labels.labels.metrics).items()))


class CheckpointEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint of a catalog.

    directory: below the root. damage: why its index cannot be read; then what only that says is missing ("", None,
    empty); or which of its files are not there. bytes: of its index, the files that it names, and parity. metrics: of
    its save and added later, which win. tags: those that name this checkpoint. verified: it was read back after it was
    saved; unsound: and was not what was written. labels_damage: why its newest labels cannot be read, which retention
    takes for a pin.
    """

    iteration: int
    epoch: int
    commit_seq: int
    directory: str
    save_id: str
    parent: str | None
    created_unix_s: float | None
    age_s: float | None
    bytes: int
    world_size: int | None
    mesh: dict[str, int]
    metadata: object
    metrics: Metrics
    tags: tuple[str, ...]
    note: str
    pinned: bool
    verified: bool
    unsound: bool
    damage: str | None
    labels_damage: str | None


class IncompleteSave(msgspec.Struct, frozen=True, kw_only=True):
    """Files of a save that is no checkpoint. state: whether it may still become one, died, or was one and is being
    removed. why: for people."""

    iteration: int
    directory: str
    save_id: str
    state: Literal["under way", "died", "retired"]
    bytes: int
    age_s: float
    why: str


class IterationUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of the files in one iteration's directory, by what they belong to."""

    iteration: int
    directory: str
    committed_bytes: int
    incomplete_bytes: int
    retired_bytes: int
    other_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.committed_bytes + self.incomplete_bytes + self.retired_bytes + self.other_bytes


def survey(
    storage: Storage, commits: Iterable[Commit], *, labelled_only: bool = False, may_lack_rights: bool = True
) -> list[Record]:
    """What is known of commits, in their order. labelled_only: only of those in directories that have labels.
    may_lack_rights: labels that this process may not read count as damaged: one person's must not stop everybody.

    Raises OSError for what is no damage (no right to read).
    """
    read = partial(read_labels, storage, may_lack_rights=may_lack_rights)
    names: dict[str, Sequence[str]] = {}
    heads: dict[Commit, tuple[IndexHead | None, str | None, int]] = {}
    for commit in commits:
        if commit.directory not in names:
            names[commit.directory] = storage.list(commit.directory)
        if labelled_only and not labelled_saves(names[commit.directory]):
            continue
        head = _read_head(storage, commit)
        if head is not None:
            heads[commit] = head
    known = {head.save_id for head, _, _ in heads.values() if head is not None}
    return [
        _record(
            storage, read, commit, *found, names[commit.directory], known, [c for c in heads if heads[c][0] is None]
        )
        for commit, found in heads.items()
    ]


def _read_head(storage: Storage, commit: Commit) -> tuple[IndexHead | None, str | None, int] | None:
    """The head of an index, or why it cannot be read, and its bytes; None if it is removed."""
    try:
        data = read_file(storage, commit.name, MAX_INDEX_BYTES)
        return decode_head_of(commit, data), None, len(data)
    except FileNotFoundError as error:
        if commit.name.rpartition("/")[2] not in storage.list(commit.directory):
            return None
        return None, str(error), 0
    except (CheckpointError, OSError) as error:
        if isinstance(error, OSError) and not is_damage(error):
            raise
        return None, str(error), 0


def _record(
    storage: Storage,
    read: Callable[[str, str], ReadLabels],
    commit: Commit,
    head: IndexHead | None,
    damage: str | None,
    index_bytes: int,
    names: Sequence[str],
    known: AbstractSet[str],
    unreadable: Sequence[Commit],
) -> Record:
    """read: the labels of a directory and save_id. names: of its directory.
    known: save_ids of sound indexes. unreadable: the commits whose indexes are not."""
    if head is None:
        labels = NO_LABELS
        saves = labelled_saves(names) - known - _retired(names)
        # Whose labels they are is only known if nobody else's they can be.
        if len(saves) == 1 and [c.directory for c in unreadable].count(commit.directory) == 1:
            labels = read(commit.directory, *saves)
        is_unsound = any(name.startswith("unsound-") for name in names)
        return Record(commit, None, damage, labels, False, is_unsound, 0)
    has_labels = head.save_id in labelled_saves(names)
    parity = [name for name in names if name.startswith("parity-") and head.save_id in name]
    size_bytes = index_bytes + head.size_bytes + sum(_size(storage, f"{commit.directory}/{name}") for name in parity)
    return Record(
        commit,
        head,
        None,
        read(commit.directory, head.save_id) if has_labels else NO_LABELS,
        f"verified-{head.save_id}" in names,
        f"unsound-{head.save_id}" in names,
        size_bytes,
        tuple(missing_files(storage, commit, head, names)),
        f"parity-{head.save_id}.json" in names,
    )


def _retired(names: Iterable[str]) -> set[str]:
    return {name.partition("-")[2] for name in names if name.startswith("retired-")}


def _size(storage: Storage, name: str) -> int:
    try:
        file = storage.open(name)
    except OSError:  # Gone since it was listed, or a directory.
        return 0
    try:
        return file.size_bytes
    finally:
        file.close()


def tag_holders(records: Iterable[Record]) -> dict[str, Commit]:
    """Which checkpoint each tag names: the one on which it has the highest number."""
    numbers: dict[str, tuple[int, Commit]] = {}
    for record in records:
        for tag, number in record.labels.labels.tags.items():
            numbers[tag] = max(numbers.get(tag, (0, record.commit)), (number, record.commit))
    return {tag: commit for tag, (_, commit) in numbers.items()}


def catalog(root: str | os.PathLike[str] | Storage) -> list[CheckpointEntry]:
    """The checkpoints under a root, newest commit first; of an iteration's directory, those of that iteration.

    Empty if there are none. Raises OSError for what may not be read.
    """
    storage, only = open_root(root)
    records = survey(storage, list_commits(storage))
    holders = tag_holders(records)
    now_unix_s = time.time()
    return [
        entry_of(record, holders, now_unix_s, storage)
        for record in records
        if only is None or record.commit.iteration == only
    ]


def entry_of(record: Record, holders: Mapping[str, Commit], now_unix_s: float, storage: Storage) -> CheckpointEntry:
    """holders: as of tag_holders."""
    commit, head, labels = record.commit, record.head, record.labels.labels
    damage, metadata, age_s = record.damage, None, None
    if head is not None:
        age_s = max(0.0, now_unix_s - head.created_unix_s)
        try:
            metadata = decode_value(bytes(head.metadata), f"{commit.name}: metadata")
        except CheckpointError as error:
            damage = str(error)
        damage = damage or _missing_text(record)
    else:
        with suppress(OSError):
            age_s = storage.age_s(commit.name)
    return CheckpointEntry(
        iteration=commit.iteration,
        epoch=commit.epoch,
        commit_seq=commit.commit_seq,
        directory=commit.directory,
        save_id="" if head is None else head.save_id,
        parent=None if head is None else head.parent,
        created_unix_s=None if head is None else head.created_unix_s,
        age_s=age_s,
        bytes=record.size_bytes,
        world_size=None if head is None else head.world_size,
        mesh={} if head is None else head.mesh,
        metadata=metadata,
        metrics=record.metrics,
        tags=tuple(sorted(tag for tag in labels.tags if holders.get(tag) == commit)),
        note=labels.note,
        pinned=labels.pinned,
        verified=record.is_verified,
        unsound=record.is_unsound,
        damage=damage,
        labels_damage=record.labels.damage,
    )


def _missing_text(record: Record) -> str | None:
    if not record.missing:
        return None
    more = f" and {len(record.missing) - 1} more of its files" if len(record.missing) > 1 else ""
    ways = "; `distckpt repair` may make what is missing again" if record.has_parity else ""
    return f"{record.commit.directory}/{record.missing[0]}{more} is missing{ways}"


def incomplete_saves(root: str | os.PathLike[str] | Storage) -> list[IncompleteSave]:
    """Saves under a root that are no checkpoints, by iteration: under way, dead, or retired. Raises OSError.

    Those that may be of a checkpoint whose index is damaged are left out: `catalog` has that, and `repair` its files.
    """
    storage, only = open_root(root)
    found: list[IncompleteSave] = []
    for iteration, directory in iteration_directories(storage):
        if only is None or iteration == only:
            found += incomplete_in(storage, iteration, directory)
    return found


def incomplete_in(storage: Storage, iteration: int, directory: str) -> list[IncompleteSave]:
    """The same of one iteration."""
    names = storage.list(directory)
    committed, has_damage = _committed_saves(storage, iteration, names)
    if committed is None:
        return []
    retired = _retired(names)
    found: list[IncompleteSave] = []
    for save_id in sorted(saves_in(names) - committed):
        is_announced = f"pending-{save_id}" in names
        if has_damage and save_id not in retired and not is_announced:
            continue
        own = [f"{directory}/{name}" for name in names if save_id in name]
        state: Literal["under way", "died", "retired"] = "died"
        if save_id in retired:
            state, why = "retired", "it was a checkpoint, and is being removed"
        elif is_announced and is_under_way(storage, iteration, save_id):
            state, why = "under way", f"no index yet: its save may be under way; {_ranks_text(names, save_id)}"
        else:
            why = f"no index: its save ended before it was committed; {_ranks_text(names, save_id)}"
        ages = [age for name in own if (age := _age(storage, name)) is not None]
        found.append(
            IncompleteSave(
                iteration=iteration,
                directory=directory,
                save_id=save_id,
                state=state,
                bytes=sum(_size(storage, name) for name in own),
                age_s=min(ages, default=0.0),
                why=why,
            )
        )
    return found


def _committed_saves(storage: Storage, iteration: int, names: Sequence[str]) -> tuple[set[str] | None, bool]:
    """save_ids of the sound indexes in a directory, and whether one is not sound; None if the directory changes."""
    committed: set[str] = set()
    has_damage = False
    for commit in indexes_in(iteration, names):
        found = _read_head(storage, commit)
        if found is None:
            return None, has_damage
        if found[0] is None:
            has_damage = True
        else:
            committed.add(found[0].save_id)
    return committed, has_damage


def _ranks_text(names: Iterable[str], save_id: str) -> str:
    shards = [match for match in map(_SHARD.fullmatch, names) if match and match[3] == save_id]
    if not shards:
        return "it has no shard files"
    return f"shard files of {len({match[1] for match in shards})} of {int(shards[0][2])} ranks are there"


def _age(storage: Storage, name: str) -> float | None:
    try:
        return storage.age_s(name)
    except OSError:
        return None


def disk_usage(root: str | os.PathLike[str] | Storage) -> list[IterationUsage]:
    """Bytes of the files in each iteration's directory, ascending. Raises OSError."""
    storage, only = open_root(root)
    return [
        _usage(storage, iteration, directory)
        for iteration, directory in iteration_directories(storage)
        if only is None or iteration == only
    ]


def _usage(storage: Storage, iteration: int, directory: str) -> IterationUsage:
    names = storage.list(directory)
    saves = incomplete_in(storage, iteration, directory)
    retired = {save.save_id for save in saves if save.state == "retired"}
    incomplete = {save.save_id for save in saves} - retired
    committed = saves_in(names) - retired - incomplete
    sizes = {"committed": 0, "incomplete": 0, "retired": 0, "other": 0}
    for name in names:
        save_id = next(iter(saves_in([name])), None)
        kind = "other"
        if save_id in committed or indexes_in(iteration, [name]):
            kind = "committed"
        elif save_id is not None:
            kind = "retired" if save_id in retired else "incomplete"
        sizes[kind] += _size(storage, f"{directory}/{name}")
    return IterationUsage(
        iteration=iteration,
        directory=directory,
        committed_bytes=sizes["committed"],
        incomplete_bytes=sizes["incomplete"],
        retired_bytes=sizes["retired"],
        other_bytes=sizes["other"],
    )
