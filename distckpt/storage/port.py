"""The Storage port: named files below a root. It moves bytes and knows nothing of tensors or checkpoints.

Names are relative, "/"-separated, without "." or ".." segments. What a method promises to be durable
survives a power cut; anything else may be lost, whole or in part, in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from typing_extensions import Buffer


@dataclass(frozen=True, slots=True)
class FreeSpace:
    """size_bytes that may still be written to the file system `filesystem_id` (unique across hosts)."""

    filesystem_id: str
    size_bytes: int


class ReadFile(Protocol):
    """One open file. Safe to use from several threads. Close it when done."""

    @property
    def name(self) -> str: ...

    @property
    def size_bytes(self) -> int: ...

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill the whole writable buffer from `offset`. Raises EOFError if the file ends before."""

    def close(self) -> None: ...


class WriteFile(Protocol):
    """One new file, written by one thread. A failure at any call abandons the file for good: nobody reopens it either,
    unless what it was synced as is all that counts."""

    @property
    def name(self) -> str: ...

    def write(self, offset: int, buffer: Buffer) -> None:
        """Write the whole buffer at `offset`, a multiple of 4096 (else ValueError).

        Where a buffer ends off such a multiple, the bytes up to the next one are undefined: the end of the
        file must lie there, or a later write cover them.
        """

    def sync(self) -> None:
        """Make durable what was written so far; the file stays open. The name is as durable as with `finish`."""

    def finish(self, size_bytes: int) -> None:
        """Set the length, make the content durable, check that the name still leads to this very file, close.

        The name itself becomes durable with the next `sync_directory` of its directory.
        """

    def abandon(self) -> None:
        """Close without any promise; never raises. Safe after finish."""


class Storage(Protocol):
    """A root directory. Safe to use from several threads.

    Missing files raise FileNotFoundError, other failures OSError with errno and file name, and names that are
    not as above ValueError.
    """

    @property
    def location(self) -> str:
        """What to show a person: a path or URL."""

    def list(self, directory: str) -> Sequence[str]:
        """Names directly in `directory` ("" is the root), sorted; empty when there is no such directory."""

    def make_directory(self, directory: str) -> None:
        """Make it durably, with its parents (the root included); an existing one is fine."""

    def sync_directory(self, directory: str) -> None:
        """Make the names in it, and their absence, durable."""

    def create(self, name: str, *, size_hint: int = 0) -> WriteFile:
        """Open a new file for writing; FileExistsError if the name is taken."""

    def reopen(self, name: str) -> WriteFile:
        """Go on writing a file that was created and never finished, as when its writer has died. What was written after
        its last sync may be there, whole or in part."""

    def open(self, name: str) -> ReadFile: ...

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Store a small file durably, all of it or nothing; False, changing nothing, if the name is taken."""

    def replace(self, name: str, data: bytes) -> None:
        """Store a small file durably over whatever the name held; readers see the old or the new content."""

    def append(self, name: str, data: bytes) -> None:
        """Add lines to the end of a small file, made if it is missing. Promises little: it is for logs.

        What one call adds is never mixed with what another does, and begins a line of its own, even where an earlier
        call was torn. It may be lost in a power cut; what fails, or a power cut, may leave a torn last line.
        """

    def move(self, name: str, new_name: str) -> None:
        """Give a finished file another name in its directory, over whatever file held that; readers see the old file or
        the new one. Durable with the next `sync_directory`."""

    def remove(self, name: str) -> None:
        """Remove a file; a missing one is fine. Durable with the next `sync_directory`."""

    def remove_directory(self, directory: str) -> None:
        """Remove an empty directory; a missing one, or one that is not empty, is left as it is."""

    def touch(self, name: str) -> None:
        """Set the modification time of an existing file to now."""

    def age_s(self, name: str) -> float:
        """Seconds since the file was last modified, by the storage's own clock where it has one."""

    def free_space(self) -> FreeSpace | None:
        """Free space where new files will lie; None when there is no bound that can be known."""
