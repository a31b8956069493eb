"""The base of an adapter: which weights it was trained on, so that it is never put on others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path

import msgspec

from distckpt.errors import CheckpointNotFoundError, MismatchError

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth")
_READ_BYTES = 1 << 20


class BaseCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """location: where it lay; it may lie elsewhere now. digest: of all that is stored there. iteration, save_id: of a
    checkpoint of ours; None of files that others wrote."""

    location: str
    digest: str
    iteration: int | None = None
    save_id: str | None = None

    @classmethod
    def of_files(cls, path: str | PathLike[str], patterns: Sequence[str] = WEIGHT_FILES) -> BaseCheckpoint:
        """Of a weight file, or of the weight files in a directory: the SHA-256 of their names and bytes.

        All of them are read, by each rank that calls this; a base of our own checkpoints, from load_weights(), is not.
        Raises CheckpointNotFoundError if there is none, OSError.
        """
        place = Path(fspath(path))
        files = [place] if place.is_file() else sorted({file for pattern in patterns for file in place.glob(pattern)})
        if not files:
            raise CheckpointNotFoundError(f"{place}: no weight files there ({', '.join(patterns)})")
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as opened:
                while block := opened.read(_READ_BYTES):
                    digest.update(block)
        return cls(location=str(place), digest=digest.hexdigest())


def check_base(stored: BaseCheckpoint | None, now: BaseCheckpoint | None, iteration: int) -> None:
    """Whether this job's base is the one that the stored adapter was trained on. Raises MismatchError if not.

    stored: what is recorded of it; None of a checkpoint that holds whole models.
    """
    if stored is None and now is None:
        return
    if stored is None:
        raise MismatchError(f"iteration {iteration} holds a whole model, no adapter: pass no base")
    if now is None:
        raise MismatchError(
            f"iteration {iteration} holds an adapter, trained on {_described(stored)}. Load that base first, and "
            f"pass it: TrainState(..., base=...)"
        )
    if now.digest != stored.digest:
        raise MismatchError(
            f"the adapter of iteration {iteration} was trained on another base: on {_described(stored)}; this job's "
            f"is {_described(now)}"
        )


def _described(base: BaseCheckpoint) -> str:
    which = "" if base.iteration is None else f", iteration {base.iteration} (save {base.save_id})"
    return f"{base.location}{which}, digest {base.digest[:16]}"
