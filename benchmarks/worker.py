"""One rank of a torchrun job: `-m benchmarks.worker REQUEST`, where REQUEST is a JSON file."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from benchmarks.engines import ENGINES
from benchmarks.limits import measure_limits
from benchmarks.measure import measure_async, measure_sync
from benchmarks.request import Answer, Request
from benchmarks.state import Layout, RankState


def main(request_path: Path) -> None:
    request = msgspec.json.decode(request_path.read_bytes(), type=Request)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    state = RankState(Layout(request.tp, request.pp), dist.get_rank(), request.size_bytes)
    answer = _measure(request, state)
    answer.state_bytes = _sum(state.size_bytes)
    if dist.get_rank() == 0:
        Path(request.answer).write_bytes(msgspec.json.encode(answer))
    dist.barrier()  # A rank that crashes from here on does not take the answer with it.
    dist.destroy_process_group()


def _measure(request: Request, state: RankState) -> Answer:
    root = Path(request.root)
    if request.mode == "limits":
        return measure_limits(root, state.rank, state.size_bytes, request.repeats)
    try:
        engine = ENGINES[request.engine].make(root, state)
    except ImportError as error:
        return Answer(missing=str(error))
    measure = measure_sync if request.mode == "sync" else measure_async
    answer = measure(engine, request.repeats)
    engine.close()
    return answer


def _sum(value: int) -> int:
    tensor = torch.tensor(value)
    dist.all_reduce(tensor)
    return int(tensor)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
