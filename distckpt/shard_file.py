"""The byte layout of one shard file: an ordinary safetensors file whose last entry is a checksum per 1 MiB block.

Decides where every chunk lies, what the header says, and whether the header of a file read back is sound. Holds
the table of element types. No torch, no I/O. docs/format.md is the normative description.

    8 bytes   header length, little-endian
    header    JSON, padded with spaces so that data starts at a multiple of 4096
    chunks    in descending item size, so that each is aligned; C order, little-endian, no holes
    __per_rank__   U8: the JSON of what differs by rank, padded with spaces to a multiple of 4
    __crc32c__     U32: CRC32C of each 1 MiB of the file from byte 0 up to the start of this entry
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple
from urllib.parse import quote, unquote

import msgspec
import numpy as np

from distckpt.decoding import decode_json
from distckpt.errors import CheckpointError, CorruptionError
from distckpt.geometry import MAX_DIMS, Int64Array

BLOCK_BYTES = 1 << 20
ALIGNMENT = 4096
MAX_HEADER_BYTES = 64 << 20
PER_RANK_ENTRY = "__per_rank__"
CHECKSUM_ENTRY = "__crc32c__"
FORMAT = "distckpt"
FORMAT_VERSION = 1
_HEADER_RESERVE = 2 * ALIGNMENT  # the entries that every file has, the short metadata, the padding
# In the header, but only known when the chunks are laid out: as many digits as an offset can have.
_ENTRY_OVERHEAD = len('"":{"dtype":"F8_E4M3FNUZ","shape":[],"data_offsets":[,]},') + 2 * 19


class DType(NamedTuple):
    """How elements are stored: safetensors' word for them, the trailing dimensions that it adds, bytes an element."""

    stored: str
    trailing: tuple[int, ...]
    item_bytes: int


# torch's name -> how it is stored. What safetensors has no word for lies as pairs or as bytes.
DTYPES: Mapping[str, DType] = {
    "complex128": DType("F64", (2,), 16),
    "float64": DType("F64", (), 8),
    "int64": DType("I64", (), 8),
    "uint64": DType("U64", (), 8),
    "complex64": DType("C64", (), 8),
    "float32": DType("F32", (), 4),
    "int32": DType("I32", (), 4),
    "uint32": DType("U32", (), 4),
    "complex32": DType("F16", (2,), 4),
    "float16": DType("F16", (), 2),
    "bfloat16": DType("BF16", (), 2),
    "int16": DType("I16", (), 2),
    "uint16": DType("U16", (), 2),
    "int8": DType("I8", (), 1),
    "uint8": DType("U8", (), 1),
    "bool": DType("BOOL", (), 1),
    "float8_e4m3fn": DType("F8_E4M3", (), 1),
    "float8_e5m2": DType("F8_E5M2", (), 1),
    "float8_e8m0fnu": DType("F8_E8M0", (), 1),
    "float8_e4m3fnuz": DType("U8", (), 1),
    "float8_e5m2fnuz": DType("U8", (), 1),
    "float4_e2m1fn_x2": DType("U8", (), 1),
}


def file_name(rank: int, part: int, world_size: int, save_id: str) -> str:
    """The name of a rank's shard file; `part` counts its files when it has several."""
    number = f"{rank:05d}" + (f".{part}" if part else "")
    return f"shard-{number}-of-{world_size:05d}-{save_id}.safetensors"


class Chunk(NamedTuple):
    """One box of one tensor, as it goes into a file."""

    key: str
    dtype: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    whole: bool  # the chunk is the whole tensor

    @property
    def entry(self) -> str:
        """Its name in the header: the escaped key, and the offset unless the chunk is the whole tensor."""
        return escape_key(self.key) if self.whole else entry_of_part(escape_key(self.key), self.offset)

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].item_bytes


_SAFE = "".join(chr(c) for c in range(32, 127) if chr(c) not in '%@"\\')
_PLAIN_KEY = re.compile(rf"(?!__)[{re.escape(_SAFE)}]*")


def escape_key(key: str) -> str:
    """A key as names of entries have it, which is also the name of a chunk that is the whole tensor."""
    if _PLAIN_KEY.fullmatch(key):
        return key
    name = quote(key, safe=_SAFE)
    return "%5F%5F" + name[2:] if name.startswith("__") else name


def entry_of_part(escaped_key: str, offset: Sequence[int]) -> str:
    """The name of the chunk at `offset` of a tensor of which it is a part."""
    return f"{escaped_key}@{','.join(map(str, offset))}"


def key_of_entry(entry: str) -> str:
    """The key again. The inverse of `Chunk.entry`."""
    return unquote(entry.partition("@")[0], errors="strict")


