"""Where all chunks lie, by tensor and by file: held against the list that they were made of."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.chunk_table import Chunks, Hits, decode_records, encode_record
from distckpt.errors import CorruptionError
from distckpt.geometry import Box
from distckpt.located_chunks import LocatedChunks
from tests.unit.stored_tensors import tilings

FILES = 3
Place = tuple[int, int, Box]  # file, first byte, box


def located(shapes: Sequence[tuple[int, ...]], tensors: Sequence[Sequence[Place]], data_ends: int = 1 << 30) -> Any:
    """Through a chunk table, as it is read."""
    keys = [f"t{number}" for number in range(len(shapes))]
    records = []
    for shape, places in zip(shapes, tensors, strict=True):
        offsets = np.array([box.offset for *_, box in places], np.int64).reshape(len(places), len(shape))
        extents = np.array([box.shape for *_, box in places], np.int64).reshape(len(places), len(shape))
        files, starts = (np.array([place[i] for place in places], np.int64) for i in range(2))
        records.append(encode_record(Chunks(offsets, extents, files, starts), shape))
    sizes = [len(record) for record in records]
    begins = [sum(sizes[:number]) for number in range(len(sizes))]
    table = decode_records(b"".join(records), list(zip(begins, sizes, strict=True)), shapes, keys, where="test")
    file = SimpleNamespace(header_bytes=0, per_rank=(data_ends, 2), name="shard")
    index = SimpleNamespace(
        tensors={k: SimpleNamespace(global_shape=s, dtype="uint8") for k, s in zip(keys, shapes, strict=True)},
        files=[file] * FILES,
    )
    return LocatedChunks.of(index, keys, table)  # type: ignore[arg-type]  # It has what is looked at.


def places_of(hits: Hits) -> list[Place]:
    columns = (hits.files.tolist(), hits.starts.tolist(), hits.offsets.tolist(), hits.shapes.tolist())
    return [(file, start, Box(tuple(o), tuple(s))) for file, start, o, s in zip(*columns, strict=True)]


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[list[Place]]]:
    shapes = draw(st.lists(st.lists(st.integers(0, 6), max_size=3).map(tuple), max_size=6))
    tensors: list[list[Place]] = []
    for number, shape in enumerate(shapes):
        boxes = draw(tilings(shape))
        files = draw(st.lists(st.integers(0, FILES - 1), min_size=len(boxes), max_size=len(boxes)))
        starts = draw(st.permutations(range(len(boxes))))
        places = zip(files, starts, boxes, strict=True)
        tensors.append([(file, 1000 * number + start, box) for file, start, box in places])
    return shapes, tensors


@given(checkpoints())
def test_chunks_are_found_by_tensor_and_by_file(checkpoint: tuple[list[tuple[int, ...]], list[list[Place]]]) -> None:
    shapes, tensors = checkpoint
    found = located(shapes, tensors)
    for number, places in enumerate(tensors):
        assert places_of(found.of_tensor(number)) == sorted(places)
    for file in range(FILES):
        of_file = [
            (tensor, place)
            for numbers, hits in found.of_file(file)
            for tensor, place in zip(numbers.tolist(), places_of(hits), strict=True)
        ]
        assert sorted(of_file) == [(t, p) for t, places in enumerate(tensors) for p in sorted(places) if p[0] == file]


@pytest.mark.parametrize(("file", "start", "says"), [(FILES, 0, "is in file 3 of 3"), (0, 90, "data lies at 0-100")])
def test_chunk_where_none_can_be_is_damage(file: int, start: int, says: str) -> None:
    with pytest.raises(CorruptionError, match=f"tensor 't0'.*{says}"):
        located([(16,)], [[(file, start, Box((0,), (16,)))]], data_ends=100)
