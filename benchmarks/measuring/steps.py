"""The steps that measurements are made of: durable, cold, warm, removed, loaded and compared. All are collective."""

from __future__ import annotations

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


def next_step(engine: Engine) -> int:
    """Change the state; the step that it is now at."""
    engine.state.advance()
    return engine.state.step


def make_durable(engine: Engine, step: int) -> None:
    """What a peer leaves undone. The ranks share the files, as they share the writing of them."""
    if engine.is_durable:
        return
    dist.barrier()
    directory = engine.path(step)
    sync_files(files_below(directory)[dist.get_rank() :: dist.get_world_size()])
    dist.barrier()
    if dist.get_rank() == 0:
        sync_directories(directory)


def save(engine: Engine, step: int) -> None:
    """Until it is durable."""
    engine.save(step)
    make_durable(engine, step)


def remove_others(engine: Engine, step: int) -> None:
    """All checkpoints but this one, so that the disk holds two at most."""
    dist.barrier()
    if dist.get_rank() == 0:
        for path in engine.root.iterdir():
            if path.is_dir() and path != engine.path(step):
                remove(path)
    dist.barrier()


def chill(engine: Engine, step: int) -> float:
    """Drop a checkpoint from the page cache; the fraction of it that stayed there."""
    fraction = 0.0
    dist.barrier()
    if dist.get_rank() == 0:
        files = files_below(engine.path(step))
        drop_from_page_cache(files)
        fraction = cached_fraction(files)
    return maximum(fraction)


def warm(engine: Engine, step: int) -> None:
    if dist.get_rank() == 0:
        read_into_page_cache(files_below(engine.path(step)))
    dist.barrier()


def load(engine: Engine, step: int) -> float:
    """Seconds of a load into a state that was overwritten before. Raises ValueError unless every value is right."""
    engine.state.poison()
    seconds = slowest(lambda: engine.load(step))
    engine.state.check(step)
    return seconds