@dataclass(frozen=True, slots=True, eq=False)
class FileLayout:
    """Where everything in one shard file lies; all positions are from byte 0 of the file."""

    header: bytes  # with its length prefix and its padding; the chunks start where it ends
    order: tuple[int, ...]  # which chunk (by number) lies where: those of this file, in file order
    starts: Int64Array  # where each chunk of `order` starts
    per_rank_start: int
    per_rank: bytes  # the JSON, padded
    checksum_start: int

    @property
    def per_rank_bytes(self) -> int:
        return len(self.per_rank)

    @property
    def block_count(self) -> int:
        return -(-self.checksum_start // BLOCK_BYTES)

    @property
    def size_bytes(self) -> int:
        return self.checksum_start + 4 * self.block_count


def split_into_files(
    chunks: Sequence[Chunk],
    *,
    metadata_bytes: Sequence[int] = (),
    first_metadata_bytes: int = 0,
    max_header_bytes: int = MAX_HEADER_BYTES,
    max_data_bytes: int | None = None,
) -> list[list[int]]:
    """Chunk numbers per file, in file order (descending item size), so that no header passes the limit.

    metadata_bytes: what each chunk adds to `__metadata__` of its file; first_metadata_bytes: what the first file
    has there besides. max_data_bytes: of chunks in a file of several; None is no limit.
    """
    files: list[list[int]] = [[]]
    header, data = _HEADER_RESERVE + first_metadata_bytes, 0
    for i in sorted(range(len(chunks)), key=lambda i: -DTYPES[chunks[i].dtype].item_bytes):
        chunk = chunks[i]
        entry = len(chunk.entry) + _ENTRY_OVERHEAD + 21 * len(chunk.shape)
        if metadata_bytes:
            entry += metadata_bytes[i]
        is_long = max_data_bytes is not None and data + chunk.size_bytes > max_data_bytes
        if files[-1] and (is_long or header + entry > max_header_bytes):
            files.append([])
            header, data = _HEADER_RESERVE, 0
        files[-1].append(i)
        header, data = header + entry, data + chunk.size_bytes
    return files


def nested_json(value: object) -> bytes:
    """A value's JSON inside a JSON string, which is how `__metadata__` holds it."""
    return msgspec.json.encode(msgspec.json.encode(value).decode())


@dataclass(frozen=True, slots=True, eq=False)
class FilePlan:
    """What of a file's layout depends on its chunks alone, and so stays from one save to the next."""

    order: tuple[int, ...]  # as in FileLayout
    starts: Int64Array  # of each chunk of `order`, counted from where the data starts
    entries: bytes  # of the chunks, in the header's JSON, each with a comma behind it
    data_bytes: int  # of all chunks

    def lay_out(self, per_rank: bytes, metadata: Mapping[str, str | msgspec.Raw]) -> FileLayout:
        """The layout of the file with this per-rank JSON and these texts in `__metadata__`.

        A Raw is a text as JSON already, such as `nested_json` makes.
        Raises CheckpointError when the header would be longer than readers take.
        """
        per_rank += b" " * (-(self.data_bytes + len(per_rank)) % 4)
        end = self.data_bytes + len(per_rank)
        per_rank_entry = f'"{PER_RANK_ENTRY}"{_description("U8", (len(per_rank),))}[{self.data_bytes},{end}]}},'
        # Megabytes when there are many chunks: joined once.
        text = [b'{"__metadata__":', msgspec.json.encode(metadata), b",", self.entries, per_rank_entry.encode()]
        text_bytes = sum(map(len, text))
        # The checksum table covers the header, whose length depends on the table's: settle it by trying.
        blocks = 0
        while True:
            table = f'"{CHECKSUM_ENTRY}"{_description("U32", (blocks,))}[{end},{end + 4 * blocks}]}}}}'
            base = -(-(8 + text_bytes + len(table)) // ALIGNMENT) * ALIGNMENT
            needed = -(-(base + end) // BLOCK_BYTES)
            if needed == blocks:
                break
            blocks = needed
        if base > MAX_HEADER_BYTES + 8:
            raise CheckpointError(
                f"a shard file would have a header of {base} bytes, more than the {MAX_HEADER_BYTES} that readers take"
            )
        padding = b" " * (base - 8 - text_bytes - len(table))
        return FileLayout(
            header=b"".join([(base - 8).to_bytes(8, "little"), *text, table.encode(), padding]),
            order=self.order,
            starts=self.starts + base,
            per_rank_start=base + self.data_bytes,
            per_rank=per_rank,
            checksum_start=base + end,
        )


def plan_file(chunks: Sequence[Chunk], order: Sequence[int]) -> FilePlan:
    """The plan of the file that holds chunks[i] for i in `order` (descending item size)."""
    described: dict[tuple[str, tuple[int, ...]], tuple[str, int]] = {}  # Many chunks have few shapes.
    entries: list[str] = []
    ends = [0]
    for i in order:
        chunk = chunks[i]
        kind = chunk.dtype, chunk.shape
        known = described.get(kind)
        if known is None:
            dtype = DTYPES[chunk.dtype]
            known = described[kind] = _description(dtype.stored, (*chunk.shape, *dtype.trailing)), chunk.size_bytes
        description, size = known
        start = ends[-1]
        ends.append(start + size)
        # No name has anything in it that JSON would escape.
        entries.append(f'"{chunk.entry}"{description}[{start},{start + size}]}},')
    starts = np.array(ends[:-1], np.int64)
    return FilePlan(tuple(order), starts, "".join(entries).encode(), ends[-1])


def _description(dtype: str, shape: Sequence[int]) -> str:
    """An entry of the header between its name and its data_offsets."""
    return f':{{"dtype":"{dtype}","shape":[{",".join(map(str, shape))}],"data_offsets":'


class HeaderEntry(msgspec.Struct, frozen=True):
    """One entry of a header: safetensors dtype and shape, and its bytes counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Header:
    """A header that was read and found sound; positions are from byte 0 of the file."""

    metadata: Mapping[str, str]
    entries: Mapping[str, HeaderEntry]
    data_start: int

    def start_of(self, entry: str) -> int:
        return self.data_start + self.entries[entry].data_offsets[0]

    def keys(self) -> Iterator[str]:
        """Keys of the tensors that have a chunk in the file, with repeats."""
        return (key_of_entry(e) for e in self.entries if not e.startswith("__"))


_ITEM_BYTES = {d.stored: d.item_bytes // prod(d.trailing) for d in DTYPES.values()}
_ENTRY_PATTERN = re.compile(r"(?!__)[^@%]*(?:%[0-9A-F]{2}[^@%]*)*(?:@[0-9]+(?:,[0-9]+)*)?")


def _is_chunk_name(name: str) -> bool:
    if _ENTRY_PATTERN.fullmatch(name) is None:
        return False
    try:
        key_of_entry(name)
    except UnicodeDecodeError:
        return False
    return True


def decode_header(data: bytes, *, file_name: str, file_bytes: int) -> Header:
    """Check the header (with its length prefix) of a file of `file_bytes`.

    Raises CorruptionError, naming the file and the rule, unless entries lie inside the file, without hole or
    overlap, each as long as its shape says, and the checksum table is the last one and of the right length.
    """

    def fail(why: str) -> CorruptionError:
        return CorruptionError(f"{file_name}: header: {why}")

    if len(data) < 8 or int.from_bytes(data[:8], "little") != len(data) - 8:
        raise fail(f"length prefix does not say {max(0, len(data) - 8)}")
    try:
        raw = decode_json(data[8:], dict[str, msgspec.Raw])
        metadata = decode_json(raw.pop("__metadata__", msgspec.Raw(b"{}")), dict[str, str])
        # All entries in one go: each is whole JSON, so that a list of them has as many items.
        listed = decode_json(b"[%b]" % b",".join(raw.values()), list[HeaderEntry])
        entries = dict(zip(raw, listed, strict=True))
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise fail(str(error)) from error
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        (start, end), shape = entry.data_offsets, entry.shape
        if start != position or end < start:
            raise fail(f"entry {name!r} is at {start}-{end}, expected to start at {position}")
        if len(shape) > MAX_DIMS + 1:  # Before the product, which is slow to compute when there are many.
            raise fail(f"entry {name!r} has {len(shape)} dimensions, at most {MAX_DIMS + 1} expected")
        if min(shape, default=0) < 0 or prod(shape) * _ITEM_BYTES.get(entry.dtype, -1) != end - start:
            raise fail(f"entry {name!r}: {entry.dtype} {list(shape)} does not take {end - start} bytes")
        if not (_is_chunk_name(name) or name in (PER_RANK_ENTRY, CHECKSUM_ENTRY)):
            raise fail(f"entry {name!r} is not the name of a chunk")
        position = end
    if len(data) + position != file_bytes:
        raise fail(f"entries end at byte {len(data) + position}, the file has {file_bytes}")
    table = entries.get(CHECKSUM_ENTRY)
    if table is None or table.data_offsets[1] != position or table.dtype != "U32":
        raise fail(f"the last entry is not {CHECKSUM_ENTRY}")
    if table.shape != (-(-(len(data) + table.data_offsets[0]) // BLOCK_BYTES),):
        raise fail(f"{CHECKSUM_ENTRY} has shape {list(table.shape)}, not one checksum per block")
    return Header(metadata=metadata, entries=entries, data_start=len(data))
