"""Tensor values: what one stored key holds: statistics, elements of a slice, an ordinary .npy file. No torch.

A tensor is read in bands through a fixed amount of memory, however long it is.
"""

from __future__ import annotations

import difflib
import errno
import heapq
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from math import prod
from typing import BinaryIO

import msgspec
import numpy as np

from distckpt._C import sync_directory
from distckpt.checkpoint_files import OnBytes, read_per_rank
from distckpt.commit import Commit, read_index
from distckpt.elements import Elements, NumpyDType, convert, is_of_numpy, numpy_dtype, view_elements
from distckpt.errors import CorruptionError, MismatchError
from distckpt.geometry import Box, bands, strides_of
from distckpt.index import Index, TensorEntry
from distckpt.moments import Moments, add_numbers, are_numbers
from distckpt.reader import StoredTensors, Wanted
from distckpt.selecting import Selector, open_selected, select_commits
from distckpt.shard_file import DTYPES
from distckpt.storage import Storage
from distckpt.tensor_source import MEMORY_BYTES, TensorSource

MIN_MEMORY_BYTES = 16 << 20
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_NEAR, _EXAMPLES = 5, 3
_MAX_COMPARED = 1000  # keys that a wrong one is compared with, those that begin and end most like it
_MAX_NAMED = 200  # characters of a key in an error


class TensorStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a stored tensor's elements; of complex ones, of their magnitudes.

    min, max, mean, std (divided by how many there are) and norm are over the finite ones; None where there are none, or
    where elements are no numbers to numpy (float4 in pairs).
    """

    key: str
    iteration: int
    dtype: str
    shape: tuple[int, ...]
    elements: int
    bytes: int
    min: int | float | None
    max: int | float | None
    mean: float | None
    std: float | None
    norm: float | None
    zeros: int | None
    nans: int | None
    infinities: int | None


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key of one checkpoint. entry: of a tensor; else it is a shared or a per-rank value."""

    key: str
    storage: Storage
    commit: Commit
    index: Index
    entry: TensorEntry | None

    @property
    def is_per_rank(self) -> bool:
        return self.key in self.index.per_rank


class RankValue(msgspec.Struct, frozen=True):
    """A per-rank value: of which coordinates, and its JSON, tagged as it is stored."""

    coordinates: dict[str, int]
    value: msgspec.Raw


def find_key(root: str | os.PathLike[str] | Storage, key: str, iteration: Selector = None) -> StoredKey:
    """A key of the newest checkpoint under a root, or of the selected one.

    Raises MismatchError, which names keys that look like it; CheckpointNotFoundError; CorruptionError; OSError.
    """
    storage, selector = open_selected(root, iteration)
    commit = select_commits(storage, selector)[0]
    index, _ = read_index(storage, commit)
    if not (key in index.tensors or key in index.values or key in index.per_rank):
        raise MismatchError(
            f"{storage.location}/{commit.directory} has no key {_named(key)}{advice(key, index)}", missing=(key,)
        )
    return StoredKey(key, storage, commit, index, index.tensors.get(key))


def advice(key: str, index: Index) -> str:
    """For an error, after a key that there is not: which keys look like it, or how those look that there are."""
    keys = [*index.tensors, *index.values, *index.per_rank]
    if not keys:
        return ", nor any other"
    near = [one for one in keys if key in one][:_NEAR]
    if not near and len(key) <= _MAX_NAMED:  # What follows takes time that grows with the square of lengths.
        short = [one for one in keys if len(one) <= _MAX_NAMED]
        alike = heapq.nlargest(_MAX_COMPARED, short, key=partial(_shared_ends, key))
        near = difflib.get_close_matches(key, alike, _NEAR)
    if near:
        return f"; did you mean {', '.join(map(_named, near))}?"
    like = ", ".join(map(_named, keys[:_EXAMPLES]))
    return f"; its keys look like {like}; `distckpt inspect --tensors --values` lists them"


def _shared_ends(a: str, b: str) -> int:
    """How many characters both begin with, and end with."""
    return _shared_start(a, b) + _shared_start(a[::-1], b[::-1])


