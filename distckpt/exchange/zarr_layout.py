"""The layout of a zarr v3 group that is a checkpoint: where each tensor lies, how it is cut, what its attributes say.

Decides names, data types, shards and inner chunks, and what an import needs beside the arrays to make the same
checkpoint again. No I/O, no zarr, no torch. docs/format.md is the normative description.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple
from urllib.parse import quote

import msgspec
import numpy as np

from distckpt.chunk_table import Boxes, Grids
from distckpt.geometry import Box
from distckpt.index import Natural, OnChange, SaveId, Spec
from distckpt.metrics import Metrics
from distckpt.shard_file import DTYPES

ATTRIBUTE = "distckpt"
LAYOUT_VERSION = 1
CHUNK_BYTES = 1 << 20  # of an inner chunk: what a reader of a slice decodes at the least
_MAX_NAME = 200  # of the 255 bytes that file systems take

# zarr's data types are numpy's. What zarr-python and tensorstore do not both read lies as its bits, or as its parts.
_BITS = {
    "bfloat16": ("uint16", ()),
    **{name: ("uint8", ()) for name in DTYPES if name.startswith("float8_")},
    "float4_e2m1fn_x2": ("uint8", ()),
    "complex32": ("float16", (2,)),
}


class ZarrType(NamedTuple):
    """How elements lie in an array: its data type, and the last dimensions that it adds."""

    data_type: str
    trailing: tuple[int, ...]


def zarr_type(dtype: str) -> ZarrType:
    """Of a name in DTYPES."""
    return ZarrType(*_BITS.get(dtype, (dtype, ())))


class PerRankFacts(msgspec.Struct, frozen=True):
    """Of a value that differs by rank: the mesh axes that key it, in order, with their sizes."""

    axes: tuple[tuple[str, Natural], ...]
    on_change: OnChange


class RankValues(msgspec.Struct, frozen=True):
    """What one rank held of such values: key -> tagged JSON. mesh: axis -> coordinate."""

    rank: Natural
    mesh: dict[str, int]
    values: dict[str, msgspec.Raw]


class GroupFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The attribute `distckpt` of the group: what of an index says what is stored. In no order of importance.

    values, metadata: tagged JSON. per_rank: kinds by key; ranks: who held what.
    """

    version: int
    save_id: SaveId
    iteration: Natural
    created_unix_s: float
    world_size: Natural
    mesh: dict[str, int]
    tensors: dict[str, Spec]
    values: dict[str, msgspec.Raw]
    metadata: msgspec.Raw
    metrics: Metrics
    per_rank: dict[str, PerRankFacts]
    ranks: tuple[RankValues, ...]


def node_paths(keys: Iterable[str]) -> dict[str, str]:
    """Key -> path of its array in the group: its segments, escaped. No two keys have one path, and no array lies below
    another.

    Escaped, as "%" and two digits, is what is no letter, no digit and none of "_.-~", and the first character of what
    begins with "." or "__" or is "zarr.json" or "c". An empty segment is "%e"; of one that is too long for a file name
    there is "%h" and its SHA-256. A key that others lie below adds "%t" to its last.
    """
    known = list(keys)
    parents = {key[:at] for key in known for at, character in enumerate(key) if character == "/"}
    return {key: "/".join(map(_segment, key.split("/"))) + ("%t" if key in parents else "") for key in known}


_RESERVED = re.compile(r"\.|__|(?:zarr\.json|c)\Z")


def _segment(text: str) -> str:
    name = quote(text, safe="") or "%e"
    if _RESERVED.match(name):
        name = f"%{ord(name[0]):02X}{name[1:]}"
    return name if len(name) <= _MAX_NAME else f"%h{hashlib.sha256(text.encode()).hexdigest()}"


def dimension_names(shape: Sequence[int]) -> list[str]:
    """Of an array: by their sizes, since xarray takes dimensions of one name for one dimension, of one size."""
    seen: dict[int, int] = {}
    names = []
    for extent in shape:
        count = seen[extent] = seen.get(extent, 0) + 1
        names.append(f"size_{extent}" if count == 1 else f"size_{extent}_{count}")
    return names


@dataclass(frozen=True, slots=True)
class Cut:
    """How an array is cut: shards, which are files, of inner chunks. Each shard is whole inner chunks."""

    shard: tuple[int, ...]
    chunk: tuple[int, ...]


def cells(shape: Sequence[int], cell: Sequence[int]) -> Iterator[Box]:
    """The cells of a regular grid over a shape, in C order, cut where it ends."""
    counts = [-(-extent // size) for extent, size in zip(shape, cell, strict=True)]
    for number in np.ndindex(*counts):
        offset = tuple(i * size for i, size in zip(number, cell, strict=True))
        yield Box(offset, tuple(min(s, n - o) for s, n, o in zip(cell, shape, offset, strict=True)))


def cut_array(shape: Sequence[int], item_bytes: int, cell: Sequence[int] | None, max_shard_bytes: int) -> Cut:
    """How to cut a tensor of this shape. cell: the chunks it is stored in, if they are a regular grid; None if not.

    A shard is a stored chunk, a part of one that is not larger than max_shard_bytes (some more where the extents have
    no such divisor), or several small ones.
    """
    whole = [max(1, extent) for extent in shape]
    start = grown(cell or whole, whole, CHUNK_BYTES // item_bytes)
    shard = _shrunk(start, max_shard_bytes // item_bytes)
    chunk = _shrunk(shard, CHUNK_BYTES // item_bytes)
    shard = [-(-extent // size) * size for extent, size in zip(shard, chunk, strict=True)]
    return Cut(tuple(shard), tuple(chunk))


def grown(cell: Sequence[int], whole: Sequence[int], max_elements: int) -> list[int]:
    """Several cells taken for one, as many as fit, along the last dimensions first."""
    several = list(cell)
    for d in reversed(range(len(several))):
        count = min(max(1, max_elements // prod(several)), -(-whole[d] // several[d]))
        several[d] = min(count * several[d], whole[d])
    return several


def _shrunk(box: Sequence[int], max_elements: int) -> list[int]:
    """A part of a box, cut along the first dimensions first: a divisor of each where one is near."""
    part = list(box)
    for d, extent in enumerate(part):
        row = prod(part[d + 1 :])
        if extent * row <= max_elements:
            break
        least = -(-extent // max(1, max_elements // row))
        count = next((n for n in range(least, min(2 * least, extent) + 1) if extent % n == 0), least)
        part[d] = -(-extent // count)
    return part


def stored_cell(chunks: Grids | Boxes, row: int, shape: Sequence[int]) -> tuple[int, ...] | None:
    """The shape of the chunks of a tensor, the row-th of these, if they are a regular grid: all alike but the last."""
    if isinstance(chunks, Boxes):
        return None
    cell = []
    for d, extent in enumerate(shape):
        first, count = int(chunks.cut_first[row, d]), int(chunks.cut_counts[row, d])
        cuts = chunks.cuts[first : first + count]
        size = int(cuts[1]) if count > 1 else extent
        if (np.diff(cuts) != size).any() or extent - int(cuts[-1]) > size:
            return None
        cell.append(size)
    return tuple(cell)
