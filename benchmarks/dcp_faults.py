"""`python -m benchmarks.dcp_faults`: the same faults of storage under torch.distributed.checkpoint and distckpt.

Every save and every load is a process of its own (dcp_fault_steps.py). What is in the table is what was raised there,
or found when the tensors that were loaded were compared with those that were saved.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.dcp_fault_steps import ENGINES, make_state
from benchmarks.machine import TREE, versions
from tests.crash.io_faults import environment
from tests.crash.loop_disk import MountRefused, mounted

SMALL_MIB, LARGE_MIB = 64, 512
DISK_MIB = 48  # too small for the large tensor of SMALL_MIB, not for the small one
TIMEOUT_S = 300.0
ATTEMPTS = 10  # to kill a save before it ends
SHOWN_CHARS = 250  # of an error
FAILING_FILES = {"DCP": "__0_0.distcp", "distckpt": "shard-00000"}


@dataclass(frozen=True)
class Outcome:
    """raised: what a save or load raised. tensors: name -> which version was loaded."""

    raised: str | None
    tensors: dict[str, str]


def run(engine: str, step: str, directory: Path, *options: str, mib: int) -> Outcome:
    command = _command(engine, step, directory, mib, *options)
    environ = os.environ | (environment() if "--fail-writes-to" in options else {})
    done = subprocess.run(
        command, cwd=TREE, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if done.returncode == -signal.SIGKILL:
        return Outcome("killed", {})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return Outcome(**json.loads(done.stdout.splitlines()[-1]))


def _command(engine: str, step: str, directory: Path, mib: int, *options: str) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.dcp_fault_steps", engine, step, str(directory), f"--mib={mib}"]
    return [*command, *options]


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dcp-faults-", dir=parent) as directory:
        yield Path(directory)


def full_disk(engine: str, parent: Path) -> str:
    with scratch(parent) as directory, mounted(directory, size_mib=DISK_MIB) as disk:
        return _judge_save(engine, disk.path / "checkpoint")


def no_space_for_one_file(engine: str, parent: Path) -> str:
    with scratch(parent) as directory:
        return _judge_save(engine, directory / "checkpoint", "--fail-writes-to", FAILING_FILES[engine])


def _judge_save(engine: str, directory: Path, *options: str) -> str:
    saved = run(engine, "save", directory, *options, mib=SMALL_MIB)
    if saved.raised:
        return f"detected: the save raised {saved.raised}"
    loaded = run(engine, "load", directory, mib=SMALL_MIB)
    return f"silent: the save returned; {_what_loads(loaded)}"


def flipped_bit(engine: str, parent: Path) -> str:
    with scratch(parent) as directory:
        checkpoint = directory / "checkpoint"
        _require_saved(engine, checkpoint, SMALL_MIB)
        flip_bit(checkpoint)
        loaded = run(engine, "load", checkpoint, mib=SMALL_MIB)
    return f"detected: the load raised {loaded.raised}" if loaded.raised else f"silent: {_what_loads(loaded)}"


def flip_bit(checkpoint: Path) -> None:
    """Of an element in the middle of the large tensor, found by its content."""
    large = make_state(SMALL_MIB, 1)["large"]
    wanted = large[len(large) // 2 :][:16].numpy().tobytes()
    for path in sorted(checkpoint.rglob("*")):
        if not path.is_file() or not path.stat().st_size:
            continue
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
            at = content.find(wanted)
            if at >= 0:
                content[at + 1] ^= 1
                return
    raise RuntimeError(f"the large tensor is in no file of {checkpoint}")


def overwrite_killed_in_a_file(engine: str, parent: Path) -> str:
    for _ in range(ATTEMPTS):
        with scratch(parent) as directory:
            checkpoint = directory / "checkpoint"
            _require_saved(engine, checkpoint, LARGE_MIB)
            if _save_and_kill_midway(engine, checkpoint):
                return _judge_overwrite(engine, checkpoint, LARGE_MIB)
    raise RuntimeError(f"{engine}: {ATTEMPTS} saves ended before they were killed")


def _save_and_kill_midway(engine: str, directory: Path) -> bool:
    """When a half of the large tensor is in files. Returns whether the save was still under way."""
    started_ns, deadline = time.time_ns(), time.monotonic() + TIMEOUT_S
    command = _command(engine, "save", directory, LARGE_MIB, "--version=2")
    with subprocess.Popen(command, cwd=TREE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as saving:
        while saving.poll() is None and time.monotonic() < deadline:
            if _bytes_since(directory, started_ns) >= LARGE_MIB << 19:
                break
            time.sleep(0.001)
        saving.kill()
    return saving.returncode == -signal.SIGKILL


def _bytes_since(directory: Path, since_ns: int) -> int:
    changed = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                status = os.stat(os.path.join(parent, name))
            except FileNotFoundError:
                continue
            changed += status.st_size if status.st_mtime_ns > since_ns else 0
    return changed


def overwrite_killed_between_files(engine: str, parent: Path) -> str:
    with scratch(parent) as directory:
        checkpoint = directory / "checkpoint"
        _require_saved(engine, checkpoint, SMALL_MIB)
        if run(engine, "save", checkpoint, "--version=2", "--dies", mib=SMALL_MIB).raised != "killed":
            raise RuntimeError(f"{engine}: the save did not die between two files")
        return _judge_overwrite(engine, checkpoint, SMALL_MIB)


def _judge_overwrite(engine: str, checkpoint: Path, mib: int) -> str:
    loaded = run(engine, "load", checkpoint, mib=mib)
    if loaded.raised:
        return f"nothing loads, old or new: {loaded.raised}"
    found = set(loaded.tensors.values())
    if found == {"version 1"}:
        return "the old checkpoint loads"
    if found == {"version 2"}:
        return "the new checkpoint loads"
    return f"silent: {_what_loads(loaded)}"


def _require_saved(engine: str, directory: Path, mib: int) -> None:
    saved = run(engine, "save", directory, mib=mib)
    if saved.raised:
        raise RuntimeError(f"{engine} cannot save: {saved.raised}")


def _what_loads(loaded: Outcome) -> str:
    if loaded.raised:
        return f"the load raised {loaded.raised}"
    right = set(loaded.tensors.values()) == {"version 1"}
    return f"{'right' if right else 'wrong'} values loaded: " + ", ".join(
        f"{name} is {what}" for name, what in loaded.tensors.items()
    )


FAULTS: dict[str, Callable[[str, Path], str]] = {
    f"the disk gets full: a file system of {DISK_MIB} MiB, tensors of {SMALL_MIB} and {SMALL_MIB // 8} MiB": full_disk,
    "every write to one file fails with ENOSPC, others do not": no_space_for_one_file,
    "one bit of a stored tensor is flipped": flipped_bit,
    "overwrite killed in the middle of a file": overwrite_killed_in_a_file,
    "overwrite killed between two files": overwrite_killed_between_files,
}


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Of each fault: threads do not always meet it in one order.")] = 3,
    directory: Annotated[Path | None, typer.Option(help="Where checkpoints lie; 2 GB.")] = None,
) -> None:
    """DCP writes with two threads. Mounting the small file system takes root; without it that row says so."""
    console = Console()
    parent = Path(tempfile.gettempdir()) if directory is None else directory
    found = ", ".join(f"{name} {version}" for name, version in versions().items() if name in ("torch", "distckpt"))
    table = Table("fault", *ENGINES, title=f"Who notices what; {found}", show_lines=True)
    for fault, experiment in FAULTS.items():
        with console.status(fault):
            table.add_row(fault, *(Text(_count(experiment, engine, parent, repeats)) for engine in ENGINES))
    console.print(table)


def _count(experiment: Callable[[str, Path], str], engine: str, directory: Path, repeats: int) -> str:
    try:
        counts = Counter(_shorten(experiment(engine, directory), directory) for _ in range(repeats))
    except MountRefused as refused:
        return f"not tried: {refused}"
    return "\n".join(f"{count} of {repeats}: {what}" for what, count in counts.most_common())


def _shorten(text: str, directory: Path) -> str:
    """Without what differs from run to run."""
    text = re.sub(rf"{re.escape(str(directory))}\S*/", "", text)
    text = re.sub(r"[0-9a-f]{32}|[0-9a-f]{8}-[0-9a-f-]{27,}", "...", text)
    text = re.sub(r"at offset \d+", "at offset ...", text)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."


if __name__ == "__main__":
    typer.run(main)
