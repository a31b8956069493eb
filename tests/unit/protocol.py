"""The commit protocol without tensors: saves of two tiny files, on storage in memory that fails when told."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence

import msgspec

from distckpt.commit import Commit, Writer, iteration_directory, new_save_id
from distckpt.history_log import FILE as HISTORY
from distckpt.index import ChunkTable, Index
from distckpt.pruning import retire_superfluous
from distckpt.removing import sweep
from distckpt.retention import Facts, Retention, judge
from distckpt.shard_file import FORMAT, FORMAT_VERSION
from distckpt.storage import Storage
from distckpt.storage.contract import read_all, write_all
from distckpt.storage.memory import MemoryReadFile
from distckpt.testing import MemoryStorage

GRACE_S = 60.0


class Clock:
    """Stands still until told."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class HookedStorage(MemoryStorage):
    """For failures in the middle of a commit.

    put_instead: called once in place of the next put_if_absent of an index. fail_next: method whose next call fails.
    """

    put_instead: Callable[[str, bytes], bool] | None = None
    fail_next: str | None = None

    def open(self, name: str) -> MemoryReadFile:
        self._fail("open")
        return super().open(name)

    def sync_directory(self, directory: str) -> None:
        self._fail("sync_directory")
        super().sync_directory(directory)

    def _fail(self, method: str) -> None:
        if self.fail_next == method:
            self.fail_next = None
            raise io_error()

    def put_if_absent(self, name: str, data: bytes) -> bool:
        if self.put_instead is not None and "/index-" in name:
            instead, self.put_instead = self.put_instead, None
            return instead(name, data)
        return super().put_if_absent(name, data)


def io_error(code: int = errno.EIO) -> OSError:
    return OSError(code, os.strerror(code), "injected")


def file_names(save_id: str) -> list[str]:
    return [f"chunks-{save_id}.bin", f"shard-00000-of-00001-{save_id}.safetensors"]


def make_index(
    writer: Writer,
    iteration: int,
    save_id: str,
    *,
    parent: str | None = None,
    metrics: dict[str, float | None] | None = None,
    created_unix_s: float = 0.0,
) -> Index:
    return Index(
        format=FORMAT,
        version=FORMAT_VERSION,
        save_id=save_id,
        epoch=writer.epoch,
        commit_seq=writer.commit_seq,
        iteration=iteration,
        parent=parent,
        created_unix_s=created_unix_s,
        world_size=1,
        mesh={},
        tensors={},
        values={},
        metadata=msgspec.Raw(b"null"),
        per_rank={},
        files=(),
        chunk_table=ChunkTable(name=f"chunks-{save_id}.bin", size_bytes=0, records_bytes=0, trailer_crc=0),
        metrics=metrics or {},
    )


def write_files(storage: Storage, iteration: int, save_id: str) -> None:
    for name in file_names(save_id):
        write_all(storage, f"{iteration_directory(iteration)}/{name}", save_id.encode())


def save(
    writer: Writer,
    iteration: int,
    *,
    parent: str | None = None,
    metrics: dict[str, float | None] | None = None,
    created_unix_s: float = 0.0,
) -> str:
    """One save up to its commit; its marker is left for the sweep, as a real save leaves it."""
    save_id = new_save_id()
    writer.announce(iteration, save_id)
    write_files(writer.storage, iteration, save_id)
    index = make_index(writer, iteration, save_id, parent=parent, metrics=metrics, created_unix_s=created_unix_s)
    writer.publish(index)
    return save_id


def superfluous(
    commits: Sequence[Commit], *, keep_last: int | None, tracked: int | None, first_epoch: int = 0
) -> list[Commit]:
    """What goes of good commits in which nothing else differs, oldest first."""
    verdicts = judge(
        [Facts(commit) for commit in commits],
        Retention(keep_last=keep_last),
        tracked=tracked,
        now_unix_s=0.0,
        first_epoch=first_epoch,
    )
    return sorted(verdict.commit for verdict in verdicts if not verdict.stays)


def clean_up(storage: Storage, keep_last: int | None = None, grace_s: float = GRACE_S) -> list[str]:
    retire_superfluous(storage, Retention(keep_last=keep_last))
    return sweep(storage, grace_s=grace_s)


def tree(storage: Storage, directory: str = "") -> dict[str, bytes]:
    """Every file below the directory, with its content; without the history, which every save and load adds to."""
    found: dict[str, bytes] = {}
    for name in storage.list(directory):
        if name == HISTORY:
            continue
        path = f"{directory}/{name}" if directory else name
        try:
            found[path] = read_all(storage, path)
        except IsADirectoryError:
            found |= tree(storage, path)
    return found
