"""Any layout saved, any layout loaded: the same as slicing one NumPy array."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from math import prod
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from distckpt import Checkpointer, ShardedTensor
from distckpt.coordinator import Coordinator
from distckpt.geometry import Box
from distckpt.ring import fill_through_ring
from distckpt.storage import PosixStorage, Storage
from distckpt.testing import FakeAccelerator, MemoryStorage, run_ranks

Array = npt.NDArray[np.generic]

# dtype -> the NumPy type that carries its bits.
CARRIERS = {
    torch.float32: np.int32,
    torch.bfloat16: np.int16,
    torch.float16: np.int16,
    torch.float64: np.int64,
    torch.int64: np.int64,
    torch.uint8: np.uint8,
    torch.bool: np.uint8,
    torch.float8_e4m3fn: np.uint8,
    torch.complex64: np.int64,
    torch.complex128: np.complex128,
}
POISON = 77


@dataclass(frozen=True)
class Part:
    """What one rank has of a tensor: a box, or elements start..stop-1 of flattened boxes, and how it lies in memory."""

    of: tuple[Box, ...]
    flat: tuple[int, int] | None
    memory: str

    def cut(self, whole: Array) -> Array:
        pieces = [whole[tuple(slice(o, e) for o, e in zip(b.offset, b.end, strict=True))] for b in self.of]
        if self.flat is None:
            return pieces[0]
        return np.concatenate([p.reshape(-1) for p in pieces])[slice(*self.flat)]


@dataclass(frozen=True)
class Case:
    """One tensor: what each rank of the saving, and of the loading job has of it."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    saved: tuple[tuple[Part, ...], ...]
    loaded: tuple[tuple[Part, ...], ...]

    def whole(self) -> Array:
        """Every element has a value of its own, as far as its type allows."""
        index = np.arange(prod(self.shape), dtype=np.uint64) + np.uint64(len(self.key))
        mixed = (index * np.uint64(0x9E3779B97F4A7C15)) ^ (index * np.uint64(0xC2B2AE3D27D4EB4F) >> np.uint64(17))
        if self.dtype is torch.bool:
            mixed = mixed >> np.uint64(40) & np.uint64(1)
        if self.dtype is torch.complex128:
            return (index.astype(np.float64) + 1j * mixed.astype(np.float64)).reshape(self.shape)
        return mixed.astype(CARRIERS[self.dtype]).reshape(self.shape)


Full = Callable[[int | tuple[int, ...], int, npt.DTypeLike], Array]


def lay_out(shape: Sequence[int], memory: str, carrier: npt.DTypeLike, full: Full = np.full) -> tuple[Array, Array]:
    """A buffer full of POISON, and a view of it of this shape that lies in it as `memory` says."""
    if memory == "contiguous":
        buffer = full(prod(shape), POISON % 2, carrier)
        return buffer, buffer.reshape(shape)
    if memory == "transposed":
        buffer = full(prod(shape) + 3, POISON % 2, carrier)
        return buffer, buffer[3:].reshape(tuple(shape)[::-1]).transpose()
    if memory == "padded":
        buffer = full((2, *(n + 3 for n in shape)), POISON % 2, carrier)
        return buffer, buffer[(1, *(slice(1, 1 + n) for n in shape), ...)]
    buffer = full((1, *(2 * n + 1 for n in shape)), POISON % 2, carrier)
    return buffer, buffer[(0, *(slice(1, 2 * n + 1, 2) for n in shape), ...)]


def sharded(case: Case, part: Part, view: Array) -> ShardedTensor:
    data = torch.from_numpy(view).view(case.dtype)
    boxes = [
        ShardedTensor(
            case.key,
            data if part.flat is None else torch.empty(box.shape, dtype=case.dtype, device="meta"),
            global_shape=case.shape,
            global_offset=box.offset,
        )
        for box in part.of
    ]
    if part.flat is None:
        return boxes[0]
    return ShardedTensor.from_flat_range(case.key, data, of=boxes, flat_range=slice(*part.flat))


def full_on(accelerator: FakeAccelerator) -> Full:
    """np.full, in the memory of an accelerator."""
    return lambda shape, value, dtype: accelerator.put(torch.from_numpy(np.full(shape, value, dtype))).numpy()


