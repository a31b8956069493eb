"""Checkpointer among real processes; the checks themselves are in save_load_ranks.py."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from distckpt import Checkpointer, ShardedTensor
from tests.distributed.checks import assert_ok, names_of_checks, outcomes_of
from tests.distributed.launch import MPIRUN, launch, start

SCRIPT = Path(__file__).with_name("save_load_ranks.py")
CHECKS = names_of_checks(SCRIPT)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """All checks run in one job: starting processes takes longer than the checks."""
    root = tmp_path_factory.mktemp("save_load")
    results = launch(SCRIPT, 3, args=[str(root)], timeout_s=150)
    return root, [outcomes_of(result.stdout) for result in results]


@pytest.mark.parametrize("name", CHECKS)
def test_three_processes(name: str, job: tuple[Path, list[dict[str, str]]]) -> None:
    assert_ok(name, job[1])


def test_one_process_loads_what_three_saved(job: tuple[Path, list[dict[str, str]]]) -> None:
    whole = torch.arange(60, dtype=torch.float32).reshape(12, 5) + 5000
    with Checkpointer(job[0] / "async") as checkpointer:
        state: Any = checkpointer.read()
    assert torch.equal(state["model"]["split"], whole)
    assert torch.equal(state["model"]["shared"], torch.full((7,), 5.0))
    assert state["number"] == 5


KILLED = """
import os, sys, time
from pathlib import Path
import torch.distributed as dist
from distckpt import Checkpointer, DistributedError
from tests.distributed.save_load_ranks import AlteredStorage, make_state

dist.init_process_group("gloo")
rank, root, victim = dist.get_rank(), Path(sys.argv[1]), int(sys.argv[2])

class HangingStorage(AlteredStorage):
    def create(self, name, *, size_hint=0):
        if rank == victim and "iter_0000002/shard-" in name:
            print("writing")
            time.sleep(60)
        return self._inner.create(name, size_hint=size_hint)

checkpointer = Checkpointer(HangingStorage(root, lambda name, content: None), timeout_s=3)
checkpointer.save(make_state(1), iteration=1)
started = time.monotonic()
pending = checkpointer.async_save(make_state(2), iteration=2)
try:
    pending.wait(timeout_s=40)
except DistributedError as error:
    print("raised", sorted(error.failures), error.committed)
os._exit(0)  # gloo's own shutdown may wait for ranks that were killed
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_rank_killed_during_an_async_save_is_named_and_the_previous_checkpoint_loads(
    victim: int, tmp_path: Path
) -> None:
    with start(KILLED, 3, args=[str(tmp_path / "root"), str(victim)]) as job:
        job.wait_for(victim, "writing")
        job.signal(victim, signal.SIGKILL)
        expected = [-signal.SIGKILL if rank == victim else 0 for rank in range(3)]
        results = job.wait(expect_exit=expected, timeout_s=40)
    for rank in {0, 1, 2} - {victim}:
        # Ranks that are not told by rank 0 cannot know what it did before it died.
        committed = "no" if victim else "unknown"
        assert f"raised [{victim}] {committed}" in results[rank].stdout, results
    whole = torch.arange(60, dtype=torch.float32).reshape(12, 5) + 1000
    with Checkpointer(tmp_path / "root") as checkpointer:
        assert checkpointer.iterations() == [1]
        target = ShardedTensor("split", torch.zeros(12, 5), global_shape=(12, 5), global_offset=(0, 0))
        report = checkpointer.load({"model": {"split": target, "shared": torch.zeros(7)}})
    assert report.iteration == 1
    assert torch.equal(target.data, whole)


JOB = """
import sys
import torch.distributed as dist
from distckpt import Checkpointer
from tests.unit.megatron_states import Layout, rank_state

dist.init_process_group("gloo")
rank = dist.get_rank()
before, after = Layout(tp=2, pp=2), Layout(pp=1, tp=1, dp=4, ep=2)
saved = rank_state(before, rank).fill()
with Checkpointer(sys.argv[1], mesh=before.place(rank).mesh, timeout_s=20) as checkpointer:
    checkpointer.save(saved.state, iteration=7)
shapes = [None] * 4
dist.all_gather_object(shapes, {part.key: part.global_shape for part in saved.parts})
found = rank_state(after, rank)
with Checkpointer(sys.argv[1], mesh=after.place(rank).mesh, timeout_s=20) as checkpointer:
    checkpointer.load(found.state)
found.check({key: shape for each in shapes for key, shape in each.items()})
print(len(found.parts), "parts are right")
dist.destroy_process_group()
"""


def test_four_processes_turn_tensor_and_pipeline_into_data_and_expert_parallelism(tmp_path: Path) -> None:
    for result in launch(JOB, 4, args=[str(tmp_path)]):
        count, _, rest = result.stdout.partition(" ")
        assert rest == "parts are right\n"
        assert int(count) > 90


MPI = """
import sys
import torch
from distckpt import Checkpointer, ShardedTensor
from mpi4py import MPI

rank = MPI.COMM_WORLD.rank

def state(value, cut):
    shape = (2, 6) if cut == 0 else (4, 3)
    data = torch.arange(24.0).reshape(4, 6).chunk(2, cut)[rank].clone() if value else torch.zeros(shape)
    return {"w": ShardedTensor.from_rank_offsets("w", data, (cut, rank, 2)), "lr": 0.1 if value else None}

with Checkpointer(sys.argv[1]) as checkpointer:
    print(type(checkpointer._coordinator).__name__)
    checkpointer.save(state(True, 0), iteration=1)
    pending = checkpointer.async_save(state(True, 0), iteration=2)
    MPI.COMM_WORLD.allreduce(1)
    pending.wait()
    found = state(False, 1)
    report = checkpointer.load(found)
assert torch.equal(found["w"].data, state(True, 1)["w"].data)
assert found["lr"] == 0.1
print("loaded", report.iteration)
"""


@pytest.mark.skipif(not MPIRUN.exists(), reason="needs mpi4py and mpirun")
def test_two_processes_under_mpirun_save_and_load(tmp_path: Path) -> None:
    for result in launch(MPI, 2, args=[str(tmp_path)], launcher="mpirun"):
        assert result.stdout == "MpiCoordinator\nloaded 2\n"
