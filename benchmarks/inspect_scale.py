"""`python -m benchmarks.inspect_scale`: how long `distckpt inspect` takes on a checkpoint of a million chunks.

The checkpoint is that of a simulated world (benchmarks.world): its index and chunk table are real, its shard files have
their length and nothing in them. Each command is a process of its own, start-up included, and the checkpoint lies in
the page cache.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import commit, describe_machine, versions
from benchmarks.scale import DIRECTORY, metadata_of
from benchmarks.world import World
from distckpt.index import decode_index

PAGE = "page.html"
COMMANDS: dict[str, list[str]] = {
    "start-up alone (--help)": ["--help"],
    "summary": [],
    "summary, --json": ["--json"],
    "20 largest tensors": ["--tensors", "--sort", "size", "--top", "20"],
    "all tensors": ["--tensors"],
    "all tensors, --json": ["--tensors", "--json"],
    "all ranks": ["--ranks"],
    "page": ["--html", PAGE],
}


@dataclass(frozen=True)
class Timing:
    """Medians and ranges over the runs. wall_s counts what else the machine does; cpu_s: user and system."""

    wall_s: float
    wall_range_s: tuple[float, float]
    cpu_s: float
    cpu_range_s: tuple[float, float]
    printed_bytes: int


def write_checkpoint(root: Path, world: World) -> dict[str, int]:
    """The checkpoint of a world under a root; how much there is of what."""
    index, table_name, table = metadata_of(world)
    directory = root / DIRECTORY
    directory.mkdir(parents=True)
    (directory / table_name).write_bytes(table)
    (directory / "index-000001-000001.json").write_bytes(index)
    (root / "latest_checkpointed_iteration.txt").write_text("1")
    decoded = decode_index(index, name="index")
    for file in decoded.files:
        with (directory / file.name).open("wb") as hollow:
            hollow.truncate(file.size_bytes)
    sizes = {"index_bytes": len(index), "table_bytes": len(table)}
    return {"tensors": len(decoded.tensors), "files": len(decoded.files), **sizes}


def measure(root: Path, options: list[str], runs: int) -> Timing:
    """Run `distckpt inspect ROOT` with these options, in a directory of its own."""
    command = [sys.executable, "-m", "distckpt.cli", "inspect", str(root), *options]
    wall, cpu = [], []
    printed = b""
    for _ in range(runs):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        printed = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
        wall.append(time.perf_counter() - started)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    ranges = (min(wall), max(wall)), (min(cpu), max(cpu))
    return Timing(statistics.median(wall), ranges[0], statistics.median(cpu), ranges[1], len(printed))


def main(
    ranks: Annotated[int, typer.Option(help="Of the world, a power of two.")] = 1024,
    chunks: Annotated[int, typer.Option(help="About as many.")] = 1_000_000,
    runs: Annotated[int, typer.Option(help="Of each command.")] = 5,
    out: Annotated[Path, typer.Option(help="Where inspect_scale.json goes.")] = Path("out/bench"),
) -> None:
    """Make the checkpoint, time the commands, print a table and write JSON."""
    console = Console()
    with tempfile.TemporaryDirectory(prefix="inspect-scale-") as scratch:
        root = Path(scratch) / "run"
        facts = write_checkpoint(root, World(ranks, chunks))
        timings: dict[str, Timing] = {}
        for name, options in COMMANDS.items():
            with console.status(name):
                given = [str(Path(scratch) / PAGE) if option == PAGE else option for option in options]
                timings[name] = measure(root, given, runs)
        facts["page_bytes"] = (Path(scratch) / PAGE).stat().st_size
    record = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": describe_machine(),
        "versions": versions(),
        "world": asdict(World(ranks, chunks)),
        "facts": facts,
        "timings": {name: asdict(timing) for name, timing in timings.items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "inspect_scale.json").write_text(json.dumps(record, indent=1) + "\n")
    table = Table("distckpt inspect", "wall s", "", "CPU s", "", "printed", caption=f"{facts}; medians and ranges")
    for name, timing in timings.items():
        spreads = [f"{low:.2f}-{high:.2f}" for low, high in (timing.wall_range_s, timing.cpu_range_s)]
        wall, cpu = f"{timing.wall_s:.2f}", f"{timing.cpu_s:.2f}"
        table.add_row(name, wall, spreads[0], cpu, spreads[1], f"{timing.printed_bytes:,}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