def check(cases: Sequence[Case], storage: Storage, *, on_accelerator: bool = False) -> None:
    """Save under one layout, load under the other, and compare every byte of every target's memory."""

    def save(coordinator: Coordinator) -> None:
        state: dict[str, object] = {}
        for case in cases:
            for i, part in enumerate(case.saved[coordinator.rank]):
                _, view = lay_out(part.cut(case.whole()).shape, part.memory, CARRIERS[case.dtype])
                view[...] = part.cut(case.whole())
                state[f"{case.key} {i}"] = sharded(case, part, view)
        with Checkpointer(storage, coordinator=coordinator) as checkpointer:
            checkpointer.save({"model": state}, iteration=3)

    def load(coordinator: Coordinator) -> None:
        state: dict[str, object] = {}
        compare: list[tuple[str, Part, Array, Array]] = []
        accelerator = FakeAccelerator()
        full = full_on(accelerator) if on_accelerator else np.full
        for case in cases:
            for i, part in enumerate(case.loaded[coordinator.rank]):
                local = part.cut(case.whole())
                buffer, view = lay_out(local.shape, part.memory, CARRIERS[case.dtype], full)
                expected, expected_view = lay_out(local.shape, part.memory, CARRIERS[case.dtype])
                expected_view[...] = local
                state[f"{case.key} {i}"] = sharded(case, part, view)
                compare.append((case.key, part, buffer, expected))
        with Checkpointer(storage, coordinator=coordinator) as checkpointer:
            checkpointer._load_context.transports = accelerator.transports()
            report = checkpointer.load({"model": state})
            assert report.iteration == 3
            assert accelerator.counts["bytes"] == (report.bytes if on_accelerator else 0)
            for key, part, found, expected in compare:
                np.testing.assert_array_equal(found, expected, err_msg=f"{key} {part} on rank {coordinator.rank}")

    run_ranks(len(cases[0].saved), save)
    run_ranks(len(cases[0].loaded), load)
    with Checkpointer(storage, coordinator=None) as checkpointer:
        stored = checkpointer.read()
        for case in cases:
            if any(case.saved):
                found = stored["model"][case.key]
                assert found.dtype == case.dtype
                bits = found.view(torch.from_numpy(np.empty(0, CARRIERS[case.dtype])).dtype).numpy()
                np.testing.assert_array_equal(bits, case.whole())


MEMORY = st.sampled_from(["contiguous", "padded", "transposed", "strided"])


@st.composite
def grids(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Cells between any cuts; two equal cuts give empty cells."""
    cells: list[list[tuple[int, int]]] = []
    for n in shape:
        cuts = [0, *sorted(draw(st.lists(st.integers(0, n), max_size=2))), n]
        cells.append([(a, b - a) for a, b in pairwise(cuts)])
    return [Box(tuple(o for o, _ in cell), tuple(s for _, s in cell)) for cell in product(*cells)]


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Irregular boxes: whole, then some of them cut in two, again and again."""
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 5)) if shape else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        d = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, box.shape[d]))
        first = Box(box.offset, (*box.shape[:d], at, *box.shape[d + 1 :]))
        offset = (*box.offset[:d], box.offset[d] + at, *box.offset[d + 1 :])
        boxes += [first, Box(offset, (*box.shape[:d], box.shape[d] - at, *box.shape[d + 1 :]))]
    return boxes


