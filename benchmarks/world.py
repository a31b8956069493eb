"""A simulated world: what every rank of a large job would say of its state, without the state.

The model is cut by tensor, pipeline and data parallelism. Of every stage half of the matrices are cut by rows, half by
columns, as Megatron cuts them; the optimizer's are cut once more by rows over the data-parallel ranks, which hold the
weights as replicas.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from distckpt.geometry import Box, Int64Array
from distckpt.index import Spec
from distckpt.planner import PerRankKind, RankShards, RankValues, encode_specs, encode_values

ROWS, COLUMNS = 64, 256  # of one shard
VALUES = 200  # settings that all ranks share
WEIGHTS = 10  # one replicated shard for so many that are not


@dataclass(frozen=True)
class World:
    """ranks: a power of two. chunks: about as many distinct boxes as all ranks have. replicas: so many data-parallel
    ranks hold each box of the optimizer, too."""

    ranks: int
    chunks: int
    replicas: int = 1

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Of the mesh."""
        tp = min(8, self.ranks // self.replicas)
        pp = min(16, self.ranks // self.replicas // tp)
        return {"tp": tp, "pp": pp, "dp": self.ranks // tp // pp}

    @cached_property
    def shards(self) -> int:
        """Optimizer tensors of a stage, of each of which every rank has a shard."""
        return max(1, round(self.chunks * self.replicas / self.ranks))

    @cached_property
    def weights(self) -> int:
        """Weights of a stage, of each of which every rank has a shard that its data-parallel peers have, too."""
        return -(-self.shards // WEIGHTS)

    def mesh(self, rank: int) -> dict[str, tuple[int, int]]:
        """By axis: a rank's coordinate, the size; tp varies fastest, then dp."""
        tp, pp, dp = self.sizes.values()
        return {"tp": (rank % tp, tp), "pp": (rank // tp // dp, pp), "dp": (rank // tp % dp, dp)}

    def tensors(self, stage: int) -> list[tuple[str, Spec]]:
        tp, parts = self.sizes["tp"], self.sizes["dp"] // self.replicas
        specs = []
        for i in range(self.shards + self.weights):
            is_weight, is_by_rows = i >= self.shards, i % 2 == 0
            parts_here = 1 if is_weight else parts
            shape = (ROWS * parts_here * (tp if is_by_rows else 1), COLUMNS * (1 if is_by_rows else tp))
            name = f"stages.{stage}.layers.{i // 12}.mlp.{i % 12}.{'weight' if is_weight else 'exp_avg'}"
            spec = Spec(
                dtype="bfloat16" if is_weight else "float32",
                global_shape=shape,
                partition=("tp", None) if is_by_rows else (None, "tp"),
                owner="pp",
                container="model" if is_weight else "optimizer",
                given_as="sharded",
            )
            specs.append((f"{'model' if is_weight else 'optimizer'}.{name}", spec))
        return specs

    def boxes(self, rank: int) -> Int64Array:
        """Offset and shape of the shard that a rank has of each tensor of its stage: (n, 4)."""
        mesh = self.mesh(rank)
        tp, dp = mesh["tp"][0], mesh["dp"][0]
        parts = self.sizes["dp"] // self.replicas
        i = np.arange(self.shards + self.weights)
        part = np.where(i < self.shards, dp % parts, 0)
        parts_here = np.where(i < self.shards, parts, 1)
        by_rows = i % 2 == 0
        boxes = np.empty((len(i), 4), np.int64)
        boxes[:, 0] = ROWS * (part + by_rows * tp * parts_here)
        boxes[:, 1] = np.where(by_rows, 0, COLUMNS * tp)
        boxes[:, 2:] = ROWS, COLUMNS
        return boxes

    def messages(self) -> Iterator[tuple[RankShards, RankValues]]:
        """What each rank says, in order."""
        specs = [encode_specs(self.tensors(stage)) for stage in range(self.sizes["pp"])]
        values = encode_values({f"settings/{i}": b'{"lr":0.0001,"betas":[0.9,0.95]}' for i in range(VALUES)})
        kind = {"rng": PerRankKind(("tp", "pp", "dp"), "exact")}
        for rank in range(self.ranks):
            boxes, mesh = self.boxes(rank), self.mesh(rank)
            yield (
                RankShards(
                    specs=specs[mesh["pp"][0]],
                    tensor=np.arange(len(boxes), dtype=np.int32).tobytes(),
                    boxes=boxes.tobytes(),
                    per_rank=kind,
                    mesh=mesh,
                ),
                RankValues(values, {"rng": rank}),
            )

    def targets(self) -> list[tuple[str, Box]]:
        """What rank 0 would load if there were half as many tensor-parallel and data-parallel ranks: boxes twice as
        long both ways, where there is as much."""
        wanted = []
        for key, spec in self.tensors(0):
            shape = tuple(min(2 * n, extent) for n, extent in zip((ROWS, COLUMNS), spec.global_shape, strict=True))
            wanted.append((key, Box((0, 0), shape)))
        return wanted
