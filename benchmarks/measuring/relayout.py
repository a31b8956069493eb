"""A checkpoint that is saved by one job and loaded by another with another world size."""

from __future__ import annotations

from pathlib import Path

from benchmarks.clock import total
from benchmarks.engines.port import Engine
from benchmarks.measuring import steps
from benchmarks.request import Answer, Request


def store(engine: Engine, request: Request, answer: Answer) -> None:
    """Save once, for the job that follows."""
    steps.save(engine, steps.next_step(engine))


def measure_reload(engine: Engine, request: Request, answer: Answer) -> None:
    """load: cold, compared. read: bytes that all ranks caused to be read from the disk, over those of the state,
    each counted once, however many ranks need it."""
    for _ in range(request.repeats):
        answer.cached_before_cold_load = max(answer.cached_before_cold_load, steps.chill(engine, request.stored_step))
        before = _bytes_read()
        seconds = steps.load(engine, request.stored_step)
        read = total(_bytes_read() - before)
        answer.add(f"{request.label}_load", seconds)
        answer.add(f"{request.label}_read", read / total(engine.state.own_bytes))


def _bytes_read() -> int:
    """What this process caused the block layer to read: page cache misses and direct reads, and no cached bytes."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])
