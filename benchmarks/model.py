"""The tensors of the models that are saved: names, shapes, and the axis that tensor parallelism cuts. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from benchmarks.layout import Layout

# gpt: a transformer. rows, columns: matrices only, all cut along dimension 0, or all along dimension 1.
# small: many tensors of SMALL_BYTES each.
Content = Literal["gpt", "rows", "columns", "small"]
# mixed: bf16 weights, and fp32 master weights and moments. fp32: weights and moments.
Precision = Literal["fp32", "mixed"]

COPIES: dict[Precision, dict[str, int]] = {  # of each parameter: name -> bytes an item
    "fp32": {"model": 4, "exp_avg": 4, "exp_avg_sq": 4},
    "mixed": {"model": 2, "master": 4, "exp_avg": 4, "exp_avg_sq": 4},
}
LAYERS = 8
HIDDEN_MULTIPLE = 64
VOCABULARY_PER_HIDDEN = 4
SMALL_BYTES = 4096
SMALL_ITEMS = SMALL_BYTES // 4


@dataclass(frozen=True, slots=True)
class Parameter:
    """axis: None if every tensor-parallel rank has all of it."""

    name: str
    global_shape: tuple[int, ...]
    axis: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What a job saves. size_bytes: of all ranks together, as nearly as the shapes allow; small_tensors: the number
    of local tensors of all ranks together, for content "small", which has no optimizer state."""

    content: Content = "gpt"
    precision: Precision = "mixed"
    size_bytes: int
    small_tensors: int

    @property
    def copies(self) -> dict[str, int]:
        return {"model": 4} if self.content == "small" else COPIES[self.precision]

    def parameters(self, layout: Layout, stage: int) -> Iterator[Parameter]:
        """Of a pipeline stage. The model is the same for every layout whose stages divide LAYERS."""
        layers = math.ceil(LAYERS / layout.pp) * layout.pp
        own_layers = range(stage * layers // layout.pp, (stage + 1) * layers // layout.pp)
        if self.content == "small":
            yield from _small(layout, stage, self.small_tensors)
        elif self.content == "gpt":
            yield from _gpt(layout, stage, own_layers, self._hidden(12 * layers + 2 * VOCABULARY_PER_HIDDEN))
        else:
            hidden, axis = self._hidden(12 * layers), 0 if self.content == "rows" else 1
            for layer in own_layers:
                for part in ("query", "key", "value"):
                    yield Parameter(f"layers.{layer}.{part}.weight", (2 * hidden, 2 * hidden), axis)

    def _hidden(self, squares: int) -> int:
        """The hidden size for which squares * hidden**2 items, with all copies, come closest to size_bytes."""
        hidden = math.sqrt(self.size_bytes / (sum(self.copies.values()) * squares))
        return max(1, round(hidden / HIDDEN_MULTIPLE)) * HIDDEN_MULTIPLE


def _gpt(layout: Layout, stage: int, layers: range, hidden: int) -> Iterator[Parameter]:
    vocabulary = VOCABULARY_PER_HIDDEN * hidden
    if stage == 0:
        yield Parameter("embedding.weight", (vocabulary, hidden), 0)
    for layer in layers:
        prefix = f"layers.{layer}"
        for norm in ("input_norm", "mlp_norm"):
            yield Parameter(f"{prefix}.{norm}.weight", (hidden,), None)
            yield Parameter(f"{prefix}.{norm}.bias", (hidden,), None)
        yield Parameter(f"{prefix}.qkv.weight", (3 * hidden, hidden), 0)
        yield Parameter(f"{prefix}.qkv.bias", (3 * hidden,), 0)
        yield Parameter(f"{prefix}.proj.weight", (hidden, hidden), 1)
        yield Parameter(f"{prefix}.proj.bias", (hidden,), None)
        yield Parameter(f"{prefix}.fc1.weight", (4 * hidden, hidden), 0)
        yield Parameter(f"{prefix}.fc1.bias", (4 * hidden,), 0)
        yield Parameter(f"{prefix}.fc2.weight", (hidden, 4 * hidden), 1)
        yield Parameter(f"{prefix}.fc2.bias", (hidden,), None)
    if stage == layout.pp - 1:
        yield Parameter("final_norm.weight", (hidden,), None)
        yield Parameter("output.weight", (vocabulary, hidden), 0)


def _small(layout: Layout, stage: int, count: int) -> Iterator[Parameter]:
    """As many per rank as make `count` over all ranks; each is a tensor-parallel rank's part of a vector."""
    per_rank = max(1, count // layout.ranks)
    for number in range(per_rank):
        yield Parameter(f"stage.{stage}.small.{number}", (SMALL_ITEMS * layout.tp,), 0)
