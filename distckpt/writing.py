"""Writing: one new file, durable and whole, or abandoned. Decides nothing of what is in it."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

import msgspec
import numpy as np

from distckpt._C import crc32c
from distckpt.index import Mesh, MeshCoordinates, ShardFile
from distckpt.shard_file import BLOCK_BYTES, FORMAT, FORMAT_VERSION, FileLayout
from distckpt.storage import Part, Storage, new_file, write_checked

logger = logging.getLogger("distckpt")

# Of a disk or server that was away for a moment. A full disk does not come back so soon, nor do rights.
_TRANSIENT = frozenset(
    [
        *(errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.ENOBUFS, errno.EREMOTEIO),
        *(errno.ECONNRESET, errno.ECONNABORTED, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    ]
)
RETRY_AFTER_S = (1.0, 4.0)  # one try more for each


def may_pass(error: BaseException) -> bool:
    """Whether what failed so may succeed when it is tried again."""
    return isinstance(error, OSError) and error.errno in _TRANSIENT


def header_metadata(save_id: str, iteration: int, rank: int, mesh: Mesh) -> dict[str, str | msgspec.Raw]:
    """What every header says of its save: rebuilding an index from the files alone needs it."""
    return {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "save_id": save_id,
        "iteration": str(iteration),
        "rank": str(rank),
        "mesh": msgspec.json.encode(mesh).decode(),
    }


def write_shard_file(
    storage: Storage,
    directory: str,
    names: Iterator[str],
    layout: FileLayout,
    parts: Sequence[Part],
    *,
    rank: int,
    mesh: MeshCoordinates,
    max_bytes_per_s: float,
) -> ShardFile:
    """Write one shard file with its checksum table. Any thread. Raises OSError; the file is then abandoned.

    names: below `directory`, the iteration's; the next one is taken. A write that fails for a reason that may pass is
    tried again after a pause, as another file under the name after that: of one that failed nothing is known.
    parts: the elements of each chunk in C order, in the order of the file. max_bytes_per_s: 0 is no limit.
    """
    table = np.empty(layout.block_count, np.uint32)
    pieces: list[Part] = [layout.header, *parts, layout.per_rank]
    pauses = iter(RETRY_AFTER_S)
    while True:
        name = next(names)
        try:
            with new_file(storage, f"{directory}/{name}", layout.size_bytes) as file:
                write_checked(file, pieces, BLOCK_BYTES, table, max_bytes_per_s=max_bytes_per_s)
            break
        except OSError as error:
            pause = next(pauses, None)
            if error.errno not in _TRANSIENT or pause is None:
                raise
            logger.warning("%s: %s; another file is tried in %g s", name, error, pause)
            with suppress(OSError):
                storage.remove(f"{directory}/{name}")
            time.sleep(pause)
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
