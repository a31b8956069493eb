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

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from distckpt._C import crc32c_blocks
from distckpt.errors import CorruptionError
from distckpt.geometry import Int64Array, grid_cuts, is_tiling

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


def encode_record(chunks: Chunks, global_shape: Sequence[int]) -> bytes:
    """One tensor's record; as a grid when the chunks are all the cells of one. Chunks are non-empty."""
    count, ndim = chunks.offsets.shape
    width = next(w for w in (1, 2, 4, 8) if max(global_shape, default=0) < 1 << (8 * w))
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
    head = np.array([(kind, width, ndim, count)], _HEAD).tobytes()
    files, starts = chunks.files[order].astype("<u4"), chunks.starts[order].astype("<u8")
    return head + geometry + files.tobytes() + starts.tobytes()


def decode_record(record: bytes, global_shape: Sequence[int], *, where: str) -> Chunks:
    """The chunks again. Raises CorruptionError unless the boxes are non-empty and tile `global_shape`."""
    try:
        chunks = _decode(record, global_shape)
    except (ValueError, IndexError, OverflowError) as error:
        raise CorruptionError(f"{where}: chunk table record: {error}") from error
    room = np.array(global_shape, np.int64) - chunks.offsets
    if (chunks.offsets < 0).any() or (chunks.shapes <= 0).any() or (chunks.shapes > room).any():
        raise CorruptionError(f"{where}: chunk table record: a box is empty or outside {tuple(global_shape)}")
    if record[0] == _BOXES and not is_tiling(chunks.offsets, chunks.shapes, global_shape):  # The cells of a grid are.
        raise CorruptionError(f"{where}: chunk table record: the boxes do not tile {tuple(global_shape)}")
    return chunks


def _decode(record: bytes, global_shape: Sequence[int]) -> Chunks:
    if len(record) < _HEAD.itemsize:
        raise ValueError(f"{len(record)} bytes are too few")
    kind, width, ndim, count = (int(x) for x in np.frombuffer(record, _HEAD, 1)[0])
    if ndim != len(global_shape) or width not in (1, 2, 4, 8) or kind not in (_GRID, _BOXES):
        raise ValueError(f"kind {kind}, width {width}, {ndim} dimensions for a tensor of {len(global_shape)}")
    position = _HEAD.itemsize
    if kind == _GRID:
        lengths = np.frombuffer(record, "<u8", ndim, position).tolist()
        position += 8 * ndim
        if prod(lengths) != count:
            raise ValueError(f"{lengths} cuts for {count} chunks")
        cuts = []
        for n, extent in zip(lengths, global_shape, strict=True):
            starts = np.frombuffer(record, f"<u{width}", n, position).astype(np.int64)
            position += width * n
            if starts[0] != 0 or (np.diff(starts) <= 0).any() or starts[-1] >= extent:
                raise ValueError(f"cuts are not ascending from 0 to below {extent}")
            cuts.append(starts)
        _expect_bytes(record, position + 12 * count)  # Before cells are made: they may be many times the record.
        offsets, shapes = _grid_cells(cuts, global_shape)
    else:
        flat = np.frombuffer(record, f"<u{width}", 2 * count * ndim, position).astype(np.int64)
        position += width * 2 * count * ndim
        offsets, shapes = flat.reshape(2, count, ndim)
        _expect_bytes(record, position + 12 * count)
    files = np.frombuffer(record, "<u4", count, position).astype(np.int64)
    starts = np.frombuffer(record, "<u8", count, position + 4 * count).astype(np.int64)
    return Chunks(offsets, shapes, files, starts)


def _expect_bytes(record: bytes, size_bytes: int) -> None:
    if len(record) != size_bytes:
        raise ValueError(f"{len(record)} bytes, expected {size_bytes}")


def _grid_cells(cuts: Sequence[Int64Array], global_shape: Sequence[int]) -> tuple[Int64Array, Int64Array]:
    sizes = [np.diff(np.append(c, n)) for c, n in zip(cuts, global_shape, strict=True)]
    ndim, count = len(cuts), prod(len(c) for c in cuts)
    offsets, shapes = (
        np.stack(np.meshgrid(*columns, indexing="ij"), axis=-1) if ndim else np.zeros((1, 0), np.int64)
        for columns in (cuts, sizes)
    )
    return offsets.reshape(count, ndim), shapes.reshape(count, ndim)


def page_checksums(records: bytes) -> bytes:
    """The trailer of the file: u32 CRC32C of each 64 KiB of the records."""
    out = np.empty(-(-len(records) // PAGE_BYTES), "<u4")
    crc32c_blocks(records, PAGE_BYTES, out)
    return out.tobytes()


def check_pages(pages: bytes, first_page: int, trailer: bytes, *, where: str) -> None:
    """Check `pages`, read from the start of page `first_page`, against the trailer. Raises CorruptionError."""
    found = np.frombuffer(page_checksums(pages), "<u4")
    expected = np.frombuffer(trailer, "<u4")[first_page : first_page + len(found)]
    bad = np.flatnonzero(found != expected)
    if len(bad):
        page = int(bad[0])
        raise CorruptionError(
            f"{where}, page {first_page + page}: crc32c is {found[page]:08x}, the trailer says {expected[page]:08x}"
        )
