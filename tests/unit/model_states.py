"""Whole models as a labelled Megatron-style job saves them, on any layout, and what a checkpoint of one must hold.

Every element is a function of its key and of where it lies in the global tensor. Who holds which box is worked out here
from numpy.array_split and torch.chunk alone, so that a reshard can be compared with what a job itself would have saved.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from distckpt import Checkpointer, LoadReport, PerRank, ShardedTensor
from distckpt.chunk_table import Boxes, Grids
from distckpt.commit import list_commits, read_index
from distckpt.coordinator import Coordinator
from distckpt.geometry import Box
from distckpt.planner import plan_load
from distckpt.reader import StoredTensors
from distckpt.storage import Storage
from distckpt.testing import run_ranks

AXES = ("tp", "ep", "dp", "pp")  # The first is counted fastest.
OTHER = -3  # what is in memory before a load
ITERATION = 7


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh. layers: how many each pipeline stage has, if not equally many."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    layers: tuple[int, ...] | None = None

    @property
    def mesh(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def world_size(self) -> int:
        return prod(self.mesh.values())

    def place(self, rank: int) -> dict[str, int]:
        found = {}
        for axis, size in self.mesh.items():
            rank, found[axis] = divmod(rank, size)
        return found

    def mesh_of(self, rank: int) -> dict[str, tuple[int, int]]:
        return {axis: (at, getattr(self, axis)) for axis, at in self.place(rank).items()}

    def stage_of(self, layer: int, count: int) -> int:
        sizes = self.layers or [count // self.pp] * self.pp
        assert sum(sizes) == count
        return next(stage for stage in range(self.pp) if layer < sum(sizes[: stage + 1]))

    def __str__(self) -> str:
        sizes = "".join(f"{axis}{size}" for axis, size in self.mesh.items() if size > 1)
        return (sizes or "one") + ("" if self.layers is None else f" {self.layers}")


Stage = int | Literal["first", "last", "both"]  # a layer, or the ends of the pipeline


@dataclass(frozen=True)
class Parameter:
    """One parameter. stage: which coordinate of "pp" holds it."""

    key: str
    shape: tuple[int, ...]
    partition: tuple[str | None, ...]
    stage: Stage
    blocks: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.bfloat16

    def whole(self) -> Tensor:
        return whole_tensor(self.key, self.shape, self.dtype)

    def is_at(self, layout: Layout, pp: int, layers: int) -> bool:
        if isinstance(self.stage, int):
            return layout.stage_of(self.stage, layers) == pp
        ends = {"first": {0}, "last": {layout.pp - 1}, "both": {0, layout.pp - 1}}
        return pp in ends[self.stage]

    def boxes(self, layout: Layout, place: Mapping[str, int]) -> list[Box]:
        """What a rank at this place holds, if its stage does, in the order in which its weight has them."""
        runs: list[list[tuple[int, int]]] = []
        for d, (extent, axis) in enumerate(zip(self.shape, self.partition, strict=True)):
            size = 1 if axis is None else layout.mesh[axis]
            count = 1 if self.blocks is None or size == 1 else self.blocks[d]  # Whole, they are one box.
            own = []
            for block in torch.arange(extent).chunk(count) if extent else []:
                parts = block.chunk(size)
                at = 0 if axis is None else place[axis]
                if at < len(parts) and len(parts[at]):
                    own.append((int(parts[at][0]), len(parts[at])))
            runs.append(own)
        return [Box(tuple(o for o, _ in cell), tuple(n for _, n in cell)) for cell in product(*runs)]

    def is_split_over(self, axis: str) -> bool:
        return axis in self.partition


def whole_tensor(key: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Numbers that are all finite, and differ in every element as far as the type allows."""
    count = prod(shape)
    bits = (np.arange(count, dtype=np.uint64) + np.uint64(zlib.crc32(key.encode()))) * np.uint64(0x9E3779B97F4A7C15)
    bits >>= np.uint64(20)
    if dtype is torch.bfloat16:
        found = torch.from_numpy((bits & np.uint64(0x3FFF)).astype(np.int16)).view(torch.bfloat16)
    elif dtype is torch.float32:
        found = torch.from_numpy((bits & np.uint64(0x3FFFFFFF)).astype(np.int32)).view(torch.float32)
    else:
        found = torch.from_numpy(bits.astype(np.int64)).to(dtype)
    return found.reshape(tuple(shape))


