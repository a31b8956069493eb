"""The coordinators among real processes that are killed, stopped and woken."""

from __future__ import annotations

import json
import re
import signal
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from distckpt.coordinator import contract
from distckpt.coordinator.port import Coordinator
from distckpt.testing import CoordinatorContract
from tests.distributed.launch import MPIRUN, Launcher, Result, launch, start

needs_mpi = pytest.mark.skipif(not MPIRUN.exists(), reason="needs mpi4py and mpirun")

# Every script starts with a coordinator, made anew by `make()`, and `attempt`: agree() that prints how it ended.
GLOO = """
import torch.distributed as dist
from distckpt.coordinator import TorchDistCoordinator as make
dist.init_process_group("gloo")
"""
MPI = """
from distckpt.coordinator import MpiCoordinator as make
"""
COMMON = """
import json, os, sys, threading, time
from distckpt.coordinator import agree
from distckpt.errors import DistributedError

def say(*what):
    # In one write: threads must not mix their lines.
    sys.stdout.write(" ".join(map(str, what)) + "\\n")

def attempt(coordinator, phase="p", local=lambda: b"m", timeout_s=20):
    started = time.monotonic()
    try:
        result = agree(coordinator, phase, local, lambda m: [len(m)] * len(m), message=bytes, decision=int,
                       timeout_s=timeout_s, committed_if_lost="unknown")
        say(phase, "returned", result)
    except DistributedError as error:
        took_s = round(time.monotonic() - started, 2)
        say(phase, "raised", json.dumps([sorted(error.failures), error.committed, took_s, str(error)]))

coordinator = make()
rank = coordinator.rank
"""
END_GLOO = """
os._exit(0)  # gloo's own shutdown may wait for ranks that were killed
"""

CONTRACT = """
import traceback
from distckpt.coordinator import contract, default_coordinator
coordinator.close()
for name in json.loads(sys.argv[1]):
    coordinator, outcome = default_coordinator(), "ok"
    assert type(coordinator) is make
    try:
        getattr(contract, name)(coordinator)
    except BaseException:
        outcome = traceback.format_exc()
    print(json.dumps([name, outcome]))
    coordinator.close()
"""


def dedented(script: str) -> str:
    return textwrap.dedent(script)


def raised(result: Result, phase: str = "p") -> tuple[list[int], str, float, str]:
    """failures, committed, seconds and message of the error that `attempt` printed."""
    found = re.search(rf"^{phase} raised (.*)$", result.stdout, re.MULTILINE)
    assert found, result
    failures, committed, took_s, text = json.loads(found[1])
    return failures, committed, took_s, text


class ProcessContract(CoordinatorContract):
    """All checks run in one job: starting processes takes longer than the checks."""

    world_size = 3
    launcher: ClassVar[Launcher]
    preamble: ClassVar[str]
    outcomes: ClassVar[list[dict[str, str]] | None]

    def run(self, check: Callable[[Coordinator], None]) -> None:
        cls = type(self)
        if cls.outcomes is None:
            cls.outcomes = []
            names = json.dumps([name for name in vars(contract) if name.startswith("check_")])
            script = cls.preamble + COMMON + CONTRACT
            for result in launch(script, cls.world_size, args=[names], launcher=cls.launcher):
                cls.outcomes.append(dict(json.loads(line) for line in result.stdout.splitlines()))
        assert [outcome[check.__name__] for outcome in cls.outcomes] == ["ok"] * cls.world_size


class TestTorchDistContract(ProcessContract):
    launcher = "torchrun-env"
    preamble = GLOO
    outcomes = None


@needs_mpi
class TestMpiContract(ProcessContract):
    launcher = "mpirun"
    preamble = MPI
    outcomes = None


def test_torch_runs_beside_the_trainings_collectives_and_other_coordinators() -> None:
    """The main thread reduces while two coordinators, and one of some ranks, agree in background threads."""
    script = """
    import torch
    second, pair = make(), make([2, 0]) if rank in (0, 2) else None
    assert pair is None or (pair.rank, pair.world_size) == ({2: 0, 0: 1}[rank], 2)
    try:
        make([(rank + 1) % 3])
    except ValueError as error:
        say(error)
    done = threading.Event()
    def background():
        for number in range(60):
            attempt(coordinator, f"a{number}")
            attempt(second, f"b{number}", lambda: b"x" * 100_000)
            if pair:
                attempt(pair, f"c{number}")
        say("background done")
        done.set()
    thread = threading.Thread(target=background)
    thread.start()
    rounds, over = 0, False
    while not over:
        total = torch.tensor([1, int(done.is_set())])
        dist.all_reduce(total)
        assert total[0] == 3
        rounds, over = rounds + 1, total[1] == 3
    thread.join()
    say("reduced", rounds)
    for one in (coordinator, second, pair):
        if one:
            one.close()
    dist.destroy_process_group()
    """
    results = launch(GLOO + COMMON + dedented(script), 3)
    for result in results:
        for number in range(60):
            assert f"a{number} returned 3\n" in result.stdout
            assert f"b{number} returned 3\n" in result.stdout
            assert (f"c{number} returned 2\n" in result.stdout) == (result.rank in (0, 2))
        assert f"rank {result.rank} makes a coordinator of ranks [{(result.rank + 1) % 3}]" in result.stdout
        assert int(result.stdout.rpartition("reduced ")[2]) > 5


