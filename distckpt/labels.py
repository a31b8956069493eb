"""Labels: what people say of a committed checkpoint and may change: tags, a note, a pin, metrics measured later.

They are a record beside the index, `labels-<number>-<save_id>.json`. Every change is a new file under the next number,
put only if that is not taken, and the highest number that can be read counts: a crash leaves the old labels or the
new ones. The one before the newest stays, so that a listing made meanwhile shows one of them.

A tag names one checkpoint of a root. It is put on the new one first, with a number one higher than anywhere else, and
then taken from the old one; meanwhile it names the one with the higher number.

Beside a job that removes checkpoints: `retire` puts its marker first, then looks whether labels have come. Whoever
labels puts labels first, then looks whether a marker, or no index, is there. One of the two sees the other.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable

import msgspec

from distckpt.checked_json import checked_body, decode_body, encode_record
from distckpt.checkpoint_files import is_damage
from distckpt.commit import Commit, read_file
from distckpt.errors import CheckpointError, CheckpointNotFoundError, CorruptionError
from distckpt.index import MAX_NATURAL, Natural, SaveId
from distckpt.metrics import Metrics
from distckpt.shard_file import FORMAT, FORMAT_VERSION
from distckpt.storage import Storage

_NAME = re.compile(r"labels-(\d{6,18})-([0-9a-f]{32})\.json")
_MAX_RECORD_BYTES = 16 << 20
MAX_TAG_NUMBER = MAX_NATURAL
_MAX_NUMBER = 10**18 - 1  # A name has no more digits.
_ATTEMPTS = 100
_WAIT_S, _STEP_S = 2.0, 0.02  # for a removal that may be given up


class Labels(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The labels of one checkpoint. number: of the file, 0 if there is none. tags: with the number that each has."""

    format: str = ""
    version: int = 0
    save_id: SaveId = "0" * 32
    number: Natural = 0
    tags: dict[str, Natural] = {}
    note: str = ""
    pinned: bool = False
    metrics: Metrics = {}


class ReadLabels(msgspec.Struct, frozen=True):
    """What was found. number: the highest of all files. damage: why that one does not count; then `labels` are those
    before it, or empty, and nobody knows what was said of the checkpoint."""

    labels: Labels
    number: int
    damage: str | None


NO_LABELS = ReadLabels(Labels(), 0, None)


def labelled_saves(names: Iterable[str]) -> set[str]:
    """The save_ids of the labels among the names of an iteration's directory."""
    return {match[2] for match in map(_NAME.fullmatch, names) if match}


def label_numbers(names: Iterable[str], save_id: str) -> list[int]:
    """Those of a save, ascending."""
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match and match[2] == save_id)


def read_labels(storage: Storage, directory: str, save_id: str, *, may_lack_rights: bool = False) -> ReadLabels:
    """The labels of a checkpoint. may_lack_rights: those that this process may not read count as damaged, for who is
    not about to write on from them. Raises OSError for what is no damage.
    """
    for attempt in range(_ATTEMPTS):
        numbers = label_numbers(storage.list(directory), save_id)
        damage: str | None = None
        for number in reversed(numbers):
            try:
                return ReadLabels(_read(storage, directory, save_id, number), numbers[-1], damage)
            except (CheckpointError, OSError) as error:
                lacks_rights = may_lack_rights and isinstance(error, PermissionError)
                if isinstance(error, OSError) and not is_damage(error) and not lacks_rights:
                    raise
                damage = damage or str(error)
                if isinstance(error, FileNotFoundError) and attempt < _ATTEMPTS - 1:
                    break  # Replaced since it was listed.
        else:
            return ReadLabels(Labels(), numbers[-1] if numbers else 0, damage)
    raise AssertionError("the last attempt returns")


def _read(storage: Storage, directory: str, save_id: str, number: int) -> Labels:
    name = _path(directory, save_id, number)
    labels = decode_body(checked_body(read_file(storage, name, _MAX_RECORD_BYTES), name=name), Labels, name=name)
    if labels.format == FORMAT and labels.version != FORMAT_VERSION:
        raise CheckpointError(f"{name}: format version {labels.version}; this package reads version {FORMAT_VERSION}")
    if (labels.format, labels.save_id, labels.number) != (FORMAT, save_id, number):
        raise CorruptionError(f"{name}: it is of {labels.format} {labels.save_id}, number {labels.number}")
    return labels


def _path(directory: str, save_id: str, number: int) -> str:
    return f"{directory}/labels-{number:06d}-{save_id}.json"


def change_labels(storage: Storage, commit: Commit, save_id: str, change: Callable[[Labels], Labels]) -> Labels:
    """Write what `change` makes of the labels. It may be called again, with what others have written meanwhile.

    Raises CheckpointNotFoundError if the checkpoint is, or may be, removed meanwhile; CheckpointError; OSError.
    """
    directory = commit.directory
    for _ in range(_ATTEMPTS):
        found = read_labels(storage, directory, save_id)
        wanted = change(found.labels)
        number = found.number
        if wanted != found.labels or found.damage is not None:
            number += 1
            if number > _MAX_NUMBER:
                raise CorruptionError(f"{directory}: labels of number {found.number} leave no higher one: remove them")
            wanted = msgspec.structs.replace(
                wanted, format=FORMAT, version=FORMAT_VERSION, save_id=save_id, number=number
            )
            data = encode_record(wanted)
            if len(data) > _MAX_RECORD_BYTES:
                raise ValueError(f"labels of {len(data)} bytes, at most {_MAX_RECORD_BYTES} expected")
            try:
                is_put = storage.put_if_absent(_path(directory, save_id, number), data)
            except FileNotFoundError:
                raise _not_found(commit) from None
            if not is_put:
                continue
        numbers = label_numbers(storage.list(directory), save_id)
        if numbers and numbers[-1] > number:
            continue  # The name was free again since others had gone further: what they wrote counts, not this.
        _check_is_there(storage, commit, save_id)
        for old in (n for n in numbers if n < number - 1):
            storage.remove(_path(directory, save_id, old))
        return wanted
    raise CheckpointError(f"{commit.directory}: others change its labels all the time; try again")


def _check_is_there(storage: Storage, commit: Commit, save_id: str) -> None:
    """After labels were put: whether a removal that began before has seen them."""
    deadline = time.monotonic() + _WAIT_S
    while True:
        names = storage.list(commit.directory)
        if commit.name.rpartition("/")[2] not in names:
            raise _not_found(commit)
        if f"retired-{save_id}" not in names:
            return
        if time.monotonic() >= deadline:
            raise CheckpointNotFoundError(
                f"{commit.name}: its removal had begun when it was labelled, and was neither finished nor given up "
                f"since: look whether it is still there, and label it again. If who removed it has died, the next save "
                f"or `distckpt prune` under this root clears its marker away."
            )
        time.sleep(_STEP_S)


def _not_found(commit: Commit) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(f"{commit.name}: it was removed while it was being labelled; it has no labels now")
