"""The files that a reshard writes: which chunk lies where in which of them. Pure; no torch.

Each target rank has one file; where several processes write, one for each of them that has something of the rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgspec
import numpy as np

from distckpt.geometry import Int64Array
from distckpt.index import Mesh, MeshCoordinates, TensorEntry
from distckpt.planner import PerRankKind
from distckpt.resharding.content import Content
from distckpt.resharding.steps import PlacedTensor, Position
from distckpt.resharding.target_layout import TargetLayout
from distckpt.shard_file import DTYPES, FileLayout, file_name
from distckpt.share_files import ShareFile, facts_of_all, plan_share_files, shared_metadata
from distckpt.writing import header_metadata


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One file of a target rank, written by process `part`. chunks: its shards, in file order, as (tensor, chunk)."""

    rank: int
    part: int
    file: ShareFile
    chunks: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class PlannedFiles:
    """order: of the tensors, that of the source within each part; part p has those from bounds[p] to bounds[p + 1].

    files: by rank, then part.
    """

    layout: TargetLayout
    order: Sequence[int]
    bounds: Sequence[int]
    files: Sequence[PlannedFile]

    @property
    def parts(self) -> int:
        return len(self.bounds) - 1


def plan_files(layout: TargetLayout, content: Content, turns: Sequence[int], parts: int) -> PlannedFiles:
    """turns: of each tensor of the layout when it is read. parts: how many processes write."""
    of_rank = [int(chunks.ranks.min()) if len(chunks) else 0 for chunks in layout.chunks]
    by_rank = sorted(range(len(layout.tensors)), key=lambda t: (of_rank[t], turns[t]))
    bounds = _cut(by_rank, layout, parts)
    slices = [sorted(by_rank[low:high], key=lambda t: turns[t]) for low, high in pairwise(bounds)]
    order = [t for tensors in slices for t in tensors]
    per_rank = _per_rank_kinds(content)
    writers = sorted({0, *per_rank, *(rank for chunks in layout.chunks for rank in np.unique(chunks.ranks).tolist())})
    files: list[PlannedFile] = []
    begun: set[int] = set()
    for part in range(parts):
        held = _by_rank(layout, slices[part])
        for rank in writers:
            if rank in held or (part == 0 and (rank == 0 or rank in per_rank)):
                kinds = {} if rank in begun else per_rank
                files += _plan_rank(layout, rank, part, held.get(rank, []), kinds, writers)
                begun.add(rank)
    files.sort(key=lambda file: (file.rank, file.part))
    return PlannedFiles(layout, order, bounds, files)


def _cut(order: Sequence[int], layout: TargetLayout, parts: int) -> list[int]:
    """Where each part begins in the order of tensors, so that parts have about equally many bytes."""
    sizes = np.array([layout.tensors[t].spec.size_bytes for t in order], np.float64)
    ends = np.cumsum(sizes)
    total = float(ends[-1]) if len(ends) else 0.0
    inner = [int(np.searchsorted(ends, total * part / parts)) for part in range(1, parts)]
    return [0, *inner, len(order)]


def _per_rank_kinds(content: Content) -> dict[int, dict[str, PerRankKind]]:
    kinds: dict[int, dict[str, PerRankKind]] = {}
    for key, kept in content.per_rank.items():
        for rank, _ in kept.holders.values():
            kinds.setdefault(rank, {})[key] = kept.kind
    return kinds


def _by_rank(layout: TargetLayout, tensors: Sequence[int]) -> dict[int, list[tuple[int, int]]]:
    """The chunks (tensor, chunk) of each rank, in the order of the tensors."""
    held: dict[int, list[tuple[int, int]]] = {}
    for t in tensors:
        for chunk, rank in enumerate(layout.chunks[t].ranks.tolist()):
            held.setdefault(rank, []).append((t, chunk))
    return held


def _plan_rank(
    layout: TargetLayout,
    rank: int,
    part: int,
    held: Sequence[tuple[int, int]],
    per_rank: Mapping[int, Mapping[str, PerRankKind]],
    writers: Sequence[int],
) -> list[PlannedFile]:
    shards = [(layout.tensors[t].key, layout.tensors[t].spec, layout.chunks[t].box(chunk)) for t, chunk in held]
    of_all = {}
    if rank == 0 and part == 0:
        of_all = facts_of_all(writers, {tensor.key: tensor.spec for tensor in layout.tensors})
    files = plan_share_files(shards, range(len(held)), per_rank=per_rank.get(rank, {}), of_all=of_all)
    return [PlannedFile(rank, part, file, [held[n] for n in file.numbers]) for file in files]


