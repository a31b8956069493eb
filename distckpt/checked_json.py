"""Records as JSON with their checksum: one line that people and jq can read, then one with its CRC32C. No I/O."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from distckpt._C import crc32c
from distckpt.decoding import decode_json
from distckpt.errors import CorruptionError

T = TypeVar("T")


class _Trailer(msgspec.Struct):
    crc32c: str


def encode_record(record: msgspec.Struct) -> bytes:
    """Two lines: the JSON, and {"crc32c": "..."} of the first line with its line feed."""
    body = msgspec.json.encode(record) + b"\n"
    return body + msgspec.json.encode({"crc32c": f"{crc32c(body):08x}"}) + b"\n"


def checked_body(data: bytes, *, name: str) -> bytes:
    """The first line, whose checksum is right. Raises CorruptionError."""
    body, newline, last = data[:-1].rpartition(b"\n") if data.endswith(b"\n") else (b"", b"", b"")
    if not newline:
        raise CorruptionError(f"{name}: the checksum line is missing; the file is cut short")
    body += newline
    try:
        stated = decode_json(last, _Trailer).crc32c
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptionError(f"{name}: the checksum line is damaged: {error}") from error
    found = f"{crc32c(body):08x}"
    if found != stated:
        raise CorruptionError(f"{name}: crc32c is {found}, its last line says {stated}")
    return body


def decode_body(body: bytes, kind: type[T], *, name: str) -> T:
    """Raises CorruptionError."""
    try:
        return decode_json(body, kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptionError(f"{name}: {error}") from error
