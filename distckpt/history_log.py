"""The history of a root: one line of JSON for each save, load and copy, in `history.jsonl`. No torch.

A log, and no part of any checkpoint: nothing is decided by it, it may be removed at any time, and its last lines may be
lost in a power cut. It is bounded: a file that would pass MAX_FILE_BYTES is replaced by its last half.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeAlias

import msgspec

from distckpt.decoding import decode_json
from distckpt.errors import Committed
from distckpt.index import Natural
from distckpt.report import CopyReport, LoadReport, SaveReport
from distckpt.storage import PosixStorage, Storage

FILE = "history.jsonl"
MAX_FILE_BYTES = 16 << 20
MAX_LINE_BYTES = 256 << 10
_MAX_ERROR_CHARACTERS = 16 << 10
_LISTED = 20  # items of a list in a line that would be too long

Kind: TypeAlias = Literal["save", "failed save", "load", "copy", "failed copy"]
_REPORTS = {"save": SaveReport, "load": LoadReport, "copy": CopyReport}


class HistoryLine(msgspec.Struct, frozen=True, kw_only=True):
    """One save, load or copy.

    time_unix_s: when it ended. save_id: "" if it is not known. report: of rank 0; None of what failed, which has an
    error. committed: whether a failed save is a checkpoint all the same.
    """

    kind: Kind
    time_unix_s: Annotated[float, msgspec.Meta(ge=0, le=1e11)]
    iteration: Natural | None
    save_id: str
    world_size: Natural
    report: SaveReport | LoadReport | CopyReport | None = None
    error: str | None = None
    committed: Committed | None = None


class _Stored(msgspec.Struct, frozen=True, kw_only=True):
    """The same as it is decoded: the kind says what the report is."""

    kind: Kind
    time_unix_s: Annotated[float, msgspec.Meta(ge=0, le=1e11)]
    iteration: Natural | None
    save_id: str
    world_size: Natural
    report: msgspec.Raw = msgspec.Raw(b"null")
    error: str | None = None
    committed: Committed | None = None


@dataclass(frozen=True, slots=True)
class History:
    """Lines, oldest first. skipped: how many were torn, too long or not of this kind."""

    lines: list[HistoryLine]
    skipped: int


def history(root: str | os.PathLike[str] | Storage, *, last: int | None = None) -> list[HistoryLine]:
    """What was saved, loaded and copied under a root, oldest first; only the last so many lines if `last` is given.

    Empty where nothing was logged. Lines that cannot be read are left out. Raises OSError.
    """
    return read_history(PosixStorage(root) if isinstance(root, (str, os.PathLike)) else root, last=last).lines


def line_of(report: SaveReport | LoadReport | CopyReport, world_size: int) -> HistoryLine:
    """The line of what has just ended."""
    kinds: dict[type, Kind] = {SaveReport: "save", LoadReport: "load", CopyReport: "copy"}
    return HistoryLine(
        kind=kinds[type(report)],
        time_unix_s=time.time(),
        iteration=report.iteration,
        save_id=report.save_id,
        world_size=world_size,
        report=report,
    )


def line_of_failure(
    kind: Kind, iteration: object, error: BaseException, world_size: int, *, save_id: str = ""
) -> HistoryLine:
    """The line of what has just failed. iteration: as the caller gave it."""
    return HistoryLine(
        kind=kind,
        time_unix_s=time.time(),
        iteration=iteration if isinstance(iteration, int) and 0 <= iteration < 2**63 else None,
        save_id=save_id,
        world_size=world_size,
        error=f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARACTERS],
        committed=getattr(error, "committed", "no") if kind == "failed save" else None,
    )


def append_line(storage: Storage, line: HistoryLine, *, make: bool = True) -> None:
    """Add a line. make: whether to begin the log where there is none. Raises OSError."""
    data = _encode(line)
    try:
        tail, size_bytes = _read_tail(storage, 0)
    except FileNotFoundError:
        if not make:
            return
        tail, size_bytes = b"", 0
    if size_bytes + len(data) > MAX_FILE_BYTES:
        tail, _ = _read_tail(storage, MAX_FILE_BYTES // 2)
        storage.replace(FILE, tail.partition(b"\n")[2])
    storage.append(FILE, data)


def read_history(storage: Storage, *, last: int | None = None) -> History:
    """The last lines, or all of them. Raises OSError."""
    try:
        data, size_bytes = _read_tail(storage, MAX_FILE_BYTES + MAX_LINE_BYTES)
    except FileNotFoundError:
        return History([], 0)
    if len(data) < size_bytes:  # Somebody else's; what it begins with is no whole line.
        data = data.partition(b"\n")[2]
    lines = [line for line in data.split(b"\n") if line]
    decoded = [_decode(line) for line in lines]
    known = [line for line in decoded if line is not None]
    return History(known if last is None else known[len(known) - min(last, len(known)) :], len(lines) - len(known))


def _read_tail(storage: Storage, max_bytes: int) -> tuple[bytes, int]:
    """The last bytes of the log, and how long it is."""
    file = storage.open(FILE)
    try:
        size_bytes = file.size_bytes
        data = bytearray(min(size_bytes, max_bytes))
        if data:
            file.read_into(size_bytes - len(data), data)
        return bytes(data), size_bytes
    except EOFError as error:  # Replaced by a shorter one, on a file system that does not keep the old one open.
        raise OSError(f"{FILE}: {error}") from error
    finally:
        file.close()


def _encode(line: HistoryLine) -> bytes:
    data = _json(line)
    if len(data) <= MAX_LINE_BYTES or line.report is None:
        return data
    return _json(msgspec.structs.replace(line, report=_shortened(line.report)))


def _json(line: HistoryLine) -> bytes:
    """One line. What is no Unicode, as a file name or key that was found may not be, becomes "?"."""
    try:
        return msgspec.json.encode(line) + b"\n"
    except UnicodeEncodeError:
        return msgspec.json.encode(_as_unicode(msgspec.to_builtins(line))) + b"\n"


def _as_unicode(value: object) -> object:
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, dict):
        return {_as_unicode(key): _as_unicode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_unicode(item) for item in value]
    return value


def _shortened(report: SaveReport | LoadReport | CopyReport) -> SaveReport | LoadReport | CopyReport:
    """With the first few of every list: a load that is not strict may name any number of keys."""
    if isinstance(report, SaveReport):
        return replace(report, degraded=_first(report.degraded))
    if isinstance(report, CopyReport):
        return report
    return replace(
        report,
        missing=_first(report.missing),
        unexpected=_first(report.unexpected),
        reseeded=_first(report.reseeded),
        skipped=_first(report.skipped),
        warnings=_first(report.warnings),
        rebuilt=_first(report.rebuilt),
        fell_back_from=dict(list(report.fell_back_from.items())[:_LISTED]),
    )


def _first(items: tuple[str, ...]) -> tuple[str, ...]:
    if len(items) <= _LISTED:
        return items
    return (*(item[:1000] for item in items[:_LISTED]), f"and {len(items) - _LISTED} more")


def _decode(line: bytes) -> HistoryLine | None:
    """None if it is not a line of a history, or not a whole one."""
    if len(line) > MAX_LINE_BYTES:
        return None
    try:
        stored = decode_json(line, _Stored)
        kind = _REPORTS.get(stored.kind)
        report = None if kind is None else decode_json(bytes(stored.report), kind)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return None
    return HistoryLine(
        kind=stored.kind,
        time_unix_s=stored.time_unix_s,
        iteration=stored.iteration,
        save_id=stored.save_id,
        world_size=stored.world_size,
        report=report,
        error=stored.error,
        committed=stored.committed,
    )
