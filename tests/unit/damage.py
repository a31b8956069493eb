"""Damage done to stored checkpoints, a byte or a file at a time."""

from __future__ import annotations

from collections.abc import Callable

from distckpt.commit import list_commits, read_index
from distckpt.index import Index
from distckpt.storage import Storage
from distckpt.storage.contract import read_all


def newest(storage: Storage) -> tuple[str, Index]:
    """Its directory and index."""
    commit = list_commits(storage)[0]
    return commit.directory, read_index(storage, commit)[0]


def change(storage: Storage, name: str, edit: Callable[[bytearray], object]) -> None:
    content = bytearray(read_all(storage, name))
    edit(content)
    storage.replace(name, bytes(content))


def flip(position: int) -> Callable[[bytearray], object]:
    def edit(content: bytearray) -> None:
        content[position] ^= 1

    return edit