def _shared_start(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _named(key: str) -> str:
    return repr(key if len(key) <= _MAX_NAMED else f"{key[:_MAX_NAMED]}...")


def read_values(stored: StoredKey) -> list[RankValue]:
    """A shared value, of no coordinates; or a per-rank value of all. Raises CorruptionError; OSError."""
    if not stored.is_per_rank:
        return [RankValue({}, stored.index.values[stored.key])]
    entry = stored.index.per_rank[stored.key]
    names = [name for name, _ in entry.axes]
    found = []
    for coordinates, number in entry.holders:
        held = read_per_rank(stored.storage, stored.commit.directory, stored.index, number)
        if stored.key not in held:
            raise CorruptionError(
                f"{stored.index.files[number].name}: the index has {stored.key!r} there, and it is not"
            )
        found.append(RankValue(dict(zip(names, coordinates, strict=True)), held[stored.key]))
    return found


def tensor_statistics(
    root: str | os.PathLike[str] | Storage,
    key: str,
    iteration: Selector = None,
    *,
    memory_bytes: int = MEMORY_BYTES,
    on_bytes: OnBytes = lambda _: None,
) -> TensorStatistics:
    """Statistics of one tensor of the newest checkpoint, or of the selected one, in one pass. Raises as find_key does,
    and MismatchError for a value; ValueError for too little memory."""
    return statistics_of(find_key(root, key, iteration), memory_bytes=memory_bytes, on_bytes=on_bytes)


def statistics_of(
    stored: StoredKey, *, memory_bytes: int = MEMORY_BYTES, on_bytes: OnBytes = lambda _: None
) -> TensorStatistics:
    """The same of a key that was found."""
    entry = tensor_entry(stored)
    moments = Moments()
    is_known = are_numbers(entry.dtype)
    if is_known:
        for elements in read_bands(stored, Box.whole(entry.global_shape), memory_bytes=memory_bytes):
            add_numbers(moments, elements)
            on_bytes(elements.nbytes)
    return TensorStatistics(
        key=stored.key,
        iteration=stored.commit.iteration,
        dtype=entry.dtype,
        shape=entry.global_shape,
        elements=prod(entry.global_shape),
        bytes=entry.size_bytes,
        min=moments.smallest,
        max=moments.largest,
        mean=moments.mean,
        std=moments.std,
        norm=moments.norm,
        zeros=moments.zeros if is_known else None,
        nans=moments.nans if is_known else None,
        infinities=moments.infinities if is_known else None,
    )


def tensor_entry(stored: StoredKey) -> TensorEntry:
    """Raises MismatchError if the key is no tensor."""
    if stored.entry is None:
        kind = "per-rank value" if stored.is_per_rank else "value"
        raise MismatchError(f"{stored.key!r} is a {kind}, not a tensor", mismatched=(stored.key,))
    return stored.entry


def read_bands(stored: StoredKey, box: Box, *, memory_bytes: int = MEMORY_BYTES) -> Iterator[Elements]:
    """The elements of a box of a tensor, in C order, as arrays of one dimension (as view_elements() has them). Each is
    good until the next is asked for. Raises CorruptionError; OSError; ValueError for too little memory."""
    if memory_bytes < MIN_MEMORY_BYTES:
        raise ValueError(f"memory of {memory_bytes} bytes: expected at least {MIN_MEMORY_BYTES}")
    entry = tensor_entry(stored)
    if not box.size:
        return
    item_bytes = DTYPES[entry.dtype].item_bytes
    step_bytes = min(memory_bytes // 8, box.size * item_bytes)
    memory = np.empty(max(step_bytes, item_bytes), np.uint8)
    directory = stored.commit.directory
    tensors = StoredTensors.read(stored.storage, directory, stored.index, [stored.key])
    with TensorSource(stored.storage, directory, tensors, cache_bytes=memory_bytes // 2) as source:
        for band in bands(box, step_bytes // item_bytes):
            shape = np.array([band.shape], np.int64).reshape(1, -1)
            strides = tuple(n * item_bytes for n in strides_of(shape)[0].tolist())
            source.fill([Wanted(stored.key, band, memory.data, 0, strides, item_bytes)])
            yield view_elements(memory[: band.size * item_bytes].data, entry.dtype, (band.size,))


def parse_slice(text: str, shape: Sequence[int]) -> tuple[Box, tuple[int, ...]]:
    """A box of a tensor, and its shape without dimensions of which one index is chosen, from "0:4, :, 3" or "..., -1".

    As numpy takes them, but for steps. Raises ValueError.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if parts.count("...") > 1:
        raise ValueError(f"slice {text!r}: more than one ...")
    if "..." in parts:
        at = parts.index("...")
        parts[at : at + 1] = [":"] * (len(shape) - len(parts) + 1)
    if len(parts) > len(shape):
        raise ValueError(f"slice {text!r} has {len(parts)} dimensions, and the tensor {len(shape)}: {list(shape)}")
    parts += [":"] * (len(shape) - len(parts))
    ranges = [_range_of(part, size, text) for part, size in zip(parts, shape, strict=True)]
    box = Box(tuple(begin for begin, _, _ in ranges), tuple(stop - begin for begin, stop, _ in ranges))
    return box, tuple(stop - begin for begin, stop, is_kept in ranges if is_kept)


def _range_of(part: str, size: int, text: str) -> tuple[int, int, bool]:
    """(begin, stop, whether the dimension stays)."""
    match = re.fullmatch(r"(-?\d{1,18})|(-?\d{1,18})?\s*:\s*(-?\d{1,18})?", part)
    if match is None:
        raise ValueError(f"slice {text!r}: {part!r} is not one of 3, -1, :, 0:4, 2:, :4 (a step is not taken)")
    if match[1] is not None:
        index = int(match[1])
        if not -size <= index < size:
            raise ValueError(f"slice {text!r}: index {index} is outside a dimension of {size}")
        return index % size, index % size + 1, False
    begin, stop, _ = slice(*(None if bound is None else int(bound) for bound in match.group(2, 3))).indices(size)
    return begin, max(begin, stop), True


def npy_dtype(dtype: str, *, raw: bool = False) -> NumpyDType:
    """As what a .npy file holds elements: their own type where numpy has it.

    Else as float32 or complex64, which hold every such number exactly; raw: as its bits, an unsigned integer. Pairs of
    float4 are bytes always.
    """
    known = numpy_dtype(dtype)
    if known is not None and is_of_numpy(dtype):
        return known
    if dtype == "float4_e2m1fn_x2" or raw:
        return np.dtype(f"<u{DTYPES[dtype].item_bytes}")
    return np.dtype("<c8" if dtype == "complex32" else "<f4")


def as_numpy_type(elements: Elements, dtype: str, *, raw: bool = False) -> Elements:
    """Elements of one dimension, as view_elements() has them, as npy_dtype() says."""
    target = npy_dtype(dtype, raw=raw)
    if elements.dtype == target:
        return elements
    if target.kind == "u":
        return np.ascontiguousarray(elements).view(target).reshape(-1)
    with np.errstate(invalid="ignore"):  # Signalling NaNs.
        if dtype == "complex32":
            return np.ascontiguousarray(elements.astype(np.float32)).view(target).reshape(-1)
        return convert(elements, "float32")


def write_npy(
    stored: StoredKey,
    file: str | os.PathLike[str],
    *,
    where: str = "",
    raw: bool = False,
    force: bool = False,
    memory_bytes: int = MEMORY_BYTES,
    on_bytes: OnBytes = lambda _: None,
) -> NumpyDType:
    """Write a tensor, or the slice `where` of it, as a .npy file of the type that is returned: whole, or not at all.

    It gets its name once it is durable. force: over the file of that name, or that a link of that name leads to. What
    is no regular file, such as a pipe or a device, is written to itself. Raises FileExistsError, IsADirectoryError; as
    read_bands does; and as parse_slice does.
    """
    path = os.fspath(file)
    entry = tensor_entry(stored)
    box, shape = parse_slice(where, entry.global_shape)
    dtype, item_bytes = npy_dtype(entry.dtype, raw=raw), DTYPES[entry.dtype].item_bytes
    parts = (as_numpy_type(one, entry.dtype, raw=raw) for one in read_bands(stored, box, memory_bytes=memory_bytes))

    def write(out: BinaryIO) -> None:
        out.write(_npy_header(dtype, shape))
        for elements in parts:
            out.write(elements.data.cast("B"))
            on_bytes(len(elements) * item_bytes)
        out.flush()

    _check_target(path, force=force)  # Before hours of reading.
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "wb") as out:
            write(out)
        return dtype
    path = os.path.realpath(path) if force else path
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as out:
            write(out)
            os.fsync(out.fileno())
        _give_name(temporary, path, force=force)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    return dtype


def _check_target(path: str, *, force: bool) -> None:
    """Raises an OSError if no file can be written there."""
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a directory, and no file to write")
    if not force and os.path.lexists(path) and (os.path.isfile(path) or not os.path.exists(path)):
        raise FileExistsError(f"{path} is there already; --force writes over it")
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{path}: there is no directory {folder}")


def _npy_header(dtype: NumpyDType, shape: tuple[int, ...]) -> bytes:
    header = BytesIO()
    described = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(header, {"descr": described, "fortran_order": False, "shape": shape})
    return header.getvalue()


def _give_name(temporary: str, path: str, *, force: bool) -> None:
    if force:
        os.replace(temporary, path)
    else:
        try:
            os.link(temporary, path)  # Fails if somebody has made it meanwhile.
        except FileExistsError:
            raise FileExistsError(f"{path} is there already; --force writes over it") from None
        except OSError as error:
            if error.errno not in _NO_LINKS or os.path.lexists(path):
                raise
            os.replace(temporary, path)
        else:
            os.unlink(temporary)
    try:
        sync_directory(os.path.dirname(os.path.abspath(path)))
    except OSError as error:
        if error.errno != errno.EINVAL:  # The file system has no such operation.
            raise
