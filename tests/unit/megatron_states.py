"""The state of one rank of a Megatron-style job, every element of which is a function of its global position.

Keys, axes and shapes are those of a GPT with gated MLPs and experts: a layer axis in front of homogeneous
layers, a padded vocabulary, several model chunks on a pipeline rank, and an optimizer whose fp32 buffers are cut
into equal flat ranges over data parallelism, wherever parameters end.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from distckpt import PerRank, ShardedTensor

HIDDEN, FFN, EXPERTS, LAYERS, VOCABULARY = 8, 16, 4, 8, 30
UNTOUCHED = -1.0


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel axes. Ranks count tp first, then dp, then pp; ep is a part of dp."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    chunks: int = 1  # model chunks on a pipeline rank

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def place(self, rank: int) -> Place:
        rest, tp = divmod(rank, self.tp)
        pp, dp = divmod(rest, self.dp)
        return Place(self, tp, pp, dp)

    def __str__(self) -> str:
        return "".join(f"{axis}{getattr(self, axis)}" for axis in ("tp", "pp", "dp", "ep")) + f"vpp{self.chunks}"


@dataclass(frozen=True)
class Place:
    layout: Layout
    tp: int
    pp: int
    dp: int

    @property
    def ep(self) -> int:
        return self.dp % self.layout.ep

    @property
    def mesh(self) -> dict[str, tuple[int, int]]:
        layout = self.layout
        return {"tp": (self.tp, layout.tp), "pp": (self.pp, layout.pp), "dp": (self.dp, layout.dp)}

    def layers(self, chunk: int) -> range:
        count = LAYERS // (self.layout.pp * self.layout.chunks)
        first = (chunk * self.layout.pp + self.pp) * count
        return range(first, first + count)


def value_at(key: str, shape: Sequence[int]) -> Tensor:
    """The global tensor: exact in float32."""
    return torch.arange(prod(shape), dtype=torch.float32).reshape(tuple(shape)) + 4096 * (
        zlib.crc32(key.encode()) % 900
    )


def of_global(shard: ShardedTensor, stored_shape: Sequence[int]) -> Tensor:
    """What `shard.data` should hold: the global tensor where it is stored, UNTOUCHED elsewhere."""
    whole = torch.full(shard.global_shape, UNTOUCHED)
    common = tuple(slice(0, min(a, b)) for a, b in zip(stored_shape, shard.global_shape, strict=True))
    whole[common] = value_at(shard.key, stored_shape)[common]
    pieces = [whole[tuple(slice(o, e) for o, e in zip(b.offset, b.end, strict=True))] for b in shard.boxes()]
    return torch.cat([p.reshape(-1) for p in pieces]).reshape(shard.data.shape)


@dataclass
class RankState:
    """`state` is what is saved; `parts` are descriptions of all its shards, with the tensors they fill."""

    state: dict[str, Any]
    parts: list[ShardedTensor] = field(default_factory=list)

    def fill(self) -> RankState:
        for part in self.parts:
            part.data.copy_(of_global(part, part.global_shape))
        return self

    def check(self, stored_shapes: Mapping[str, Sequence[int]]) -> None:
        for part in self.parts:
            torch.testing.assert_close(
                part.data, of_global(part, stored_shapes[part.key]), rtol=0, atol=0, msg=lambda m, p=part: f"{p}: {m}"
            )


def padded_vocabulary(layout: Layout) -> int:
    return -(-VOCABULARY // (4 * layout.tp)) * 4 * layout.tp


def _parameters(place: Place, chunk: int) -> Iterator[tuple[list[ShardedTensor], Tensor]]:
    """Each parameter of a model chunk: its parts (two for a gated projection) and the tensor they are views of."""
    layout, tp, n = place.layout, place.tp, place.layout.tp
    replica = (0, place.tp, place.dp)

    def one(key: str, shape: Sequence[int], *at: tuple[int, int, int], **options: Any) -> Any:
        data = torch.full(tuple(shape), UNTOUCHED)
        return [ShardedTensor.from_rank_offsets(key, data, *at, replica_id=replica, **options)], data

    def gated(key: str, *before: tuple[int, int, int]) -> Any:
        data = torch.full((2 * FFN // n, HIDDEN), UNTOUCHED)
        axis = len(before)
        halves = [
            ShardedTensor.from_rank_offsets(
                key, half, *before, (axis, tp + i * n, 2 * n), replica_id=replica, prepend_axis_num=axis
            )
            for i, half in enumerate(data.chunk(2))
        ]
        return halves, data

    last = place.pp == layout.pp - 1 and chunk == layout.chunks - 1
    if (place.pp == 0 and chunk == 0) or last:  # tied: the last stage has a copy
        rows = padded_vocabulary(layout) // n
        yield one("embedding.word_embeddings.weight", (rows, HIDDEN), (0, tp, n), allow_shape_mismatch=True)
    for number in place.layers(chunk):
        layer = (0, number, LAYERS)
        yield one("decoder.layers.qkv.weight", (3 * HIDDEN // n, HIDDEN), layer, (1, tp, n), prepend_axis_num=1)
        yield one("decoder.layers.proj.weight", (HIDDEN, HIDDEN // n), layer, (2, tp, n), prepend_axis_num=1)
        yield one("decoder.layers.norm.weight", (HIDDEN,), layer, prepend_axis_num=1)
        yield one(f"decoder.layers.{number}.router.weight", (EXPERTS, HIDDEN))
        yield gated("decoder.layers.fc1.weight", layer)
        yield one("decoder.layers.fc2.weight", (HIDDEN, FFN // n), layer, (2, tp, n), prepend_axis_num=1)
    if last:
        yield one("decoder.final_norm.weight", (HIDDEN,))


def _experts(place: Place, chunk: int) -> Iterator[tuple[list[ShardedTensor], Tensor]]:
    layout, tp, n = place.layout, place.tp, place.layout.tp
    count = EXPERTS // layout.ep
    for number, local in product(place.layers(chunk), range(count)):
        at = ((0, number, LAYERS), (1, place.ep * count + local, EXPERTS))
        data = torch.full((2 * FFN // n, HIDDEN), UNTOUCHED)
        yield (
            [
                ShardedTensor.from_rank_offsets(
                    "decoder.layers.experts.fc1.weight", half, *at, (2, tp + i * n, 2 * n), prepend_axis_num=2
                )
                for i, half in enumerate(data.chunk(2))
            ],
            data,
        )


def _flat_ranges(
    parameters: Sequence[tuple[list[ShardedTensor], Tensor]], at: int, parts: int
) -> Iterator[ShardedTensor]:
    """What data-parallel rank `at` keeps of a moment: its equal part of the buffer of all parameters."""
    total = sum(data.numel() for _, data in parameters)
    bucket = -(-total // parts)
    begin = 0
    for of, data in parameters:
        low, high = max(at * bucket - begin, 0), min((at + 1) * bucket - begin, data.numel())
        if low < high:
            flat = torch.full((high - low,), UNTOUCHED)
            key = f"optimizer.exp_avg.{of[0].key}"
            yield ShardedTensor.from_flat_range(key, flat, of=of, flat_range=slice(low, high))
        begin += data.numel()


def rank_state(layout: Layout, rank: int, convert: Any = None) -> RankState:
    """The state of a rank, with UNTOUCHED everywhere. `convert` makes something else of each parameter's parts."""
    place = layout.place(rank)
    state: dict[str, Any] = {}
    out = RankState(state)
    dense: list[tuple[list[ShardedTensor], Tensor]] = []
    experts: list[tuple[list[ShardedTensor], Tensor]] = []
    for chunk in range(layout.chunks):
        mine, own_experts = list(_parameters(place, chunk)), list(_experts(place, chunk))
        model: dict[str, Any] = {}
        for i, (parts, data) in enumerate(mine + own_experts):
            out.parts += parts
            model[f"{i}.{parts[0].key}"] = convert(parts, data) if convert else parts
        state["model" if layout.chunks == 1 else f"model{chunk}"] = model
        dense += mine
        experts += own_experts
    flat = list(_flat_ranges(dense, place.dp, layout.dp))
    flat += _flat_ranges(experts, place.dp // layout.ep, layout.dp // layout.ep)
    out.parts += flat
    state["optimizer"] = {f"{i}.{part.key}": part for i, part in enumerate(flat)}
    state["args"] = {"hidden_size": HIDDEN, "betas": (0.9, 0.95), "iteration": 7}
    state["rng"] = PerRank({"seed": 1234 + 100 * place.pp + place.tp}, axes=("pp", "tp"), on_change="reseed")
    return out


# Megatron-core's classes, as far as their fields go.


@dataclass
class ShardedTensorLookAlike:
    key: str
    data: Tensor | None
    dtype: torch.dtype
    local_shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    axis_fragmentations: tuple[int, ...] | None
    replica_id: int | tuple[int, ...] = 0
    prepend_axis_num: int = 0
    allow_shape_mismatch: bool = False
    flattened_range: slice | None = None


@dataclass
class ShardedTensorFactoryLookAlike:
    key: str
    data: Tensor
    build_fn: Any
    merge_fn: Any
    replica_id: int | tuple[int, ...] = 0
    flattened_range: slice | None = None

    def build(self) -> Any:
        return self.build_fn(self.key, self.data, self.replica_id, self.flattened_range)


@dataclass
class ShardedObjectLookAlike:
    key: str
    data: object
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    replica_id: int | tuple[int, ...] = 0

    @property
    def unique_key(self) -> str:
        offset, shape = (".".join(map(str, numbers)) for numbers in (self.global_offset, self.global_shape))
        return f"{self.key}/shard_{offset}_{shape}"


class LocalNonpersistentObjectLookAlike:
    def __init__(self, obj: object) -> None:
        self.obj = obj

    def unwrap(self) -> object:
        return self.obj


LOOK_ALIKES = SimpleNamespace(
    ShardedTensor=ShardedTensorLookAlike,
    ShardedTensorFactory=ShardedTensorFactoryLookAlike,
    ShardedObject=ShardedObjectLookAlike,
    LocalNonpersistentObject=LocalNonpersistentObjectLookAlike,
)
for _name, _kind in vars(LOOK_ALIKES).items():
    _kind.__name__ = _kind.__qualname__ = _name
    _kind.__module__ = "megatron.core.dist_checkpointing.mapping"


def megatron_tensor(mapping: Any, part: ShardedTensor, data: Tensor) -> Any:
    """The part as Megatron's ShardedTensor, which counts the shape of its data and the axes in front of that."""
    (box,) = part.boxes()
    return mapping.ShardedTensor(
        part.key,
        data,
        data.dtype,
        tuple(data.shape),
        part.global_shape,
        box.offset,
        None,
        part.replica_id,
        len(box.shape) - data.dim(),
        part.allow_shape_mismatch,
    )


def megatron_parameter(mapping: Any, parts: Sequence[ShardedTensor], data: Tensor) -> Any:
    """As Megatron's modules give it: a ShardedTensor, or a factory of the two halves of a gated projection."""
    if len(parts) == 1:
        return megatron_tensor(mapping, parts[0], data)

    def build(key: str, tensor: Tensor, replica_id: object, flattened_range: slice | None) -> list[Any]:
        return [megatron_tensor(mapping, p, half) for p, half in zip(parts, tensor.chunk(2), strict=True)]

    return mapping.ShardedTensorFactory(parts[0].key, data, build, torch.cat, parts[0].replica_id)
