"""Applying: what a load has read, put into the state. Only the state's own objects can fail here."""

from __future__ import annotations

import hashlib

from distckpt.index import Index, Mesh
from distckpt.matching import Request, subtree
from distckpt.state_dict import FlatState, PerRankLeaf, set_per_rank


def apply_request(request: Request, flat: FlatState, index: Index, mesh: Mesh) -> None:
    """Replace values, hand stored subtrees to objects, tell leaves that they are filled. mesh: this rank's place."""
    for key, replace in request.values:
        replace(request.decoded[key])
    for leaf, _ in request.tensors:
        if leaf.loaded is not None:
            leaf.loaded()
    for per_rank, _ in request.per_rank:
        set_per_rank(per_rank, request.per_rank_values[per_rank.key])
    for per_rank in request.reseed:
        per_rank.leaf.seed = _seed(index, per_rank, mesh)
    for finish in flat.finish:
        finish()
    fresh = {item.path for item in request.fresh}
    for item in flat.objects:
        if item.path in fresh:
            item.owner.load_state_dict(subtree(index, request.whole_tensors, item.path))
        elif not any(item.path.startswith(f"{path}/") for path in fresh):
            item.owner.load_state_dict(item.state)


def _seed(index: Index, per_rank: PerRankLeaf, mesh: Mesh) -> int:
    axes = mesh if per_rank.leaf.axes is None else per_rank.leaf.axes
    text = f"{index.save_id} {per_rank.key} {[(axis, mesh[axis]) for axis in axes]}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
