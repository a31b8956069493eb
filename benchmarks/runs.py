"""Starts the torchrun jobs, those of a group one after the other in the same new directory, and collects answers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.plan import Job
from benchmarks.request import Answer, Request

TREE = Path(__file__).resolve().parent.parent
LAST_WORDS = 3000  # characters of a failed job's output
TORCHRUN = "torch/distributed/elastic/"  # in the lines in which it says that a worker failed
EXIT_CODE = "exitcode"  # in the line in which it says how
END_WITHIN_S = 60.0  # torchrun kills workers that do not end within 30 s of its own end


class JobError(Exception):
    """A job that failed; the message is its last words."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What all jobs of a run have in common. directory: on the file system that is measured."""

    repeats: int
    directory: Path
    timeout_s: float

    def run(self, jobs: Iterable[Job], engine: str = "") -> Iterator[Answer]:
        """Run the jobs in order, each when its answer is asked for. Raises JobError; the rest is not run then."""
        with self._new_directory() as directory:
            stored_step = 0
            for number, job in enumerate(jobs):
                answer = self._run(job, engine, stored_step, directory, f"{number}-{job.mode}")
                stored_step = answer.last_step
                yield answer
                if answer.missing:
                    return

    @contextmanager
    def _new_directory(self) -> Iterator[Path]:
        self.directory.mkdir(parents=True, exist_ok=True)
        path = Path(tempfile.mkdtemp(prefix="bench-", dir=self.directory))
        try:
            (path / "checkpoints").mkdir()
            yield path
        finally:
            shutil.rmtree(path)

    def _run(self, job: Job, engine: str, stored_step: int, directory: Path, name: str) -> Answer:
        request_path, answer_path = directory / f"{name}.request", directory / f"{name}.answer"
        output_path = directory / f"{name}.output"
        request = Request(
            mode=job.mode,
            engine=engine,
            layout=job.layout,
            model=job.model,
            repeats=min(self.repeats, job.most_repeats),
            root=str(directory / "checkpoints"),
            answer=str(answer_path),
            stored_step=stored_step,
            label=job.label,
        )
        request_path.write_bytes(msgspec.json.encode(request))
        code = self._torchrun(job.layout.ranks, request_path, output_path)
        words = _last_words(output_path.read_text(errors="replace"), code)
        if not answer_path.exists():
            raise JobError(words)
        answer = msgspec.json.decode(answer_path.read_bytes(), type=Answer)
        if code:  # Everything had been measured and compared; only the end of the processes went wrong.
            answer.notes.append(f"{job.mode}: failed at exit, after the last figure: {words}")
        return answer

    def _torchrun(self, ranks: int, request_path: Path, output_path: Path) -> int:
        """Its exit code. Raises JobError if it has to be ended."""
        arguments = f"-m torch.distributed.run --standalone --nproc-per-node {ranks} -m benchmarks.worker"
        path = os.pathsep.join(filter(None, [str(TREE), os.environ.get("PYTHONPATH")]))
        with output_path.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *arguments.split(), str(request_path)],
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
            try:
                return process.wait(self.timeout_s)
            except subprocess.TimeoutExpired:
                raise JobError(f"not finished after {self.timeout_s:g} s") from None
            finally:
                if process.poll() is None:
                    _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()  # torchrun ends its workers and their children
    try:
        process.wait(END_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_words(output: str, code: int) -> str:
    """Of the workers: the output before torchrun's own, which is long; of that, how a worker ended.

    A worker that a signal ended (a crash in C++, no memory left) has said nothing itself.
    """
    lines = output.splitlines()
    end = next((number for number, line in enumerate(lines) if TORCHRUN in line), len(lines))
    how = next((" ".join(line.split()) for line in lines[end:] if EXIT_CODE in line), "")
    words = "\n".join(lines[:end])[-LAST_WORDS:].strip() or "no output"
    return f"{words} ({how or f'torchrun ended with {code}'})"