def test_torch_store_keeps_no_keys_of_past_rounds() -> None:
    script = """
    from distckpt.coordinator import torch_dist
    def rounds(count):
        for number in range(count):
            fails = number % 10 == 3 and rank == 1
            attempt(coordinator, f"p{number}", lambda: 1 / 0 if fails else b"x" * (5 << 20 if number == 5 else 9))
    rounds(20)
    before = coordinator._store.num_keys()
    rounds(400)
    say("keys", before, coordinator._store.num_keys())
    attempt(coordinator, "end")  # nobody counts keys while another is a round ahead
    """
    for result in launch(GLOO + COMMON + dedented(script), 2):
        assert result.stdout.count("returned 2") == 420 - 42 + 1
        before, after = map(int, re.findall(r"keys (\d+) (\d+)", result.stdout)[0])
        assert before < 20
        assert abs(after - before) <= 4  # the others may be a call ahead


def test_torch_store_keeps_no_payloads_that_are_for_one_rank() -> None:
    """Small and in several pieces, taken and missed."""
    script = """
    from distckpt.coordinator import RankFailure
    def round(number, size, missed=False):
        coordinator.gather("g", bytes(size), timeout_s=20)
        if missed and rank:
            try:
                coordinator.scatter("s", None, timeout_s=0.1)
                say("took what was to be missed")
            except RankFailure:
                pass
        elif missed:
            time.sleep(1.5)
        if rank == 0 or not missed:
            payloads = [bytes([one]) * (size + one) for one in range(3)] if rank == 0 else None
            assert coordinator.scatter("s", payloads, timeout_s=20) == bytes([rank]) * (size + rank)
    def keys():
        for number in range(2):  # what is over is deleted in the next round
            round(number, 1)
        coordinator.gather("g", b"", timeout_s=20)
        if rank == 0:
            deadline = time.monotonic() + 20
            while coordinator._store.num_keys() > 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            say("keys", coordinator._store.num_keys())  # what counted the ranks, and what two handed over just now
        coordinator.scatter("s", [b""] * 3 if rank == 0 else None, timeout_s=20)
    keys()
    for number in range(20):
        round(number, 5 << 20 if number == 5 else 9, number in (7, 8))
        if number == 7:
            round(number, 9 << 20, True)
    keys()
    coordinator.close()
    """
    results = launch(GLOO + COMMON + dedented(script), 3)
    assert "took" not in "".join(result.stdout for result in results)
    assert re.findall(r"keys (\d+)", results[0].stdout) == ["3", "3"]


def test_torch_rank_that_raises_and_rank_that_is_killed() -> None:
    script = """
    attempt(coordinator, "raise", (lambda: 1 / 0) if rank == 1 else lambda: b"m")
    attempt(coordinator, "again")
    say("ready")
    if rank == 1:
        time.sleep(60)
    attempt(coordinator, "killed", timeout_s=2)
    coordinator.close()
    """
    with start(GLOO + COMMON + dedented(script) + END_GLOO, 3) as job:
        for rank in range(3):
            job.wait_for(rank, "ready")
        job.signal(1, signal.SIGKILL)
        results = job.wait(expect_exit=[0, -signal.SIGKILL, 0])
    assert len({raised(result, "raise")[3] for result in results}) == 1
    assert raised(results[0], "raise")[:2] == ([1], "no")
    assert raised(results[0], "raise")[3] == "'raise' failed on rank 1 of 3: ZeroDivisionError: division by zero"
    assert all("again returned 3" in result.stdout for result in results)
    for result in (results[0], results[2]):
        failures, committed, took_s, text = raised(result, "killed")
        assert (failures, committed) == ([1], "no")
        assert took_s < 8
        assert text == "'killed' failed on rank 1 of 3: no answer to 'killed' within 2 s"


