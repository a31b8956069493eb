"""A GPT with SwiGLU and untied embeddings; one object holds one pipeline stage of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from checkpoint import weight_shards
from parallel import (
    Axis,
    ColumnParallelLinear,
    Parallel,
    RowParallelLinear,
    VocabParallelEmbedding,
    derive_seed,
    split_of,
    vocab_parallel_cross_entropy,
)
from torch import Tensor, nn

from distckpt import ShardedTensor


@dataclass(frozen=True, slots=True)
class Config:
    """Sizes of the whole model. tp must divide heads, ffn and vocabulary; no size depends on the layout."""

    vocabulary: int = 320  # 256 bytes and an end-of-text token, padded to a multiple of 64
    sequence: int = 64
    hidden: int = 256
    ffn: int = 768
    layers: int = 4
    heads: int = 8
    dropout: float = 0.1


class Attention(nn.Module):
    """Causal self-attention, (batch, sequence, hidden) -> the same; heads are split over tp."""

    def __init__(self, config: Config, parallel: Parallel) -> None:
        super().__init__()
        self.head_size = config.hidden // config.heads
        self.dropout = config.dropout
        self.generator = parallel.split_generator
        self.qkv = ColumnParallelLinear(config.hidden, 3 * config.hidden, parallel.tp, blocks=3)
        self.out = RowParallelLinear(config.hidden, config.hidden, parallel.tp)
        mask = torch.full((config.sequence, config.sequence), -math.inf).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, -1, self.head_size))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (batch, heads / tp, sequence, head_size)
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.head_size) + self.mask
        weights = self._dropout(scores.softmax(-1))
        return self.out((weights @ v).transpose(1, 2).flatten(-2))

    def _dropout(self, weights: Tensor) -> Tensor:
        """Dropout of a tensor split over tp: another mask on every tp rank."""
        if self.dropout == 0:
            return weights
        keep = torch.rand(weights.shape, generator=self.generator) >= self.dropout
        return weights * keep / (1 - self.dropout)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), (batch, sequence, hidden) -> the same; gate and up are one weight."""

    def __init__(self, config: Config, tp: Axis) -> None:
        super().__init__()
        self.gate_up = ColumnParallelLinear(config.hidden, 2 * config.ffn, tp, blocks=2)
        self.down = RowParallelLinear(config.ffn, config.hidden, tp)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Layer(nn.Module):
    """Pre-norm transformer layer, (batch, sequence, hidden) -> the same."""

    def __init__(self, config: Config, parallel: Parallel) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden)
        self.attention = Attention(config, parallel)
        self.mlp_norm = nn.RMSNorm(config.hidden)
        self.mlp = SwiGLU(config, parallel.tp)
        self.dropout = nn.Dropout(config.dropout)  # of replicated tensors: the same mask on every tp rank

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Embedding(nn.Module):
    """Token ids (batch, sequence) -> (batch, sequence, hidden), with learned positions."""

    def __init__(self, config: Config, tp: Axis) -> None:
        super().__init__()
        self.token = VocabParallelEmbedding(config.vocabulary, config.hidden, tp)
        self.position = nn.Parameter(torch.empty(config.sequence, config.hidden))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.token(tokens) + self.position)


class Stage(nn.Module):
    """The layers of one pipeline rank; the first stage also embeds, the last also computes the loss.

    Parameter names are those of the whole model ("layers.3.mlp.down.weight"), whatever the layout.
    """

    def __init__(self, config: Config, parallel: Parallel) -> None:
        super().__init__()
        self.config = config
        self.parallel = parallel
        tp, pp = parallel.tp, parallel.pp
        mine = range(config.layers * pp.rank // pp.size, config.layers * (pp.rank + 1) // pp.size)
        if pp.is_first:
            self.embedding = Embedding(config, tp)
        self.layers = nn.ModuleDict({str(number): Layer(config, parallel) for number in mine})
        if pp.is_last:
            self.norm = nn.RMSNorm(config.hidden)
            self.head = ColumnParallelLinear(config.hidden, config.vocabulary, tp)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """Activations (batch, sequence, hidden) -> the same.

        The first stage takes token ids (batch, sequence) instead; the last returns the loss, a scalar.
        """
        if self.parallel.pp.is_first:
            x = self.embedding(x)
        for layer in self.layers.values():
            x = layer(x)
        if self.parallel.pp.is_last:
            x = vocab_parallel_cross_entropy(self.head(self.norm(x)), targets, self.parallel.tp)
        return x

    def sharded_state_dict(self) -> dict[str, list[ShardedTensor]]:
        """By parameter name; by this a TrainState knows that the model says itself how it is sharded."""
        return {name: weight_shards(name, param, self.parallel.tp) for name, param in self.named_parameters()}

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fill the parameters by seed, name and position in the whole tensor: alike on every layout.

        Each rank draws the whole of every tensor it has a part of, and keeps the part.
        """
        for name, param in self.named_parameters():
            if "norm" in name:
                param.fill_(1.0)
                continue
            split = split_of(param)
            shape = split.global_shape(param, self.parallel.tp) if split else param.shape
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            std = 0.02 / math.sqrt(2 * self.config.layers) if residual else 0.02
            generator = torch.Generator().manual_seed(derive_seed(seed, name))
            whole = torch.empty(shape).normal_(0, std, generator=generator)
            param.copy_(split.local_part(whole, self.parallel.tp) if split else whole)
