"""A source of tensors: every box is what was saved, every block is checked, and read once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distckpt import Checkpointer, ShardedTensor
from distckpt.commit import list_commits, read_index
from distckpt.coordinator import Coordinator
from distckpt.errors import CorruptionError
from distckpt.geometry import Box, bands
from distckpt.reader import StoredTensors, Wanted
from distckpt.reading_order import begun_blocks, reading_order
from distckpt.shard_file import BLOCK_BYTES
from distckpt.storage import Storage
from distckpt.tensor_source import TensorSource
from distckpt.testing import MemoryStorage, run_ranks
from tests.unit.damage import change, flip
from tests.unit.saved_roots import ROWS, saved_root
from tests.unit.stored_tensors import Tensor, stored

COLUMNS = BLOCK_BYTES // 8
WEIGHT = np.arange(ROWS * COLUMNS, dtype=np.int64).reshape(ROWS, COLUMNS)


@pytest.fixture(scope="module")
def root() -> MemoryStorage:
    return saved_root(1)


def open_source(storage: Storage, *, cache_bytes: int = 32 << 20, **options: int) -> TensorSource:
    commit = list_commits(storage)[0]
    index, _ = read_index(storage, commit)
    stored = StoredTensors.read(storage, commit.directory, index, list(index.tensors))
    return TensorSource(storage, commit.directory, stored, cache_bytes=cache_bytes, **options)


def read_box(source: TensorSource, box: Box) -> np.ndarray:
    out = np.zeros(box.shape, np.int64)
    source.fill([Wanted("weight", box, out.reshape(-1).view(np.uint8), 0, out.strides, 8)])
    return out


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, e) for o, e in zip(box.offset, box.end, strict=True))


@given(st.data())
def test_any_boxes_in_any_order_are_what_was_saved(root: MemoryStorage, data: st.DataObject) -> None:
    with open_source(root, cache_bytes=data.draw(st.sampled_from([1, 3])) * BLOCK_BYTES) as source:
        for _ in range(data.draw(st.integers(1, 4))):
            row, column = data.draw(st.integers(0, ROWS - 1)), data.draw(st.integers(0, COLUMNS - 1))
            rows, columns = data.draw(st.integers(1, ROWS - row)), data.draw(st.integers(1, COLUMNS - column))
            box = Box((row, column), (rows, columns))
            assert np.array_equal(read_box(source, box), WEIGHT[slices(box)])


@pytest.mark.parametrize("max_elements", [COLUMNS // 3, COLUMNS, 2 * COLUMNS + 5])
def test_bands_in_order_read_every_byte_once(root: MemoryStorage, max_elements: int) -> None:
    with open_source(root) as source:
        for box in bands(Box.whole(WEIGHT.shape), max_elements):
            assert np.array_equal(read_box(source, box), WEIGHT[slices(box)])
        check_every_byte_was_read_once(source)


def check_every_byte_was_read_once(source: TensorSource) -> None:
    once = sum(file.size_bytes for file in source.stored.index.files)
    headers = sum(file.header_bytes for file in source.stored.index.files)
    assert once <= source.bytes_read <= once + headers  # Headers lie in blocks, which are read too.


def test_chunks_that_share_a_file_are_read_once_though_each_is_begun() -> None:
    """Columns of a block and a half, so that most blocks are the end of one and the begin of another."""
    columns, rows = 8, 3 * BLOCK_BYTES // 2 // 8
    boxes = [Box((0, column), (rows, 1)) for column in range(columns)]
    tensor = Tensor.of("int64", (rows, columns), boxes=boxes)
    elements = np.frombuffer(tensor.data, np.int64).reshape(rows, columns)
    storage = stored({"weight": tensor})
    with open_source(storage) as source:
        located = source.stored.located
    begun = begun_blocks(located, reading_order(located))
    assert columns < begun < 2 * columns
    with open_source(storage, cache_bytes=begun * BLOCK_BYTES) as source:
        for box in bands(Box.whole(elements.shape), elements.size // 5):
            assert np.array_equal(read_box(source, box), elements[slices(box)])
        check_every_byte_was_read_once(source)


def test_blocks_are_not_kept_for_what_nobody_will_ask_for() -> None:
    """Rank 0 has the first and the last tensor in one block, which is needed to the end. Of what rank 1 has in between,
    every other is asked for: many blocks end with something else."""
    storage, size_bytes = MemoryStorage(), BLOCK_BYTES // 24 * 8

    def save(coordinator: Coordinator) -> None:
        at = coordinator.rank
        state: dict[str, object] = {  # Of a file, items of 8 bytes come first and those of 2 bytes last.
            key: ShardedTensor.from_rank_offsets(key, tensor, (0, at, 2), partition=("tp",))
            for key, tensor in (
                ("first", torch.full((size_bytes // 8,), at, dtype=torch.int64)),
                ("last", torch.full((size_bytes // 2,), at, dtype=torch.int16)),
            )
        }
        if at == 1:
            state |= {f"own{number:02}": torch.zeros(size_bytes // 4, dtype=torch.int32) for number in range(24)}
        with Checkpointer(storage, coordinator=coordinator, mesh={"tp": (at, 2)}) as checkpointer:
            checkpointer.save(state, iteration=1)

    run_ranks(2, save)
    with open_source(storage) as source:
        everything = source.stored
    keys = [everything.keys[number] for number in reading_order(everything.located)]
    assert keys == ["first", *sorted(keys[1:-1]), "last"]
    wanted = ["first", *keys[1:-1:2], "last"]
    directory = list_commits(storage)[0].directory
    with TensorSource(storage, directory, everything, wanted, cache_bytes=2 * BLOCK_BYTES) as source:
        for key in wanted:
            entry = everything.index.tensors[key]
            out = np.zeros(entry.global_shape, entry.dtype)
            source.fill([Wanted(key, Box.whole(out.shape), out.view(np.uint8), 0, out.strides, out.itemsize)])
        assert source.bytes_read <= sum(file.size_bytes + file.header_bytes for file in everything.index.files)


def test_a_cache_that_is_too_small_reads_again(root: MemoryStorage) -> None:
    with open_source(root, cache_bytes=BLOCK_BYTES) as source:
        for column in range(0, COLUMNS, COLUMNS // 4):
            box = Box((0, column), (ROWS, COLUMNS // 4))
            assert np.array_equal(read_box(source, box), WEIGHT[slices(box)])
        assert source.bytes_read > 2 * WEIGHT.nbytes


def test_a_damaged_block_is_refused_and_its_neighbours_are_read() -> None:
    storage = saved_root(1)
    name = next(n for n in storage.list("iter_0000001") if n.startswith("shard-00001"))
    change(storage, f"iter_0000001/{name}", flip(2 * BLOCK_BYTES + 5))
    with open_source(storage) as source:
        with pytest.raises(CorruptionError, match="block 2"):
            read_box(source, Box.whole(WEIGHT.shape))
        assert np.array_equal(read_box(source, Box((0, 0), (3, COLUMNS))), WEIGHT[:3])
