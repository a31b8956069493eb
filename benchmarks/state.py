"""The state that every engine saves and loads: one rank's part of a GPT and its two Adam moments, fp32.

Values are a function of key, position in the global tensor and step, so that what was loaded can be compared
exactly without keeping a copy. Nothing here saves or loads.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LAYERS = 8
HIDDEN_MULTIPLE = 64
VOCABULARY_PER_HIDDEN = 4
COPIES = ("model", "exp_avg", "exp_avg_sq")
PRIME = 16_769_023  # 2**24 - 8193: positions modulo it, and 8193 steps added, are exact in fp32
POISON = -1.0  # No value of the state is negative.


@dataclass(frozen=True, slots=True)
class Layout:
    """tp x pp ranks; the tensor-parallel coordinate changes fastest, as in Megatron."""

    tp: int
    pp: int

    @property
    def ranks(self) -> int:
        return self.tp * self.pp

    def place(self, rank: int) -> tuple[int, int]:
        """Tensor- and pipeline-parallel coordinate of a rank."""
        return rank % self.tp, rank // self.tp

    def __str__(self) -> str:
        return f"tp{self.tp} pp{self.pp}"


@dataclass(frozen=True, slots=True)
class Piece:
    """This rank's part of one global tensor: part `at` of `parts` along `axis`, or all of it if axis is None."""

    key: str
    global_shape: tuple[int, ...]
    axis: int | None
    at: int
    parts: int
    data: Tensor

    def expected(self, step: int) -> Tensor:
        position = torch.tensor(zlib.crc32(self.key.encode()))
        for d, size in enumerate(self.data.shape):
            start = self.at * size if d == self.axis else 0
            index = torch.arange(start, start + size) * math.prod(self.global_shape[d + 1 :])
            position = position + index.view(-1, *[1] * (self.data.dim() - d - 1))
        return (position % PRIME).to(torch.float32).add_(step)


class RankState:
    """The pieces of one rank, by key. `step` counts advance(), and is what its values depend on."""

    def __init__(self, layout: Layout, rank: int, size_bytes: int) -> None:
        self.layout = layout
        self.rank = rank
        self.step = 0
        self.tp_rank, self.pp_rank = layout.place(rank)
        layers = math.ceil(LAYERS / layout.pp) * layout.pp
        self.pieces: dict[str, Piece] = {}
        for name, shape, axis in _stage_shapes(layout, self.pp_rank, layers, _hidden_size(size_bytes, layers)):
            for copy in COPIES:
                self._add(f"{copy}.{name}", shape, axis)
        for piece in self.pieces.values():
            piece.data.copy_(piece.expected(self.step))

    def _add(self, key: str, global_shape: tuple[int, ...], axis: int | None) -> None:
        shape = list(global_shape)
        if axis is not None:
            shape[axis] //= self.layout.tp
        data = torch.empty(shape, dtype=torch.float32)
        self.pieces[key] = Piece(key, global_shape, axis, self.tp_rank, self.layout.tp, data)

    @property
    def size_bytes(self) -> int:
        return sum(piece.data.nbytes for piece in self.pieces.values())

    def tensors(self) -> dict[str, Tensor]:
        return {key: piece.data for key, piece in self.pieces.items()}

    def advance(self) -> None:
        """Change every value, as a training step does."""
        self.step += 1
        for piece in self.pieces.values():
            piece.data.add_(1)

    def poison(self) -> None:
        """Overwrite every value with one that the state never has."""
        for piece in self.pieces.values():
            piece.data.fill_(POISON)

    def check(self, step: int) -> None:
        """Raise ValueError unless every value is that of `step`."""
        for key, piece in self.pieces.items():
            if not torch.equal(piece.data, piece.expected(step)):
                raise ValueError(f"{key} on rank {self.rank} does not hold the values of step {step}")


def _hidden_size(size_bytes: int, layers: int) -> int:
    """Of a model whose fp32 weights and moments come closest to size_bytes."""
    items_per_square = 12 * layers + 2 * VOCABULARY_PER_HIDDEN
    hidden = math.sqrt(size_bytes / (4 * len(COPIES) * items_per_square))
    return max(1, round(hidden / HIDDEN_MULTIPLE)) * HIDDEN_MULTIPLE


def _stage_shapes(
    layout: Layout, stage: int, layers: int, hidden: int
) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """(name, global shape, axis that tensor parallelism splits) of each parameter of a pipeline stage."""
    vocabulary = VOCABULARY_PER_HIDDEN * hidden
    if stage == 0:
        yield "embedding.weight", (vocabulary, hidden), 0
    per_stage = layers // layout.pp
    for layer in range(stage * per_stage, (stage + 1) * per_stage):
        prefix = f"layers.{layer}"
        for norm in ("input_norm", "mlp_norm"):
            yield f"{prefix}.{norm}.weight", (hidden,), None
            yield f"{prefix}.{norm}.bias", (hidden,), None
        yield f"{prefix}.qkv.weight", (3 * hidden, hidden), 0
        yield f"{prefix}.qkv.bias", (3 * hidden,), 0
        yield f"{prefix}.proj.weight", (hidden, hidden), 1
        yield f"{prefix}.proj.bias", (hidden,), None
        yield f"{prefix}.fc1.weight", (4 * hidden, hidden), 0
        yield f"{prefix}.fc1.bias", (4 * hidden,), 0
        yield f"{prefix}.fc2.weight", (hidden, 4 * hidden), 1
        yield f"{prefix}.fc2.bias", (hidden,), None
    if stage == layout.pp - 1:
        yield "final_norm.weight", (hidden,), None
        yield "output.weight", (vocabulary, hidden), 0
