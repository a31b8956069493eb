"""`distckpt reshard` beside `cp` and sync of the same bytes, and beside what torch has for it, in one run.

    python -m benchmarks.reshard --size-gib 4 --repeats 5 --limit-mib 512 --directory DIR --out out/bench

A checkpoint of a tensor-parallel job (4 ranks, fp32 matrices of 128 MiB) is rewritten for 2 ranks and for 8; once all
matrices are cut by rows, once by columns. `cp` copies the same files. torch's way is dcp_to_torch_save followed by
torch_save_to_dcp, which know no layout: all of it goes through one process, and comes out whole. Every run begins with
cold files and ends with sync; distckpt runs in a control group that has --limit-mib of memory, page cache included,
where such a group can be made.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.files import drop_from_page_cache, files_below, remove
from benchmarks.machine import commit, describe_file_system, describe_machine, versions
from distckpt import Checkpointer, ShardedTensor
from distckpt.coordinator import Coordinator
from distckpt.testing import run_ranks

RANKS, ROWS, COLUMNS = 4, 4096, 8192  # of a matrix: 128 MiB
TIMEOUT_S = 1800.0
CGROUPS = (  # version 2, then version 1
    (Path("/sys/fs/cgroup"), "memory.max"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
)


@dataclass(frozen=True)
class Sample:
    """One run. peak_bytes: the most that its process had of memory, but no less than this one had when it began."""

    seconds: float
    peak_bytes: int


def main(
    size_gib: Annotated[list[int] | None, typer.Option(help="Of the checkpoint; may be repeated. Default 4.")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    limit_mib: Annotated[int, typer.Option(help="Memory of the control group that distckpt runs in.")] = 512,
    max_torch_gib: Annotated[int, typer.Option(help="Larger checkpoints are not tried with torch's tools.")] = 4,
    directory: Annotated[Path, typer.Option(help="On the file system to measure.")] = Path("out/reshard"),
    out: Annotated[Path, typer.Option(help="Where reshard.json goes.")] = Path("out/bench"),
    make: Annotated[str, typer.Option(hidden=True, help="Make a source here: kind,gib,dim.")] = "",
) -> None:
    """Exits with 1 if a run failed."""
    if make:
        kind, gib, dim = make.split(",")
        SOURCES[kind](directory, int(gib), int(dim))
        return
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    runs: list[dict[str, Any]] = []
    with memory_limit(limit_mib << 20) as group:
        if group is None:
            console.print("no control group can be made here: memory is not limited")
        for gib in size_gib or [4]:
            for dim in (0, 1):
                runs += measure(console, directory, gib, dim, repeats, group, with_torch=gib <= max_torch_gib)
    record = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": describe_machine(),
        "file_system": describe_file_system(directory),
        "versions": versions(),
        "limit_bytes": None if group is None else limit_mib << 20,
        "runs": runs,
    }
    (out / "reshard.json").write_text(json.dumps(record, indent=1) + "\n")
    print_runs(console, runs)
    console.print(f"written: {out / 'reshard.json'}", highlight=False)


def measure(
    console: Console, directory: Path, gib: int, dim: int, repeats: int, group: Path | None, *, with_torch: bool
) -> list[dict[str, Any]]:
    """All ways, one after the other, `repeats` times."""
    source, dcp, target = directory / "source", directory / "dcp", directory / "target"
    remove(directory)
    directory.mkdir(parents=True)
    run([*python("-m", "benchmarks.reshard"), "--make", f"distckpt,{gib},{dim}", "--directory", str(source)])
    ways: dict[str, Callable[[], Sample]] = {
        "cp": lambda: timed(["cp", "-r", str(source), str(target)]),
        **{f"distckpt, {RANKS} -> {tp}": lambda tp=tp: resharded(source, target, tp, group) for tp in (2, 8)},
    }
    if with_torch:
        torchrun = python("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}")
        make = ["--make", f"dcp,{gib},{dim}", "--directory", str(dcp)]
        run([*torchrun, "-m", "benchmarks.reshard", *make])
        ways["dcp_to_torch_save, torch_save_to_dcp"] = lambda: timed(
            python("-c", DCP_SCRIPT, str(dcp), str(directory / "whole.pt"), str(target))
        )
    samples: dict[str, list[Sample]] = {way: [] for way in ways}
    for repeat in range(repeats):
        for way, once in ways.items():
            drop_from_page_cache(files_below(directory))
            with console.status(f"{gib} GiB cut along dimension {dim}, {way}, {repeat + 1} of {repeats}"):
                samples[way].append(once())
            if repeat == 0 and way.startswith("distckpt"):
                check_equal(source, target)
            remove(target)
            (directory / "whole.pt").unlink(missing_ok=True)
    remove(directory)
    directory.mkdir(parents=True)
    return [
        {"gib": gib, "dim": dim, "way": way, "samples": [asdict(sample) for sample in found]}
        for way, found in samples.items()
    ]


def resharded(source: Path, target: Path, tp: int, group: Path | None) -> Sample:
    command = python("-m", "distckpt.cli", "reshard", str(source), str(target), "--tp", str(tp))
    return timed(command, group)


def check_equal(source: Path, target: Path) -> None:
    run(python("-m", "distckpt.cli", "verify", str(target)))
    run(python("-m", "distckpt.cli", "diff", str(source), str(target)))


def timed(command: Sequence[str], group: Path | None = None) -> Sample:
    """A command, and sync, from start to end."""

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=enter)
    assert process.stderr is not None
    words = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {process.returncode}: {words.decode(errors='replace')[-2000:]}"
        )
    return Sample(seconds, usage.ru_maxrss << 10)


def run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=TIMEOUT_S)


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


@contextmanager
def memory_limit(limit_bytes: int) -> Iterator[Path | None]:
    """A control group with so much memory; None where none can be made."""
    for above, limit in CGROUPS:
        group = above / f"distckpt-benchmark-{os.getpid()}"
        try:
            if not (above / "cgroup.procs").exists():
                continue
            group.mkdir()
            (group / limit).write_text(str(limit_bytes))
        except OSError:
            continue
        try:
            yield group
        finally:
            group.rmdir()
        return
    yield None


def make_distckpt(root: Path, gib: int, dim: int) -> None:
    """A checkpoint of 8 matrices a GiB, saved by RANKS ranks of a tensor-parallel job."""
    shape = [ROWS, COLUMNS]
    shape[dim] //= RANKS
    partition = ("tp", None) if dim == 0 else (None, "tp")
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(shape, generator=generator)

    def save(coordinator: Coordinator) -> None:
        at = coordinator.rank
        state = {
            f"layers.{i}.weight": ShardedTensor.from_rank_offsets(
                f"layers.{i}.weight", data + (i * RANKS + at), (dim, at, RANKS), partition=partition
            )
            for i in range(8 * gib)
        }
        with Checkpointer(root, coordinator=coordinator, mesh={"tp": (at, RANKS)}) as checkpointer:
            checkpointer.save(state, iteration=1)

    run_ranks(RANKS, save, timeout_s=TIMEOUT_S)


def make_dcp(root: Path, gib: int, dim: int) -> None:
    """The same by torch.distributed.checkpoint; in each of RANKS processes."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (RANKS,))
    shape = [ROWS, COLUMNS]
    shape[dim] //= RANKS
    data = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    state = {
        f"layers.{i}.weight": DTensor.from_local(data + (i * RANKS + dist.get_rank()), mesh, [Shard(dim)])
        for i in range(8 * gib)
    }
    dcp.save(state, checkpoint_id=str(root))
    dist.destroy_process_group()