@dataclass(frozen=True)
class Model:
    """parameters, and for each two fp32 moments that are cut over data parallelism wherever parameters end."""

    name: str
    layers: int
    parameters: tuple[Parameter, ...]
    with_moments: bool = True

    def stored(self) -> dict[str, Tensor]:
        """Key -> tensor of everything that a checkpoint of it has."""
        found = {parameter.key: parameter.whole() for parameter in self.parameters}
        for parameter in self.parameters if self.with_moments else ():
            for moment in ("exp_avg", "exp_avg_sq"):
                key = f"optimizer.{moment}.{parameter.key}"
                found[key] = whole_tensor(key, parameter.shape, torch.float32)
        return found

    def parameter_of(self, key: str) -> Parameter:
        """The parameter that a stored tensor is, or is a moment of."""
        name = re.sub(r"^optimizer\.exp_avg(_sq)?\.", "", key)
        return next(parameter for parameter in self.parameters if parameter.key == name)

    def own(self, layout: Layout, rank: int) -> list[Parameter]:
        return [p for p in self.parameters if p.is_at(layout, layout.place(rank)["pp"], self.layers)]

    def holders(self, layout: Layout) -> dict[str, dict[Box, set[int]]]:
        """Key of each parameter -> box -> the ranks that hold it."""
        found: dict[str, dict[Box, set[int]]] = {p.key: {} for p in self.parameters}
        for rank in range(layout.world_size):
            for parameter in self.own(layout, rank):
                for box in parameter.boxes(layout, layout.place(rank)):
                    found[parameter.key].setdefault(box, set()).add(rank)
        return found


def gpt(layers: int = 4, hidden: int = 8, vocabulary: int = 32, *, tied: bool = True) -> Model:
    """Fused QKV of three blocks, learned positions; word embeddings that both ends of the pipeline have."""
    found = [
        Parameter("embedding.word.weight", (vocabulary, hidden), ("tp", None), "both" if tied else "first"),
        Parameter("embedding.position.weight", (6, hidden), (None, None), "first"),
        Parameter("final_norm.weight", (hidden,), (None,), "last"),
        Parameter("final_norm.bias", (hidden,), (None,), "last"),
    ]
    if not tied:
        found.append(Parameter("output.weight", (vocabulary, hidden), ("tp", None), "last"))
    for n in range(layers):
        at = f"layers.{n}"
        found += [
            Parameter(f"{at}.attention.qkv.weight", (3 * hidden, hidden), ("tp", None), n, (3, 1)),
            Parameter(f"{at}.attention.qkv.bias", (3 * hidden,), ("tp",), n, (3,)),
            Parameter(f"{at}.attention.proj.weight", (hidden, hidden), (None, "tp"), n),
            Parameter(f"{at}.attention.proj.bias", (hidden,), (None,), n),
            Parameter(f"{at}.norm.weight", (hidden,), (None,), n),
            Parameter(f"{at}.mlp.fc1.weight", (4 * hidden, hidden), ("tp", None), n),
            Parameter(f"{at}.mlp.fc2.weight", (hidden, 4 * hidden), (None, "tp"), n),
        ]
    return Model("gpt", layers, tuple(found))


def llama(layers: int = 4, hidden: int = 16) -> Model:
    """SwiGLU, gate and up in one weight; fewer key and value heads than query heads; untied embeddings."""
    found = [
        Parameter("embedding.weight", (24, hidden), ("tp", None), "first"),
        Parameter("norm.weight", (hidden,), (None,), "last", dtype=torch.float32),  # No end of layers.0.norm.weight.
        Parameter("output.weight", (24, hidden), ("tp", None), "last"),
    ]
    for n in range(layers):
        at = f"layers.{n}"
        found += [
            Parameter(f"{at}.attention.q.weight", (hidden, hidden), ("tp", None), n),
            Parameter(f"{at}.attention.k.weight", (hidden // 4, hidden), ("tp", None), n),
            Parameter(f"{at}.attention.v.weight", (hidden // 4, hidden), ("tp", None), n),
            Parameter(f"{at}.attention.proj.weight", (hidden, hidden), (None, "tp"), n),
            Parameter(f"{at}.norm.weight", (hidden,), (None,), n, dtype=torch.float32),
            Parameter(f"{at}.mlp.gate_up.weight", (2 * 3 * hidden, hidden), ("tp", None), n, (2, 1)),
            Parameter(f"{at}.mlp.down.weight", (hidden, 3 * hidden), (None, "tp"), n),
        ]
    return Model("llama", layers, tuple(found))


def moe(layers: int = 4, hidden: int = 8, experts: int = 4) -> Model:
    """Experts, stacked on a dimension that expert parallelism splits, a router, and experts that all tokens share."""
    found = [
        Parameter("embedding.weight", (16, hidden), ("tp", None), "first"),
        Parameter("output.weight", (16, hidden), ("tp", None), "last"),
    ]
    for n in range(layers):
        at = f"layers.{n}"
        found += [
            Parameter(f"{at}.attention.qkv.weight", (3 * hidden, hidden), ("tp", None), n, (3, 1)),
            Parameter(f"{at}.router.weight", (experts, hidden), (None, None), n, dtype=torch.float32),
            Parameter(f"{at}.experts.fc1", (experts, 2 * hidden, hidden), ("ep", "tp", None), n, (1, 2, 1)),
            Parameter(f"{at}.experts.fc2", (experts, hidden, hidden), ("ep", None, "tp"), n),
            Parameter(f"{at}.shared.fc1", (2 * hidden, hidden), ("tp", None), n, (2, 1)),
            Parameter(f"{at}.shared.fc2", (hidden, hidden), (None, "tp"), n),
        ]
    return Model("moe", layers, tuple(found))


@dataclass
class RankState:
    """state is what is saved; shards are all in it."""

    state: dict[str, Any]
    shards: list[ShardedTensor] = field(default_factory=list)

    def check(self, stored: Mapping[str, Tensor]) -> None:
        """That all were filled with what is stored."""
        for shard in self.shards:
            whole = stored[shard.key]
            pieces = [whole[slices(box)].reshape(-1) for box in shard.boxes()]
            expected = torch.cat(pieces) if pieces else whole.reshape(-1)[:0]
            assert same_bits(shard.data.reshape(-1), expected), shard


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, e) for o, e in zip(box.offset, box.end, strict=True))


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8))


