"""Peak memory of a process and its children, watched from outside. Run as `-m benchmarks.peak_memory PID` it watches.

What counts is Pss_Anon + Pss_Shmem of /proc/<pid>/smaps_rollup: anonymous and shared memory, what several
processes share divided among them (a forked writer's copy of the state counts as far as it differs), mapped files and
page cache left out. A process of its own samples it, since a thread would stand still while an engine holds the GIL.
A peak shorter than the time between two samples (about SAMPLE_S and what the kernel takes to count) can be missed.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType

SAMPLE_S = 0.01
ANSWER_WITHIN_S = 60.0
COUNTED = ("Pss_Anon:", "Pss_Shmem:")
PROC = Path("/proc")
TREE = Path(__file__).resolve().parent.parent


class PeakMemory:
    """Watches this process from `with` on. Bytes count from what it had then."""

    def __enter__(self) -> PeakMemory:
        self._watcher = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peak_memory", str(os.getpid())],
            cwd=TREE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._before = self._ask()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._watcher.kill()
        self._watcher.communicate()

    def forget_peak(self) -> None:
        """The next peak_bytes() is of the time from now on."""
        self._ask()

    def peak_bytes(self) -> int:
        """The most since the last call of either function, beyond what the process had at the start."""
        return self._ask() - self._before

    def _ask(self) -> int:
        assert self._watcher.stdin is not None
        assert self._watcher.stdout is not None
        self._watcher.stdin.write("\n")
        self._watcher.stdin.flush()
        if not select.select([self._watcher.stdout], [], [], ANSWER_WITHIN_S)[0]:
            raise TimeoutError(f"the process that watches memory has not answered for {ANSWER_WITHIN_S:.0f} s")
        line = self._watcher.stdout.readline()
        if not line:
            raise RuntimeError("the process that watches memory has ended; its error output says why")
        return int(line)


def watch(pid: int) -> None:
    """Until standard input ends: for each line of it, the peak since the line before, in bytes, on standard output."""
    peak = 0
    while True:
        peak = max(peak, counted_bytes(pid))
        if select.select([sys.stdin], [], [], SAMPLE_S)[0]:
            if not sys.stdin.readline():
                return
            print(max(peak, counted_bytes(pid)), flush=True)
            peak = 0


def counted_bytes(pid: int) -> int:
    """Of the process and of all processes below it but the caller's own."""
    total = 0
    for member in _with_children(pid):
        with suppress(FileNotFoundError, ProcessLookupError):  # It has ended since it was listed.
            lines = (PROC / str(member) / "smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith(COUNTED))
    return total


def _with_children(pid: int) -> list[int]:
    found = [pid]
    for parent in found:  # It grows while it is walked.
        with suppress(FileNotFoundError, ProcessLookupError):
            for task in (PROC / str(parent) / "task").iterdir():
                children = (task / "children").read_text().split()
                found += [int(child) for child in children if int(child) != os.getpid()]
    return found


if __name__ == "__main__":
    watch(int(sys.argv[1]))
