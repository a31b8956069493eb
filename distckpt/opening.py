"""Opening: the roots of a Checkpointer and its ranks' places, agreed on all ranks or refused on all."""

from __future__ import annotations

import operator
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from distckpt.coordinator import Coordinator, agree
from distckpt.errors import CheckpointError
from distckpt.host import host_id
from distckpt.index import Mesh
from distckpt.planner import check_places
from distckpt.protecting import Protection
from distckpt.storage import PosixStorage, Storage

Root = str | os.PathLike[str] | Storage


class _Place(msgspec.Struct, frozen=True):
    """A rank's coordinates, the host that it runs on, what it was asked to do after commits, where it copies to."""

    mesh: dict[str, tuple[int, int]]
    host: str
    protection: Protection
    copied_to: str | None


@dataclass(frozen=True, slots=True)
class Opened:
    """mesh: this rank's place. storages: the root, and the one that is copied to. neighbours: ranks of this host."""

    mesh: Mesh
    storages: tuple[Storage, ...]
    neighbours: int


def open_roots(
    coordinator: Coordinator,
    root: Root,
    second: Root | None,
    *,
    mesh: Mapping[str, tuple[int, int]],
    protection: Protection,
    io_backend: str,
    file_mode: int | None,
    group: str | int | None,
    timeout_s: float,
) -> Opened:
    """Open the roots and check the mesh. Collective. Raises the same on all ranks."""
    storages: list[Storage] = []

    def local() -> _Place:
        for given in (root, second):
            if isinstance(given, (str, os.PathLike)):
                storages.append(PosixStorage(given, io_backend=io_backend, file_mode=file_mode, group=group))
            elif given is not None:
                storages.append(given)
                if file_mode is not None or group is not None:
                    raise ValueError("file_mode and group are for roots that are paths; a Storage is made with its own")
        if len(storages) == 2 and _is_same(*storages):
            raise ValueError(f"copy_to={storages[1].location}: that is the root itself")
        own = {axis: (operator.index(at), operator.index(size)) for axis, (at, size) in mesh.items()}
        return _Place(own, host_id(), protection, storages[1].location if len(storages) == 2 else None)

    def decide(ranks: Sequence[_Place]) -> list[int]:
        check_places([place.mesh for place in ranks])
        for rank, place in enumerate(ranks):
            if place.protection != ranks[0].protection:
                raise CheckpointError(
                    f"the ranks differ in parity and verify_after_save: rank 0 has {ranks[0].protection}, rank {rank} "
                    f"{place.protection}"
                )
            if place.copied_to != ranks[0].copied_to:
                raise CheckpointError(
                    f"the ranks differ in copy_to: rank 0 has {ranks[0].copied_to}, rank {rank} {place.copied_to}"
                )
        count = Counter(place.host for place in ranks)
        return [count[place.host] for place in ranks]

    neighbours = agree(coordinator, "open", local, decide, message=_Place, decision=int, timeout_s=timeout_s)
    own = {axis: (operator.index(at), operator.index(size)) for axis, (at, size) in mesh.items()}
    return Opened(own, tuple(storages), neighbours)


def _is_same(first: Storage, second: Storage) -> bool:
    both_posix = isinstance(first, PosixStorage) and isinstance(second, PosixStorage)
    return first is second or (both_posix and os.path.realpath(first.location) == os.path.realpath(second.location))