def rank_state(model: Model, layout: Layout, rank: int, *, is_blank: bool = False, labels: bool = True) -> RankState:
    """What a rank saves, or, blank, what it gives to a load."""
    place = layout.place(rank)
    out = RankState({})
    weights: dict[str, list[ShardedTensor]] = {}
    for parameter in model.own(layout, rank):
        whole = parameter.whole()
        told = {"partition": parameter.partition, "owner": "pp", "blocks": parameter.blocks} if labels else {}
        weights[parameter.key] = [
            ShardedTensor(
                parameter.key,
                torch.full_like(whole[slices(box)], OTHER) if is_blank else whole[slices(box)].clone(),
                global_shape=parameter.shape,
                global_offset=box.offset,
                **told,  # type: ignore[arg-type]
            )
            for box in parameter.boxes(layout, place)
        ]
    out.state["model"] = weights
    out.shards += [shard for shards in weights.values() for shard in shards]
    if model.with_moments:
        optimizer: dict[str, list[ShardedTensor]] = {}
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer[moment] = list(_moments(model, layout, place, weights, moment, is_blank=is_blank))
            out.shards += optimizer[moment]
        out.state["optimizer"] = {**optimizer, "step": None if is_blank else 1000}
    seed = None if is_blank else 100 * place["pp"] + place["tp"]
    out.state["rng"] = PerRank({"seed": seed}, axes=("pp", "tp"), on_change="reseed")
    arguments = {"betas": (0.9, 0.95), "name": "run\u00e9", "nested": {"list": [1, None, True]}}
    out.state["args"] = {"betas": None, "name": None, "nested": {"list": None}} if is_blank else arguments
    return out


