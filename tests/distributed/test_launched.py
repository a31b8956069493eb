"""The coordinator of a command-line process under real launchers, and the command line below them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from torch.distributed import TCPStore

import distckpt
from distckpt.coordinator import SingleProcess, launched_coordinator
from distckpt.errors import CheckpointError, DistributedError
from distckpt.storage import PosixStorage
from tests.distributed.launch import MPIRUN, REPOSITORY, Launcher, Result, launch, start
from tests.unit.saved_roots import save

LAUNCHERS: list[Launcher] = ["forked"]
if MPIRUN.exists():
    LAUNCHERS.append("mpirun")

AGREES = """
import os, sys, time
from distckpt.coordinator import agree, launched_coordinator
from tests.distributed.launch import say
coordinator = launched_coordinator(timeout_s=40)
total = agree(coordinator, "sum", lambda: coordinator.rank + 1, lambda ranks: [sum(ranks)] * len(ranks),
              message=int, decision=int, timeout_s=40)
say("rank", coordinator.rank, "of", coordinator.world_size, "agreed", total, type(coordinator).__name__)
coordinator.close()
"""


def torchrun(
    *arguments: object, ranks: int, options: Sequence[str] = ("--standalone",), env: Mapping[str, str] = {}
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc-per-node", str(ranks)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "RANK"))}
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**clean, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **env},
    )


def agreed(stdout: str) -> list[str]:
    return sorted(line for line in stdout.splitlines() if " agreed " in line)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_agree(launcher: Launcher) -> None:
    kind = {"forked": "StoreCoordinator", "mpirun": "MpiCoordinator"}[launcher]
    said = [result.stdout for result in launch(AGREES, 3, launcher=launcher)]
    assert said == [f"rank {rank} of 3 agreed 6 {kind}\n" for rank in range(3)]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_one_process_is_alone(launcher: Launcher) -> None:
    (result,) = launch(AGREES, 1, launcher=launcher)
    assert result.stdout == "rank 0 of 1 agreed 1 SingleProcess\n"


# Rank 1 dies once before it writes anything, when the others have.
DIES_AT_FIRST = """
import os, sys
from pathlib import Path
from distckpt.coordinator import launched
from tests.distributed.launch import wait_for_file
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    rank, met, meet = os.environ["RANK"], Path(sys.argv[1]), launched._meet
    if rank == "1":
        wait_for_file(met / "0")
        wait_for_file(met / "2")
        os._exit(3)
    def note_and_meet(coordinator, timeout_s):
        (met / rank).touch()
        meet(coordinator, timeout_s)
    launched._meet = note_and_meet
"""


def test_ranks_of_torchrun_agree_also_when_they_are_started_again(tmp_path: Path) -> None:
    """Through its agent's store, which remembers what ranks that died had written there."""
    script = tmp_path / "script.py"
    script.write_text(DIES_AT_FIRST + AGREES)
    done = torchrun(
        script, tmp_path, ranks=3, options=["--standalone", "--max-restarts", "1", "--monitor-interval", "0.1"]
    )
    assert done.returncode == 0, done.stderr
    assert set(agreed(done.stdout)) == {f"rank {rank} of 3 agreed 6 StoreCoordinator" for rank in range(3)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_ranks_of_two_agents_agree(tmp_path: Path) -> None:
    """As on two machines."""
    script = tmp_path / "script.py"
    script.write_text(AGREES)
    port = free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    agents = [
        subprocess.Popen([*command, "--node-rank", str(node), str(script)], stdout=subprocess.PIPE, text=True, env=env)
        for node in range(2)
    ]
    try:
        said = "".join(agent.communicate(timeout=120)[0] for agent in agents)
    finally:
        for agent in agents:
            agent.kill()
    assert agreed(said) == [f"rank {rank} of 2 agreed 3 StoreCoordinator" for rank in range(2)]


DIES = """
import os, sys, signal, time
from distckpt.coordinator import agree, launched_coordinator
from distckpt.errors import DistributedError
from tests.distributed.launch import say
coordinator = launched_coordinator(timeout_s=40)
if coordinator.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    agree(coordinator, "work", lambda: 1, lambda ranks: ranks, message=int, decision=int, timeout_s=2)
except DistributedError as error:
    say("failed", sorted(error.failures), error)
coordinator.close()
os._exit(0)
"""


def test_rank_that_dies_is_named_by_the_others() -> None:
    with start(DIES, 3, launcher="forked") as job:
        for rank in (0, 2):
            job.wait_for(rank, "failed [1] 'work' failed on rank 1 of 3")


@pytest.mark.skipif("mpirun" not in LAUNCHERS, reason="needs mpi4py and mpirun")
def test_mpirun_ends_all_when_a_rank_dies() -> None:
    results = launch(DIES, 3, launcher="mpirun", expect_exit=None)
    assert results[1].returncode == -signal.SIGKILL


# Rank 2 asks for the answer of rank 0 when that has given up.
COMES_NOT = """
import os, sys, time
from pathlib import Path
from distckpt.coordinator import launched, launched_coordinator, torch_dist
from distckpt.errors import DistributedError
from tests.distributed.launch import say, wait_for_file
missing, gave_up = sys.argv[1], Path(sys.argv[2])
if os.environ["RANK"] == missing:
    sys.exit(0)
if os.environ["RANK"] == "0":
    agree = launched.agree
    def agree_and_tell(*arguments, **options):
        try:
            return agree(*arguments, **options)
        finally:
            gave_up.touch()
    launched.agree = agree_and_tell
if os.environ["RANK"] == "2":
    take = torch_dist._take
    def take_late(*arguments):
        wait_for_file(gave_up)
        time.sleep(0.5)
        return take(*arguments)
    torch_dist._take = take_late
try:
    launched_coordinator(timeout_s=6)
except DistributedError as error:
    say("failed", sorted(error.failures), error)
os._exit(0)
"""


@pytest.mark.parametrize("missing", [0, 1])
def test_rank_that_does_not_come_is_named_within_the_bound(missing: int, tmp_path: Path) -> None:
    arguments = [str(missing), str(tmp_path / "gave up")]
    results: list[Result] = launch(COMES_NOT, 3, args=arguments, launcher="forked")
    for result in results:
        if result.rank != missing:
            assert result.stdout.startswith(f"failed [{missing}] "), result
            assert "All ranks must run the same command; for one process alone, unset WORLD_SIZE." in result.stdout


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_PORT, MASTER_ADDR cannot be right: no RANK, WORLD_SIZE=2, "),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "but RANK cannot be right: RANK=2"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, "but MASTER_PORT cannot be right"),
    ],
)
def test_environment_that_cannot_be_right_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], says: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(CheckpointError, match=re.escape(says)):
        launched_coordinator()


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert isinstance(launched_coordinator(), SingleProcess)


