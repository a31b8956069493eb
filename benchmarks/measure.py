"""Measures one engine in one torchrun job. Collective; decides what is inside a figure and what is outside."""

from __future__ import annotations

import time

import torch.distributed as dist

from benchmarks.clock import maximum, slowest
from benchmarks.engines.port import Engine
from benchmarks.files import (
    cached_fraction,
    drop_from_page_cache,
    files_below,
    read_into_page_cache,
    remove,
    sync_directories,
    sync_files,
)
from benchmarks.request import Answer


def measure_sync(engine: Engine, repeats: int) -> Answer:
    """save_first, save: until durable. load_cold, load_warm: into the state, whose values are compared after it."""
    answer = _answer_of(engine)
    for repeat in range(repeats + 1):
        step = _next_step(engine)

        def save(step: int = step) -> None:
            engine.save(step)
            _make_durable(engine, step)

        answer.add("save" if repeat else "save_first", slowest(save))
        _remove_before(engine, step)
    for _ in range(repeats):
        answer.cached_before_cold_load = max(answer.cached_before_cold_load, _chill(engine))
        answer.add("load_cold", _load(engine))
    _warm(engine)
    for _ in range(repeats):
        answer.add("load_warm", _load(engine))
    return answer


def measure_async(engine: Engine, repeats: int) -> Answer:
    """prepare; stall_first, stall: inside the call; durable_first, durable: from its start until durable.

    At the end a save whose state changes as soon as the call has returned is loaded and compared.
    """
    answer = _answer_of(engine)
    answer.add("prepare", slowest(engine.prepare))
    for repeat in range(repeats + 1):
        step = _next_step(engine)
        dist.barrier()
        start = time.perf_counter()
        engine.async_save(step)
        stall_s = time.perf_counter() - start
        engine.wait()
        _make_durable(engine, step)
        durable_s = time.perf_counter() - start
        answer.add("stall" if repeat else "stall_first", maximum(stall_s))
        answer.add("durable" if repeat else "durable_first", maximum(durable_s))
        _remove_before(engine, step)
    step = _next_step(engine)
    engine.async_save(step)
    engine.state.advance()
    engine.wait()
    _make_durable(engine, step)
    _load_and_check(engine, step)
    return answer


def _answer_of(engine: Engine) -> Answer:
    return Answer(backend=engine.backend)


def _next_step(engine: Engine) -> int:
    engine.state.advance()
    return engine.state.step


def _make_durable(engine: Engine, step: int) -> None:
    """What a peer leaves undone. The ranks share the files, as they share the writing of them."""
    if engine.is_durable:
        return
    dist.barrier()
    directory = engine.path(step)
    sync_files(files_below(directory)[dist.get_rank() :: dist.get_world_size()])
    dist.barrier()
    if dist.get_rank() == 0:
        sync_directories(directory)


def _remove_before(engine: Engine, step: int) -> None:
    """The save before this one, so that the disk holds two at most."""
    dist.barrier()
    earlier = engine.path(step - 1)
    if dist.get_rank() == 0 and earlier.exists():
        remove(earlier)
    dist.barrier()


def _chill(engine: Engine) -> float:
    """Drop the newest checkpoint from the page cache; the fraction of it that stayed there."""
    fraction = 0.0
    dist.barrier()
    if dist.get_rank() == 0:
        files = files_below(engine.path(engine.state.step))
        drop_from_page_cache(files)
        fraction = cached_fraction(files)
    return maximum(fraction)


def _warm(engine: Engine) -> None:
    if dist.get_rank() == 0:
        read_into_page_cache(files_below(engine.path(engine.state.step)))
    dist.barrier()


def _load(engine: Engine) -> float:
    step = engine.state.step
    engine.state.poison()
    seconds = slowest(lambda: engine.load(step))
    engine.state.check(step)
    return seconds


def _load_and_check(engine: Engine, step: int) -> None:
    dist.barrier()
    engine.state.poison()
    engine.load(step)
    engine.state.check(step)
