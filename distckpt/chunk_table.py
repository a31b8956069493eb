"""The chunk table: which file holds which box of every tensor, and where. Decides its encoding; no I/O, no torch.

The file is a sequence of records, one per tensor, followed by a CRC32C of each 64 KiB of them, so that a reader
of one tensor reads and checks only what it needs. A record is little-endian:

    u8 kind (0 grid, 1 boxes), u8 width of an integer (1, 2, 4, 8), u16 ndim, u32 chunk count
    grid:   per dimension u64 number of cuts, then all cuts (start offsets), `width` bytes each;
            the chunks are the cells in C order
    boxes:  offsets then shapes, (count, ndim) each, `width` bytes an integer
    both:   file number u32 per chunk, then start of the chunk in the file u64 per chunk
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from distckpt._C import crc32c_blocks
from distckpt.errors import CorruptionError
from distckpt.geometry import BoolArray, Int64Array, find_untiled, grid_cuts

PAGE_BYTES = 64 << 10
_GRID, _BOXES = 0, 1
_HEAD = np.dtype([("kind", "u1"), ("width", "u1"), ("ndim", "<u2"), ("count", "<u4")])


@dataclass(frozen=True, slots=True)
class Chunks:
    """The stored chunks of one tensor: (n, ndim) offsets and shapes in elements, (n,) file number and byte start."""

    offsets: Int64Array
    shapes: Int64Array
    files: Int64Array
    starts: Int64Array

    def __len__(self) -> int:
        return len(self.files)


def encode_whole(file: int, start: int, global_shape: Sequence[int]) -> bytes:
    """The record of a tensor that is one chunk: encode_record, without columns of one number each."""
    width, ndim = _width(global_shape), len(global_shape)
    no_cuts = (1).to_bytes(8, "little") * ndim + bytes(width * ndim)
    return _head(_GRID, width, ndim, 1) + no_cuts + struct.pack("<IQ", file, start)


def _head(kind: int, width: int, ndim: int, count: int) -> bytes:
    """As _HEAD, at the price of one."""
    return struct.pack("<BBHI", kind, width, ndim, count)


def _width(global_shape: Sequence[int]) -> int:
    """Of an integer that tells a place in the tensor."""
    return next(w for w in (1, 2, 4, 8) if max(global_shape, default=0) < 1 << (8 * w))


def encode_record(chunks: Chunks, global_shape: Sequence[int]) -> bytes:
    """One tensor's record; as a grid when the chunks are all the cells of one. Chunks are non-empty."""
    count, ndim = chunks.offsets.shape
    width = _width(global_shape)
    cuts = grid_cuts(chunks.offsets, chunks.shapes) if count else None
    if cuts is not None and prod(len(c) for c in cuts) == count:
        order = np.lexsort(chunks.offsets.T[::-1]) if ndim else np.arange(count)
        kind = _GRID
        geometry = b"".join(len(c).to_bytes(8, "little") for c in cuts)
        geometry += b"".join(c.astype(f"<u{width}").tobytes() for c in cuts)
    else:
        order = np.arange(count)
        kind = _BOXES
        geometry = chunks.offsets.astype(f"<u{width}").tobytes() + chunks.shapes.astype(f"<u{width}").tobytes()
    files, starts = chunks.files[order].astype("<u4"), chunks.starts[order].astype("<u8")
    return _head(kind, width, ndim, count) + geometry + files.tobytes() + starts.tobytes()


@dataclass(frozen=True, slots=True)
class Hits:
    """Chunks that meet boxes: (h,) number of the box, of the chunk (its place in files and starts), its file number
    and first byte; (h, ndim) offset and shape of the chunk."""

    box: Int64Array
    chunk: Int64Array
    files: Int64Array
    starts: Int64Array
    offsets: Int64Array
    shapes: Int64Array


def take_hits(hits: Hits, rows: Int64Array | slice) -> Hits:
    """Those of some rows."""
    return Hits(*(getattr(hits, field.name)[rows] for field in fields(Hits)))


