"""What the ranks of one of two jobs do that write to the same root at once: once for every contest.

python two_jobs.py <directory> <job> <contests>    job: 1 or 2

In contest n the job waits for the file <n>-go-<job>, then saves iterations 1, 2, ... below <n>-root, until it fails or
there is a file <n>-stop. Prints "<n> saved <iteration> <version> <save_id>" after each, and in the end "<n> stopped" or
"<n> lost <error> / <error of another try>".
"""

from __future__ import annotations

import os
import sys
from contextlib import closing
from datetime import timedelta
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist

from distckpt import Checkpointer, CheckpointError
from distckpt.coordinator import Coordinator, TorchDistCoordinator
from tests.crash.states import make_state
from tests.distributed.launch import say, wait_for_file

BOUND_S = 60.0


def save(checkpointer: Checkpointer, coordinator: Coordinator, iteration: int, version: int) -> str:
    """By turns in the call and in the background; its save_id."""
    state = make_state(version, coordinator)
    if iteration % 2:
        return checkpointer.save(state, iteration=iteration).save_id
    return checkpointer.async_save(state, iteration=iteration).wait(timeout_s=BOUND_S).save_id


def is_to_stop(path: Path) -> bool:
    """The same answer on all ranks."""
    answer = torch.tensor([path.exists()])
    dist.broadcast(answer, 0)
    return bool(answer)


def compete(directory: Path, job: int, contest: int) -> None:
    wait_for_file(directory / f"{contest}-go-{job}")
    with (
        closing(TorchDistCoordinator()) as coordinator,
        Checkpointer(directory / f"{contest}-root", coordinator=coordinator, timeout_s=BOUND_S / 2) as checkpointer,
    ):
        for iteration in count(1):
            if is_to_stop(directory / f"{contest}-stop"):
                say(contest, "stopped")
                return
            version = 1000 * job + iteration
            try:
                save_id = save(checkpointer, coordinator, iteration, version)
            except CheckpointError as error:
                first = error
                break
            say(contest, "saved", iteration, version, save_id)
        try:
            save(checkpointer, coordinator, iteration, version)
        except CheckpointError as error:
            say(contest, "lost", type(first).__name__, "/", type(error).__name__)


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=BOUND_S))
    for contest in range(int(sys.argv[3])):
        compete(Path(sys.argv[1]), int(sys.argv[2]), contest)
    os._exit(0)
