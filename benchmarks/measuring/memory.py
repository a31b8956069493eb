"""Peak extra memory of saves and of loads, each in a process that has done nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from benchmarks.clock import maximum
from benchmarks.engines.port import Engine
from benchmarks.measuring import steps
from benchmarks.peak_memory import PeakMemory
from benchmarks.request import Answer, Request

MOST_REPEATS = 3  # Memory hardly varies; the second save is the first that finds what the first one kept.


def measure_peak_save(engine: Engine, request: Request, answer: Answer) -> None:
    def save() -> None:
        step = steps.next_step(engine)
        steps.save(engine, step)
        steps.remove_others(engine, step)

    _measure(save, "peak_save", request, answer)


def measure_peak_async(engine: Engine, request: Request, answer: Answer) -> None:
    """The state changes while the save is under way, as it does in training."""

    def save() -> None:
        step = steps.next_step(engine)
        engine.async_save(step)
        engine.state.advance()
        engine.wait()
        steps.make_durable(engine, step)
        steps.remove_others(engine, step)

    _measure(save, "peak_async", request, answer)


def measure_peak_load(engine: Engine, request: Request, answer: Answer) -> None:
    _measure(lambda: engine.load(request.stored_step), "peak_load", request, answer)
    engine.state.check(request.stored_step)


def _measure(action: Callable[[], None], figure: str, request: Request, answer: Answer) -> None:
    """Each peak counts from what the process had before the first action: memory that is kept for the next counts."""
    with PeakMemory() as memory:
        for _ in range(min(request.repeats, MOST_REPEATS)):
            dist.barrier()
            memory.forget_peak()
            action()
            answer.add(figure, maximum(memory.peak_bytes()))
