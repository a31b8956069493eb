"""One rank of a torchrun job: `-m benchmarks.worker REQUEST`, where REQUEST is a JSON file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from benchmarks.clock import maximum, total
from benchmarks.engines import ENGINES
from benchmarks.limits import measure_limits
from benchmarks.measuring import MEASUREMENTS
from benchmarks.request import Answer, Request
from benchmarks.state import RankState


def main(request_path: Path) -> None:
    request = msgspec.json.decode(request_path.read_bytes(), type=Request)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    answer = measure_limits(request) if request.mode == "limits" else measure(request)
    if dist.get_rank() == 0:
        # Whole or not at all: the command takes the file for the sign that everything was measured.
        unfinished = Path(f"{request.answer}.tmp")
        unfinished.write_bytes(msgspec.json.encode(answer))
        os.replace(unfinished, request.answer)
    dist.barrier()  # A rank that crashes from here on does not take the answer with it.
    dist.destroy_process_group()


def measure(request: Request) -> Answer:
    """One job of an engine. Collective; what rank 0 gets is the job's answer."""
    state = RankState(request.layout, dist.get_rank(), request.model)
    try:
        engine = ENGINES[request.engine].make(Path(request.root), state)
    except ImportError as error:
        return Answer(missing=str(error))
    answer = Answer(
        backend=engine.backend,
        state_bytes=total(state.own_bytes),
        rank_bytes=int(maximum(state.size_bytes)),
        chunks=total(state.own_chunks),
    )
    MEASUREMENTS[request.mode](engine, request, answer)
    answer.last_step = state.step
    engine.close()
    return answer


if __name__ == "__main__":
    main(Path(sys.argv[1]))
