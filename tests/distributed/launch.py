"""Run a script on several real processes, as torchrun or mpirun would, within a hard bound of time.

    results = launch(SCRIPT, 3, args=[str(tmp_path)])           # waits; every rank must exit with 0
    with start(SCRIPT, 3) as job:                               # or step by step
        job.wait_for(1, "ready")
        job.signal(1, signal.SIGSTOP)
        results = job.wait(expect_exit=[0, -signal.SIGKILL, 0])

The script is text or a path; `say` and `wait_for_file` are for its ranks. Whatever happens, no process outlives the
call or the `with` block. "forked" ranks are as real as those of "torchrun-env", and have its variables, but are forked
from a process that has imported what takes seconds to import: for tests that start many jobs.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

Launcher = Literal["torchrun-env", "mpirun", "forked"]

REPOSITORY = Path(__file__).resolve().parents[2]
MPIRUN = Path(sys.executable).with_name("mpirun")
IMPORTED = ["torch._dynamo", "torch.distributed.fsdp", "distckpt.training.train_state", "peft"]  # before "forked" ranks

# mpirun runs this: it mixes the ranks' outputs, does not tell their process ids, and when one rank fails it
# kills the rest, which a test may want to hear out.
_MPI_RANK = """
cd "$1" && shift && rank=$OMPI_COMM_WORLD_RANK
"$@" >"$rank.out" 2>"$rank.err" & echo $! >"$rank.pid.new" && mv "$rank.pid.new" "$rank.pid"
wait $! ; echo $? >"$rank.exit"
"""


@dataclass(frozen=True)
class Result:
    rank: int
    returncode: int | None  # negative: the signal that ended it; None: it was still running
    stdout: str
    stderr: str


def launch(
    script: str | Path,
    world_size: int,
    *,
    args: Sequence[str] = (),
    launcher: Launcher = "torchrun-env",
    timeout_s: float = 60,
    expect_exit: int | Sequence[int] | None = 0,
    env: Mapping[str, str] | None = None,
) -> list[Result]:
    """Run the script on `world_size` processes; the results by rank.

    expect_exit: the code of all ranks, or one for each; None accepts any. AssertionError, showing all outputs,
    on another code and when `timeout_s` is over.
    """
    with start(script, world_size, args=args, launcher=launcher, env=env) as job:
        return job.wait(timeout_s=timeout_s, expect_exit=expect_exit)


def start(
    script: str | Path,
    world_size: int,
    *,
    args: Sequence[str] = (),
    launcher: Launcher = "torchrun-env",
    env: Mapping[str, str] | None = None,
) -> Job:
    """The same without waiting: to signal single ranks. Use it in a `with` statement."""
    return Job(script, world_size, args, launcher, env or {})


def say(*words: object) -> None:
    """Print a line as a whole: nobody sees a part of it, and who is killed has printed all of it or nothing."""
    os.write(sys.stdout.fileno(), (" ".join(map(str, words)) + "\n").encode())


def wait_for_file(path: Path, *, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} has not come in {timeout_s:g} s")
        time.sleep(0.005)


class Job:
    """The processes of one launch."""

    def __init__(
        self, script: str | Path, world_size: int, args: Sequence[str], launcher: Launcher, env: Mapping[str, str]
    ) -> None:
        self.world_size = world_size
        self._launcher = launcher
        self._scratch = tempfile.TemporaryDirectory(prefix="launch-")
        self._directory = Path(self._scratch.name)
        if isinstance(script, str):
            path = self._directory / "script.py"
            path.write_text(textwrap.dedent(script))
        else:
            path = script
        command = [sys.executable, str(path), *args]
        self._processes: list[subprocess.Popen[bytes] | _Forked] = []
        if launcher == "mpirun":
            self._start_mpi(command, env)
        else:
            self._start_ranks(command, env)

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.kill()
        self._scratch.cleanup()

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank."""
        os.kill(self._pid(rank), number)

    def stdout(self, rank: int) -> str:
        """What the rank has written so far; scripts run unbuffered."""
        path = self._directory / f"{rank}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, rank: int, text: str, *, timeout_s: float = 60) -> None:
        """Until the rank has written `text`."""
        deadline = time.monotonic() + timeout_s
        while text not in self.stdout(rank):
            if self.returncode(rank) is not None and text not in self.stdout(rank):
                raise AssertionError(f"rank {rank} ended without writing {text!r}\n{self._show()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"rank {rank} has not written {text!r} in {timeout_s:g} s\n{self._show()}")
            time.sleep(0.01)

    def returncode(self, rank: int) -> int | None:
        if self._launcher != "mpirun":
            return self._processes[rank].poll()
        path = self._directory / f"{rank}.exit"
        text = path.read_text().strip() if path.exists() else ""
        if not text:  # not written yet, or mpirun killed who would write it
            ended = self._processes[0].poll()
            return None if ended is None else ended or -signal.SIGKILL
        return 128 - int(text) if int(text) > 128 else int(text)

    def wait(self, *, timeout_s: float = 60, expect_exit: int | Sequence[int] | None = 0) -> list[Result]:
        """Until all ranks have ended; see `launch`."""
        deadline = time.monotonic() + timeout_s
        while any(self.returncode(rank) is None for rank in range(self.world_size)):
            if time.monotonic() > deadline:
                raise AssertionError(f"not over after {timeout_s:g} s\n{self._show()}")
            time.sleep(0.01)
        results = self._results()
        if expect_exit is not None:
            expected = [expect_exit] * self.world_size if isinstance(expect_exit, int) else list(expect_exit)
            if [result.returncode for result in results] != expected:
                raise AssertionError(f"expected exit codes {expected}\n{self._show()}")
        return results

    def kill(self) -> None:
        """End all processes, stopped ones and children of ranks included."""
        for rank in range(self.world_size if self._launcher == "mpirun" else 0):
            if self.returncode(rank) is None and (self._directory / f"{rank}.pid").exists():
                _kill(self._pid(rank), os.kill)
        for process in self._processes:
            _kill(process.pid, os.killpg)
            _kill(process.pid, os.kill)  # One that was only just forked leads no group yet.
            process.wait()

    def _start_ranks(self, command: list[str], env: Mapping[str, str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for rank in range(self.world_size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            out, err = self._directory / f"{rank}.out", self._directory / f"{rank}.err"
            self._spawn(command, {**common, **own, **env}, out, err)

    def _start_mpi(self, command: list[str], env: Mapping[str, str]) -> None:
        as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        mpirun = [str(MPIRUN), "--oversubscribe", "-n", str(self.world_size)]
        shell = ["sh", "-c", _MPI_RANK, "sh", str(self._directory)]
        log = self._directory / "mpirun.log"
        self._spawn([*mpirun, *shell, *command], {**as_root, **env}, log, log)

    def _spawn(self, command: list[str], env: Mapping[str, str], out: Path, err: Path) -> None:
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        ours = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "1"}
        if self._launcher == "forked":
            self._processes.append(_Forked(command[1:], {**ours, **env}, out, err))
            return
        with out.open("ab") as stdout, err.open("ab") as stderr:
            self._processes.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, **ours, **env},
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    start_new_session=True,  # a process group that can be killed with all its children
                )
            )

    def _pid(self, rank: int) -> int:
        if self._launcher != "mpirun":
            return self._processes[rank].pid
        return int((self._directory / f"{rank}.pid").read_text())

    def _results(self) -> list[Result]:
        results = []
        for rank in range(self.world_size):
            err = self._directory / f"{rank}.err"
            stderr = err.read_text(errors="replace") if err.exists() else ""
            results.append(Result(rank, self.returncode(rank), self.stdout(rank), stderr))
        return results

    def _show(self) -> str:
        log = self._directory / "mpirun.log"
        shown = [f"--- mpirun\n{log.read_text(errors='replace')[-4000:]}"] if log.exists() else []
        for result in self._results():
            shown.append(f"--- rank {result.rank}: exit code {result.returncode}, stdout:\n{result.stdout[-4000:]}")
            shown.append(f"--- rank {result.rank}, stderr:\n{result.stderr[-8000:]}")
        return "\n".join(shown)


class _Forked:
    """A rank forked from multiprocessing's server; to the job it is what a Popen is."""

    def __init__(self, arguments: list[str], env: Mapping[str, str], out: Path, err: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        self._process = context.Process(target=_run_script, args=(arguments, dict(env), out, err))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> None:
        self._process.join()


def _run_script(arguments: list[str], env: dict[str, str], out: Path, err: Path) -> None:
    """In the forked process: what `python script arguments...` would do."""
    os.setsid()  # a process group that can be killed with all its children
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), stream.fileno())
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.update(env)
    faulthandler.enable()
    import torch

    torch.set_num_threads(1)  # OMP_NUM_THREADS comes too late: torch was imported before the fork.
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")


def _kill(pid: int, kill: Callable[[int, int], None]) -> None:
    with suppress(ProcessLookupError):
        kill(pid, signal.SIGKILL)