@st.composite
def arbitrary_boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Boxes that may overlap and leave holes: good for loading only."""
    boxes = []
    for _ in range(draw(st.integers(1, 4))):
        bounds = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
        boxes.append(Box(tuple(a for a, _ in bounds), tuple(b - a for a, b in bounds)))
    return boxes


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], world_size: int, *, to_load: bool) -> tuple[tuple[Part, ...], ...]:
    """What each rank has. Flat ranges count in one box (column- or row-parallel), or in several, one after the
    other (SwiGLU)."""
    kinds = [grids(shape), tilings(shape)] + ([arbitrary_boxes(shape)] if to_load else [])
    boxes = draw(st.one_of(kinds))
    ranks: list[list[Part]] = [[] for _ in range(world_size)]
    rank = st.integers(0, world_size - 1)

    def give(part_of: tuple[Box, ...], flat: tuple[int, int] | None) -> None:
        holders = {draw(rank)} | (draw(st.sets(rank, max_size=2)) if draw(st.booleans()) else set())
        for holder in sorted(holders):
            memory = draw(MEMORY)
            ranks[holder].append(Part(part_of, flat, memory))

    if draw(st.booleans()):
        for box in boxes:
            give((box,), None)
    else:
        boxes = draw(st.permutations(boxes))
        while boxes:
            count = draw(st.integers(1, 3))
            group, boxes = tuple(boxes[:count]), boxes[count:]
            total = sum(b.size for b in group)
            cuts = [0, *sorted(draw(st.lists(st.integers(0, total), max_size=3))), total]
            for start, stop in pairwise(cuts):
                give(group, (start, stop))
    return tuple(tuple(parts) for parts in ranks)


@st.composite
def all_cases(draw: st.DrawFn) -> list[Case]:
    before, after = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    cases = []
    for number in range(draw(st.integers(1, 2))):
        shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
        if draw(st.integers(0, 9)) == 0 and shape:
            shape = (*shape[:-1], 0)
        cases.append(
            Case(
                key="w" * (number + 1),
                shape=shape,
                dtype=draw(st.sampled_from(list(CARRIERS))),
                saved=draw(layouts(shape, before, to_load=False)),
                loaded=draw(layouts(shape, after, to_load=True)),
            )
        )
    return cases


PROPERTY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@settings(PROPERTY, max_examples=150)
@given(all_cases())
def test_any_layout_loads_as_any_other(cases: list[Case]) -> None:
    event(f"{len(cases[0].saved)} -> {len(cases[0].loaded)} ranks")
    check(cases, MemoryStorage())


@settings(PROPERTY, max_examples=15)
@given(all_cases())
def test_any_layout_loads_as_any_other_from_files(cases: list[Case]) -> None:
    with tempfile.TemporaryDirectory() as root:
        check(cases, PosixStorage(root))


@settings(PROPERTY, max_examples=60)
@given(all_cases(), st.sampled_from([128, 1024, 1 << 20]))
def test_any_layout_loads_as_any_other_onto_an_accelerator(cases: list[Case], ring_bytes: int) -> None:
    with patch("distckpt.filling.fill_through_ring", partial(fill_through_ring, ring_bytes=ring_bytes)):
        check(cases, MemoryStorage(), on_accelerator=True)


def swiglu(tp: int, dp: int, rows: int, columns: int) -> tuple[tuple[Part, ...], ...]:
    """fc1 of a gated MLP: a tp rank has its slice of the gate and of the up half, flattened together over dp."""
    ranks = []
    step = rows // (2 * tp)
    for t, d in product(range(tp), range(dp)):
        halves = tuple(Box((half * rows // 2 + t * step, 0), (step, columns)) for half in range(2))
        total = 2 * step * columns
        bucket = -(-total // dp)
        flat = (min(d * bucket, total), min((d + 1) * bucket, total))
        ranks.append((Part(halves, flat, "padded"),))
    return tuple(ranks)


def row_parallel(tp: int, dp: int, rows: int, columns: int) -> tuple[tuple[Part, ...], ...]:
    ranks = []
    for t, d in product(range(tp), range(dp)):
        box = Box((0, t * columns // tp), (rows, columns // tp))
        bucket = -(-box.size // dp)
        ranks.append((Part((box,), (min(d * bucket, box.size), min((d + 1) * bucket, box.size)), "strided"),))
    return tuple(ranks)


def test_flat_swiglu_and_row_parallel_shards_move_to_another_tp_and_dp() -> None:
    fc1 = Case("fc1", (24, 5), torch.float32, swiglu(2, 3, 24, 5), swiglu(3, 1, 24, 5))
    fc2 = Case("fc2", (5, 12), torch.bfloat16, row_parallel(2, 3, 5, 12), row_parallel(3, 1, 5, 12))
    check([fc1, fc2], MemoryStorage())


def test_tensors_larger_than_the_read_window_are_cut_both_ways() -> None:
    rows, columns = 1000, 3001  # 24 MB of float64: three windows of blocks, rows that straddle blocks
    shape = (rows, columns)
    by_rows = tuple((Part((Box((i * 500, 0), (500, columns)),), None, "contiguous"),) for i in range(2))
    narrow = (Part((Box((3, 1500), (990, 2)),), None, "padded"),)
    flat = (Part((Box.whole(shape),), (1_400_001, 3_000_003), "contiguous"),)
    check([Case("w", shape, torch.float64, by_rows, (narrow, flat))], MemoryStorage())


def test_a_tensor_without_elements_is_saved_and_loaded() -> None:
    empty = Part((Box((0, 0), (0, 3)),), None, "contiguous")
    check([Case("w", (0, 3), torch.float32, ((empty,), (empty,)), ((empty,),))], MemoryStorage())


def test_a_box_that_two_ranks_have_is_stored_once() -> None:
    whole = (Part((Box((0,), (64,)),), None, "contiguous"),)
    other = (Part((Box((64,), (64,)),), None, "contiguous"),)
    one = MemoryStorage()
    check([Case("w", (128,), torch.float64, (whole, other), (whole,))], one)
    both = MemoryStorage()
    check([Case("w", (128,), torch.float64, (whole + other, whole + other), (whole,))], both)
    assert _data_bytes(one) == _data_bytes(both) == 128 * 8


def _data_bytes(storage: Storage) -> int:
    """Bytes of tensors in the shard files, by their own headers."""
    total = 0
    for name in storage.list("iter_0000003"):
        if name.endswith(".safetensors"):
            file = storage.open(f"iter_0000003/{name}")
            content = bytearray(file.size_bytes)
            file.read_into(0, content)
            file.close()
            header = np.frombuffer(content, "<u8", 1)[0]
            for key, entry in json.loads(content[8 : 8 + int(header)]).items():
                if not key.startswith("__"):
                    total += entry["data_offsets"][1] - entry["data_offsets"][0]
    return total