def test_torch_rank_0_is_killed_while_the_others_wait() -> None:
    script = """
    attempt(coordinator, "all")
    say("ready")
    if rank == 0:
        time.sleep(60)
    attempt(coordinator, "killed", timeout_s=10)
    coordinator.close()
    """
    with start(GLOO + COMMON + dedented(script) + END_GLOO, 2) as job:
        for rank in range(2):
            job.wait_for(rank, "ready")
        job.signal(0, signal.SIGKILL)
        results = job.wait(expect_exit=[-signal.SIGKILL, 0])
    for result in results[1:]:
        failures, committed, took_s, _ = raised(result, "killed")
        assert (failures, committed) == ([0], "unknown")
        assert took_s < 22


MOMENTS = ("before", "inside")
BACKENDS = [
    pytest.param("torchrun-env", GLOO, id="torch"),
    pytest.param("mpirun", MPI, id="mpi", marks=needs_mpi),
]


@pytest.mark.parametrize(("launcher", "preamble"), BACKENDS)
def test_stopped_rank_is_given_up_and_raises_when_it_wakes(launcher: Launcher, preamble: str, tmp_path: Path) -> None:
    """SIGSTOP before the rank comes to agree(), or while it waits in it; later SIGCONT."""
    script = """
    coordinator.close()
    for stopped, moment, others_may_go in json.loads(sys.argv[1]):
        coordinator = make()
        if rank == stopped and moment == "inside":
            ready = threading.Timer(0.2, say, [others_may_go, "ready"])  # most likely it waits by then
            ready.start()
        else:
            say(others_may_go, "ready")
            while not os.path.exists(others_may_go):
                time.sleep(0.01)
        attempt(coordinator, f"stop {stopped} {moment}", timeout_s=1.5)
        coordinator.close()
    """
    plan = [(stopped, moment, str(tmp_path / f"{stopped} {moment}")) for stopped in (2, 0) for moment in MOMENTS]
    with start(preamble + COMMON + dedented(script), 3, args=[json.dumps(plan)], launcher=launcher) as job:
        for stopped, moment, flag in plan:
            for rank in range(3):
                job.wait_for(rank, f"{flag} ready")
            job.signal(stopped, signal.SIGSTOP)
            Path(flag).touch()
            for rank in {0, 1, 2} - {stopped}:
                job.wait_for(rank, f"stop {stopped} {moment} ", timeout_s=20)
            job.signal(stopped, signal.SIGCONT)
        results = job.wait()
    for stopped, moment, _ in plan:
        for result in results:
            failures, _, took_s, text = raised(result, f"stop {stopped} {moment}")
            if result.rank != stopped:
                assert failures == [stopped]
                assert f"on rank {stopped} of 3" in text
                assert took_s < 10


@needs_mpi
def test_mpi_rank_that_raises_and_rank_that_is_silent() -> None:
    script = """
    attempt(coordinator, "raise", (lambda: 1 / 0) if rank == 1 else lambda: b"m")
    attempt(coordinator, "again", lambda: b"x" * 10_000_000)
    background = threading.Thread(target=attempt, args=[coordinator, "background"])
    background.start()
    background.join()
    if rank != 1:
        attempt(coordinator, "silent", timeout_s=2)
    coordinator.close()
    """
    results = launch(MPI + COMMON + dedented(script), 3, launcher="mpirun")
    assert len({raised(result, "raise")[3] for result in results}) == 1
    assert raised(results[0], "raise")[:2] == ([1], "no")
    assert all("again returned 3" in result.stdout for result in results)
    assert all("background returned 3" in result.stdout for result in results)
    for result in (results[0], results[2]):
        assert raised(result, "silent")[0] == [1]


@needs_mpi
def test_mpi_without_thread_multiple_is_refused() -> None:
    script = """
    import mpi4py
    mpi4py.rc.thread_level = "serialized"
    from distckpt.coordinator import default_coordinator
    from distckpt.errors import CheckpointError
    try:
        default_coordinator()
    except CheckpointError as error:
        print(error)
    """
    for result in launch(script, 2, launcher="mpirun"):
        assert "MPI_THREAD_MULTIPLE" in result.stdout


def test_torch_rank_0_ends_without_closing_and_leaves_nobody_behind() -> None:
    """Its process hosts the store, which must outlive its last word."""
    script = """
    coordinator.gather("x", b"", timeout_s=20)
    if rank == 0:
        coordinator.scatter("x", [b"last word"] * 2, timeout_s=20)
    else:
        time.sleep(0.5)
        say(coordinator.scatter("x", None, timeout_s=20))
    """
    assert "last word" in launch(GLOO + COMMON + dedented(script), 2)[1].stdout
