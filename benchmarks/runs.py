"""Starts the torchrun jobs, one per engine and mode, each in an empty directory, and collects their answers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.request import Answer, Mode, Request
from benchmarks.state import Layout

TREE = Path(__file__).resolve().parent.parent
LAST_WORDS = 3000  # characters of a failed job's output
TORCHRUN = "torch/distributed/elastic/"  # in the lines in which it says that a worker failed


class JobError(Exception):
    """A job that failed; the message is its last words."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What all jobs of a run have in common. directory: on the file system that is measured."""

    layout: Layout
    size_bytes: int
    repeats: int
    directory: Path
    timeout_s: float

    def run(self, mode: Mode, engine: str = "") -> Answer:
        """Raises JobError."""
        self.directory.mkdir(parents=True, exist_ok=True)
        root = Path(tempfile.mkdtemp(prefix="bench-", dir=self.directory))
        try:
            return self._run(mode, engine, root)
        finally:
            shutil.rmtree(root)

    def _run(self, mode: Mode, engine: str, root: Path) -> Answer:
        checkpoints = root / "checkpoints"
        checkpoints.mkdir()
        request_path, answer_path, output_path = root / "request.json", root / "answer.json", root / "output"
        request = Request(
            mode=mode,
            engine=engine,
            tp=self.layout.tp,
            pp=self.layout.pp,
            size_bytes=self.size_bytes,
            repeats=self.repeats,
            root=str(checkpoints),
            answer=str(answer_path),
        )
        request_path.write_bytes(msgspec.json.encode(request))
        torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {self.layout.ranks} -m benchmarks.worker"
        path = os.pathsep.join(filter(None, [str(TREE), os.environ.get("PYTHONPATH")]))
        with output_path.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *torchrun.split(), str(request_path)],
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
                stdout=output,
                stderr=output,
            )
            try:
                code = process.wait(self.timeout_s)
            except subprocess.TimeoutExpired:
                raise JobError(f"not finished after {self.timeout_s:.0f} s") from None
            finally:
                if process.poll() is None:
                    process.terminate()  # torchrun ends its workers
                    process.wait()
        words = _last_words(output_path.read_text(errors="replace"))
        if not answer_path.exists():
            raise JobError(words)
        answer = msgspec.json.decode(answer_path.read_bytes(), type=Answer)
        if code:  # Everything had been measured and compared; only the end of the processes went wrong.
            answer.notes.append(f"{mode}: crashed at exit, after the last figure: {words}")
        return answer


def _last_words(output: str) -> str:
    """Of the workers: the output before torchrun's own, which is long and says nothing about the reason."""
    lines = output.splitlines()
    end = next((number for number, line in enumerate(lines) if TORCHRUN in line), 0) or len(lines)
    return "\n".join(lines[:end])[-LAST_WORDS:]
