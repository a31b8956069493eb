"""Sync saves, and loads, cold and warm."""

from __future__ import annotations

from functools import partial

from benchmarks.clock import slowest
from benchmarks.engines.port import Engine
from benchmarks.measuring import steps
from benchmarks.request import Answer, Request


def measure_sync(engine: Engine, request: Request, answer: Answer) -> None:
    """save_first, save: until durable. load_cold, load_warm: into the state, whose values are compared after it.

    Many small tensors take the same time warm as cold, and some engines minutes: they are loaded cold only.
    """
    for repeat in range(request.repeats + 1):
        step = steps.next_step(engine)
        seconds = slowest(partial(steps.save, engine, step))
        answer.add("save" if repeat else "save_first", seconds)
        steps.remove_others(engine, step)
    for _ in range(request.repeats):
        answer.cached_before_cold_load = max(answer.cached_before_cold_load, steps.chill(engine, step))
        answer.add("load_cold", steps.load(engine, step))
    if request.model.content == "small":
        return
    steps.warm(engine, step)
    for _ in range(request.repeats):
        answer.add("load_warm", steps.load(engine, step))
