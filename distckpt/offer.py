"""Offers: what each rank says of itself when a save is planned, and whether the file systems take what is planned."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from distckpt.errors import CheckpointError
from distckpt.planner import RankValues, SavePlan
from distckpt.storage import FreeSpace, Storage


class Offer(msgspec.Struct, frozen=True):
    """A rank's message to the plan: the plan that its state fits, and the room on the file system it writes to."""

    iteration: int
    metadata: bytes
    plan_id: str | None
    values: RankValues
    filesystem_id: str
    free_bytes: int


def free_space(storage: Storage) -> FreeSpace:
    return storage.free_space() or FreeSpace("", 2**62)


def check_free_space(offers: Sequence[Offer], plan: SavePlan, gained: int) -> None:
    """Raises CheckpointError when the ranks of one file system are about to write more than it has room for.

    gained: bytes that were freed since the offers.
    """
    free: dict[str, int] = {}
    needed: dict[str, int] = {}
    for offer, size in zip(offers, plan.bytes_by_rank.tolist(), strict=True):
        free[offer.filesystem_id] = min(offer.free_bytes, free.get(offer.filesystem_id, offer.free_bytes))
        needed[offer.filesystem_id] = needed.get(offer.filesystem_id, 0) + size
    for filesystem_id, size in needed.items():
        room = free[filesystem_id] + gained
        if size > room:
            raise CheckpointError(
                f"not enough space: the checkpoint takes {size} bytes on file system {filesystem_id}, which has {room} "
                f"bytes free. Nothing was written. Free space there; a checkpoint that keep_last gives up is removed "
                f"at the first save after its grace period."
            )