@dataclass(frozen=True, slots=True)
class Grids:
    """Tensors of one number of dimensions that are stored as grids.

    tensors: (t,) which of those asked for. first: (t,) place of the first chunk of each in `files` and `starts`. The
    cuts of dimension d of tensor t are the cut_counts[t, d] entries of cuts from cut_first[t, d] on; a cell ends at
    `cut_ends`.
    """

    tensors: Int64Array
    first: Int64Array
    files: Int64Array
    starts: Int64Array
    cuts: Int64Array
    cut_ends: Int64Array
    cut_first: Int64Array
    cut_counts: Int64Array

    def meeting(self, rows: Int64Array, low: Int64Array, high: Int64Array) -> Hits:
        """The cells that meet each of the non-empty boxes low..high (k, ndim) of the tensors `rows` (k,) of this."""
        begins, lengths = self.cut_first[rows], self.cut_counts[rows]
        first_cell = _count_up_to(self.cuts, begins, lengths, low) - 1
        cells = _count_up_to(self.cuts, begins, lengths, high - 1) - first_cell
        box, within = _ragged(cells.prod(axis=1))
        chunk, stride = self.first[rows[box]], np.ones(len(box), np.int64)
        offsets, ends = np.empty((2, len(box), low.shape[1]), np.int64)
        for d in reversed(range(low.shape[1])):
            within, cell = np.divmod(within, cells[box, d])
            cell += first_cell[box, d]
            chunk += cell * stride
            stride *= lengths[box, d]
            at = begins[box, d] + cell
            offsets[:, d], ends[:, d] = self.cuts[at], self.cut_ends[at]
        return Hits(box, chunk, self.files[chunk], self.starts[chunk], offsets, ends - offsets)


@dataclass(frozen=True, slots=True)
class Boxes:
    """Tensors of one number of dimensions that are stored as irregular boxes; as Grids, but for the chunks' offsets
    and shapes (n, ndim), of which tensor t has counts[t]."""

    tensors: Int64Array
    first: Int64Array
    files: Int64Array
    starts: Int64Array
    counts: Int64Array
    offsets: Int64Array
    shapes: Int64Array

    def meeting(self, rows: Int64Array, low: Int64Array, high: Int64Array) -> Hits:
        """The chunks that meet each of the boxes low..high (k, ndim) of the tensors `rows` (k,) of this."""
        found = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        batch = np.cumsum(self.counts[rows]) // _COMPARED
        for begin, stop in pairwise(np.flatnonzero(np.diff(batch, prepend=-1, append=-1)).tolist()):
            box, within = _ragged(self.counts[rows[begin:stop]])
            box += begin
            chunk = self.first[rows[box]] + within
            meets = np.ones(len(box), bool)
            for d in range(low.shape[1]):
                begins = self.offsets[chunk, d]
                meets &= (begins < high[box, d]) & (begins + self.shapes[chunk, d] > low[box, d])
            found.append((box[meets], chunk[meets]))
        box, chunk = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return Hits(box, chunk, self.files[chunk], self.starts[chunk], self.offsets[chunk], self.shapes[chunk])


_COMPARED = 1 << 20  # chunks that are compared with boxes at a time


def _ragged(counts: Int64Array) -> tuple[Int64Array, Int64Array]:
    """For each of counts[i] items of each i: i, and the number of the item."""
    of = np.repeat(np.arange(len(counts)), counts)
    return of, np.arange(len(of)) - (np.cumsum(counts) - counts)[of]


def _count_up_to(values: Int64Array, first: Int64Array, count: Int64Array, bound: Int64Array) -> Int64Array:
    """How many of the ascending values[first : first + count] are at most `bound`, elementwise; by bisection."""
    low, high = np.zeros_like(count), count.copy()
    while (is_open := low < high).any():
        middle = (low + high) // 2
        is_up_to = values[np.where(is_open, first + middle, 0)] <= bound
        low = np.where(is_open & is_up_to, middle + 1, low)
        high = np.where(is_open & ~is_up_to, middle, high)
    return low


