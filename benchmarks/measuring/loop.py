"""What a training loop feels of an async save: loops that compute on every core, with and without one, in turn."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from benchmarks.clock import maximum, slowest
from benchmarks.engines.port import Engine
from benchmarks.measuring import steps
from benchmarks.request import Answer, Request

STEPS = 20
SAVE_BEFORE_STEP = 3
COMPUTE_S = 0.1  # of a step, beside what the optimizer takes to change the state
MATRIX = 512


class Work:
    """Matrix products on one thread, as many as take COMPUTE_S while all ranks make them. Collective."""

    def __init__(self) -> None:
        self._left, self._right = torch.rand(MATRIX, MATRIX), torch.rand(MATRIX, MATRIX)
        self._product = torch.empty(MATRIX, MATRIX)
        self._gradient = torch.zeros(1024)
        self._count = 10
        slowest(self._multiply)  # The first call loads what the others use.
        seconds = min(slowest(self._multiply) for _ in range(3))
        self._count = max(1, math.ceil(COMPUTE_S / seconds * self._count))

    def compute(self) -> None:
        """Forward and backward, and the ranks' meeting over the gradients: nobody runs ahead of a rank that stands."""
        self._multiply()
        dist.all_reduce(self._gradient)

    def _multiply(self) -> None:
        for _ in range(self._count):
            torch.mm(self._left, self._right, out=self._product)


@dataclass(slots=True)
class Times:
    """Seconds of one loop, on this rank. drain_s: from the end of the call to the end of the save or of the loop."""

    saved_step: int = 0
    total_s: float = 0.0
    call_s: float = 0.0
    waits_s: float = 0.0
    drain_s: float = 0.0
    has_ended: bool = True


def measure_loop(engine: Engine, request: Request, answer: Answer) -> None:
    """All figures of kind "loop". The last save is loaded and compared: it must hold its own step and no later one."""
    work = Work()
    engine.prepare()
    _run(engine, work, is_saving=True)  # The first save is reported by kind "async".
    for _ in range(request.repeats):
        without_s = maximum(_run(engine, work, is_saving=False).total_s)
        times = _run(engine, work, is_saving=True)
        _report(answer, times, without_s)
    steps.load(engine, times.saved_step)


def _report(answer: Answer, times: Times, without_s: float) -> None:
    extra_s = maximum(times.total_s) - without_s
    call_s, waits_s, drain_s = maximum(times.call_s), maximum(times.waits_s), maximum(times.drain_s)
    answer.add("loop_step", without_s / STEPS)
    answer.add("loop_stall", extra_s)
    answer.add("loop_call", call_s)
    answer.add("loop_waits", waits_s)
    answer.add("loop_drain", drain_s)
    answer.add("loop_slowdown", 100 * (extra_s - call_s - waits_s) / max(drain_s, without_s / STEPS))
    note = "a save was still draining when its loop ended; what it would have cost later is not in the figures"
    if maximum(float(not times.has_ended)) and note not in answer.notes:
        answer.notes.append(note)


def _run(engine: Engine, work: Work, *, is_saving: bool) -> Times:
    """One loop of STEPS steps; the save, if any, is waited for after it, made durable, and the one before removed."""
    state, optimizer, times = engine.state, engine.state.optimizer, Times()
    call_end = 0.0
    dist.barrier()
    start = time.perf_counter()
    for number in range(STEPS):
        if is_saving and number == SAVE_BEFORE_STEP:
            times.saved_step, before = state.step, time.perf_counter()
            engine.async_save(times.saved_step)
            call_end = time.perf_counter()
            times.call_s, times.has_ended = call_end - before, False
        work.compute()
        before = time.perf_counter()
        state.advance()
        times.waits_s += time.perf_counter() - before - optimizer.change_s
        if not times.has_ended:
            before = time.perf_counter()
            times.has_ended = engine.poll()
            times.waits_s += time.perf_counter() - before
            times.drain_s = time.perf_counter() - call_end
    times.total_s = time.perf_counter() - start
    if is_saving:
        engine.wait()
        steps.make_durable(engine, times.saved_step)
        steps.remove_others(engine, times.saved_step)
    return times
