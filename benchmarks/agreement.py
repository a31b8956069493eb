"""`python -m benchmarks.agreement`: what one agreement of the ranks costs, from the last arrival to the last return."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.machine import commit, describe_machine, versions

if TYPE_CHECKING:
    from distckpt.coordinator import TorchDistCoordinator

LATE_S = 0.1  # how much later than the others the last rank comes, where one comes late
PAYLOADS_BYTES = (100, 100_000)  # of every rank's report
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Figure:
    payload_bytes: int
    late_s: float
    median_ms: float
    fastest_ms: float
    slowest_ms: float


def main(
    ranks: Annotated[int, typer.Option(min=2, help="Processes.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Of each figure.")] = 50,
) -> None:
    """Ranks are processes of this host, in a gloo job; prints JSON."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    processes = [context.Process(target=_run, args=(rank, ranks, port, repeats, answers)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise typer.Exit(1)
    record = {"ranks": ranks, "repeats": repeats, "commit": commit()}
    record |= {"machine": describe_machine(), "versions": versions()}
    print(json.dumps(record | {"figures": [asdict(figure) for figure in answers.get()]}, indent=1))


def _run(rank: int, ranks: int, port: int, repeats: int, answers: multiprocessing.SimpleQueue[list[Figure]]) -> None:
    import torch.distributed as dist

    from distckpt.coordinator import TorchDistCoordinator

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    dist.init_process_group("gloo")
    coordinator = TorchDistCoordinator()
    figures = []
    for payload_bytes in PAYLOADS_BYTES:
        for late_s in (0.0, LATE_S):
            own = [_agree_once(coordinator, payload_bytes, late_s) for _ in range(1 + repeats)][1:]
            figures.append(_figure(payload_bytes, late_s, own))
    if rank == 0:
        answers.put(figures)
    coordinator.close()
    dist.barrier()
    dist.destroy_process_group()


def _agree_once(coordinator: TorchDistCoordinator, payload_bytes: int, late_s: float) -> tuple[float, float]:
    """When this rank came and when it left, by the clock that all processes of a host share."""
    import torch.distributed as dist

    from distckpt.coordinator import agree

    report = bytes(payload_bytes)
    dist.barrier()
    if coordinator.rank == coordinator.world_size - 1:
        time.sleep(late_s)
    came = time.monotonic()
    agree(
        coordinator,
        "benchmark",
        lambda: report,
        lambda reports: list(range(len(reports))),  # another decision for every rank
        message=bytes,
        decision=int,
        timeout_s=TIMEOUT_S,
    )
    return came, time.monotonic()


def _figure(payload_bytes: int, late_s: float, own: list[tuple[float, float]]) -> Figure:
    import torch.distributed as dist

    ranks: list[list[tuple[float, float]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks, own)
    took_ms = [
        1e3 * (max(left for _, left in times) - max(came for came, _ in times)) for times in zip(*ranks, strict=True)
    ]
    median, fastest, slowest = (round(of(took_ms), 3) for of in (statistics.median, min, max))
    return Figure(payload_bytes, late_s, median, fastest, slowest)


if __name__ == "__main__":
    typer.run(main)