def _moments(
    model: Model,
    layout: Layout,
    place: Mapping[str, int],
    weights: Mapping[str, list[ShardedTensor]],
    moment: str,
    *,
    is_blank: bool,
) -> Iterator[ShardedTensor]:
    """Equal ranges of the buffer of all weights that the same ranks have: over dp; if ep does not split them, over ep
    and dp."""
    for is_split in (False, True):
        keys = [key for key in weights if weights[key] and model.parameter_of(key).is_split_over("ep") == is_split]
        parts = layout.dp if is_split else layout.dp * layout.ep
        at = place["dp"] if is_split else place["dp"] * layout.ep + place["ep"]
        total = sum(shard.data.numel() for key in keys for shard in weights[key])
        bucket, begin = -(-total // parts), 0
        for key in keys:
            size = sum(shard.data.numel() for shard in weights[key])
            low, high = max(at * bucket - begin, 0), min((at + 1) * bucket - begin, size)
            begin += size
            if low < high:
                name = f"optimizer.{moment}.{key}"
                whole = whole_tensor(name, weights[key][0].global_shape, torch.float32)
                pieces = [whole[slices(box)].reshape(-1) for shard in weights[key] for box in shard.boxes()]
                flat = torch.cat(pieces)[low:high].clone()
                yield ShardedTensor.from_flat_range(
                    name,
                    torch.full_like(flat, OTHER) if is_blank else flat,
                    of=weights[key],
                    flat_range=slice(low, high),
                )


def save_model(storage: Storage, model: Model, layout: Layout, *, labels: bool = True) -> None:
    def run(coordinator: Coordinator) -> None:
        mesh = layout.mesh_of(coordinator.rank)
        with Checkpointer(storage, coordinator=coordinator, mesh=mesh) as checkpointer:
            state = rank_state(model, layout, coordinator.rank, labels=labels).state
            checkpointer.save(state, iteration=ITERATION, metrics={"loss": 0.5})

    run_ranks(layout.world_size, run)


def load_model(storage: Storage, model: Model, layout: Layout) -> list[LoadReport]:
    """By a job on this layout; fails unless everything is filled with what was saved."""
    stored = model.stored()

    def run(coordinator: Coordinator) -> LoadReport:
        mesh = layout.mesh_of(coordinator.rank)
        own = rank_state(model, layout, coordinator.rank, is_blank=True)
        with Checkpointer(storage, coordinator=coordinator, mesh=mesh) as checkpointer:
            report = checkpointer.load(own.state)
        own.check(stored)
        assert own.state["args"] == rank_state(replace(model, parameters=()), layout, 0).state["args"]
        assert not model.with_moments or own.state["optimizer"]["step"] == 1000
        place, rng = layout.place(coordinator.rank), own.state["rng"]
        assert rng.seed is not None or rng.value == {"seed": 100 * place["pp"] + place["tp"]}
        return report

    return run_ranks(layout.world_size, run)


Held = dict[str, list[tuple[int, Box]]]


def held_chunks(storage: Storage) -> Held:
    """Key -> (rank whose file it is in, box) of the chunks of the newest checkpoint, sorted."""
    commit = list_commits(storage)[0]
    index, _ = read_index(storage, commit)
    keys = list(index.tensors)
    stored = StoredTensors.read(storage, commit.directory, index, keys)
    return {keys[n]: chunks for n, chunks in _chunks(stored.chunks, index.files, keys, index.tensors).items()}


def _chunks(
    chunks: Sequence[Grids | Boxes], files: Sequence[Any], keys: Sequence[str], tensors: Mapping[str, Any]
) -> dict[int, list[tuple[int, Box]]]:
    found: dict[int, list[tuple[int, Box]]] = {n: [] for n in range(len(keys))}
    wholes = [Box.whole(tensors[key].global_shape) for key in keys]
    for copies in plan_load(chunks, np.arange(len(keys)), wholes):
        hits = copies.hits
        rows = zip(
            copies.target.tolist(), hits.files.tolist(), hits.offsets.tolist(), hits.shapes.tolist(), strict=True
        )
        for n, file, offset, shape in rows:
            found[n].append((files[file].rank, Box(tuple(offset), tuple(shape))))
    return {n: sorted(rows, key=lambda row: (row[1], row[0])) for n, rows in found.items()}


def bytes_by_rank(storage: Storage) -> dict[int, int]:
    """Of tensors, in the newest checkpoint."""
    index, _ = read_index(storage, list_commits(storage)[0])
    found: dict[int, int] = {}
    for key, chunks in held_chunks(storage).items():
        item = index.tensors[key].size_bytes // prod(index.tensors[key].global_shape) if chunks else 0
        for rank, box in chunks:
            found[rank] = found.get(rank, 0) + box.size * item
    return found


def read_tensors(storage: Storage) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint, whole, by key."""
    commit = list_commits(storage)[0]
    keys = list(read_index(storage, commit)[0].tensors)
    with Checkpointer(storage) as checkpointer:
        state = checkpointer.read()

    found: dict[str, Tensor] = {}

    def walk(node: object, path: str) -> None:
        if isinstance(node, np.ndarray):
            node = torch.from_numpy(node)
        if isinstance(node, Tensor):
            found[path if path in keys else path.rpartition("/")[2]] = node
        elif isinstance(node, dict):
            for name, child in node.items():
                walk(child, f"{path}/{name}" if path else str(name))
        elif isinstance(node, (list, tuple)):
            for number, child in enumerate(node):  # as keys have entries of lists
                walk(child, f"{path}/%l{number}")

    walk(state, "")
    assert found.keys() == set(keys)
    return found


def check_holds(storage: Storage, model: Model, layout: Layout) -> None:
    """That the newest checkpoint is what a job on this layout would have saved: the same tensors, bit by bit, and each
    parameter cut as there, every box of it in the file of a rank that holds it there. What of a parameter's moments a
    rank has is what it has of the parameter, or, in what a job saved, a part of that."""
    stored = read_tensors(storage)
    expected = model.stored()
    assert stored.keys() == expected.keys()
    for key, tensor in expected.items():
        assert same_bits(stored[key], tensor), key
    holders = model.holders(layout)
    for key, chunks in held_chunks(storage).items():
        allowed = holders[model.parameter_of(key).key]
        boxes = [box for _, box in chunks]
        assert sorted(boxes) == sorted(allowed), key
        wrong = [(rank, box) for rank, box in chunks if rank not in allowed[box]]
        assert not wrong, f"{key}: {wrong}, allowed are {[allowed[box] for _, box in wrong]}"
