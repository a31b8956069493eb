"""Reading order: every file from its begin to its end; and how much is begun, held against going through it."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from unittest.mock import patch

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distckpt import reading_order as module
from distckpt.geometry import Box
from distckpt.reading_order import begun_blocks, reading_order
from tests.unit.stored_tensors import tilings
from tests.unit.test_located_chunks import FILES, Place, located

SMALL_BLOCK = 8
Checkpoint = tuple[list[tuple[int, ...]], list[list[Place]]]


@st.composite
def written(draw: st.DrawFn) -> Checkpoint:
    """Tensors in one order, which all files have: each has the chunks of a tensor in any order."""
    shapes = draw(st.lists(st.lists(st.integers(0, 6), max_size=3).map(tuple), max_size=8))
    ends = [draw(st.integers(0, 20)) for _ in range(FILES)]
    tensors: list[list[Place]] = [[] for _ in shapes]
    for number in draw(st.permutations(range(len(shapes)))):
        for box in draw(st.permutations(draw(tilings(shapes[number])))):
            file = draw(st.integers(0, FILES - 1))
            tensors[number].append((file, ends[file], box))
            ends[file] += box.size
    return shapes, tensors


def names_in_file(tensors: Sequence[Sequence[Place]], file: int) -> list[int]:
    chunks = sorted((start, number) for number, places in enumerate(tensors) for of, start, _ in places if of == file)
    return list(dict.fromkeys(number for _, number in chunks))


@given(written())
def test_every_file_is_read_from_its_begin_to_its_end(checkpoint: Checkpoint) -> None:
    shapes, tensors = checkpoint
    order = reading_order(located(shapes, tensors))
    assert sorted(order) == list(range(len(shapes)))
    turn = {number: at for at, number in enumerate(order)}
    for file in range(FILES):
        turns = [turn[number] for number in names_in_file(tensors, file)]
        assert turns == sorted(turns)


def test_files_that_share_no_tensor_are_read_one_after_the_other() -> None:
    whole = Box((0,), (4,))
    tensors = [[(number % 2, 4 * (number // 2), whole)] for number in range(6)]
    assert reading_order(located([(4,)] * 6, tensors)) == [0, 2, 4, 1, 3, 5]


def test_tensors_that_files_have_in_contrary_orders_are_all_read() -> None:
    halves = [Box((0,), (4,)), Box((4,), (4,))]
    tensors = [
        [(0, 0, halves[0]), (1, 4, halves[1])],
        [(0, 4, halves[0]), (1, 0, halves[1])],
        [(2, 0, Box((0,), (8,)))],
    ]
    assert sorted(reading_order(located([(8,)] * 3, tensors))) == [0, 1, 2]


@given(written(), st.randoms(use_true_random=False))
def test_as_many_blocks_are_begun_as_who_goes_through_it_finds(checkpoint: Checkpoint, random: Random) -> None:
    shapes, tensors = checkpoint
    found = located(shapes, tensors)
    order = reading_order(found)
    random.shuffle(order)
    blocks = [block for number in order for block in blocks_of_elements(shapes[number], tensors[number])]
    begun = [len(set(blocks[:at]) & set(blocks[at:])) for at in range(len(blocks))]
    with patch.object(module, "BLOCK_BYTES", SMALL_BLOCK):
        counted = begun_blocks(found, order)
    # Of the blocks in the midst of a chunk one counts all the time, also where the one has ended and the next comes.
    chunks = sum(len(places) for places in tensors)
    assert max(begun, default=0) <= counted <= max(begun, default=0) + chunks


def blocks_of_elements(shape: Sequence[int], places: Sequence[Place]) -> list[tuple[int, int]]:
    """The block of each element, in C order. Elements have one byte."""
    blocks = np.zeros(tuple(shape), "i8,i8")
    for file, start, box in places:
        of = [(file, (start + number) // SMALL_BLOCK) for number in range(box.size)]
        inside = tuple(slice(o, e) for o, e in zip(box.offset, box.end, strict=True))
        blocks[inside] = np.array(of, "i8,i8").reshape(box.shape)
    return [tuple(block) for block in blocks.reshape(-1).tolist()]


def test_columns_count_a_block_each_and_rows_one() -> None:
    columns = [[(file, 0, Box((0, 4 * file), (64, 4))) for file in range(3)]]
    rows = [[(file, 0, Box((16 * file, 0), (16, 12))) for file in range(3)]]
    with patch.object(module, "BLOCK_BYTES", SMALL_BLOCK):
        assert begun_blocks(located([(64, 12)], columns), [0]) == 3
        assert begun_blocks(located([(48, 12)], rows), [0]) == 1


def test_small_chunks_that_share_a_block_are_one() -> None:
    places = [[(0, 2 * column, Box((0, column), (2, 1))) for column in range(4)]]
    with patch.object(module, "BLOCK_BYTES", SMALL_BLOCK):
        assert begun_blocks(located([(2, 4)], places), [0]) == 1
