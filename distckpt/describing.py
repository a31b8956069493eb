"""Describing: what one rank has to save, as records for the planner. Copies no tensor and talks to nobody.

What stays the same from save to save (the structure) is kept apart from what changes (the values).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from distckpt._C import crc32c
from distckpt.adapters import ADAPTERS
from distckpt.errors import CheckpointError, UnsupportedTypeError
from distckpt.garbage import postponed_collection
from distckpt.geometry import Box
from distckpt.index import Mesh, Spec
from distckpt.json_value import EMPTY_DICT
from distckpt.leaf_value import encode_leaf
from distckpt.planner import PerRankKind, RankShards, RankValues, encode_specs, encode_values
from distckpt.state_dict import FlatState, PerRankLeaf, flatten


@dataclass(frozen=True, slots=True)
class Structure:
    """What of one rank's state decides the plan: RankShards before it is encoded. Equal ones have one plan."""

    specs: list[tuple[str, Spec]]
    tensor: bytes
    boxes: bytes
    per_rank: dict[str, PerRankKind]

    def message(self, mesh: Mesh, available: bytes | None = None) -> RankShards:
        return RankShards(
            specs=encode_specs(self.specs),
            tensor=self.tensor,
            boxes=self.boxes,
            per_rank=self.per_rank,
            mesh=dict(mesh),
            available=available,
        )


@dataclass(frozen=True, slots=True)
class Description:
    """One rank's state at one save. shards: (key, spec, box), numbered as in the structure; tensors: of each its data,
    until they are let go. values and per_rank: key -> encoded value.
    """

    structure: Structure
    shards: list[tuple[str, Spec, Box]]
    tensors: list[Tensor]
    values: dict[str, bytes]
    per_rank: dict[str, bytes]

    def value_message(self) -> RankValues:
        digests = {key: crc32c(encoded) for key, encoded in self.per_rank.items()}
        return RankValues(encode_values(self.values), digests)


@postponed_collection()
def describe(state: dict[str, object], mesh: Mesh) -> Description:
    """Raises what flatten raises, UnsupportedTypeError for meta tensors, CheckpointError for unknown mesh axes."""
    flat = flatten(state, ADAPTERS)
    number: dict[tuple[str, Spec], int] = {}
    of_shard: list[int] = []
    shards: list[tuple[str, Spec, Box]] = []
    tensors: list[Tensor] = []
    for leaf in flat.tensors:
        if leaf.materialize is not None:
            raise UnsupportedTypeError(f"{leaf.key!r}: a tensor on the meta device has no values to save")
        described = number.setdefault((leaf.key, leaf.spec), len(number))
        of_shard += [described] * len(leaf.shards)
        shards += [(leaf.key, leaf.spec, shard.box) for shard in leaf.shards]
        tensors += [shard.data for shard in leaf.shards]
    boxes = [n for _, _, box in shards for n in (*box.offset, *box.shape)]
    structure = Structure(
        specs=list(number),
        tensor=np.array(of_shard, np.int32).tobytes(),
        boxes=np.array(boxes, np.int64).tobytes(),
        per_rank={leaf.key: _kind(leaf, mesh) for leaf in flat.per_rank},
    )
    per_rank = {leaf.key: encode_leaf(leaf.leaf.value, leaf.key) for leaf in flat.per_rank}
    return Description(structure, shards, tensors, _values(flat), per_rank)


def _values(flat: FlatState) -> dict[str, bytes]:
    return {leaf.key: leaf.encoded for leaf in flat.values} | flat.fixed | dict.fromkeys(flat.empty, EMPTY_DICT)


def _kind(leaf: PerRankLeaf, mesh: Mesh) -> PerRankKind:
    axes = tuple(mesh) if leaf.leaf.axes is None else leaf.leaf.axes
    unknown = [axis for axis in axes if axis not in mesh]
    if unknown:
        raise CheckpointError(f"PerRank {leaf.key!r}: axes {unknown} are not in the mesh {list(mesh)}")
    return PerRankKind(axes, leaf.leaf.on_change)
