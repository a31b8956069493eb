"""`python -m benchmarks.dcp_fault_steps ENGINE STEP DIRECTORY`: one save or load, in a process of its own.

Prints one line of JSON: what was raised, and after a load what each tensor holds. What goes wrong is decided elsewhere
(dcp_faults.py); here a process can be made to die, or writes to fail, at a given place.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed.checkpoint as dcp
import typer
from torch.distributed.checkpoint.filesystem import FileSystem

from distckpt import Checkpointer
from distckpt.storage import PosixStorage, WriteFile
from tests.crash.io_faults import EVERY, Fault, injected

ITERATION = 1
VERSIONS = (1, 2)


def make_state(mib: int, version: int) -> dict[str, torch.Tensor]:
    """A large tensor of so many MiB and a small one; no element is the same in two versions. Version 0 is a target."""
    sizes = {"large": mib << 18, "small": mib << 15}
    if not version:
        return {name: torch.zeros(size, dtype=torch.int32) for name, size in sizes.items()}
    return {name: torch.arange(size, dtype=torch.int32) * 4 + version for name, size in sizes.items()}


def describe(name: str, found: torch.Tensor, mib: int) -> str:
    """Which version a tensor is of."""
    counts = {version: int((found == make_state(mib, version)[name]).sum()) for version in VERSIONS}
    for version, count in counts.items():
        if count == found.numel():
            return f"version {version}"
    parts = [f"{count} elements of version {version}" for version, count in counts.items() if count]
    return " and ".join([*parts, f"{found.numel() - sum(counts.values())} of none"])


class _DyingFileSystem(FileSystem):
    """Kills the process when one data file is written and the next is to be opened."""

    def __init__(self) -> None:
        self._is_taken = threading.Lock()
        self._written = threading.Event()

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        is_data = mode == "wb" and str(path).endswith(".distcp")
        if is_data and not self._is_taken.acquire(blocking=False):
            self._written.wait(60)
            os.kill(os.getpid(), signal.SIGKILL)
        with super().create_stream(path, mode) as stream:
            yield stream
        if is_data:
            self._written.set()


class _DyingStorage(PosixStorage):
    """Kills the process when the tensors are written and the next file is to be opened."""

    def create(self, name: str, *, size_hint: int = 0) -> WriteFile:
        if "shard-" not in name:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().create(name, size_hint=size_hint)


class Dcp:
    def save(self, directory: Path, state: dict[str, torch.Tensor], *, dies: bool) -> None:
        writer = dcp.FileSystemWriter(directory, thread_count=2)
        if dies:
            writer.fs = _DyingFileSystem()
        dcp.save(state, storage_writer=writer, no_dist=True)

    def load(self, directory: Path, state: dict[str, torch.Tensor]) -> None:
        dcp.load(state, storage_reader=dcp.FileSystemReader(directory), no_dist=True)


class Distckpt:
    def save(self, directory: Path, state: dict[str, torch.Tensor], *, dies: bool) -> None:
        storage = (_DyingStorage if dies else PosixStorage)(directory, io_backend="threads")
        with Checkpointer(storage) as checkpointer:
            checkpointer.save(dict(state), iteration=ITERATION)

    def load(self, directory: Path, state: dict[str, torch.Tensor]) -> None:
        with Checkpointer(directory) as checkpointer:
            checkpointer.load(dict(state), ITERATION)


ENGINES: dict[str, type[Dcp] | type[Distckpt]] = {"DCP": Dcp, "distckpt": Distckpt}


def _describe_error(error: BaseException) -> str:
    text = str(error).strip()
    if isinstance(error, dcp.CheckpointException):
        text = text.splitlines()[-1]  # The others are the traceback.
    return f"{type(error).__name__}: {' '.join(text.split())}"


def main(
    engine: Annotated[str, typer.Argument(help=f"Of {', '.join(ENGINES)}.")],
    step: Annotated[str, typer.Argument(help="save or load.")],
    directory: Annotated[Path, typer.Argument(help="Of the checkpoint.")],
    mib: Annotated[int, typer.Option(help="Size of the large tensor.")],
    version: Annotated[int, typer.Option(help="To save.")] = 1,
    dies: Annotated[bool, typer.Option(help="Between two files of the save.")] = False,
    fail_writes_to: Annotated[str, typer.Option(help="ENOSPC for files whose path contains this.")] = "",
) -> None:
    """Needs the library of tests/crash/io_faults.cc for --fail-writes-to."""
    state = make_state(mib, version if step == "save" else 0)
    result: dict[str, Any] = {"raised": None, "tensors": {}}
    fault: AbstractContextManager[object] = nullcontext()
    if fail_writes_to:
        fault = injected(Fault("write", fail_writes_to, errno.ENOSPC, count=EVERY))
    try:
        with fault:
            if step == "save":
                ENGINES[engine]().save(directory, state, dies=dies)
            else:
                ENGINES[engine]().load(directory, state)
                result["tensors"] = {name: describe(name, tensor, mib) for name, tensor in state.items()}
    except (Exception, dcp.CheckpointException) as error:  # DCP's own is no Exception.
        result["raised"] = _describe_error(error)
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
