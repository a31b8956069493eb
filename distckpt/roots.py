"""Roots: which directory is meant. An iteration's directory stands for its root, and never becomes one itself."""

from __future__ import annotations

import logging
import os

from distckpt.commit import (
    TRACKER,
    Writer,
    highest_epoch,
    indexes_in,
    iteration_directories,
    iteration_of,
    read_file,
    writer_epochs,
)
from distckpt.errors import CheckpointError, CorruptionError
from distckpt.removing import saves_in
from distckpt.root_owner import MAX_OWNER_BYTES, RootOwner, decode_owner
from distckpt.storage import PosixStorage, Storage

logger = logging.getLogger("distckpt")
_MAX_DEPTH = 4  # from a path inside an iteration's directory up to it


def open_root(root: str | os.PathLike[str] | Storage) -> tuple[Storage, int | None]:
    """The storage of a root, and None; given the directory of an iteration, or a link to one, of its root, and the
    iteration."""
    if not isinstance(root, (str, os.PathLike)):
        return root, None
    storage = PosixStorage(root)
    above, name = os.path.split(without_link(storage.location))
    iteration = iteration_of(name)
    if iteration is None or not _is_iteration_directory(storage):
        return storage, None
    return PosixStorage(above), iteration


def without_link(path: str) -> str:
    """Of a link to the directory of an iteration, that: links have readable names. Any other path as it is."""
    if not os.path.islink(path):
        return path
    real = os.path.realpath(path)
    return path if iteration_of(os.path.basename(real)) is None else real


def _is_iteration_directory(storage: Storage) -> bool:
    """Whether there are files of saves in it, and no checkpoints below it."""
    names = storage.list("")
    return bool(indexes_in(0, names) or saves_in(names)) and not is_root(storage)


def is_root(storage: Storage) -> bool:
    """Whether a job has saved there: by its names."""
    names = storage.list("")
    return TRACKER in names or bool(writer_epochs(storage)) or bool(iteration_directories(storage))


def root_above(path: str) -> tuple[str, int] | None:
    """The root and the iteration that a path lies in, itself an iteration's directory or somewhere below one."""
    path = without_link(os.path.abspath(path))
    for _ in range(_MAX_DEPTH):
        above, name = os.path.split(path)
        iteration = iteration_of(name)
        if iteration is not None and is_root(PosixStorage(above)):
            return above, iteration
        path = above
    return None


def owner_of(storage: Storage) -> RootOwner | None:
    """Who claimed a root last; None if nobody has. Raises OSError."""
    epochs = writer_epochs(storage)
    if not epochs:
        return None
    try:
        return decode_owner(read_file(storage, f"writer-{max(epochs):06d}", MAX_OWNER_BYTES))
    except (FileNotFoundError, CorruptionError):  # Somebody else has claimed it since: a job, for all we know.
        return RootOwner()


def claim_root(storage: Storage, second: Storage | None = None) -> Writer:
    """Writer.claim, for a job's first save; of the first root alone if the second cannot be written, with a warning.
    Raises CheckpointError where a root would begin inside an iteration; OSError."""
    check_place(storage)
    if second is None:
        return Writer.claim(storage)
    above = 0
    try:
        check_place(second)
        above = highest_epoch(second)
        return Writer.claim(storage, second)
    except OSError as error:
        writer = Writer.claim(storage, above=above)  # If it was the first that failed, it does here again.
        logger.warning(
            "%s cannot be claimed, so this job copies nothing to it; saves go on in %s, and the next job copies what "
            "is missing there: %s",
            second.location,
            storage.location,
            error,
        )
        return writer


def check_place(root: Storage) -> None:
    """Raise CheckpointError where a root would begin inside an iteration."""
    if not isinstance(root, PosixStorage) or is_root(root):
        return
    found = root_above(root.location)
    if found is not None:
        above, iteration = found
        raise CheckpointError(
            f"{root.location} is no place for checkpoints: it lies in iteration {iteration} of {above}. To save "
            f"there, give the root {above}; to go on from that iteration, also load iteration {iteration} first. "
            f"Nothing was written."
        )