def digest_of(
    source_id: str,
    layout: TargetLayout,
    content: Content,
    sources: Mapping[str, TensorEntry],
    turns: Sequence[int],
) -> str:
    """Of all that decides what is written: with equal ones, equal bytes are, but for save_ids and parts."""
    found = hashlib.blake2b(source_id.encode(), digest_size=16)
    found.update(np.array(turns, np.int64).tobytes())
    found.update(msgspec.msgpack.encode(dict(layout.mesh.sizes)))
    for tensor, chunks in zip(layout.tensors, layout.chunks, strict=True):
        found.update(msgspec.msgpack.encode((tensor.key, tensor.spec, sources[tensor.key].dtype)))
        for column in (chunks.offsets, chunks.shapes, chunks.ranks):
            found.update(column.tobytes())
    found.update(msgspec.msgpack.encode({key: bytes(value) for key, value in content.values.items()}))
    found.update(msgspec.msgpack.encode(sorted(content.per_rank)))
    return found.hexdigest()


@dataclass(frozen=True, slots=True)
class TargetFile:
    """One file of the target as it will lie: its name in the directory, and its layout."""

    planned: PlannedFile
    name: str
    layout: FileLayout
    mesh: MeshCoordinates


def lay_out_files(
    planned: PlannedFiles,
    content: Content,
    per_rank: Mapping[int, Mapping[str, msgspec.Raw]],
    *,
    save_id: str,
    iteration: int,
    metadata: bytes,
    metrics: dict[str, float | None],
) -> list[TargetFile]:
    """per_rank: the values of each rank. metadata, metrics: of the source's index. Raises CheckpointError."""
    mesh = planned.layout.mesh
    counts = np.bincount([file.rank for file in planned.files], minlength=mesh.world_size).tolist()
    number_of: dict[int, int] = {}
    found = []
    for file in planned.files:
        number = number_of[file.rank] = number_of.get(file.rank, -1) + 1
        at = mesh.coordinates(file.rank)
        place: Mesh = {axis: (at[axis], size) for axis, size in mesh.sizes.items()}
        text = header_metadata(save_id, iteration, file.rank, place) | file.file.metadata
        text["files"] = str(counts[file.rank])
        if number:
            text.pop("per_rank", None)
        if number == 0 and file.rank == 0:
            text |= shared_metadata(content.values, metadata, metrics)
        values = msgspec.json.encode(per_rank.get(file.rank, {})) if number == 0 else b"{}"
        name = file_name(file.rank, number, mesh.world_size, save_id)
        found.append(TargetFile(file, name, file.file.plan.lay_out(values, text), at))
    return found


def place_tensors(
    planned: PlannedFiles, files: Sequence[TargetFile], sources: Mapping[str, TensorEntry]
) -> list[PlacedTensor]:
    """The tensors of the layout, with what lies where; outputs count in `files`."""
    chunks = planned.layout.chunks
    outputs = [np.zeros(len(of), np.int64) for of in chunks]
    starts = [np.zeros(len(of), np.int64) for of in chunks]
    for number, file in enumerate(files):
        for (t, chunk), start in zip(file.planned.chunks, file.layout.starts.tolist(), strict=True):
            outputs[t][chunk], starts[t][chunk] = number, start
    return [
        _placed(planned, t, sources[planned.layout.tensors[t].key], outputs[t], starts[t]) for t in range(len(chunks))
    ]


def _placed(
    planned: PlannedFiles, t: int, source: TensorEntry, outputs: Int64Array, starts: Int64Array
) -> PlacedTensor:
    tensor, chunks = planned.layout.tensors[t], planned.layout.chunks[t]
    return PlacedTensor(
        key=tensor.key,
        shape=tensor.spec.global_shape,
        dtype=tensor.spec.dtype,
        source_shape=source.global_shape,
        source_dtype=source.dtype,
        offsets=chunks.offsets,
        shapes=chunks.shapes,
        outputs=outputs,
        starts=starts,
    )


class Lot(msgspec.Struct, frozen=True):
    """Tensors of a part, from a position up to number `end`, that one thread goes through."""

    at: Position
    end: int


def cut_lots(tensors: Sequence[PlacedTensor], count: int) -> list[Lot]:
    """The tensors of a part, in lots of about equally many bytes."""
    sizes = [np.prod(tensor.shape, dtype=np.float64) * DTYPES[tensor.dtype].item_bytes for tensor in tensors]
    ends = np.cumsum(np.array(sizes, np.float64))
    total = float(ends[-1]) if len(ends) else 0.0
    inner = [int(np.searchsorted(ends, total * i / count)) for i in range(1, count)]
    bounds = [0, *inner, len(tensors)]
    return [Lot(Position(low, 0), high) for low, high in pairwise(bounds) if low < high]
