"""What of a checkpoint a reshard takes along: its tensors, shared values and per-rank values. Decides; moves nothing.

A per-rank value belongs to coordinates of the mesh. Where those axes keep their sizes it goes to the rank that then has
its coordinates. Where they do not, it can be nobody's: by its policy the load begins anew or leaves it alone, and what
must come back exactly is refused here, not in a load months later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec

from distckpt.checkpoint_files import read_per_rank
from distckpt.errors import CheckpointError, CorruptionError
from distckpt.index import Index, PerRankEntry
from distckpt.json_value import is_container
from distckpt.key_globs import is_selected, unmatched_globs
from distckpt.planner import PerRankKind
from distckpt.resharding.plan_file import glob_of
from distckpt.resharding.target_layout import TargetMesh
from distckpt.storage import Storage

_MAX_SHOWN = 10


@dataclass(frozen=True, slots=True)
class KeptPerRank:
    """axes: (name, size) as the target's index has them. holders: coordinates on them -> the target rank whose file
    has the value, and the file of the source."""

    kind: PerRankKind
    axes: tuple[tuple[str, int], ...]
    holders: Mapping[tuple[int, ...], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Content:
    """keys: of tensors. notes: what became of per-rank values, for the report."""

    keys: Sequence[str]
    values: Mapping[str, msgspec.Raw]
    per_rank: Mapping[str, KeptPerRank]
    notes: tuple[str, ...]


def choose_content(index: Index, mesh: TargetMesh, *, select: Sequence[str] = (), drop: Sequence[str] = ()) -> Content:
    """What is taken along: the keys that match a glob of `select` (all, if there is none) and none of `drop`.

    Raises CheckpointError for a glob that matches nothing, for nothing left, and for per-rank values without a place.
    """
    known = [*index.tensors, *index.values, *index.per_rank]
    _check_globs("--select", select, known)
    _check_globs("--drop", drop, known)

    is_kept = partial(is_selected, select=select, drop=drop)
    keys = [key for key in index.tensors if is_kept(key)]
    values = {key: value for key, value in index.values.items() if is_kept(key)}
    entries = {key: entry for key, entry in index.per_rank.items() if is_kept(key)}
    if not keys and not values and not entries:
        raise CheckpointError(f"nothing is left of the {len(known)} keys of the checkpoint")
    gone = [key for key in known if not is_kept(key)]
    values = {key: value for key, value in values.items() if not _is_hollow(key, value, gone, (keys, values, entries))}
    per_rank, notes = _place_per_rank(entries, {axis: _size_of(axis, index, mesh) for axis in index.mesh}, mesh)
    return Content(keys, values, per_rank, notes)


def _check_globs(option: str, globs: Sequence[str], known: Sequence[str]) -> None:
    for glob in unmatched_globs(globs, known):
        shown = ", ".join(map(repr, known[:_MAX_SHOWN])) + (" ..." if len(known) > _MAX_SHOWN else "")
        raise CheckpointError(f"{option} {glob!r} matches no key of the checkpoint; keys are {shown}")


def _is_hollow(
    key: str, value: msgspec.Raw, gone: Sequence[str], kept: Sequence[Sequence[str] | Mapping[str, object]]
) -> bool:
    """Whether a value says that there is a container of which everything else was left out."""
    if not gone or not is_container(bytes(value)):
        return False
    below = f"{key}/"
    return any(other.startswith(below) for other in gone) and not any(
        other.startswith(below) for keys in kept for other in keys
    )


def _size_of(axis: str, index: Index, mesh: TargetMesh) -> int:
    """Of an axis of the source, in the target. A job without a mesh counts all its ranks on one."""
    is_only = len(index.mesh) == 1 and axis == "rank"
    return mesh.world_size if is_only and mesh.size(axis) == index.mesh[axis] else mesh.size(axis)


def _place_per_rank(
    entries: Mapping[str, PerRankEntry], sizes: Mapping[str, int], mesh: TargetMesh
) -> tuple[dict[str, KeptPerRank], tuple[str, ...]]:
    placed: dict[str, KeptPerRank] = {}
    notes: list[str] = []
    for key, entry in entries.items():
        kind = PerRankKind(tuple(axis for axis, _ in entry.axes), entry.on_change)
        changed = {axis: size for axis, size in entry.axes if sizes.get(axis, 1) != size}
        if not changed:
            holders = {
                at: (mesh.ranks_at(dict(zip(kind.axes, at, strict=True)))[0], number) for at, number in entry.holders
            }
            placed[key] = KeptPerRank(kind, entry.axes, holders)
            continue
        were = ", ".join(f"{axis} {size} -> {sizes.get(axis, 1)}" for axis, size in changed.items())
        if entry.on_change == "exact":
            raise CheckpointError(
                f"per-rank value {key!r} must come back exactly, but its axes change ({were}). Leave it out with "
                f"--drop '{glob_of(key)}', or keep the sizes of these axes."
            )
        what = "ranks will draw a new seed" if entry.on_change == "reseed" else "ranks will keep what they have"
        notes.append(f"per-rank value {key!r} is left out, as its axes change ({were}): at a load {what}")
        # Of size 0: no mesh has it, so that every load does what it does when an axis has another size.
        placed[key] = KeptPerRank(kind, tuple((axis, 0) for axis in kind.axes), {})
    return placed, tuple(notes)


def read_kept_per_rank(
    storage: Storage, directory: str, index: Index, per_rank: Mapping[str, KeptPerRank]
) -> dict[int, dict[str, msgspec.Raw]]:
    """The values that each target rank's file gets. Raises CorruptionError or OSError."""
    sources = {number for kept in per_rank.values() for _, number in kept.holders.values()}
    stored = {number: read_per_rank(storage, directory, index, number) for number in sorted(sources)}
    found: dict[int, dict[str, msgspec.Raw]] = {}
    for key, kept in per_rank.items():
        for rank, number in kept.holders.values():
            if key not in stored[number]:
                raise CorruptionError(f"{index.files[number].name}: per-rank value {key!r} is not in it")
            found.setdefault(rank, {})[key] = stored[number][key]
    return found
