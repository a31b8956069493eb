"""Who claimed a root, as the fence file `writer-<epoch>` tells it. No I/O, no torch."""

from __future__ import annotations

import os
import socket

import msgspec

from distckpt.decoding import decode_json

MAX_OWNER_BYTES = 1 << 20


class RootOwner(msgspec.Struct, frozen=True, omit_defaults=True):
    """The process that claimed it. reshards: location of the root that a reshard reads, as utf8_text() has it; None
    for a job."""

    host: str = ""
    pid: int = 0
    reshards: str | None = None


def encode_owner(reshards: str | None) -> bytes:
    """Of this process."""
    return msgspec.json.encode(RootOwner(socket.gethostname(), os.getpid(), reshards))


def decode_owner(data: bytes) -> RootOwner:
    """What cannot be read counts as a job's: it must not be disturbed."""
    try:
        return decode_json(data, RootOwner)
    except (msgspec.DecodeError, RecursionError):
        return RootOwner()
