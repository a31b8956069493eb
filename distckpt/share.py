"""Share: what one rank writes under one plan, and how it lies in files and in the Arena. Kept from save to save.

Decides nothing new: it is the plan's word for this rank, worked out as far as it stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from distckpt.arena import Region, arrange
from distckpt.commit import new_save_id
from distckpt.describing import Description, Structure
from distckpt.garbage import postponed_collection
from distckpt.planner import SavePlan
from distckpt.share_files import ShareFile, facts_of_all, plan_share_files


class ShareMessage(msgspec.Struct, frozen=True):
    """From rank 0 to one rank, in a new plan: int32 numbers of the shards it writes and of those that are replicated,
    ascending, and keys of the PerRank values it writes. plan_id is the same on all ranks, and no other plan's."""

    plan_id: str
    shards: bytes
    replicated: bytes
    per_rank: list[str]


def give_shares(plan: SavePlan, world_size: int) -> list[ShareMessage]:
    """Every rank's share of a new plan."""
    plan_id = new_save_id()
    return [
        ShareMessage(
            plan_id,
            plan.shards_of(rank).tobytes(),
            plan.replicated_of(rank).tobytes(),
            plan.per_rank_keys_of(rank),
        )
        for rank in range(world_size)
    ]


@dataclass(frozen=True, slots=True)
class Share:
    """structure: of the state that it fits. plan: rank 0's. regions: where its shards lie in the Arena."""

    plan_id: str
    structure: Structure
    shards: list[int]
    replicated: list[int]
    per_rank: list[str]
    files: list[ShareFile]
    regions: list[Region]
    image_bytes: int
    plan: SavePlan | None


@postponed_collection()
def adopt(message: ShareMessage, described: Description, plan: SavePlan | None) -> Share:
    """What this rank makes of its share. The leader, who has the plan, has a file even if it puts nothing in it."""
    numbers = np.frombuffer(message.shards, np.int32).tolist()
    files = []
    if numbers or message.per_rank or plan is not None:
        files = plan_share_files(
            [described.shards[n] for n in numbers],
            numbers,
            per_rank={key: described.structure.per_rank[key] for key in message.per_rank},
            of_all={} if plan is None else facts_of_all(plan.writers(), plan.specs),
        )
    regions, image_bytes = arrange([(file.numbers, file.plan.starts.tolist(), file.plan.data_bytes) for file in files])
    return Share(
        plan_id=message.plan_id,
        structure=described.structure,
        shards=numbers,
        replicated=np.frombuffer(message.replicated, np.int32).tolist(),
        per_rank=message.per_rank,
        files=files,
        regions=regions,
        image_bytes=image_bytes,
        plan=plan,
    )
