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
class _Pieces:
    """Parts of bands in target chunks, of tensors of one number of dimensions: each is contiguous in its chunk.

    tensor: (k,) number. low, shape: (k, ndim) in the tensor. output, offset: (k,) the file, and the first byte in it.
    """

    tensor: Int64Array
    low: Int64Array
    shape: Int64Array
    output: Int64Array
    offset: Int64Array


def place_step(tensors: Sequence[PlacedTensor], step: Step, window: memoryview, scratch: memoryview) -> Transfer:
    """Where everything of a step goes. Neighbours in a file become one run, aligned in memory as it is in the file, as
    far as the window has room for that: there may be very many."""
    by_ndim: dict[int, list[tuple[int, Box]]] = {}
    for number, band in step.bands:
        by_ndim.setdefault(len(band.shape), []).append((number, band))
    groups = [_pieces(tensors, bands) for bands in by_ndim.values()]
    output, offset, size = (
        np.concatenate(columns or [np.zeros(0, np.int64)])
        for columns in (
            [pieces.output for pieces in groups],
            [pieces.offset for pieces in groups],
            [pieces.shape.prod(axis=1) * _item_bytes(tensors, pieces) for pieces in groups],
        )
    )
    at, runs = _place_runs(output, offset, size, len(window) - int(size.sum()))
    transfer = Transfer([], [], [], runs)
    first = scratch_at = 0
    for pieces in groups:
        places = at[first : first + len(pieces.tensor)].tolist()
        scratch_at = _place_pieces(tensors, pieces, places, transfer, window, scratch, scratch_at)
        first += len(pieces.tensor)
    return transfer


def _item_bytes(tensors: Sequence[PlacedTensor], pieces: _Pieces) -> Int64Array:
    return np.array([tensors[t].item_bytes for t in pieces.tensor.tolist()], np.int64)


def _place_runs(output: Int64Array, offset: Int64Array, size: Int64Array, room: int) -> tuple[Int64Array, list[Run]]:
    """Where in the window each piece lies, and the runs that they make up. room: bytes that may stay free between."""
    order = np.lexsort((offset, output))
    file, begin, end = output[order], offset[order], (offset + size)[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = (file[1:] != file[:-1]) | (begin[1:] != end[:-1])
    firsts = np.flatnonzero(is_first)
    lasts = np.append(firsts[1:], len(order)) - 1
    runs: list[Run] = []
    position = 0
    columns = (file[firsts].tolist(), begin[firsts].tolist(), end[lasts].tolist() if len(firsts) else [])
    for number, low, high in zip(*columns, strict=True):
        skipped = (low - position) % _PAGE
        if skipped <= room:
            position, room = position + skipped, room - skipped
        runs.append(Run(number, low, position, high - low))
        position += high - low
    at = np.empty(len(order), np.int64)
    if runs:
        shift = np.array([run.begin - run.offset for run in runs], np.int64)
        at[order] = begin + shift[np.cumsum(is_first) - 1]
    return at, runs


def _place_pieces(
    tensors: Sequence[PlacedTensor],
    pieces: _Pieces,
    places: Sequence[int],
    transfer: Transfer,
    window: memoryview,
    scratch: memoryview,
    scratch_at: int,
) -> int:
    """Note what fills pieces that lie at `places` of the window; returns where the scratch memory is free."""
    strides = strides_of(pieces.shape).tolist()
    columns = (pieces.tensor.tolist(), pieces.low.tolist(), pieces.shape.tolist(), strides, places)
    for number, low, shape, steps, at in zip(*columns, strict=True):
        tensor = tensors[number]
        box, data, start = Box(tuple(low), tuple(shape)), window, at
        item_bytes = DTYPES[tensor.source_dtype].item_bytes
        if tensor.source_dtype != tensor.dtype:
            data, start = scratch, scratch_at
            transfer.conversions.append(Conversion(tensor.key, start, tensor.source_dtype, at, tensor.dtype, box.size))
            scratch_at = start + box.size * item_bytes
        inner: Box | None = box
        if tensor.shape != tensor.source_shape:
            inner = intersect(box, Box.whole(tensor.source_shape))
            if inner != box:
                transfer.blank.append((data, start, box.size * item_bytes))
        if inner is not None:
            start += sum((i - o) * n for i, o, n in zip(inner.offset, low, steps, strict=True)) * item_bytes
            bytes_apart = tuple(n * item_bytes for n in steps)
            transfer.wanted.append(Wanted(tensor.key, inner, data, start, bytes_apart, item_bytes))
    return scratch_at


def _pieces(tensors: Sequence[PlacedTensor], bands: Sequence[tuple[int, Box]]) -> _Pieces:
    """What bands, all of one number of dimensions, have in common with the chunks of their tensors."""
    mine = [tensors[number] for number, _ in bands]
    counts = [len(tensor.outputs) for tensor in mine]
    of_band = np.repeat(np.arange(len(bands)), counts)
    ndim = len(bands[0][1].shape)
    low = np.array([band.offset for _, band in bands], np.int64).reshape(len(bands), ndim)[of_band]
    high = np.array([band.end for _, band in bands], np.int64).reshape(len(bands), ndim)[of_band]
    offsets = np.concatenate([tensor.offsets for tensor in mine])
    shapes = np.concatenate([tensor.shapes for tensor in mine])
    begin, end = np.maximum(offsets, low), np.minimum(offsets + shapes, high)
    rows = np.flatnonzero((begin < end).all(axis=1))
    number = np.array([number for number, _ in bands], np.int64)[of_band[rows]]
    item_bytes = np.array([tensor.item_bytes for tensor in mine], np.int64)[of_band[rows]]
    inside = ((begin[rows] - offsets[rows]) * strides_of(shapes[rows])).sum(axis=1)
    starts = np.concatenate([tensor.starts for tensor in mine])[rows]
    outputs = np.concatenate([tensor.outputs for tensor in mine])[rows]
    return _Pieces(number, begin[rows], end[rows] - begin[rows], outputs, starts + inside * item_bytes)
