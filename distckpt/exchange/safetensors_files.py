"""safetensors files of whole tensors, and the index of several, as Hugging Face's libraries write and read them.

Decides names, the order of tensors, headers, and whether the header or index of a file from elsewhere is sound. No
torch; reads no tensor. The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import msgspec

from distckpt.decoding import decode_json
from distckpt.errors import CheckpointError, CorruptionError
from distckpt.geometry import MAX_DIMS
from distckpt.index import Spec
from distckpt.shard_file import DTYPES, FORMAT, HeaderEntry
from distckpt.storage import ReadFile

MAX_FILE_BYTES = 5 * 10**9
MAX_HEADER_BYTES = 100_000_000  # what the safetensors library takes
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 1 << 30
_DTYPES_ENTRY = (
    "distckpt.dtypes"  # in __metadata__: name -> dtype, of tensors of types that safetensors has no word for
)
# safetensors' word -> torch's name, and bytes an element
_KNOWN = {dtype.stored: name for name, dtype in DTYPES.items() if not dtype.trailing and dtype.stored != "U8"}
_KNOWN["U8"] = "uint8"


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A tensor of a checkpoint, and its name in a file."""

    name: str
    key: str
    spec: Spec


@dataclass(frozen=True, slots=True)
class FileOfTensors:
    """A file to be written: its tensors in the order in which they lie in it."""

    name: str
    tensors: Sequence[NamedTensor]

    @property
    def data_bytes(self) -> int:
        return sum(tensor.spec.size_bytes for tensor in self.tensors)

    def header(self) -> bytes:
        """With its length prefix, padded with spaces to a multiple of 8. Raises CheckpointError if it is longer than
        the library takes."""
        metadata = {"format": "pt"}
        ours = {t.name: t.spec.dtype for t in self.tensors if _KNOWN[DTYPES[t.spec.dtype].stored] != t.spec.dtype}
        if ours:
            metadata[_DTYPES_ENTRY] = msgspec.json.encode(ours).decode()
        entries: dict[str, object] = {"__metadata__": metadata}
        position = 0
        for tensor in self.tensors:
            dtype = DTYPES[tensor.spec.dtype]
            end = position + tensor.spec.size_bytes
            entries[tensor.name] = HeaderEntry(dtype.stored, tensor.spec.global_shape + dtype.trailing, (position, end))
            position = end
        text = msgspec.json.encode(entries)
        text += b" " * (-len(text) % 8)
        if len(text) > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{self.name}: a header of {len(text)} bytes, readers take {MAX_HEADER_BYTES}: make the files smaller"
            )
        return len(text).to_bytes(8, "little") + text


def arrange_files(tensors: Iterable[NamedTensor], max_file_bytes: int) -> list[FileOfTensors]:
    """Tensors, in their order, as files of at most so many bytes of data; one that is larger has a file of its own. The
    same files as huggingface_hub makes of them."""
    groups: list[list[NamedTensor]] = []
    group: list[NamedTensor] = []
    size = 0
    for tensor in tensors:
        if tensor.spec.size_bytes > max_file_bytes:
            groups.append([tensor])
            continue
        if size + tensor.spec.size_bytes > max_file_bytes:
            groups.append(group)
            group, size = [], 0
        group.append(tensor)
        size += tensor.spec.size_bytes
    if group or not groups:
        groups.append(group)
    names = [SINGLE_FILE]
    if len(groups) > 1:
        names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    # Descending item size, as the library has it: then all are aligned.
    return [
        FileOfTensors(name, sorted(group, key=lambda tensor: -_aligned_bytes(tensor.spec)))
        for name, group in zip(names, groups, strict=True)
    ]


def _aligned_bytes(spec: Spec) -> int:
    dtype = DTYPES[spec.dtype]
    return dtype.item_bytes // prod(dtype.trailing)


