"""Offers: what each rank says of itself when a save is planned, and whether the file systems take what is planned."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from distckpt.errors import CheckpointError, InvalidShardingError
from distckpt.metrics import Metrics
from distckpt.planner import RankValues, SavePlan
from distckpt.storage import FreeSpace, Storage


class Offer(msgspec.Struct, frozen=True):
    """A rank's message to the plan: the plan that its state fits, and the room on the file system it writes to."""

    iteration: int
    metadata: bytes
    metrics: Metrics
    plan_id: str | None
    values: RankValues
    filesystem_id: str
    free_bytes: int


def check_alike(offers: Sequence[Offer]) -> None:
    """Raises InvalidShardingError unless all ranks say the same of the checkpoint."""
    first = offers[0]
    for rank, offer in enumerate(offers):
        if (offer.iteration, offer.metadata) != (first.iteration, first.metadata):
            raise InvalidShardingError(
                f"rank 0 saves iteration {first.iteration} with metadata {first.metadata!r}, rank {rank} "
                f"iteration {offer.iteration} with {offer.metadata!r}"
            )
        if offer.metrics != first.metrics:
            raise InvalidShardingError(
                f"rank 0 saves iteration {first.iteration} with metrics {first.metrics}, rank {rank} with "
                f"{offer.metrics}: give the same on all ranks, such as the mean over them"
            )


def free_space(storage: Storage) -> FreeSpace:
    return storage.free_space() or FreeSpace("", 2**62)


def check_free_space(offers: Sequence[Offer], plan: SavePlan, now: FreeSpace, free_before: int | None) -> None:
    """Raises CheckpointError when the ranks of one file system are about to write more than it has room for.

    now: rank 0's, after cleaning up. free_before: before it, if that is known; the offers may have been made then too.
    """
    free: dict[str, int] = {}
    needed: dict[str, int] = {}
    for offer, size in zip(offers, plan.bytes_by_rank.tolist(), strict=True):
        free[offer.filesystem_id] = min(offer.free_bytes, free.get(offer.filesystem_id, offer.free_bytes))
        needed[offer.filesystem_id] = needed.get(offer.filesystem_id, 0) + size
    before = offers[0].free_bytes if free_before is None else min(free_before, offers[0].free_bytes)
    gained = max(0, now.size_bytes - before)
    for filesystem_id, size in needed.items():
        # Other hosts see the same storage under other ids, and have not looked since.
        room = now.size_bytes if filesystem_id == now.filesystem_id else free[filesystem_id] + gained
        if size > room:
            raise CheckpointError(
                f"not enough space: the checkpoint takes {size} bytes on file system {filesystem_id}, which has {room} "
                f"bytes free. Nothing was written. Free space there; a checkpoint that keep_last gives up is removed "
                f"at the first save after its grace period."
            )
