"""Writing: one new file, durable and whole, or abandoned. Decides nothing of what is in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from distckpt._C import crc32c
from distckpt.index import MeshCoordinates, ShardFile
from distckpt.shard_file import BLOCK_BYTES, FileLayout
from distckpt.storage import Part, Storage, WriteFile, write_checked


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


def write_shard_file(
    storage: Storage,
    directory: str,
    name: str,
    layout: FileLayout,
    parts: Sequence[Part],
    *,
    rank: int,
    mesh: MeshCoordinates,
    max_bytes_per_s: float,
) -> ShardFile:
    """Write one shard file with its checksum table. Any thread. Raises OSError; the file is then abandoned.

    name: below `directory`, the iteration's. parts: the elements of each chunk in C order, in the order of the file.
    max_bytes_per_s: 0 is no limit.
    """
    table = np.empty(layout.block_count, np.uint32)
    pieces: list[Part] = [layout.header, *parts, layout.per_rank]
    with new_file(storage, f"{directory}/{name}", layout.size_bytes) as file:
        write_checked(file, pieces, BLOCK_BYTES, table, max_bytes_per_s=max_bytes_per_s)
    return ShardFile(
        name=name,
        size_bytes=layout.size_bytes,
        header_bytes=len(layout.header),
        header_crc=crc32c(layout.header),
        checksum_start=layout.checksum_start,
        table_crc=crc32c(table),
        per_rank=(layout.per_rank_start, layout.per_rank_bytes),
        rank=rank,
        mesh=mesh,
    )
