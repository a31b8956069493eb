"""Importing: a zarr group or safetensors files as a committed checkpoint of a new root, in constant memory. No torch.

What an export of a checkpoint says of itself comes back: its tensors bit by bit, with all that the index knew of them,
values, and what differed by rank. Of a group or of files from elsewhere, arrays become tensors and attributes values.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from fnmatch import fnmatchcase
from math import prod

import msgspec
import numpy as np
from typing_extensions import Buffer

from distckpt.checkpoint_files import OnBytes
from distckpt.errors import CheckpointError, CorruptionError
from distckpt.exchange.export_source import threads_and_memory
from distckpt.exchange.import_commit import Incoming, IncomingTensor, commit_incoming
from distckpt.exchange.safetensors_files import (
    INDEX_FILE,
    MAX_INDEX_BYTES,
    FoundTensor,
    decode_index_document,
    read_header,
)
from distckpt.exchange.zarr_group import StoredArray, StoredGroup
from distckpt.exchange.zarr_layout import GroupFacts, cells, node_paths
from distckpt.geometry import Box, bands
from distckpt.index import Spec, find_spec_fault
from distckpt.json_value import encode_value
from distckpt.report import ImportReport
from distckpt.shard_file import DTYPES
from distckpt.storage import PosixStorage, Storage
from distckpt.tensor_source import MEMORY_BYTES

MAX_PART_BYTES = 1 << 30  # of a tensor; what is larger is stored in several parts
_READ_BYTES = 8 << 20
_MAX_PARTS = 1 << 22


def import_zarr(
    source: str | os.PathLike[str],
    root: str | os.PathLike[str] | Storage,
    *,
    iteration: int | None = None,
    prefix: str = "",
    drop: Sequence[str] = (),
    memory_bytes: int = MEMORY_BYTES,
    jobs: int | None = None,
    on_bytes: OnBytes = lambda _: None,
) -> ImportReport:
    """Make a checkpoint of a zarr group: of one that export_zarr made, the same again; of another, its arrays as
    tensors under their paths, the attributes of its groups as values, those of its arrays in the metadata.

    root: a new one. iteration: its own if None, 0 of a foreign group. prefix: put before the keys of a foreign group.
    drop: patterns of paths of a foreign group that are left out. jobs: files that are written at a time. Raises
    CheckpointError without zarr, if there is no group, for an array that can be no tensor, if the root has checkpoints
    or there is no room; CorruptionError for an export that is not whole; ValueError; OSError.
    """
    threads, of_each = threads_and_memory(memory_bytes, jobs)
    incoming, own_iteration = open_zarr(source, prefix=prefix, drop=drop, memory_bytes=of_each)
    return commit_incoming(
        root,
        incoming,
        own_iteration if iteration is None else iteration,
        source=os.fspath(source),
        jobs=threads,
        on_bytes=on_bytes,
    )


def open_zarr(
    source: str | os.PathLike[str], *, prefix: str = "", drop: Sequence[str] = (), memory_bytes: int = MEMORY_BYTES
) -> tuple[Incoming, int]:
    """What is in a group, and its iteration. memory_bytes: of each thread that reads it."""
    path = os.path.abspath(os.fspath(source))
    group = StoredGroup.open(path)
    facts = group.facts()
    max_bytes = memory_bytes // 12  # As zarr holds what it decodes several times.
    if facts is None:
        return _foreign(group, prefix, drop, max_bytes), 0
    if prefix or drop:
        raise ValueError(f"{path} is the export of a checkpoint, and comes back whole: no prefix, nothing dropped")
    _check_facts(facts, path)
    paths = node_paths(facts.tensors)
    tensors = {}
    for key, spec in facts.tensors.items():
        array = group.array(paths[key], key, spec, max_bytes)
        tensors[key] = _of_array(array, spec)
    incoming = Incoming(
        tensors=tensors,
        values=facts.values,
        metadata=facts.metadata,
        metrics=facts.metrics,
        per_rank=facts.per_rank,
        ranks=facts.ranks,
        mesh=facts.mesh,
        world_size=facts.world_size,
    )
    return incoming, facts.iteration


def _check_facts(facts: GroupFacts, where: str) -> None:
    """What is used before an index is made of it, which is checked whole."""
    for key, spec in facts.tensors.items():
        fault = find_spec_fault(spec)
        if fault:
            raise CorruptionError(f"{where}: tensor {key!r}: {fault}")
    if len({values.rank for values in facts.ranks}) != len(facts.ranks):
        raise CorruptionError(f"{where}: a rank comes twice")
    for values in facts.ranks:
        if values.mesh.keys() != facts.mesh.keys() or any(
            not 0 <= at < facts.mesh[axis] for axis, at in values.mesh.items()
        ):
            raise CorruptionError(f"{where}: rank {values.rank} is at {values.mesh}, which is not inside {facts.mesh}")
        for key in values.values:
            if key not in facts.per_rank or not dict(facts.per_rank[key].axes).keys() <= facts.mesh.keys():
                raise CorruptionError(f"{where}: it is not said by which mesh axes {key!r} differs")


def _of_array(array: StoredArray, spec: Spec) -> IncomingTensor:
    def read(box: Box) -> Iterator[Buffer]:
        yield array.read(box).reshape(-1).view(np.uint8).data

    count = prod(-(-extent // size) for extent, size in zip(array.shape, array.unit, strict=True))
    if count > _MAX_PARTS:  # A few bytes of metadata can name any number of chunks, which are there or not.
        raise CheckpointError(
            f"zarr array {array.path!r} {array.shape} would be {count} parts, at most {_MAX_PARTS} are taken. "
            f"Give more memory"
        )
    boxes = list(cells(array.shape, array.unit)) if count else []
    return IncomingTensor(spec, boxes, read)


def _foreign(group: StoredGroup, prefix: str, drop: Sequence[str], max_bytes: int) -> Incoming:
    tensors = {}
    for array in group.foreign_arrays(drop, max_bytes):
        spec = Spec(dtype=array.dtype, global_shape=array.shape)
        fault = find_spec_fault(spec)
        if fault:
            raise CheckpointError(f"{group.root}: array {array.path!r}: {fault}")
        tensors[prefix + array.path] = _of_array(array, spec)
    taken = {key[:at] for key in tensors for at, character in enumerate(key) if character == "/"} | tensors.keys()
    values: dict[str, msgspec.Raw] = {}
    of_arrays: dict[str, object] = {}
    for path, is_array, attributes in group.foreign_attributes():
        if any(fnmatchcase(path, pattern) for pattern in drop):
            continue
        if is_array:
            of_arrays |= {path: attributes} if attributes else {}
            continue
        for name, value in attributes.items():
            key = prefix + (f"{path}/" if path else "") + _segment(name)
            if key in taken:
                raise CheckpointError(
                    f"{group.root}: {key!r} is an array or group, and an attribute too; give it another name"
                )
            values[key] = msgspec.Raw(encode_value(value, key))
    metadata = {"array_attributes": of_arrays} if of_arrays else None
    return Incoming(tensors=tensors, values=values, metadata=msgspec.Raw(encode_value(metadata, "metadata")))


def _segment(name: str) -> str:
    return name.replace("%", "%25").replace("/", "%2F") or "%e"


def import_safetensors(
    source: str | os.PathLike[str],
    root: str | os.PathLike[str] | Storage,
    *,
    iteration: int = 0,
    prefix: str = "",
    memory_bytes: int = MEMORY_BYTES,
    jobs: int | None = None,
    on_bytes: OnBytes = lambda _: None,
) -> ImportReport:
    """Make a checkpoint of safetensors files: of one, of those that an index names, or of all in a directory.

    prefix: put before each name, which is then the key ("model/": what a state has below "model"). All else as of
    import_zarr. Raises CorruptionError for a header or an index that is not sound.
    """
    return commit_incoming(
        root,
        open_safetensors(source, prefix=prefix),
        iteration,
        source=os.fspath(source),
        jobs=threads_and_memory(memory_bytes, jobs)[0],
        on_bytes=on_bytes,
    )


def open_safetensors(source: str | os.PathLike[str], *, prefix: str = "") -> Incoming:
    """What is in the files."""
    path = os.path.abspath(os.fspath(source))
    directory, names = _find_files(path)
    storage = PosixStorage(directory)
    tensors: dict[str, IncomingTensor] = {}
    for name, expected in names.items():
        with closing(storage.open(name)) as file:
            found = read_header(file)
        missing = sorted(set(expected) - {tensor.name for tensor in found})
        if missing:
            raise CorruptionError(f"{path}: {missing[0]!r} is said to be in {name}, and is not")
        for tensor in found:
            key = prefix + tensor.name
            if key in tensors:
                raise CorruptionError(f"{path}: {tensor.name!r} is in {name}, and in another file too")
            tensors[key] = _of_file(storage, name, tensor)
    return Incoming(tensors=tensors)


def _find_files(path: str) -> tuple[str, Mapping[str, Sequence[str]]]:
    """The directory, and by the names of the files in it what the index says is in each."""
    if not os.path.lexists(path):
        raise FileNotFoundError(errno.ENOENT, "no safetensors file or directory of them is there", path)
    if not os.path.isdir(path):
        directory, name = os.path.split(path)
        return directory, _read_index(path) if name.endswith(".json") else {name: ()}
    names = sorted(os.listdir(path))
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    if INDEX_FILE in indexes:
        indexes = [INDEX_FILE]
    if len(indexes) > 1:
        raise CheckpointError(f"{path} holds several indexes: {', '.join(indexes[:10])}. Give the path of one")
    if indexes:
        return path, _read_index(os.path.join(path, indexes[0]))
    files = [name for name in names if name.endswith(".safetensors")]
    if not files:
        raise CheckpointError(f"{path} holds no safetensors file, and no index of several")
    return path, dict.fromkeys(files, ())


def _read_index(path: str) -> Mapping[str, list[str]]:
    directory, name = os.path.split(path)
    with closing(PosixStorage(directory).open(name)) as file:
        data = bytearray(min(file.size_bytes, MAX_INDEX_BYTES + 1))
        file.read_into(0, data)
    return decode_index_document(data, path)


def _of_file(storage: Storage, name: str, tensor: FoundTensor) -> IncomingTensor:
    """A tensor whose elements lie one after the other in a file."""
    item_bytes = DTYPES[tensor.dtype].item_bytes
    strides = [prod(tensor.shape[d + 1 :]) for d in range(len(tensor.shape))]

    def read(box: Box) -> Iterator[Buffer]:
        first = sum(offset * stride for offset, stride in zip(box.offset, strides, strict=True))
        start, size = tensor.start + first * item_bytes, box.size * item_bytes
        with closing(storage.open(name)) as file:
            for at in range(0, size, _READ_BYTES):
                piece = memoryview(bytearray(min(_READ_BYTES, size - at)))
                try:
                    file.read_into(start + at, piece)
                except EOFError as error:
                    raise CorruptionError(f"{name} has become shorter: {error}") from error
                yield piece

    whole = Box.whole(tensor.shape)
    boxes = list(bands(whole, MAX_PART_BYTES // item_bytes)) if whole.size else []
    return IncomingTensor(Spec(dtype=tensor.dtype, global_shape=tensor.shape), boxes, read)
