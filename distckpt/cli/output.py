"""What commands print: JSON for programs, a line for people, progress while they wait."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import msgspec
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.tree import Tree

DAMAGED = DIFFERENT = 1  # exit codes; see distckpt.cli.running
MAX_JOBS = 1024
LOG_INTERVAL_S = 30.0  # between two lines of progress in a log
_NARROWEST, _WIDE = 120, 1000
_SPEED_LINES = 4

# Of arguments that several commands have.
ROOT = "The directory that holds latest_checkpointed_iteration.txt, or that of one iteration in it."
WHICH = (
    "Which: a number, step:NUMBER, latest, latest-verified, best:METRIC[:max], tag:NAME, or the path of an iteration's "
    "directory; the newest if not given."
)

SELECT = 'Only keys that match this glob ("*" fits "/" and "." too). May be repeated.'
DROP = "No keys that match this glob. May be repeated."
MEMORY = "How much to hold at a time, whatever the size of the checkpoint: 256MiB, 1GB."

# Paths and keys are printed as they are: no markup, no colours in them, no line breaks.
console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)


def print_json(value: object) -> None:
    """One line of JSON on standard output."""
    try:
        data = msgspec.json.encode(value)
    except UnicodeEncodeError:  # A path may have bytes that are no UTF-8.
        data = json.dumps(msgspec.to_builtins(value, enc_hook=_decoded)).encode()
    sys.stdout.buffer.write(data + b"\n")
    sys.stdout.buffer.flush()


def _decoded(value: object) -> object:
    """What msgspec encodes as it stands, as values of Python."""
    return msgspec.json.decode(value) if isinstance(value, msgspec.Raw) else value


def print_table(table: Table | Tree) -> None:
    """As wide as the terminal, but never so narrow that columns are cut; where there is none nothing is folded."""
    width = max(console.width, _NARROWEST) if console.is_terminal else _WIDE
    Console(width=width, highlight=False, markup=False, emoji=False).print(table, crop=False)


def plain_text(text: str) -> str:
    """One line of what was read from a file, without what a terminal would take for orders."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else " " for character in text)


def harmless_text(text: str) -> str:
    """Lines without what a terminal would take for orders: such characters as their numbers."""
    if all(map(str.isprintable, text.split("\n"))):
        return text
    return "".join(
        one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode("ascii") for one in text
    )


def size_text(size_bytes: int) -> str:
    """1.5 GB, in units of 1000."""
    return decimal(size_bytes)


def counted(count: int, what: str) -> str:
    """1 file, 2 files."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def age_text(seconds: float) -> str:
    """3.2 h."""
    for unit, unit_s in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= unit_s:
            return f"{seconds / unit_s:.1f} {unit}"
    return f"{seconds:.0f} s"


def shown(text: str, max_length: int = 200) -> str:
    """A text from disk on one line, without what would do things to a terminal."""
    text = plain_text(text)
    return text if len(text) <= max_length else f"{text[: max_length - 3]}..."


@dataclass(frozen=True, slots=True)
class OnProgress:
    """Called with how many bytes each step took, in any thread. expect: with the total, if it is known only later."""

    advance: Callable[[int], None]
    expect: Callable[[int], None]

    def __call__(self, step: int) -> None:
        self.advance(step)


@contextmanager
def progress_bar(
    what: str, total_bytes: int, *, is_shown: bool = True, log_interval_s: float = LOG_INTERVAL_S
) -> Iterator[OnProgress]:
    """Progress on standard error; yields what is told of it.

    A bar where that is a terminal. In a log plain lines: one at the beginning, one every so many seconds, one at the
    end. what: of which phase, such as "copy iteration 1000"; a command with several has a bar for each, one after
    another. total_bytes: 0 if it is not known. The body may take more than that, or less. is_shown: not by the ranks
    beside rank 0, who speaks for all.
    """
    if not is_shown:
        yield OnProgress(lambda _: None, lambda _: None)
        return
    terminal = Console(stderr=True, highlight=False, markup=False, emoji=False)
    if not terminal.is_terminal:
        with _progress_lines(plain_text(what), total_bytes, log_interval_s) as on_bytes:
            yield on_bytes
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=terminal, transient=True) as bar:
        task = bar.add_task(plain_text(what), total=total_bytes or None)
        yield OnProgress(
            lambda step: bar.advance(task, step), lambda total_bytes: bar.update(task, total=total_bytes or None)
        )


@contextmanager
def _progress_lines(what: str, total_bytes: int, interval_s: float) -> Iterator[OnProgress]:
    lines = _ProgressLines(what, total_bytes)
    is_over = threading.Event()

    def tell() -> None:  # In a thread: a log says also that nothing moves.
        while not is_over.wait(interval_s):
            lines.print_state()

    thread = threading.Thread(target=tell, name="distckpt-progress", daemon=True)
    thread.start()
    is_done = False
    try:
        yield OnProgress(lines.advance, lines.expect)
        is_done = True
    finally:
        is_over.set()
        thread.join()
        lines.print_end(is_done=is_done)


class _ProgressLines:
    """How far something is, as lines of a log."""

    def __init__(self, what: str, total_bytes: int) -> None:
        self._what = what
        self._total_bytes = total_bytes
        self._bytes = 0
        self._lock = threading.Lock()
        self._started = time.monotonic()
        # The last lines, (when, bytes): speed is what they show, as what was found done already went by faster.
        self._told = deque([(self._started, 0)], maxlen=_SPEED_LINES)
        self._print(size_text(total_bytes) if total_bytes else "begins")

    def advance(self, step: int) -> None:
        with self._lock:
            self._bytes += step

    def expect(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes

    def print_state(self) -> None:
        now, done = time.monotonic(), self._bytes
        since, before = self._told[0]
        speed = (done - before) / max(now - since, 1e-9)
        self._told.append((now, done))
        left = f", {_time_text((self._total_bytes - done) / speed)} left" if done < self._total_bytes and speed else ""
        self._print(f"{size_text(done)}{self._of_total()}, {size_text(round(speed))}/s{left}")

    def print_end(self, *, is_done: bool) -> None:
        seconds = time.monotonic() - self._started
        speed = size_text(round(self._bytes / max(seconds, 1e-9)))
        how = "done: " if is_done else "stopped: "
        # The total was an estimate, and who is done need not be told how far he is.
        of_total = "" if is_done else self._of_total()
        self._print(f"{how}{size_text(self._bytes)}{of_total} in {seconds:.1f} s, {speed}/s")

    def _of_total(self) -> str:
        return f" of {size_text(self._total_bytes)}" if self._total_bytes else ""

    def _print(self, text: str) -> None:
        if sys.stderr is None:
            return
        with suppress(OSError, ValueError):  # Who closed it does not want to know.
            sys.stderr.write(f"{self._what}: {text}\n")
            sys.stderr.flush()


def _time_text(seconds: float) -> str:
    """23 s, 4 min 5 s, 3 h 20 min: whole numbers, for what is not known better."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
