"""The files of one rank's share of a checkpoint, and what their headers say beside their chunks. No torch, no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from distckpt.geometry import Box
from distckpt.index import Spec
from distckpt.metrics import Metrics
from distckpt.planner import PerRankKind
from distckpt.shard_file import Chunk, FilePlan, nested_json, plan_file, split_into_files

# Of rank 0's first header, for the values that all ranks share; more than that is not kept there a second time.
_SHARED_METADATA_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class ShareFile:
    """One file of a share. numbers: its shards in file order. metadata: what its header says of them."""

    numbers: list[int]
    plan: FilePlan
    metadata: dict[str, str | msgspec.Raw]


def plan_share_files(
    shards: Sequence[tuple[str, Spec, Box]],
    numbers: Sequence[int],
    *,
    per_rank: Mapping[str, PerRankKind],
    of_all: Mapping[str, msgspec.Raw],
    max_data_bytes: int | None = None,
) -> list[ShareFile]:
    """As few files as headers allow, at least one. numbers: of the shards. per_rank: the values that the rank writes.
    of_all: what rank 0 says of all ranks, as facts_of_all gives it; nothing on others. max_data_bytes: as of
    split_into_files."""
    chunks = [
        Chunk(key, spec.dtype, box.offset, box.shape, box == Box.whole(spec.global_shape)) for key, spec, box in shards
    ]
    first = {"per_rank": _nested(per_rank), **of_all}
    split = split_into_files(
        chunks,
        metadata_bytes=[len(nested_json({key: spec})) for key, spec, _ in shards],
        first_metadata_bytes=sum(len(bytes(text)) for text in first.values())
        + (_SHARED_METADATA_BYTES if of_all else 0),
        max_data_bytes=max_data_bytes,
    )
    return [
        ShareFile(
            numbers=[numbers[i] for i in order],
            plan=plan_file(chunks, order),
            metadata={
                "files": str(len(split)),
                "tensors": _nested({shards[i][0]: shards[i][1] for i in order}),
                **({} if number else first),
            },
        )
        for number, order in enumerate(split)
    ]


def facts_of_all(writers: Sequence[int], specs: Mapping[str, Spec]) -> dict[str, msgspec.Raw]:
    """What the first file of rank 0 says: which ranks have files, and the tensors that are in none."""
    empty = {key: spec for key, spec in specs.items() if not spec.size_bytes}
    return {"writers": _nested(writers), "empty_tensors": _nested(empty)}


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
