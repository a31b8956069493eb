"""Steps of a reshard: what is brought into memory together, and where in which target file it then goes. No torch.

A tensor is gone through in bands, which are contiguous in every chunk, of the source and of the target: so every file
is read and written in long runs, whatever the dimension that is cut, and memory does not grow with the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import msgspec
import numpy as np

from distckpt.geometry import Box, Int64Array, bands, flat_range_boxes, intersect, strides_of
from distckpt.index import Natural
from distckpt.reader import Wanted
from distckpt.shard_file import DTYPES

_PAGE = 4096


class Position(msgspec.Struct, frozen=True, array_like=True, order=True):
    """How far a list of tensors is gone through: the number of the one that is next, and how many of its elements, in
    C order, are done."""

    tensor: Natural
    element: Natural


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """One tensor, its chunks in the target, and where each lies. source_shape, source_dtype: as it is stored.

    offsets, shapes: (n, ndim). outputs: (n,) which of the target files. starts: (n,) first byte in it.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    source_shape: tuple[int, ...]
    source_dtype: str
    offsets: Int64Array
    shapes: Int64Array
    outputs: Int64Array
    starts: Int64Array

    @property
    def item_bytes(self) -> int:
        return DTYPES[self.dtype].item_bytes

    @property
    def held_item_bytes(self) -> int:
        """What an element takes while it is in memory: twice, if it is converted."""
        before = DTYPES[self.source_dtype].item_bytes if self.source_dtype != self.dtype else 0
        return self.item_bytes + before


@dataclass(frozen=True, slots=True)
class Step:
    """Bands (number of the tensor, box) that are dealt with together. after: the position once that is done."""

    bands: tuple[tuple[int, Box], ...]
    after: Position


def cut_steps(tensors: Sequence[PlacedTensor], begin: Position, end: int, window_bytes: int) -> Iterator[Step]:
    """Everything from a position on to tensor number `end`, in steps that take at most window_bytes in memory."""
    batch: list[tuple[int, Box]] = []
    held, at = 0, begin
    for number in range(begin.tensor, end):
        tensor = tensors[number]
        # Each chunk that a band meets may begin a run of its own, which is aligned as its file is.
        slack = 2 * _PAGE * max(1, len(tensor.outputs))
        most = max(1, (window_bytes - min(slack, window_bytes // 2)) // tensor.held_item_bytes)
        done = begin.element if number == begin.tensor else 0
        for box in flat_range_boxes(tensor.shape, done, prod(tensor.shape)):
            for band in bands(box, most):
                size = band.size * tensor.held_item_bytes + min(slack, window_bytes // 2)
                if batch and held + size > window_bytes:
                    yield Step(tuple(batch), at)
                    batch, held = [], 0
                batch.append((number, band))
                held += size
                done += band.size
                at = Position(number, done)
        at = Position(number + 1, 0)
    if batch or at != begin:
        yield Step(tuple(batch), at)


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes of the window that follow each other in a target file from `offset` on."""

    output: int
    offset: int
    begin: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Conversion:
    """Elements that were read to byte `source` of the scratch memory, and go to byte `target` of the window."""

    key: str
    source: int
    source_dtype: str
    target: int
    target_dtype: str
    count: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """One step, placed in memory. blank: (memory, begin, size) that are to be zeros first: they hold elements which the
    source has not."""

    wanted: list[Wanted]
    blank: list[tuple[memoryview, int, int]]
    conversions: list[Conversion]
    runs: list[Run]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A band's part of one target chunk: contiguous in the chunk."""

    tensor: PlacedTensor
    box: Box
    output: int
    offset: int

    @property
    def size_bytes(self) -> int:
        return self.box.size * self.tensor.item_bytes


def place_step(tensors: Sequence[PlacedTensor], step: Step, window: memoryview, scratch: memoryview) -> Transfer:
    """Where everything of a step goes. Neighbours in a file become one run, aligned in memory as it is in the file."""
    pieces = [piece for number, band in step.bands for piece in _pieces(tensors[number], band)]
    pieces.sort(key=lambda piece: (piece.output, piece.offset))
    transfer = Transfer([], [], [], [])
    at = scratch_at = 0
    run: Run | None = None
    for piece in pieces:
        if run is None or (run.output, run.offset + run.size_bytes) != (piece.output, piece.offset):
            if run is not None:
                transfer.runs.append(run)
            at += (piece.offset - at) % _PAGE
            run = Run(piece.output, piece.offset, at, 0)
        run = Run(run.output, run.offset, run.begin, run.size_bytes + piece.size_bytes)
        scratch_at = _place_piece(piece, at, transfer, window, scratch, scratch_at)
        at += piece.size_bytes
    if run is not None:
        transfer.runs.append(run)
    return transfer


def _place_piece(
    piece: _Piece, at: int, transfer: Transfer, window: memoryview, scratch: memoryview, scratch_at: int
) -> int:
    """Note what fills a piece that lies at byte `at` of the window; returns where the scratch memory is free."""
    tensor, source = piece.tensor, Box.whole(piece.tensor.source_shape)
    inner = intersect(piece.box, source)
    is_converted = tensor.source_dtype != tensor.dtype
    data, start, item_bytes = (scratch, scratch_at, 0) if is_converted else (window, at, tensor.item_bytes)
    if is_converted:
        item_bytes = DTYPES[tensor.source_dtype].item_bytes
        start = scratch_at = -(-scratch_at // 16) * 16
        transfer.conversions.append(
            Conversion(tensor.key, start, tensor.source_dtype, at, tensor.dtype, piece.box.size)
        )
        scratch_at += piece.box.size * item_bytes
    if inner != piece.box:
        transfer.blank.append((data, start, piece.box.size * item_bytes))
    if inner is not None:
        strides = (strides_of(np.array([piece.box.shape], np.int64))[0] * item_bytes).tolist()
        start += sum((i - o) * s for i, o, s in zip(inner.offset, piece.box.offset, strides, strict=True))
        transfer.wanted.append(Wanted(tensor.key, inner, data, start, tuple(strides), item_bytes))
    return scratch_at


def _pieces(tensor: PlacedTensor, band: Box) -> Iterator[_Piece]:
    if len(tensor.outputs) == 1 and band.shape == tensor.shape:  # As nearly all small tensors are.
        yield _Piece(tensor, band, int(tensor.outputs[0]), int(tensor.starts[0]))
        return
    low, high = np.array(band.offset, np.int64), np.array(band.end, np.int64)
    begin = np.maximum(tensor.offsets, low)
    end = np.minimum(tensor.offsets + tensor.shapes, high)
    rows = np.flatnonzero((begin < end).all(axis=1))
    inside = ((begin[rows] - tensor.offsets[rows]) * strides_of(tensor.shapes[rows])).sum(axis=1)
    offsets = tensor.starts[rows] + inside * tensor.item_bytes
    columns = (
        begin[rows].tolist(),
        (end[rows] - begin[rows]).tolist(),
        tensor.outputs[rows].tolist(),
        offsets.tolist(),
    )
    for offset, shape, output, at in zip(*columns, strict=True):
        yield _Piece(tensor, Box(tuple(offset), tuple(shape)), output, at)
