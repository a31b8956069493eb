"""Planning a reshard: from a checkpoint and what is asked for to a layout of the target. Writes nothing.

Every process of a reshard plans for itself, from the same index, and comes to the same.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from distckpt.chunk_table import Hits
from distckpt.commit import Commit, read_index
from distckpt.elements import can_convert
from distckpt.errors import CheckpointError, CorruptionError
from distckpt.index import Index, TensorEntry
from distckpt.reader import StoredTensors
from distckpt.reading_order import begun_blocks, reading_order
from distckpt.resharding.content import Content, choose_content
from distckpt.resharding.part import LotMemory, default_memory, memory_to_read_once, share_memory
from distckpt.resharding.plan_file import ReshardPlan, plan_of
from distckpt.resharding.target_files import digest_of
from distckpt.resharding.target_layout import TargetLayout, TargetMesh, TargetTensor, lay_out
from distckpt.resharding.tensor_labels import label_tensors
from distckpt.selecting import open_selected, select_commits
from distckpt.storage import Storage

logger = logging.getLogger("distckpt")


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for. select, drop: globs of keys. dtype: what floating-point tensors are converted to."""

    mesh: TargetMesh
    plan: ReshardPlan
    select: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class PlannedReshard:
    """turns: of each tensor of the layout when it is read. begun_blocks: how many are begun at a time. digest: of all
    that decides what is written."""

    storage: Storage
    commit: Commit
    index: Index
    stored: StoredTensors
    content: Content
    layout: TargetLayout
    turns: Sequence[int]
    begun_blocks: int
    digest: str

    @property
    def sources(self) -> Mapping[str, TensorEntry]:
        return self.index.tensors

    @property
    def converts(self) -> bool:
        """Whether any tensor gets another type."""
        return any(tensor.spec.dtype != self.sources[tensor.key].dtype for tensor in self.layout.tensors)

    def lot_memory(self, memory_bytes: int, lots: int) -> LotMemory:
        """Raises CheckpointError if that is too little for so many lots at a time."""
        return share_memory(memory_bytes, lots, converts=self.converts, begun_blocks=self.begun_blocks)

    def notes(self, memory_bytes: int, jobs: int) -> tuple[str, ...]:
        """What a reader should know."""
        lots = max(1, min(jobs, len(self.layout.tensors)))
        needed = memory_to_read_once(lots, self.begun_blocks)
        if memory_bytes >= needed:
            return self.content.notes
        note = (
            f"up to {self.begun_blocks} blocks are begun at a time: some may be read more than once; a memory of "
            f"{needed >> 20} MiB (--memory) holds them all"
        )
        return (*self.content.notes, note)


def plan_reshard(storage: Storage, commit: Commit, request: Request) -> PlannedReshard:
    """Raises CorruptionError or OSError for the source, CheckpointError for what cannot be done as asked."""
    index, _ = read_index(storage, commit)
    mesh = _with_axes_of(index, request.mesh)
    content = choose_content(index, mesh, select=request.select, drop=request.drop)
    stored = StoredTensors.read(storage, commit.directory, index, content.keys)
    tensors = label_tensors(stored, mesh, request.plan, request.dtype, _ChunksLeftOut(storage, commit, index).of)
    for tensor in tensors:
        before = index.tensors[tensor.key].dtype
        if not can_convert(before, tensor.spec.dtype):
            raise CheckpointError(f"{tensor.key!r}: {before} cannot be converted to {tensor.spec.dtype}")
    content = replace(content, notes=(*content.notes, *_padding_notes(index, tensors)))
    layout = lay_out(tensors, mesh)
    order = reading_order(stored.located)
    turns = np.argsort(np.array(order, np.int64)).tolist()
    digest = digest_of(index.save_id, layout, content, index.tensors, turns)
    return PlannedReshard(
        storage, commit, index, stored, content, layout, turns, begun_blocks(stored.located, order), digest
    )


@dataclass(slots=True)
class _ChunksLeftOut:
    """Of tensors that are not taken along, read when the first is asked for."""

    storage: Storage
    commit: Commit
    index: Index
    _stored: StoredTensors | None = None
    _is_damaged: bool = False

    def of(self, key: str) -> Hits | None:
        """None if it cannot be read: nothing is lost that is taken along. Raises OSError."""
        if self._is_damaged:
            return None
        try:
            if self._stored is None:
                self._stored = StoredTensors.read(
                    self.storage, self.commit.directory, self.index, list(self.index.tensors)
                )
            return self._stored.chunks_of(key)
        except CorruptionError as error:
            self._is_damaged = True
            logger.warning("how %r and others lay that are left out is not known: %s", key, error)
            return None


