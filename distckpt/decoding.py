"""Decoding into types, in any number of threads. No I/O.

msgspec finds out what the fields of a type are when the type is first decoded, and has a half of that in the type
meanwhile: another thread that comes then crashes the process. Here one thread at a time finds out, and what it finds is
kept.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar, overload

import msgspec
from typing_extensions import Buffer

T = TypeVar("T")
_finding_out = threading.Lock()
# A process that is forked while a thread finds out would wait for it for ever, and have a half of a type.
os.register_at_fork(
    before=_finding_out.acquire, after_in_parent=_finding_out.release, after_in_child=_finding_out.release
)


def decode_json(data: Buffer | str, kind: type[T]) -> T:
    """Raises msgspec.DecodeError, UnicodeDecodeError or RecursionError."""
    decoded: T = _JSON[kind].decode(data)
    return decoded


def decode_msgpack(data: Buffer, kind: type[T]) -> T:
    """Raises msgspec.DecodeError, UnicodeDecodeError or RecursionError."""
    return msgpack_decoder(kind).decode(data)


def msgpack_decoder(kind: type[T]) -> msgspec.msgpack.Decoder[T]:
    """For those who decode very many."""
    decoder: msgspec.msgpack.Decoder[T] = _MSGPACK[kind]
    return decoder


@overload
def decode_builtins(value: object, kind: type[T]) -> T: ...
@overload
def decode_builtins(value: object, kind: Any) -> Any: ...
def decode_builtins(value: object, kind: Any) -> Any:
    """What msgspec.convert makes of a value of plain types. Raises msgspec.ValidationError."""
    _JSON[kind]  # Then the type is known.
    return msgspec.convert(value, kind)


class _Decoders(dict[Any, Any]):
    """By type; made when first asked for."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, kind: Any) -> Any:
        with _finding_out:
            self[kind] = decoder = self._make(kind)
        return decoder


# Module state, since what msgspec knows of a type lies in the type. It has an entry for each type of the package.
_JSON, _MSGPACK = _Decoders(msgspec.json.Decoder), _Decoders(msgspec.msgpack.Decoder)
