"""Async saves while nothing else runs."""

from __future__ import annotations

import time

import torch.distributed as dist

from benchmarks.clock import maximum, slowest
from benchmarks.engines.port import Engine
from benchmarks.measuring import steps
from benchmarks.request import Answer, Request


def measure_async(engine: Engine, request: Request, answer: Answer) -> None:
    """prepare, where there is one; stall_first, stall: inside the call; durable: from its start, steady state only.

    At the end a save whose state changes as soon as the call has returned is loaded and compared.
    """
    prepare_s = slowest(engine.prepare)
    if engine.has_prepare:
        answer.add("prepare", prepare_s)
    for repeat in range(request.repeats + 1):
        step = steps.next_step(engine)
        dist.barrier()
        start = time.perf_counter()
        engine.async_save(step)
        stall_s = time.perf_counter() - start
        engine.wait()
        steps.make_durable(engine, step)
        durable_s = time.perf_counter() - start
        answer.add("stall" if repeat else "stall_first", maximum(stall_s))
        if repeat:
            answer.add("durable", maximum(durable_s))
        steps.remove_others(engine, step)
    step = steps.next_step(engine)
    engine.async_save(step)
    engine.state.advance()
    engine.wait()
    steps.make_durable(engine, step)
    steps.load(engine, step)