def index_document(files: Sequence[FileOfTensors]) -> bytes:
    """The index of several files, as transformers writes it."""
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    index = {"metadata": {"total_size": sum(file.data_bytes for file in files)}, "weight_map": weight_map}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def rename_keys(keys: Iterable[str], strip: str, rename: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Key -> name: without the prefix `strip` where it begins with that, then each (old, new) of `rename` replaced
    wherever it stands, one after the other. Raises ValueError for two keys of one name, for one that is reserved, and
    for what is in no key."""
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    idle = {strip, *(old for old, _ in rename)} - {""}
    for key in keys:
        name = key.removeprefix(strip)
        if name != key:
            idle.discard(strip)
        for old, new in rename:
            if old in name:
                idle.discard(old)
            name = name.replace(old, new)
        if name in taken:
            raise ValueError(f"{taken[name]!r} and {key!r} would both be named {name!r}; rename or select less")
        if name == "__metadata__":
            raise ValueError(f"{key!r} would be named {name!r}, which safetensors keeps for itself; rename it")
        names[key] = name
        taken[name] = key
    if names and idle:
        like = ", ".join(map(repr, list(names)[:5]))
        raise ValueError(f"{min(idle)!r}, which was to be stripped or renamed, is in no key; keys are such as {like}")
    return names


@dataclass(frozen=True, slots=True)
class FoundTensor:
    """A tensor in a file: its bytes, in C order, begin at `start`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int


def read_header(file: ReadFile) -> list[FoundTensor]:
    """The tensors of a file, in the order in which they lie. Raises CorruptionError, naming the file and the rule,
    unless they are its data without hole or overlap; CheckpointError for element types that a checkpoint cannot hold
    and for a shard file of a checkpoint; OSError."""

    def fail(why: str) -> CorruptionError:
        return CorruptionError(f"{file.name}: {why}")

    prefix = bytearray(8)
    if file.size_bytes < 8:
        raise fail(f"{file.size_bytes} bytes are too few for a safetensors file")
    file.read_into(0, prefix)
    size = int.from_bytes(prefix, "little")
    if size > MAX_HEADER_BYTES or size + 8 > file.size_bytes:
        raise fail(f"its header would have {size} bytes, in a file of {file.size_bytes}; at most {MAX_HEADER_BYTES}")
    text = bytearray(size)
    file.read_into(8, text)
    try:
        raw = decode_json(text, dict[str, msgspec.Raw])
        metadata = decode_json(raw.pop("__metadata__", msgspec.Raw(b"{}")), dict[str, str])
        entries = {name: decode_json(entry, HeaderEntry) for name, entry in raw.items()}
        ours = decode_json(metadata.get(_DTYPES_ENTRY, "{}"), dict[str, str])
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise fail(f"header: {error}") from error
    if metadata.get("format") == FORMAT:
        raise CheckpointError(
            f"{file.name} is a shard file of a checkpoint, which holds parts of tensors. Give the checkpoint's root "
            f"to `distckpt export`, or to `distckpt copy`"
        )
    found = []
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if entry.data_offsets[0] != position or entry.data_offsets[1] < position:
            raise fail(f"{name!r} is at {list(entry.data_offsets)}, expected to start at {position}")
        position = entry.data_offsets[1]
        found.append(_found(name, entry, ours.get(name), 8 + size, fail_name=file.name))
    if 8 + size + position != file.size_bytes:
        raise fail(f"its tensors end at byte {8 + size + position}, the file has {file.size_bytes}")
    return found


def _found(name: str, entry: HeaderEntry, ours: str | None, data_start: int, *, fail_name: str) -> FoundTensor:
    stored = _KNOWN.get(entry.dtype)
    if stored is None:
        raise CheckpointError(f"{fail_name}: {name!r} is {entry.dtype}; known are {', '.join(sorted(_KNOWN))}")
    if len(entry.shape) > MAX_DIMS or min(entry.shape, default=0) < 0:  # Before the product, slow to compute of many.
        raise CorruptionError(f"{fail_name}: {name!r} has the shape {list(entry.shape)[: MAX_DIMS + 1]}")
    size = entry.data_offsets[1] - entry.data_offsets[0]
    if prod(entry.shape) * DTYPES[stored].item_bytes != size:
        raise CorruptionError(f"{fail_name}: {name!r}: {entry.dtype} {list(entry.shape)} does not take {size} bytes")
    dtype, shape = stored, entry.shape
    if ours is not None:
        kind = DTYPES.get(ours)
        ndim = len(shape) - (0 if kind is None else len(kind.trailing))
        if kind is None or kind.stored != entry.dtype or ndim < 0 or shape[ndim:] != kind.trailing:
            raise CorruptionError(f"{fail_name}: {name!r}: {entry.dtype} {list(shape)} is said to be {ours}")
        dtype, shape = ours, shape[:ndim]
    return FoundTensor(name, dtype, shape, data_start + entry.data_offsets[0])


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def decode_index_document(data: bytes | bytearray, where: str) -> Mapping[str, list[str]]:
    """File name -> names of the tensors that the index says are in it. Raises CorruptionError."""
    if len(data) > MAX_INDEX_BYTES:
        raise CorruptionError(f"{where}: more than the {MAX_INDEX_BYTES} bytes that it may have")
    try:
        index = decode_json(data, _Index)
    except (msgspec.DecodeError, RecursionError) as error:
        raise CorruptionError(f"{where}: {error}") from error
    if not index.weight_map:
        raise CorruptionError(f"{where}: it names no tensors")
    files: dict[str, list[str]] = {}
    for name, file in index.weight_map.items():
        if "/" in file or "\\" in file or "\0" in file or not file.endswith(".safetensors"):
            raise CorruptionError(
                f"{where}: {name!r} is said to be in {file!r}, which is no safetensors file beside it"
            )
        files.setdefault(file, []).append(name)
    return files
