"""Zarr groups on a file system, through the zarr library: arrays made, filled and read shard by shard. No torch.

The library is imported where it is needed: it is the extra `zarr`.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from types import ModuleType
from typing import Any, Literal, TypeAlias, TypeVar

import msgspec
import numpy as np
from typing_extensions import Self

from distckpt.decoding import decode_json
from distckpt.elements import Elements
from distckpt.errors import CheckpointError, CorruptionError
from distckpt.exchange.zarr_layout import (
    ATTRIBUTE,
    LAYOUT_VERSION,
    Cut,
    GroupFacts,
    ZarrType,
    cells,
    dimension_names,
    grown,
    zarr_type,
)
from distckpt.geometry import Box
from distckpt.index import MAX_INDEX_BYTES, Spec
from distckpt.shard_file import DTYPES

T = TypeVar("T")
Compression: TypeAlias = Literal["zstd", "none"]
ROOT_DOCUMENT = "zarr.json"
_DOCUMENTS = (ROOT_DOCUMENT, ".zarray", ".zgroup", ".zattrs", ".zmetadata")


def import_zarr_library() -> ModuleType:
    """The zarr package. Raises CheckpointError that says how to install it."""
    try:
        import zarr
        import zarr.codecs
        import zarr.storage
    except ImportError as error:
        raise CheckpointError(
            f"this needs the zarr package, which is not here ({error}): pip install 'distckpt[zarr]'"
        ) from error
    return zarr


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(low, high) for low, high in zip(box.offset, box.end, strict=True))


@dataclass(frozen=True, slots=True)
class NewArray:
    """An array that is being filled: by whole shards, each once, by any thread. path: in the group."""

    path: str
    cut: Cut
    kind: ZarrType
    shape: tuple[int, ...]
    root: str
    array: Any  # zarr.Array, which has no types where zarr is not installed

    def shards(self) -> Iterator[Box]:
        """As boxes of the tensor: the last dimensions that the data type adds are not cut."""
        return cells(self.shape, self.cut.shard)

    @property
    def shard_count(self) -> int:
        return prod(-(-extent // size) for extent, size in zip(self.shape, self.cut.shard, strict=True))

    def write(self, box: Box, elements: Elements) -> None:
        """Fill one of the shards, durably but for its name. elements: of the box, in C order, of the tensor's type."""
        ending = (0,) * len(self.kind.trailing)
        bits = elements.view(self.kind.data_type)
        self.array[slices(box) + tuple(slice(0, n) for n in self.kind.trailing)] = bits
        number = tuple(o // n for o, n in zip(box.offset, self.cut.shard, strict=True))
        key = self.array.metadata.encode_chunk_key(number + ending)
        sync_path(os.path.join(self.root, self.path, key))


@dataclass(frozen=True, slots=True)
class NewGroup:
    """A group that is being made in a directory of its own."""

    root: str
    compression: Compression
    group: Any  # zarr.Group

    @classmethod
    def create(cls, root: str, facts: GroupFacts, compression: Compression) -> NewGroup:
        """Below a path where nothing is yet."""
        zarr = import_zarr_library()
        attributes = {ATTRIBUTE: msgspec.json.decode(msgspec.json.encode(facts))}
        store = zarr.storage.LocalStore(root)
        return cls(root, compression, zarr.create_group(store, zarr_format=3, attributes=attributes))

    def create_array(self, path: str, key: str, spec: Spec, cut: Cut) -> NewArray:
        """An array for a tensor, of zeros."""
        codecs = import_zarr_library().codecs
        kind = zarr_type(spec.dtype)
        shape = spec.global_shape + kind.trailing
        chunk, shard = cut.chunk + kind.trailing, cut.shard + kind.trailing
        # Of each inner chunk: what is damaged is found, compressed or not.
        compressors = [codecs.ZstdCodec()] if self.compression == "zstd" else []
        array = self.group.create_array(
            path,
            shape=shape,
            dtype=kind.data_type,
            chunks=chunk,
            shards=None if chunk == shard else shard,
            filters=None,
            compressors=[*compressors, codecs.Crc32cCodec()],
            fill_value=0,
            attributes={ATTRIBUTE: {"key": key, "dtype": spec.dtype}},
            dimension_names=dimension_names(shape),
            # What equals the fill value is written, too: -0.0 does, and a shard that is missing was lost.
            config={"write_empty_chunks": True},
        )
        return NewArray(path, cut, kind, spec.global_shape, self.root, array)

    def finish(self) -> None:
        """Once all arrays are filled: gather their metadata in the group's, and make all names and metadata durable."""
        zarr = import_zarr_library()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # It is no part of the specification yet; readers that know it open faster.
            zarr.consolidate_metadata(self.group.store)
        for directory, _, names in os.walk(self.root):
            if ROOT_DOCUMENT in names:
                sync_path(os.path.join(directory, ROOT_DOCUMENT))
            sync_path(directory)


class UninterruptedCalls:
    """Calls of zarr that end before a signal is heard: it works on in a thread of its own when who waits for it is
    interrupted, and would make again what is removed then. A context manager."""

    def __enter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1, "distckpt-zarr")
        self._thread.submit(int).result()  # Then no call starts it: who is interrupted in that does not know of it.
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def call(self, work: Callable[[], T]) -> T:
        """What work() returns, or raises."""
        try:
            return self._thread.submit(work).result()
        except BaseException:
            self._thread.submit(int).result()  # After it.
            raise