def decode_records(
    data: bytes, places: npt.ArrayLike, shapes: Sequence[Sequence[int]], names: Sequence[str], *, where: str
) -> list[Grids | Boxes]:
    """The chunks of tensors of these global shapes, whose records lie at places (t, 2), start and bytes, of `data`.

    Raises CorruptionError, which calls them by their names, unless their boxes are non-empty and tile them.
    """
    records = _Records(data, np.array(places, np.int64).reshape(-1, 2), shapes, names, where)
    every = np.arange(len(records.places))
    records.refuse(every, records.places[:, 1] < _HEAD.itemsize, lambda t: f"{records.places[t, 1]} bytes are too few")
    heads = records.numbers(every, 0, _HEAD.itemsize, _HEAD)[:, 0]
    dims = np.array([len(shape) for shape in shapes], np.int64)
    kind, width, ndim = heads["kind"], heads["width"], heads["ndim"]
    records.refuse(
        every,
        (kind > _BOXES) | ~np.isin(width, (1, 2, 4, 8)) | (ndim != dims),
        lambda t: f"kind {kind[t]}, width {width[t]}, {ndim[t]} dimensions for a tensor of {dims[t]}",
    )
    # Of records that are alike all numbers lie at the same places.
    alike = kind.astype(np.int64) << 32 | ndim.astype(np.int64) << 8 | width
    groups = [np.flatnonzero(alike == one) for one in np.unique(alike)]
    decoded: list[Grids | Boxes] = []
    for group in groups:
        decode = _decode_grids if kind[group[0]] == _GRID else _decode_boxes
        decoded.append(decode(records, group, int(width[group[0]]), heads["count"][group].astype(np.int64)))
    return decoded


