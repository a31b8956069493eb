"""How the weights of a stage and the optimizer's moments are sharded. This is the module to copy.

What is returned refers to the tensors: a save reads them, a load fills them in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from parallel import Axis, split_of
from torch import Tensor

from distckpt import ShardedTensor


def weight_shards(name: str, param: Tensor, tp: Axis) -> list[ShardedTensor]:
    """One shard per block: a fused weight is several boxes of one key (see `parallel.Split`)."""
    split = split_of(param)
    if split is None:
        return [ShardedTensor.from_rank_offsets(name, param.detach(), owner="pp")]
    partition = tuple("tp" if dim == split.dim else None for dim in range(param.ndim))
    blocks = tuple(split.blocks if dim == split.dim else 1 for dim in range(param.ndim))
    return [
        ShardedTensor.from_rank_offsets(
            name,
            piece,
            (split.dim, block * tp.size + tp.rank, split.blocks * tp.size),
            partition=partition,
            owner="pp",
            blocks=blocks,
        )
        for block, piece in enumerate(param.detach().chunk(split.blocks, split.dim))
    ]


class Owned(Protocol):
    """A flat range of a parameter, and the moments of that range (see `optimizer.OwnedRange`)."""

    name: str
    flat_range: slice
    exp_avg: Tensor
    exp_avg_sq: Tensor


def moment_shards(owned: Sequence[Owned], weights: Mapping[str, list[ShardedTensor]]) -> dict[str, list[ShardedTensor]]:
    """weights: what `weight_shards` gave for each parameter; the ranges count in it."""
    return {
        moment: [
            ShardedTensor.from_flat_range(
                f"optimizer.{moment}.{own.name}", getattr(own, moment), of=weights[own.name], flat_range=own.flat_range
            )
            for own in owned
        ]
        for moment in ("exp_avg", "exp_avg_sq")
    }