def sync_path(path: str) -> None:
    """fsync of a file or directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Version(msgspec.Struct, frozen=True):
    version: int


@contextmanager
def _guarded(what: str, kind: type[CheckpointError] = CorruptionError) -> Iterator[None]:
    """Around calls of zarr: it raises errors of any type for metadata and chunks that cannot be. Those of the operating
    system, and of memory, stay what they are."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise kind(f"{what}: {str(error) or type(error).__name__}") from error


def _open_store(root: str) -> Any:
    """zarr's store of a directory, of which only regular files are read: it takes a directory in the place of a chunk
    for zeros, and waits for ever for who may write into a pipe."""

    class RegularFiles(import_zarr_library().storage.LocalStore):  # type: ignore[misc]  # The library is imported here alone.
        async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
            path = os.path.join(root, key)
            with suppress(FileNotFoundError, NotADirectoryError):
                found = os.stat(path)
                if not stat.S_ISREG(found.st_mode):
                    raise CorruptionError(f"{path} is no regular file")
                if os.path.basename(path) in _DOCUMENTS and found.st_size > MAX_INDEX_BYTES:
                    raise CorruptionError(f"{path}: more than the {MAX_INDEX_BYTES} bytes that it may have")
            return await super().get(key, prototype, byte_range)

    return RegularFiles(root, read_only=True)


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An array of a group that is being read. shape: of the tensor, without what the data type adds. unit: the shape of
    what is read at once."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    unit: tuple[int, ...]
    array: Any

    def read(self, box: Box) -> Elements:
        """The elements of a box, in C order. Raises CorruptionError for what cannot be decoded; OSError."""
        kind = zarr_type(self.dtype)
        with _guarded(f"zarr array {self.path!r}, elements {box}"):
            data = self.array[slices(box) + tuple(slice(0, n) for n in kind.trailing)]
        found = np.ascontiguousarray(data, dtype=np.dtype(kind.data_type).newbyteorder("<"))
        return found.reshape((*box.shape, *kind.trailing))


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """A group that is being read."""

    root: str
    group: Any

    @classmethod
    def open(cls, root: str) -> StoredGroup:
        """Raises CheckpointError if there is none, or an array by itself."""
        zarr = import_zarr_library()
        with _guarded(f"{root}: no zarr group can be opened there", CheckpointError):
            try:
                found = zarr.open_group(_open_store(root), mode="r", use_consolidated=False)
            except FileNotFoundError as error:
                raise CheckpointError(f"{root}: no zarr group can be opened there: {error}") from error
        return cls(root, found)

    def facts(self) -> GroupFacts | None:
        """What it says of the checkpoint that it is an export of; None of a group that is none. Raises CorruptionError;
        CheckpointError of one that a newer version has written."""
        where = os.path.join(self.root, ROOT_DOCUMENT)
        # Not from the file: zarr also writes, and takes, numbers that JSON has not, NaN among them.
        attributes = self._attributes("", self.group)
        if ATTRIBUTE not in attributes:
            return None
        with _guarded(where):
            ours = msgspec.json.encode(attributes[ATTRIBUTE])
            version = decode_json(ours, _Version).version
            if version != LAYOUT_VERSION:
                raise CheckpointError(
                    f"{where}: layout version {version}; this package reads version {LAYOUT_VERSION}. "
                    f"Use a newer distckpt."
                )
            return decode_json(ours, GroupFacts)

    def _attributes(self, path: str, node: Any) -> Mapping[str, object]:
        with _guarded(f"{self.root}: attributes of {path!r}"):
            attributes: dict[str, object] = node.attrs.asdict()
            return attributes

    def array(self, path: str, key: str, spec: Spec, max_bytes: int) -> StoredArray:
        """The array of a tensor of an export. Raises CorruptionError if it is not there, is another or is not whole."""
        where = f"{self.root}: array {path!r} of tensor {key!r}"
        found = self._member(path, where)
        kind = zarr_type(spec.dtype)
        is_ = (tuple(found.shape), str(found.dtype))
        expected = (spec.global_shape + kind.trailing, kind.data_type)
        if is_ != expected:
            raise CorruptionError(f"{where} is {is_[1]} {is_[0]}, expected {expected[1]} {expected[0]}")
        for number in np.ndindex(
            *(-(-n // size) for n, size in zip(found.shape, found.shards or found.chunks, strict=True))
        ):
            file = os.path.join(self.root, path, found.metadata.encode_chunk_key(number))
            if not os.path.isfile(file):  # zarr takes it for zeros.
                raise CorruptionError(f"{where}: {file} is missing")
        return _stored_array(found, path, spec.dtype, len(kind.trailing), max_bytes)

    def _member(self, path: str, where: str) -> Any:
        with _guarded(f"{where}: it cannot be opened"):
            found = self.group[path]
        if not hasattr(found, "shape"):
            raise CorruptionError(f"{where} is a group, expected an array")
        return found

    def foreign_arrays(self, drop: Sequence[str], max_bytes: int) -> Iterator[StoredArray]:
        """The arrays of a group that no checkpoint was exported to, but those at paths that match one of the patterns
        `drop`. Raises CheckpointError for one that no tensor can be."""
        for path, found in self._members():
            if not hasattr(found, "shape") or any(fnmatchcase(path, pattern) for pattern in drop):
                continue
            dtype = str(found.dtype.name) if hasattr(found.dtype, "name") else str(found.dtype)
            if dtype not in DTYPES or zarr_type(dtype) != ZarrType(dtype, ()):
                raise CheckpointError(
                    f"{self.root}: array {path!r} is {dtype}, which no tensor can be; leave it out with --drop {path!r}"
                )
            yield _stored_array(found, path, dtype, 0, max_bytes)

    def foreign_attributes(self) -> Iterator[tuple[str, bool, Mapping[str, object]]]:
        """Of the group (path ""), its groups and arrays: path, whether it is an array, attributes."""
        yield "", False, self._attributes("", self.group)
        for path, found in self._members():
            yield path, hasattr(found, "shape"), self._attributes(path, found)

    def _members(self) -> list[tuple[str, Any]]:
        with _guarded(f"{self.root}: not all of it can be opened", CheckpointError):
            return sorted(self.group.members(max_depth=None), key=lambda item: item[0])


def _stored_array(found: Any, path: str, dtype: str, trailing: int, max_bytes: int) -> StoredArray:
    ndim = len(found.shape) - trailing
    chunk, shard = tuple(found.chunks), tuple(found.shards or found.chunks)
    if any(size < 1 for size in (*chunk, *shard)):
        raise CorruptionError(f"zarr array {path!r}: chunks of {chunk} in shards of {shard}")
    item_bytes = DTYPES[dtype].item_bytes
    shape = tuple(found.shape[:ndim])
    whole = [max(1, extent) for extent in shape]
    extra = prod(found.shape[ndim:])
    if prod(chunk) // max(1, extra) * item_bytes > max_bytes:
        raise CheckpointError(
            f"zarr array {path!r}: one chunk of it, {chunk}, takes more than the {max_bytes} bytes that there are for "
            f"it. Give more memory"
        )
    unit = shard if prod(shard) // max(1, extra) * item_bytes <= max_bytes else chunk
    return StoredArray(path, dtype, shape, tuple(grown(unit[:ndim], whole, max_bytes // item_bytes)), found)
