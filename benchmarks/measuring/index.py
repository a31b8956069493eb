"""What it takes to know where everything lies."""

from __future__ import annotations

import time

import torch.distributed as dist

from benchmarks.clock import total
from benchmarks.engines.port import Engine
from benchmarks.measuring import steps
from benchmarks.request import Answer, Request


def measure_index(engine: Engine, request: Request, answer: Answer) -> None:
    """index_bytes: over the pieces of the state, which is the same number for every engine. index_open: on rank 0."""
    step = steps.next_step(engine)
    steps.save(engine, step)
    chunks = total(engine.state.own_chunks)
    if dist.get_rank() == 0:
        answer.add("index_bytes", sum(path.stat().st_size for path in engine.index_files(step)) / chunks)
        for _ in range(request.repeats):
            start = time.perf_counter()
            engine.open_index(step)
            answer.add("index_open", time.perf_counter() - start)
    dist.barrier()
