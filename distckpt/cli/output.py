"""What commands print: JSON for programs, a line for people, progress while they wait."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.tree import Tree

DAMAGED = 1  # exit code
_NARROWEST, _WIDE = 120, 1000

# Of arguments that several commands have.
ROOT = "The directory that holds latest_checkpointed_iteration.txt, or that of one iteration in it."
WHICH = (
    "Which: a number, step:NUMBER, latest, latest-verified, best:METRIC[:max], tag:NAME, or the path of an iteration's "
    "directory; the newest if not given."
)

# Paths and keys are printed as they are: no markup, no colours in them, no line breaks.
console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)


def print_json(value: object) -> None:
    """One line of JSON on standard output."""
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.buffer.flush()


def print_table(table: Table | Tree) -> None:
    """As wide as the terminal, but never so narrow that columns are cut; where there is none nothing is folded."""
    width = max(console.width, _NARROWEST) if console.is_terminal else _WIDE
    Console(width=width, highlight=False, markup=False, emoji=False).print(table, crop=False)


def plain_text(text: str) -> str:
    """One line of what was read from a file, without what a terminal would take for orders."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else " " for character in text)


def size_text(size_bytes: int) -> str:
    """1.5 GB, in units of 1000."""
    return decimal(size_bytes)


def age_text(seconds: float) -> str:
    """3.2 h."""
    for unit, unit_s in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= unit_s:
            return f"{seconds / unit_s:.1f} {unit}"
    return f"{seconds:.0f} s"


def write_file(path: Path, content: bytes) -> None:
    """All of it or nothing. Raises OSError."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def shown(text: str, max_length: int = 200) -> str:
    """A text from disk on one line, without what would do things to a terminal."""
    text = plain_text(text)
    return text if len(text) <= max_length else f"{text[: max_length - 3]}..."


@contextmanager
def progress_bar(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error where that is a terminal, nothing in a log; yields what is told of each step's bytes."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    terminal = Console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(), console=terminal, transient=True, disable=not terminal.is_terminal
    ) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda step: bar.advance(task, step)
