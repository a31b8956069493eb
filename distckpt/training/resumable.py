"""Whether a job can go on from a checkpoint, going by what is recorded in it. Needs no torch, reads no tensor."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from distckpt.decoding import decode_json
from distckpt.errors import CorruptionError
from distckpt.training.base_checkpoint import BaseCheckpoint

RECORD = "train_state"  # where TrainState puts its record in a checkpoint's metadata
VERSION = 1
_Names = Annotated[list[str], msgspec.Meta(max_length=1000)]
_Facts = dict[str, Any]


class _Versioned(msgspec.Struct, frozen=True):
    version: Annotated[int, msgspec.Meta(ge=1)]


class StoredRecord(msgspec.Struct, frozen=True):
    """What a TrainState says of a checkpoint: sections that are stored, and those of its job that were left out; the
    base of an adapter; the checkpoints that it goes back to; and what it was made with, as JSON values."""

    version: Annotated[int, msgspec.Meta(ge=1)]
    sections: _Names
    left_out: _Names
    base: BaseCheckpoint | None = None
    resumed_from: list[_Facts] = msgspec.field(default_factory=list)
    environment: _Facts | None = None
    arguments: Any = None
    assets: _Facts = msgspec.field(default_factory=dict)
    models: _Facts = msgspec.field(default_factory=dict)
    schedulers: _Facts = msgspec.field(default_factory=dict)
    scaler: _Facts = msgspec.field(default_factory=dict)


def stored_record(metadata: object, name: str) -> StoredRecord | None:
    """The record in the metadata of a checkpoint; None if it was not saved by a TrainState. `name` is the checkpoint's.

    Of one of a newer version only that is known. Raises CorruptionError for a record that is none.
    """
    stored = metadata.get(RECORD) if isinstance(metadata, dict) else None
    if stored is None:
        return None
    try:
        encoded = msgspec.json.encode(stored)
        version = decode_json(encoded, _Versioned).version
        if version > VERSION:
            return StoredRecord(version, [], [])
        return decode_json(encoded, StoredRecord)
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CorruptionError(f"{name}: metadata: the record of its TrainState is none: {error}") from error


class Resumability(msgspec.Struct, frozen=True):
    """is_resumable: None if nothing is recorded. reason: why, or why not; what else a resume needs."""

    is_resumable: bool | None
    reason: str

    def __str__(self) -> str:
        answer = "unknown" if self.is_resumable is None else "yes" if self.is_resumable else "no"
        return f"{answer}, {'' if self.is_resumable else 'because '}{self.reason}" if self.reason else answer


def resumability(metadata: bytes, name: str) -> Resumability:
    """metadata: the index's, as JSON. Raises CorruptionError for a record that is none; `name` is the index's."""
    try:
        record = stored_record(msgspec.json.decode(metadata), name)
    except msgspec.DecodeError as error:
        raise CorruptionError(f"{name}: metadata: {error}") from error
    if record is None:
        return Resumability(
            None, "it was not saved by a TrainState, which would have recorded what the job consists of"
        )
    if record.version > VERSION:
        return Resumability(None, f"its record has version {record.version}, this package knows {VERSION}")
    if record.left_out:
        return Resumability(False, f"it was saved without {', '.join(record.left_out)}")
    if "optimizer" not in record.sections:
        return Resumability(False, "its job had no optimizer")
    if record.base is not None:
        which = "" if record.base.iteration is None else f", iteration {record.base.iteration}"
        return Resumability(True, f"on its base {record.base.location}{which} (digest {record.base.digest[:16]})")
    return Resumability(True, "")
