"""SIGTERM to one process of a job: all of them save the same iteration, and leave."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from distckpt import Checkpointer
from tests.distributed.launch import start

TRAIN = """
import sys, time
import torch
import torch.distributed as dist
from distckpt import Checkpointer, Termination

dist.init_process_group("gloo")
with Checkpointer(sys.argv[1], timeout_s=30) as checkpointer, Termination(grace_s=60, timeout_s=30) as termination:
    for iteration in range(1, 100_000):
        time.sleep(0.01)
        print(f"iteration {iteration}")
        if iteration % 5 == 0:
            checkpointer.async_save({"iteration": iteration, "w": torch.full((9,), iteration)}, iteration=iteration)
        if termination.is_agreed():
            checkpointer.save({"iteration": iteration, "w": torch.full((9,), iteration)}, iteration=iteration)
            print(f"left at {iteration}")
            break
"""


@pytest.mark.parametrize("told", [0, 2])
def test_all_ranks_save_the_same_iteration_and_leave(tmp_path: Path, told: int) -> None:
    with start(TRAIN, 3, args=[str(tmp_path)]) as job:
        job.wait_for(told, "iteration 12\n")
        job.signal(told, signal.SIGTERM)
        results = job.wait(timeout_s=60)
    (last,) = {line for result in results for line in result.stdout.splitlines() if line.startswith("left")}
    with Checkpointer(tmp_path) as checkpointer:
        state = checkpointer.read()
    assert f"left at {state['iteration']}" == last
