"""Staging: the image of one rank's shard files in memory. Decides what lies where in it; the image is the file.

The Arena is host memory that is touched once and used again by every save.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Buffer

from distckpt._C import Memory, crc32c
from distckpt.index import MeshCoordinates, ShardFile
from distckpt.shard_file import ALIGNMENT, BLOCK_BYTES, FileLayout
from distckpt.storage import Storage, WriteFile, write_checked
from distckpt.transport import copy_to_host, host_bytes


class Arena:
    """Reused host memory. One user at a time: what was staged is gone when the next image is."""

    def __init__(self) -> None:
        self._memory: Memory | None = None

    def reserve(self, size_bytes: int) -> Memory:
        """Memory of at least size_bytes, populated."""
        if self._memory is None or len(self._memory) < size_bytes:
            self._memory = None  # Free the old before asking for the new.
            self._memory = Memory(size_bytes)
            self._memory.populate(threads=2)
        return self._memory

    def release(self) -> None:
        self._memory = None


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


@dataclass(frozen=True, slots=True)
class StagedFile:
    """One shard file, ready to be written: the parts that follow each other in it, up to the checksum table.

    `name` is below the iteration's directory. The parts are views: of an image in the Arena, or of the state itself.
    """

    name: str
    layout: FileLayout
    parts: list[Buffer]

    def write(self, storage: Storage, directory: str, *, rank: int, mesh: MeshCoordinates) -> ShardFile:
        """Write it, durably, with its checksum table. Any thread, once. Raises OSError; the file is then abandoned."""
        layout = self.layout
        table = np.empty(layout.block_count, np.uint32)
        with new_file(storage, f"{directory}/{self.name}", layout.size_bytes) as file:
            write_checked(file, self.parts, BLOCK_BYTES, table)
        return ShardFile(
            name=self.name,
            size_bytes=layout.size_bytes,
            header_bytes=len(layout.header),
            header_crc=crc32c(layout.header),
            checksum_start=layout.checksum_start,
            table_crc=crc32c(table),
            per_rank=(layout.per_rank_start, layout.per_rank_bytes),
            rank=rank,
            mesh=mesh,
        )


def stage(layouts: Sequence[FileLayout], tensors: Sequence[Tensor], arena: Arena) -> list[list[Buffer]]:
    """Copy the tensors (by chunk number) into an image of each file; on return they may change.

    Returns the parts of each file: one, its image.
    """
    starts = np.cumsum([0] + [-(-layout.size_bytes // ALIGNMENT) * ALIGNMENT for layout in layouts]).tolist()
    memory = memoryview(arena.reserve(max(starts[-1], 1)))
    images: list[list[Buffer]] = []
    for layout, start in zip(layouts, starts, strict=False):
        image = memory[start : start + layout.checksum_start]
        image[: len(layout.header)] = layout.header
        image[layout.per_rank_start :] = layout.per_rank
        target = torch.frombuffer(image, dtype=torch.uint8)
        for number, at in zip(layout.order, layout.starts, strict=True):
            copy_to_host(tensors[number], target[at : at + tensors[number].nbytes])
        images.append([image])
    return images


def stage_in_place(layouts: Sequence[FileLayout], tensors: Sequence[Tensor]) -> list[list[Buffer]]:
    """The same without a copy, for tensors that stay as they are until the files are written.

    Only what is not a plain block of host memory is copied.
    """
    return [
        [layout.header, *(host_bytes(tensors[number]) for number in layout.order), layout.per_rank]
        for layout in layouts
    ]
