"""Whole files: written to the end and durable, or abandoned. Made of the port's own calls, for any backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from distckpt.storage.port import Storage, WriteFile


@contextmanager
def new_file(storage: Storage, name: str, size_bytes: int) -> Iterator[WriteFile]:
    """A new file for the body to write, of size_bytes and durable when it is left; abandoned if anything fails."""
    file = storage.create(name, size_hint=size_bytes)
    try:
        yield file
        file.finish(size_bytes)
    except BaseException:
        file.abandon()
        raise