SOURCES: dict[str, Callable[[Path, int, int], None]] = {"distckpt": make_distckpt, "dcp": make_dcp}
DCP_SCRIPT = """
import sys
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp
dcp_to_torch_save(sys.argv[1], sys.argv[2])
torch_save_to_dcp(sys.argv[2], sys.argv[3])
"""


def print_runs(console: Console, runs: Sequence[dict[str, Any]]) -> None:
    table = Table("checkpoint", "way", "seconds", "spread", "GB/s", "speed of cp", "peak memory")
    for one in runs:
        base = next(r for r in runs if (r["gib"], r["dim"], r["way"]) == (one["gib"], one["dim"], "cp"))
        seconds = _seconds(one)
        peak = max(sample["peak_bytes"] for sample in one["samples"])
        table.add_row(
            f"{one['gib']} GiB, dimension {one['dim']}",
            str(one["way"]),
            f"{median(seconds):.2f}",
            f"{min(seconds):.2f} to {max(seconds):.2f}",
            f"{int(str(one['gib'])) * 1.073741824 / median(seconds):.2f}",
            f"{median(_seconds(base)) / median(seconds):.2f}",
            "" if one is base else f"{peak / 1e6:.0f} MB",  # cp takes less than can be seen.
        )
    console.print(table)


def _seconds(one: dict[str, Any]) -> list[float]:
    return [sample["seconds"] for sample in one["samples"]]


if __name__ == "__main__":
    typer.run(main)
