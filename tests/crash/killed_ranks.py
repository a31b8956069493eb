"""What each rank of a job does until it, or another one, is killed: it resumes, then saves again and again.

python killed_ranks.py <root> <file> <job number>    waits for the file before it opens the root

Prints a line each: "open"; "loaded <iteration> <version>"; "begins <iteration> <version>" before a save, "saved
<iteration> <version>" when it is known to be committed; "raised <committed> <failed ranks>" when others have died.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from distckpt import Checkpointer, DistributedError, ShardedTensor
from distckpt.coordinator import Coordinator, TorchDistCoordinator
from tests.crash.states import load_whole, make_state
from tests.distributed.launch import say, wait_for_file

KEEP_LAST = 3
TIMEOUT_S = 3.0
BOUND_S = 60.0


def begin(coordinator: Coordinator, iteration: int, version: int) -> dict[str, object]:
    say("begins", iteration, version)
    return make_state(version, coordinator)


def train(state: dict[str, object]) -> None:
    """Change the tensors, as the step after an async save does."""
    weight, optimizer = state["weight"], state["optimizer"]
    assert isinstance(weight, ShardedTensor)
    assert isinstance(optimizer, dict)
    weight.data.fill_(-1.0)
    optimizer["bias"].fill_(-1)


def save_three(checkpointer: Checkpointer, coordinator: Coordinator, iteration: int, version: int) -> None:
    """One in the call, one in the background, and one that is asked for while that one is under way."""
    checkpointer.save(begin(coordinator, iteration, version), iteration=iteration)
    say("saved", iteration, version)
    pending = []
    for n in (1, 2):
        state = begin(coordinator, iteration + n, version + n)
        pending.append(checkpointer.async_save(state, iteration=iteration + n))
        train(state)
    for n, save in enumerate(pending, 1):
        save.wait(timeout_s=BOUND_S)
        say("saved", iteration + n, version + n)


def run(root: str, number: int) -> None:
    with (
        closing(TorchDistCoordinator()) as coordinator,
        Checkpointer(
            root, coordinator=coordinator, keep_last=KEEP_LAST, timeout_s=TIMEOUT_S, removal_grace_s=0
        ) as checkpointer,
    ):
        say("open")
        iteration, version = 1, 1000 * number
        if checkpointer.latest_iteration() is not None:
            report, loaded_version = load_whole(checkpointer, None, coordinator)
            say("loaded", report.iteration, loaded_version)
            iteration = report.iteration + 1
        deadline = time.monotonic() + BOUND_S
        while time.monotonic() < deadline:
            save_three(checkpointer, coordinator, iteration, version)
            iteration, version = iteration + 3, version + 3
    raise TimeoutError("nobody was killed")


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=BOUND_S))
    wait_for_file(Path(sys.argv[2]))
    try:
        run(sys.argv[1], int(sys.argv[3]))
    except DistributedError as error:
        say("raised", error.committed, *sorted(error.failures))
    os._exit(0)  # gloo's own shutdown may wait for ranks that were killed
