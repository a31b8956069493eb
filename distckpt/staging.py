"""Staging: the image of one rank's shard files in memory. Decides what lies where in it; the image is the file.

The Arena is host memory that is touched once and used again by every save.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distckpt._C import Memory, crc32c, crc32c_blocks
from distckpt.index import MeshCoordinates, ShardFile
from distckpt.shard_file import ALIGNMENT, BLOCK_BYTES, Chunk, FileLayout, lay_out
from distckpt.transport import copy_to_host


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


@dataclass(frozen=True, slots=True)
class StagedFile:
    """One shard file in memory; `name` is below the iteration's directory."""

    name: str
    layout: FileLayout
    image: memoryview

    def seal(self, *, rank: int, mesh: MeshCoordinates) -> ShardFile:
        """Compute the checksum table into the image. Any thread, once, before the image is written."""
        layout = self.layout
        table = np.frombuffer(self.image[layout.checksum_start :], np.uint32)
        crc32c_blocks(self.image[: layout.checksum_start], BLOCK_BYTES, table)
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


def stage(
    arena: Arena,
    chunks: Sequence[Chunk],
    tensors: Sequence[Tensor],
    per_rank: bytes,
    *,
    names: Sequence[str],
    metadata: Sequence[Mapping[str, str]],
    order: Sequence[Sequence[int]],
) -> list[StagedFile]:
    """Copy the tensors (tensors[i] holds chunks[i]) into the images of the files that `order` divides them into.

    On return the tensors may change. The per-rank JSON goes into the first file.
    """
    layouts = [lay_out(chunks, numbers, per_rank if i == 0 else b"{}", metadata[i]) for i, numbers in enumerate(order)]
    starts = np.cumsum([0] + [-(-layout.size_bytes // ALIGNMENT) * ALIGNMENT for layout in layouts]).tolist()
    memory = memoryview(arena.reserve(max(starts[-1], 1)))
    files = []
    for i, (layout, start, name) in enumerate(zip(layouts, starts, names, strict=False)):
        image = memory[start : start + layout.size_bytes]
        image[: len(layout.header)] = layout.header
        text = (per_rank if i == 0 else b"{}").ljust(layout.per_rank_bytes)
        image[layout.per_rank_start : layout.checksum_start] = text
        target = torch.frombuffer(image, dtype=torch.uint8)
        for number, at in zip(layout.order, layout.starts, strict=True):
            copy_to_host(tensors[number], target[at : at + chunks[number].size_bytes])
        files.append(StagedFile(name, layout, image))
    return files