def test_port_that_somebody_else_has_is_an_error_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for name, text in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, text)
        with pytest.raises(DistributedError, match=f"rank 0 of 2 does not reach rank 0 through 127.0.0.1:{port}: "):
            launched_coordinator(timeout_s=6)


def test_rank_0_that_does_not_come_to_the_store_of_an_agent_is_waited_for_within_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port)}
    for name, text in {**place, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(DistributedError, match=r"rank 1 of 2 does not reach rank 0 .*not come within 2 s") as failed:
        launched_coordinator(timeout_s=2)
    assert failed.value.failures == {0: "it has not come within 2 s"}


WAITS = """
import sys
from distckpt.cli import app, main
from distckpt.coordinator import launched_coordinator
from tests.distributed.launch import say

@app.command()
def wait() -> None:
    say("waiting")
    launched_coordinator(timeout_s=100)

main(["wait"])
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_command_that_waits_for_others_can_be_interrupted(rank: int) -> None:
    env = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(free_port())}
    with start(WAITS, 1, env=env, launcher="forked") as job:
        job.wait_for(0, "waiting")
        time.sleep(0.5)
        job.signal(0, signal.SIGTERM)
        (result,) = job.wait(expect_exit=143)
    assert "distckpt: stopped by SIGTERM" in result.stderr


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_reshard_runs_as_several_processes(tmp_path: Path, launcher: str) -> None:
    """From a source tree, by torchrun; as a module, by mpirun. Rank 0 speaks for all."""
    source, target, plan = tmp_path / "source", tmp_path / "target", tmp_path / "plan.json"
    save(PosixStorage(source), 10)
    plan.write_text('{"tensors": [{"match": "weight", "partition": ["tp", null]}]}')
    arguments = [source, target, "--tp", 3, "--plan", plan, "--drop", "random", "--json"]
    if launcher == "torchrun":
        done = torchrun(REPOSITORY / "tools" / "reshard.py", *arguments, ranks=2)
    elif not MPIRUN.exists():
        pytest.skip("needs mpi4py and mpirun")
    else:
        done = subprocess.run(
            [str(MPIRUN), "--oversubscribe", "-n", "2", sys.executable, "-m", "distckpt.cli", "reshard"]
            + [str(argument) for argument in arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={
                **os.environ,
                "PYTHONPATH": str(REPOSITORY),
                "OMPI_ALLOW_RUN_AS_ROOT": "1",
                "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            },
        )
    assert done.returncode == 0, done.stderr
    (report,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert report["mesh"]["tp"] == 3
    assert done.stderr.count("reshard, rank 0 of 2: done: ") == 1
    assert distckpt.compare_checkpoints(source, target, drop=["random"]).is_equal


def test_tool_in_a_source_tree_is_the_command(tmp_path: Path) -> None:
    script = REPOSITORY / "tools" / "reshard.py"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, cwd=tmp_path, env=clean, check=False
    )
    assert "Usage: distckpt reshard" in done.stdout