def _padding_notes(index: Index, tensors: Sequence[TargetTensor]) -> list[str]:
    """What is cut off as padding is told of: a plan may be wrong."""
    cut = [
        f"{tensor.key!r} {index.tensors[tensor.key].global_shape} -> {tensor.spec.global_shape}"
        for tensor in tensors
        if any(n < of for n, of in zip(tensor.spec.global_shape, index.tensors[tensor.key].global_shape, strict=True))
    ]
    more = f" and {len(cut) - 1} more" if len(cut) > 1 else ""
    return [f"the end of {cut[0]}{more} is padding by the plan, and left out"] if cut else []


def _with_axes_of(index: Index, mesh: TargetMesh) -> TargetMesh:
    """Axes that the source has and nobody asked for have one coordinate."""
    return TargetMesh.of({**dict.fromkeys(index.mesh, 1), **mesh.sizes})


class RankPreview(msgspec.Struct, frozen=True):
    """What a rank of the target will hold."""

    rank: int
    mesh: dict[str, int]
    tensors: int
    bytes: int


class TensorPreview(msgspec.Struct, frozen=True):
    """How a tensor will lie. at: the coordinate of the owner axis that holds it."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    partition: tuple[str | None, ...] | None
    owner: str | None
    at: int | None
    blocks: tuple[int, ...] | None
    chunks: int


class ReshardPreview(msgspec.Struct, frozen=True):
    """What a reshard would do. memory_bytes: that a process takes for it, beside what Python takes. left_out: keys."""

    iteration: int
    save_id: str
    mesh: dict[str, int]
    world_size: int
    bytes: int
    memory_bytes: int
    ranks: tuple[RankPreview, ...]
    tensors: tuple[TensorPreview, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]


def preview_of(planned: PlannedReshard, memory_bytes: int, jobs: int) -> ReshardPreview:
    layout, index = planned.layout, planned.index
    counts = np.zeros(layout.mesh.world_size, np.int64)
    for chunks in layout.chunks:
        counts[np.unique(chunks.ranks)] += 1
    kept = {*planned.content.keys, *planned.content.values, *planned.content.per_rank}
    return ReshardPreview(
        iteration=index.iteration,
        save_id=index.save_id,
        mesh=dict(layout.mesh.sizes),
        world_size=layout.mesh.world_size,
        bytes=int(layout.bytes_by_rank.sum()),
        memory_bytes=memory_bytes,
        ranks=tuple(
            RankPreview(rank, layout.mesh.coordinates(rank), int(counts[rank]), int(size))
            for rank, size in enumerate(layout.bytes_by_rank.tolist())
        ),
        tensors=tuple(
            TensorPreview(
                tensor.key,
                tensor.spec.global_shape,
                tensor.spec.dtype,
                tensor.spec.partition,
                tensor.spec.owner,
                tensor.at,
                tensor.spec.blocks,
                len(chunks),
            )
            for tensor, chunks in zip(layout.tensors, layout.chunks, strict=True)
        ),
        left_out=tuple(key for key in (*index.tensors, *index.values, *index.per_rank) if key not in kept),
        notes=planned.notes(memory_bytes, jobs),
    )


def preview_reshard(
    source: str | os.PathLike[str] | Storage,
    mesh: Mapping[str, int],
    *,
    iteration: int | str | None = None,
    plan: ReshardPlan | str | os.PathLike[str] | None = None,
    select: Sequence[str] = (),
    drop: Sequence[str] = (),
    dtype: str | None = None,
    memory_bytes: int | None = None,
    jobs: int = 1,
) -> ReshardPreview:
    """What reshard() would do. Writes nothing; one process. Raises as that does."""
    memory_bytes = default_memory(jobs) if memory_bytes is None else memory_bytes
    request = Request(TargetMesh.of(mesh), plan_of(plan), tuple(select), tuple(drop), dtype)
    storage, selector = open_selected(source, iteration)
    planned = plan_reshard(storage, select_commits(storage, selector)[0], request)
    planned.lot_memory(memory_bytes, jobs)
    return preview_of(planned, memory_bytes, jobs)
