"""Whether a job can go on from a checkpoint, going by what is recorded in it. Needs no torch, reads no tensor."""

from __future__ import annotations

from typing import Annotated

import msgspec

from distckpt.errors import CorruptionError

RECORD = "train_state"  # where TrainState puts its record in a checkpoint's metadata
VERSION = 1
_Names = Annotated[list[str], msgspec.Meta(max_length=1000)]


class Base(msgspec.Struct, frozen=True):
    """What an adapter was trained on, as far as it is shown."""

    location: str
    digest: str
    iteration: int | None = None


class StoredRecord(msgspec.Struct, frozen=True):
    """What a TrainState says of a checkpoint: sections that are stored, and those of its job that were left out."""

    version: int
    sections: _Names
    left_out: _Names
    base: Base | None = None


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
        stored = msgspec.json.decode(metadata, type=dict[str, msgspec.Raw]).get(RECORD)
    except msgspec.ValidationError:  # Metadata of another kind.
        stored = None
    try:
        record = None if stored is None else msgspec.json.decode(stored, type=StoredRecord)
    except msgspec.ValidationError as error:
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
