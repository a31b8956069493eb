"""Share: what one rank writes under one plan, and how it lies in files and in the Arena. Kept from save to save.

Decides nothing new: it is the plan's word for this rank, worked out as far as it stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np

from distckpt.arena import Region, arrange
from distckpt.commit import new_save_id
from distckpt.describing import Description, Structure
from distckpt.garbage import postponed_collection
from distckpt.geometry import Box
from distckpt.metrics import Metrics
from distckpt.planner import SavePlan
from distckpt.shard_file import Chunk, FilePlan, nested_json, plan_file, split_into_files

# Of rank 0's first header, for the values that all ranks share; more than that is not kept there a second time.
_SHARED_METADATA_BYTES = 8 << 20


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
class ShareFile:
    """One file of a share. numbers: its shards in file order. metadata: what its header says of them."""

    numbers: list[int]
    plan: FilePlan
    metadata: dict[str, str | msgspec.Raw]


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
    files = _files(message, described, plan) if numbers or message.per_rank or plan is not None else []
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


def _files(message: ShareMessage, described: Description, plan: SavePlan | None) -> list[ShareFile]:
    numbers = np.frombuffer(message.shards, np.int32).tolist()
    mine = [described.shards[n] for n in numbers]
    chunks = [
        Chunk(key, spec.dtype, box.offset, box.shape, box == Box.whole(spec.global_shape)) for key, spec, box in mine
    ]
    first = {"per_rank": _nested({key: described.structure.per_rank[key] for key in message.per_rank})}
    if plan is not None:
        empty = {key: spec for key, spec in plan.specs.items() if not spec.size_bytes}
        first |= {"writers": _nested(plan.writers()), "empty_tensors": _nested(empty)}
    split = split_into_files(
        chunks,
        metadata_bytes=[len(nested_json({key: spec})) for key, spec, _ in mine],
        first_metadata_bytes=sum(len(bytes(text)) for text in first.values())
        + (0 if plan is None else _SHARED_METADATA_BYTES),
    )
    return [
        ShareFile(
            numbers=[numbers[i] for i in order],
            plan=plan_file(chunks, order),
            metadata={
                "files": str(len(split)),
                "tensors": _nested({mine[i][0]: mine[i][1] for i in order}),
                **({} if number else first),
            },
        )
        for number, order in enumerate(split)
    ]


def shared_metadata(
    values: Mapping[str, msgspec.Raw], metadata: bytes, metrics: Metrics
) -> dict[str, str | msgspec.Raw]:
    """What belongs to no tensor, for the header of rank 0's first file; nothing if it is too long for that."""
    shared: dict[str, str | msgspec.Raw] = {
        "values": msgspec.json.encode(values).decode(),
        "metadata": metadata.decode(),
        **({"metrics": msgspec.json.encode(metrics).decode()} if metrics else {}),
    }
    return shared if len(msgspec.json.encode(shared)) <= _SHARED_METADATA_BYTES else {}


def _nested(value: object) -> msgspec.Raw:
    return msgspec.Raw(nested_json(value))
