"""The grid of ranks, and layers whose weights are split over its tensor-parallel axis.

The scheme is Megatron-LM's (Shoeybi et al., 2019, arXiv:1909.08053): a column-parallel layer gives every rank
a slice of the output features, a row-parallel one takes it and sums; one collective per pair and direction.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the grid: this rank's coordinate, the size, and the ranks that differ in this axis only."""

    rank: int
    size: int
    group: dist.ProcessGroup

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1


@dataclass(frozen=True, slots=True)
class Parallel:
    """This rank's place in the grid, and the random stream for what is split over tp.

    What is replicated over tp draws from torch's default generator, whose state is the same on all tp ranks.
    """

    tp: Axis
    pp: Axis
    dp: Axis
    split_generator: torch.Generator = field(default_factory=torch.Generator)

    @classmethod
    def start(cls, *, tp: int, pp: int, dp: int) -> Parallel:
        """Join the tp * pp * dp ranks that torchrun launched; the ranks of a tp group are neighbours."""
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (pp, dp, tp), mesh_dim_names=("pp", "dp", "tp"))
        return cls(
            **{
                name: Axis(mesh.get_local_rank(name), mesh[name].size(), mesh.get_group(name))
                for name in ("tp", "pp", "dp")
            }
        )

    @property
    def mesh(self) -> dict[str, tuple[int, int]]:
        """Axis name -> (coordinate, size)."""
        return {name: (axis.rank, axis.size) for name, axis in self.axes().items()}

    def axes(self) -> dict[str, Axis]:
        return {"tp": self.tp, "pp": self.pp, "dp": self.dp}

    def seed_replicated(self, seed: int) -> None:
        """Seed what must agree over tp. `seed` must be the same on all tp ranks and differ over pp and dp."""
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    def seed_split(self, seed: int) -> None:
        """Seed the stream of tensors split over tp. `seed` must differ on all ranks."""
        self.split_generator.manual_seed(seed)


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; the same in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class _CopyToTp(torch.autograd.Function):
    """Identity whose gradient is the sum over tp: each rank's slice of a layer saw the same input."""

    @staticmethod
    def forward(ctx, x: Tensor, tp: Axis) -> Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.tp.group)
        return grad, None


class _ReduceFromTp(torch.autograd.Function):
    """Sum over tp whose gradient is the identity: every rank's addend counts once."""

    @staticmethod
    def forward(ctx, x: Tensor, tp: Axis) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=tp.group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def copy_to_tp(x: Tensor, tp: Axis) -> Tensor:
    return _CopyToTp.apply(x, tp)


def reduce_from_tp(x: Tensor, tp: Axis) -> Tensor:
    return _ReduceFromTp.apply(x, tp)


@dataclass(frozen=True, slots=True)
class Split:
    """How a parameter is split over tp: dimension `dim` consists of `blocks` equal blocks, each cut tp times.

    A rank holds its cut of every block, one after the other: gate and up of SwiGLU are two blocks, QKV three.
    """

    dim: int
    blocks: int = 1

    def global_shape(self, local: Tensor, tp: Axis) -> list[int]:
        return [n * tp.size if dim == self.dim else n for dim, n in enumerate(local.shape)]

    def local_part(self, whole: Tensor, tp: Axis) -> Tensor:
        cuts = whole.unflatten(self.dim, (self.blocks, tp.size, -1)).select(self.dim + 1, tp.rank)
        return cuts.flatten(self.dim, self.dim + 1)


def split_of(param: Tensor) -> Split | None:
    """None means that every tp rank holds the whole parameter."""
    return getattr(param, "tp_split", None)


def _split_parameter(split: Split, *shape: int) -> nn.Parameter:
    param = nn.Parameter(torch.empty(*shape))
    param.tp_split = split
    return param


class ColumnParallelLinear(nn.Module):
    """(..., features_in) replicated -> (..., features_out / tp), without bias."""

    def __init__(self, features_in: int, features_out: int, tp: Axis, *, blocks: int = 1) -> None:
        super().__init__()
        self.tp = tp
        self.weight = _split_parameter(Split(0, blocks), features_out // tp.size, features_in)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(copy_to_tp(x, self.tp), self.weight)


class RowParallelLinear(nn.Module):
    """(..., features_in / tp) -> (..., features_out) replicated, without bias."""

    def __init__(self, features_in: int, features_out: int, tp: Axis) -> None:
        super().__init__()
        self.tp = tp
        self.weight = _split_parameter(Split(1), features_out, features_in // tp.size)

    def forward(self, x: Tensor) -> Tensor:
        return reduce_from_tp(F.linear(x, self.weight), self.tp)


class VocabParallelEmbedding(nn.Module):
    """Token ids (batch, sequence) -> (batch, sequence, hidden) replicated; vocabulary / tp rows a rank."""

    def __init__(self, vocabulary: int, hidden: int, tp: Axis) -> None:
        super().__init__()
        self.tp = tp
        self.weight = _split_parameter(Split(0), vocabulary // tp.size, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        row, mine = _local_rows(tokens, self.weight.shape[0], self.tp)
        return reduce_from_tp(F.embedding(row, self.weight) * mine.unsqueeze(-1), self.tp)


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, tp: Axis) -> Tensor:
    """Mean over all tokens. logits: (batch, sequence, vocabulary / tp); targets: (batch, sequence)."""
    peak = logits.detach().amax(-1)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=tp.group)
    logits = logits - peak.unsqueeze(-1)
    row, mine = _local_rows(targets, logits.shape[-1], tp)
    chosen = logits.gather(-1, row.unsqueeze(-1)).squeeze(-1) * mine
    total, chosen = reduce_from_tp(torch.stack([logits.exp().sum(-1), chosen]), tp)
    return (total.log() - chosen).mean()


def _local_rows(tokens: Tensor, rows: int, tp: Axis) -> tuple[Tensor, Tensor]:
    """Each token's row in this rank's slice of the vocabulary (0 where it has none), and where it has one."""
    row = tokens - tp.rank * rows
    mine = (row >= 0) & (row < rows)
    return row.where(mine, 0), mine