@dataclass(frozen=True, slots=True)
class _Records:
    data: bytes
    places: Int64Array
    shapes: Sequence[Sequence[int]]
    names: Sequence[str]
    where: str

    def refuse(self, tensors: Int64Array, bad: BoolArray, why: Callable[[int], str]) -> None:
        """Raises CorruptionError for the first of `tensors` that is bad; why(i) is about the i-th of them."""
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            raise CorruptionError(f"{self.where}: tensor {self.names[tensors[i]]!r}: chunk table record: {why(i)}")

    def numbers(self, tensors: Int64Array, start: int, size: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """The numbers in `size` bytes from byte `start` of each record: a row each."""
        flat = np.frombuffer(self.data, np.uint8)
        at = self.places[tensors, 0] + start
        rows: npt.NDArray[Any] = flat[at[:, None] + np.arange(size)]
        return rows.view(dtype)

    def joined(self, tensors: Int64Array, start: Int64Array, size: Int64Array, dtype: str) -> Int64Array:
        """The numbers in size[i] bytes from byte start[i] of each record, one record's after the other's."""
        at = self.places[tensors, 0] + start
        view = memoryview(self.data)
        parts = [view[low:high] for low, high in zip(at.tolist(), (at + size).tolist(), strict=True)]
        return np.frombuffer(b"".join(parts), dtype).astype(np.int64, copy=False)

    def whole(self, tensors: Int64Array, ndim: int) -> Int64Array:
        """The global shapes: (t, ndim)."""
        return np.array([self.shapes[t] for t in tensors.tolist()], np.int64).reshape(len(tensors), ndim)

    def expect_bytes(self, tensors: Int64Array, geometry: Int64Array, count: Int64Array) -> None:
        """Before anything is allocated for `count` chunks: is there what they need?"""
        size, expected = self.places[tensors, 1], geometry + 12 * count
        self.refuse(tensors, size != expected, lambda i: f"{size[i]} bytes, expected {expected[i]}")

    def chunk_places(
        self, tensors: Int64Array, geometry: Int64Array, count: Int64Array
    ) -> tuple[Int64Array, Int64Array, Int64Array]:
        """first, files and starts, as Grids and Boxes have them. geometry: bytes before the numbers of files."""
        files = self.joined(tensors, geometry, 4 * count, "<u4")
        return np.cumsum(count) - count, files, self.joined(tensors, geometry + 4 * count, 8 * count, "<i8")


def _decode_grids(records: _Records, tensors: Int64Array, width: int, count: Int64Array) -> Grids:
    ndim = len(records.shapes[int(tensors[0])])
    head = _HEAD.itemsize + 8 * ndim
    size = records.places[tensors, 1]
    records.refuse(tensors, size < head, lambda i: f"{size[i]} bytes are too few")
    lengths = records.numbers(tensors, _HEAD.itemsize, 8 * ndim, "<u8").reshape(len(tensors), ndim)
    cells, is_wrong = np.ones(len(tensors), np.uint64), np.zeros(len(tensors), bool)
    for d in range(ndim):
        is_wrong |= (lengths[:, d] == 0) | (lengths[:, d] > count.astype(np.uint64) // cells)  # As it could overflow.
        cells = np.where(is_wrong, np.uint64(1), cells * lengths[:, d])
    is_wrong |= cells != count.astype(np.uint64)
    records.refuse(tensors, is_wrong, lambda i: f"{lengths[i].tolist()} cuts for {count[i]} chunks")
    counts = lengths.astype(np.int64)
    geometry = head + width * counts.sum(axis=1)
    records.expect_bytes(tensors, geometry, count)
    cuts = records.joined(tensors, np.full(len(tensors), head), geometry - head, f"<u{width}")
    extents = records.whole(tensors, ndim)
    begins = (np.cumsum(counts.ravel()) - counts.ravel()).reshape(counts.shape)
    last = begins + counts - 1
    is_good = np.ones(len(cuts), bool)
    is_good[1:] = cuts[1:] > cuts[:-1]
    is_good[begins] = cuts[begins] == 0
    is_good[last] &= cuts[last] < extents
    is_bad = np.zeros(counts.shape, bool)
    is_bad.reshape(-1)[np.repeat(np.arange(counts.size), counts.ravel())[~is_good]] = True
    records.refuse(
        tensors,
        np.asarray(is_bad.any(axis=1)),
        lambda i: f"cuts are not ascending from 0 to below {extents[i, is_bad[i].argmax()]}",
    )
    ends = np.empty_like(cuts)
    ends[:-1] = cuts[1:]
    ends[last] = extents
    first, files, starts = records.chunk_places(tensors, geometry, count)
    return Grids(tensors, first, files, starts, cuts, ends, begins, counts)


def _decode_boxes(records: _Records, tensors: Int64Array, width: int, count: Int64Array) -> Boxes:
    ndim = len(records.shapes[int(tensors[0])])
    size = width * ndim * count
    head = np.full(len(tensors), _HEAD.itemsize)
    records.expect_bytes(tensors, head + 2 * size, count)
    row = np.repeat(np.arange(len(tensors), dtype=np.int32), count)
    offsets, shapes = (
        records.joined(tensors, start, size, f"<u{width}").reshape(len(row), ndim) for start in (head, head + size)
    )
    wholes = records.whole(tensors, ndim)
    is_wrong = np.zeros(len(tensors), bool)
    is_wrong[row[((offsets < 0) | (shapes <= 0) | (shapes > wholes[row] - offsets)).any(axis=1)]] = True
    records.refuse(tensors, is_wrong, lambda i: f"a box is empty or outside {tuple(wholes[i].tolist())}")
    is_wrong[find_untiled(row, np.concatenate([offsets, shapes], axis=1), wholes)] = True
    records.refuse(tensors, is_wrong, lambda i: f"the boxes do not tile {tuple(wholes[i].tolist())}")
    first, files, starts = records.chunk_places(tensors, head + 2 * size, count)
    return Boxes(tensors, first, files, starts, count, offsets, shapes)


def page_checksums(records: bytes | bytearray) -> bytes:
    """The trailer of the file: u32 CRC32C of each 64 KiB of the records."""
    out = np.empty(-(-len(records) // PAGE_BYTES), "<u4")
    crc32c_blocks(records, PAGE_BYTES, out)
    return out.tobytes()


def check_pages(pages: bytes | bytearray, first_page: int, trailer: bytes | bytearray, *, where: str) -> None:
    """Check `pages`, read from the start of page `first_page`, against the trailer. Raises CorruptionError."""
    found = np.frombuffer(page_checksums(pages), "<u4")
    expected = np.frombuffer(trailer, "<u4")[first_page : first_page + len(found)]
    bad = np.flatnonzero(found != expected)
    if len(bad):
        page = int(bad[0])
        raise CorruptionError(
            f"{where}, page {first_page + page}: crc32c is {found[page]:08x}, the trailer says {expected[page]:08x}"
        )
