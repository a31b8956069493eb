"""The demo's training jobs: real torchrun jobs of train.py, their logs, and how to kill one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TRAIN = Path(__file__).with_name("train.py")


@dataclass(frozen=True, slots=True)
class Log:
    """What a run wrote: a record per iteration, a record per save, and the iteration it resumed from."""

    iterations: dict[int, dict]
    saves: dict[int, dict]
    resumed_from: int | None

    @classmethod
    def read(cls, path: Path) -> Log:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        return cls(
            iterations={record["iteration"]: record for record in records if "iteration" in record},
            saves={record["save"]: record for record in records if "save" in record},
            resumed_from=next(record["resumed_from"] for record in records if "resumed_from" in record),
        )


@dataclass(frozen=True, slots=True)
class Layout:
    tp: int = 1
    pp: int = 1
    dp: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        return f"{self.ranks} ranks (tp{self.tp} pp{self.pp} dp{self.dp})"


@dataclass(frozen=True, slots=True)
class Job:
    """A job that keeps its checkpoints in `directory` and its log and output beside it.

    options: of train.py, separated by spaces.
    """

    directory: Path
    layout: Layout
    options: str

    def start(self) -> subprocess.Popen[bytes]:
        layout = self.layout
        torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {layout.ranks}"
        grid = f"--tp {layout.tp} --pp {layout.pp} --dp {layout.dp}"
        files = ["--checkpoint-dir", str(self.directory), "--log-file", str(self._log)]
        with self._output.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, *torchrun.split(), str(TRAIN), *grid.split(), *self.options.split(), *files],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=output,
            )

    def run(self) -> Log:
        """To the end. Raises SystemExit with the job's last words if it fails."""
        if self.start().wait():
            raise self.failure("failed")
        return Log.read(self._log)

    def failure(self, what: str) -> SystemExit:
        return SystemExit(f"{self.directory.name} {what}:\n{self._output.read_text(errors='replace')[-4000:]}")

    @property
    def _log(self) -> Path:
        return self.directory.with_suffix(".jsonl")

    @property
    def _output(self) -> Path:
        return self.directory.with_suffix(".out")


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL torchrun and its workers, each of which leads a session of its own; return when all are dead."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = [int(pid) for pid in children.read_text().split()]
    for pid in (*workers, process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    while any(_is_alive(pid) for pid in workers):
        time.sleep(0.001)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"  # a zombie does nothing any more; its new parent may be slow to collect it
