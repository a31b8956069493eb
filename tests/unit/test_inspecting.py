"""What inspecting finds in a checkpoint is what was saved, wherever its chunks lie."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distckpt import Checkpointer, PerRank, ShardedTensor
from distckpt.commit import Commit, list_commits, read_index
from distckpt.coordinator import Coordinator
from distckpt.errors import CorruptionError
from distckpt.index import Index
from distckpt.inspecting import (
    ORDERS,
    Placement,
    contents_of,
    held_values,
    keys_matching,
    list_per_rank,
    list_ranks,
    list_tensors,
    list_values,
    natural_order,
    placements,
    read_root,
)
from distckpt.planner import plan_load
from distckpt.shard_file import BLOCK_BYTES
from distckpt.testing import MemoryStorage, run_ranks
from tests.unit.damage import change, flip
from tests.unit.saved_roots import RANKS, ROWS, saved_root

FLAT = 100 * 33


def save_layouts(storage: MemoryStorage) -> None:
    """A tensor of each kind: a grid, irregular boxes, one dimension, none, no elements; and values."""

    def save(coordinator: Coordinator) -> None:
        rank = coordinator.rank
        tp, dp = rank % 2, rank // 2
        whole = ShardedTensor.from_rank_offsets("whole", torch.zeros(50, 33), (0, tp, 2), replica_id=dp)
        ends = [0, 50 * 33 // 2 + 5, 50 * 33]
        state = {
            "grid.10": ShardedTensor.from_rank_offsets(
                "grid.10", torch.zeros(2, 3, dtype=torch.int16), (0, tp, 2), (1, dp, 2), partition=("tp", "dp")
            ),
            "grid.9": ShardedTensor.from_rank_offsets("grid.9", torch.zeros(7), (0, rank, 4)),
            "flat": ShardedTensor.from_flat_range(
                "flat", torch.zeros(ends[dp + 1] - ends[dp]), of=whole, flat_range=slice(ends[dp], ends[dp + 1])
            ),
            "scalar": torch.tensor(1.0),
            "empty": torch.zeros(0, 3),
            "list": [torch.zeros(1), 3],
            "nothing": {},
            "seed": PerRank(rank * 11),
        }
        mesh = {"tp": (tp, 2), "dp": (dp, 2)}
        with Checkpointer(storage, coordinator=coordinator, mesh=mesh) as checkpointer:
            checkpointer.save(state, iteration=3)

    run_ranks(4, save)


@pytest.fixture(scope="module")
def layouts() -> MemoryStorage:
    storage = MemoryStorage()
    save_layouts(storage)
    return storage


def opened(storage: MemoryStorage) -> tuple[Commit, Index]:
    commit = list_commits(storage)[0]
    return commit, read_index(storage, commit)[0]


def test_contents_are_counted_without_the_chunk_table(layouts: MemoryStorage) -> None:
    _, index = opened(layouts)
    contents = contents_of(index)
    assert (contents.tensors, contents.values, contents.per_rank) == (6, 1, 1)
    assert {share.dtype: share.bytes for share in contents.dtypes} == {
        "float32": 4 * (28 + FLAT + 1 + 1),
        "int16": 2 * 24,
    }
    assert contents.tensor_bytes == sum(tensor.size_bytes for tensor in index.tensors.values())
    assert (contents.files, contents.writers) == (4, 4)
    assert contents.file_bytes == sum(file.size_bytes for file in index.files)
    assert contents.largest_bytes == max(file.size_bytes for file in index.files)


def test_marks_of_lists_and_empty_dicts_are_no_values(layouts: MemoryStorage) -> None:
    _, index = opened(layouts)
    assert [(one.key, bytes(one.value)) for one in list_values(index)] == [("list/%l1", b"3")]
    assert {"list", "nothing"} <= index.values.keys()


def test_tensors_come_in_the_order_that_is_asked_for(layouts: MemoryStorage) -> None:
    commit, index = opened(layouts)
    found = {
        order: [one.key for one in list_tensors(layouts, commit, index, list(index.tensors), order=order)]
        for order in ORDERS
    }
    assert found["key"] == ["empty", "flat", "grid.9", "grid.10", "list/%l0", "scalar"]
    assert found["size"] == ["flat", "grid.9", "grid.10", "list/%l0", "scalar", "empty"]
    assert found["shape"][:2] == ["flat", "grid.9"]
    assert found["dtype"][-1] == "grid.10"
    assert found["chunks"][0] == "flat"
    assert found["chunks"][-1] == "empty"
    first = list_tensors(layouts, commit, index, list(index.tensors), order="size", top=2)
    assert [one.key for one in first] == found["size"][:2]
    with pytest.raises(ValueError, match="--sort weight: expected one of key, size"):
        list_tensors(layouts, commit, index, [], order="weight")


def test_tensor_says_how_it_is_cut_and_which_ranks_hold_it(layouts: MemoryStorage) -> None:
    commit, index = opened(layouts)
    found = {one.key: one for one in list_tensors(layouts, commit, index, list(index.tensors))}
    grid = found["grid.10"]
    assert (grid.shape, grid.bytes, grid.partition) == ((4, 6), 48, ("tp", "dp"))
    assert (grid.chunks, grid.ranks) == (4, (0, 1, 2, 3))
    assert (found["empty"].chunks, found["empty"].ranks) == (0, ())
    assert (found["scalar"].chunks, len(found["scalar"].ranks)) == (1, 1)


def test_every_chunk_is_told_once_and_where_it_lies(layouts: MemoryStorage) -> None:
    commit, index = opened(layouts)
    keys = list(index.tensors)
    for key in keys:
        chunks = Placement.read(layouts, commit, index, [key]).chunks()
        entry = index.tensors[key]
        seen = np.zeros(entry.global_shape, int)
        for chunk in chunks:
            seen[tuple(slice(low, low + n) for low, n in zip(chunk.offset, chunk.shape, strict=True))] += 1
            [file] = [file for file in index.files if file.name == chunk.file]
            assert (file.rank, file.mesh) == (chunk.rank, chunk.mesh)
            assert file.header_bytes <= chunk.start <= file.per_rank[0] - chunk.bytes
        assert (seen == 1).all(), key
        assert sum(chunk.bytes for chunk in chunks) == entry.size_bytes
    assert len(Placement.read(layouts, commit, index, ["flat"]).chunks(top=3)) == 3


def test_ranks_hold_together_what_there_is(layouts: MemoryStorage) -> None:
    commit, index = opened(layouts)
    keys = list(index.tensors)
    placement = Placement.read(layouts, commit, index, keys)
    ranks = list_ranks(index, [placement])
    assert [one.rank for one in ranks] == [0, 1, 2, 3]
    assert [one.mesh for one in ranks] == [{"tp": r % 2, "dp": r // 2} for r in range(4)]
    assert sum(one.tensor_bytes for one in ranks) == contents_of(index).tensor_bytes
    assert sum(one.bytes for one in ranks) == contents_of(index).file_bytes
    assert sum(one.chunks for one in ranks) == int(placement.chunk_counts.sum())
    holders = {one.key: one.ranks for one in list_tensors(layouts, commit, index, keys)}
    for one in ranks:
        assert one.tensors == sum(one.rank in held for held in holders.values())


@pytest.mark.parametrize("name", ["_MATRIX", "_BATCH_BYTES"])
def test_what_is_found_in_parts_is_the_same(layouts: MemoryStorage, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    commit, index = opened(layouts)
    keys = list(index.tensors)

    def found() -> list[object]:
        ranks = list_ranks(index, placements(layouts, commit, index, keys))
        return [ranks, *(list_tensors(layouts, commit, index, keys, order=order) for order in ORDERS)]

    whole = found()
    assert len(list(placements(layouts, commit, index, keys))) == 1
    monkeypatch.setattr(f"distckpt.inspecting.{name}", 1)
    assert found() == whole
    assert len(list(placements(layouts, commit, index, keys))) == (len(keys) if name == "_BATCH_BYTES" else 1)


def test_values_that_differ_by_rank_are_read_from_their_files(layouts: MemoryStorage) -> None:
    commit, index = opened(layouts)
    [per_rank] = list_per_rank(index)
    assert (per_rank.key, per_rank.axes, per_rank.holders) == ("seed", (("tp", 2), ("dp", 2)), 4)
    held = held_values(layouts, commit, index, "seed")
    assert [(one.coordinates, one.rank, bytes(one.value)) for one in held] == [
        ((tp, dp), tp + 2 * dp, b"%d" % (11 * (tp + 2 * dp))) for tp in (0, 1) for dp in (0, 1)
    ]
    assert len(held_values(layouts, commit, index, "seed", top=1)) == 1


def test_root_has_its_checkpoints_and_unfinished_saves() -> None:
    storage = saved_root(10, 20)
    storage.make_directory("iter_0000030")
    storage.replace(f"iter_0000030/shard-00000-of-00002-{'7' * 32}.safetensors", b"12345")
    storage.replace("latest_checkpointed_iteration.txt", b"10")
    root = read_root(storage)
    assert [one.iteration for one in root.checkpoints] == [20, 10]
    assert [(one.iteration, one.bytes) for one in root.incomplete] == [(30, 5)]
    assert root.bytes == sum(one.bytes for one in root.checkpoints) + 5
    assert root.tracker == 10
    assert root.tracker_warning is not None
    assert "says 10; the newest committed checkpoint is 20" in root.tracker_warning


def test_damaged_chunk_table_is_no_list_of_tensors() -> None:
    storage = saved_root(1)
    commit, index = opened(storage)
    change(storage, f"{commit.directory}/{index.chunk_table.name}", flip(3))
    with pytest.raises(CorruptionError, match="page 0"):
        list_tensors(storage, commit, index, ["weight"])


def test_chunk_in_a_file_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = saved_root(1)
    commit, index = opened(storage)
    fewer = msgspec.structs.replace(index, files=index.files[:1])
    with pytest.raises(CorruptionError, match="a chunk is in file 1 of 1"):
        Placement.read(storage, commit, fewer, ["weight"])


def test_listing_some_tensors_reads_the_chunks_of_those_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = saved_root(1)
    commit, index = opened(storage)
    asked: list[int] = []

    def counted(stored: object, tensor: np.ndarray, boxes: list[object]) -> object:
        asked.append(len(boxes))
        return plan_load(stored, tensor, boxes)  # type: ignore[arg-type]

    monkeypatch.setattr("distckpt.inspecting.plan_load", counted)
    [found] = list_tensors(storage, commit, index, list(index.tensors), order="size", top=1)
    assert (found.key, found.chunks, asked) == ("weight", RANKS, [1])
    assert found.bytes == ROWS * BLOCK_BYTES


@given(st.lists(st.text(max_size=6), max_size=8))
def test_natural_order_is_an_order_of_any_keys(keys: list[str]) -> None:
    ordered = sorted(keys, key=natural_order)
    assert sorted(ordered) == sorted(keys)
    assert [natural_order(key) for key in ordered] == sorted(map(natural_order, keys[::-1]))


@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_natural_order_counts(a: int, b: int) -> None:
    assert (natural_order(f"layers.{a}.w") < natural_order(f"layers.{b}.w")) == (a < b)


def test_natural_order_takes_numbers_of_any_length() -> None:
    assert natural_order("a" + "9" * 10_000) < natural_order("a1" + "0" * 10_000)


def test_globs_match_whole_keys() -> None:
    keys: Mapping[str, int] = {"a.b/c": 1, "b": 2, "x\ny": 3, "[1]": 4}
    assert keys_matching(keys, []) == list(keys)
    assert keys_matching(keys, ["a*"]) == ["a.b/c"]
    assert keys_matching(keys, ["b", "*c"]) == ["a.b/c", "b"]
    assert keys_matching(keys, ["x?y"]) == ["x\ny"]
    assert keys_matching(keys, ["B"]) == []


def test_sizes_are_those_of_the_shapes(layouts: MemoryStorage) -> None:
    commit, index = opened(layouts)
    for chunk in Placement.read(layouts, commit, index, ["grid.10"]).chunks():
        assert chunk.bytes == 2 * prod(chunk.shape)
