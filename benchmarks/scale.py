"""`python -m benchmarks.scale`: what rank 0 does for a large world, and what a load does of its metadata, without data.

Every message is encoded and decoded as the ranks' agreement does it. Each size runs in a process of its own, so that
its peak memory is its own; DCP's planner and metadata do as much of the same as there is in them.
"""

from __future__ import annotations

import json
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import commit, describe_machine, versions
from benchmarks.scale_dcp import global_plan, local_plans, metadata_file, read_items
from benchmarks.world import COLUMNS, ROWS, World
from distckpt.assembling import Commitment, Written, chunk_records, index_of
from distckpt.index import ShardFile, decode_index, encode_index
from distckpt.planner import RankShards, RankValues, SavePlan, check_replicas, join_values, plan_save
from distckpt.reader import StoredTensors, plan_reads
from distckpt.shard_file import BLOCK_BYTES, file_name
from distckpt.testing import MemoryStorage
from distckpt.wanted_tensor import WantedTensor

SIZES = ((64, 10_000, 1), (256, 100_000, 1), (1024, 1_000_000, 1), (1024, 1_250_000, 8), (16_384, 10_000_000, 1))
DIRECTORY, SAVE_ID = "iter_0000001", "5" * 32
HEADER_BYTES = 1 << 20


class Offer(msgspec.Struct, frozen=True):
    """A rank's message before a save."""

    shards: RankShards
    values: RankValues


class Order(msgspec.Struct, frozen=True):
    """Rank 0's answer to each."""

    shards: bytes
    replicated: bytes
    per_rank: list[str]


@dataclass
class Measured:
    """CPU seconds (nothing here waits), and peak memory of the process so far, by step; and facts by name."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        started = time.process_time()
        yield
        self.seconds[name] = time.process_time() - started
        self.peak_bytes[name] = peak_memory_bytes()


def peak_memory_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_distckpt(world: World) -> Measured:
    """A whole save and load of the metadata: rank 0's part of all, and one rank's part of a load."""
    measured = Measured()
    with measured.step("encode offers, all ranks"):
        offers = [msgspec.msgpack.encode(Offer(*message)) for message in world.messages()]
    plan = _plan(measured, offers)
    del offers
    with measured.step("encode orders"):
        orders = [
            msgspec.msgpack.encode(Order(plan.shards_of(r).tobytes(), plan.replicated_of(r).tobytes(), keys))
            for r, keys in enumerate(map(plan.per_rank_keys_of, range(world.ranks)))
        ]
    measured.facts["orders_bytes"] = sum(map(len, orders))
    del orders
    index, table_name, table = _assemble(measured, world, plan)
    chunks = sum(len(columns.tensor) for columns in plan.columns)
    measured.facts |= {"chunks": chunks, "index_bytes": len(index), "table_bytes": len(table)}
    measured.facts["bytes_a_chunk"] = (len(index) + len(table)) / chunks
    measured.facts["largest_over_mean"] = float(plan.bytes_by_rank.max() / plan.bytes_by_rank.mean())
    del plan
    _load(measured, world, index, table_name, table)
    return measured


def metadata_of(world: World) -> tuple[bytes, str, bytes]:
    """The index of a checkpoint of such a world, and name and content of its chunk table."""
    measured = Measured()
    plan = _plan(measured, [msgspec.msgpack.encode(Offer(*message)) for message in world.messages()])
    return _assemble(measured, world, plan)


def _plan(measured: Measured, offers: Sequence[bytes]) -> SavePlan:
    measured.facts["offers_bytes"] = sum(map(len, offers))
    with measured.step("decode offers"):
        decoded = [msgspec.msgpack.decode(offer, type=Offer) for offer in offers]
    with measured.step("plan"):
        plan = plan_save([offer.shards for offer in decoded])
    with measured.step("join values"):
        join_values(plan, [offer.values for offer in decoded])
    samples = [bytes(4 * len(plan.replicated_of(rank))) for rank in range(len(offers))]
    with measured.step("compare replicas"):
        check_replicas(plan, samples)
    return plan


def _assemble(measured: Measured, world: World, plan: SavePlan) -> tuple[bytes, str, bytes]:
    """The index, and name and content of the chunk table."""
    reports = [msgspec.msgpack.encode(_written(world, plan, rank)) for rank in range(world.ranks)]
    measured.facts["reports_bytes"] = sum(map(len, reports))
    with measured.step("decode reports"):
        written = [msgspec.msgpack.decode(report, type=Written) for report in reports]
    with measured.step("chunk table"):
        records = chunk_records(plan, written)
    with measured.step("index"):
        who = Commitment(SAVE_ID, 1, 1, 1, None, world.ranks, b"null")
        encoded = encode_index(index_of(who, plan, {}, written, records))
    return encoded, records.table(SAVE_ID).name, records.content


def _written(world: World, plan: SavePlan, rank: int) -> Written:
    """What a rank would report, of one file in which its shards follow each other."""
    shards = plan.shards_of(rank)
    item_bytes = np.where(shards < world.shards, 4, 2)
    ends = HEADER_BYTES + np.cumsum(ROWS * COLUMNS * item_bytes)
    end = int(ends[-1]) if len(ends) else HEADER_BYTES
    file = ShardFile(
        name=file_name(rank, 0, world.ranks, SAVE_ID),
        size_bytes=end + 128 - (-(end + 128) // BLOCK_BYTES) * 4,
        header_bytes=HEADER_BYTES,
        header_crc=rank,
        checksum_start=end + 128,
        table_crc=rank,
        per_rank=(end, 128),
        rank=rank,
        mesh={axis: at for axis, (at, _) in world.mesh(rank).items()},
    )
    starts = ends - ROWS * COLUMNS * item_bytes
    return Written([file], np.zeros(len(shards), np.int32).tobytes(), starts.astype(np.int64).tobytes(), b"", {})


def _load(measured: Measured, world: World, encoded: bytes, table_name: str, table: bytes) -> None:
    storage = MemoryStorage()
    storage.make_directory(DIRECTORY)
    storage.replace(f"{DIRECTORY}/{table_name}", table)
    wanted = [WantedTensor(key, box, torch.empty(box.shape, dtype=_dtype(key))) for key, box in world.targets()]
    keys = sorted(w.key for w in wanted)
    with measured.step("open index"):
        index = decode_index(encoded, name="index")
    with measured.step("read chunk table"):
        stored = StoredTensors.read(storage, DIRECTORY, index, keys)
    with measured.step("plan load"):
        reads = plan_reads(stored, [one.in_memory() for one in wanted])
    measured.facts["tensors_loaded"] = len(wanted)
    measured.facts["regions_loaded"] = sum(len(of_file.targets) for of_file in reads)
    measured.facts["files_read"] = len(reads)


def _dtype(key: str) -> torch.dtype:
    return torch.bfloat16 if key.startswith("model.") else torch.float32


def measure_dcp(world: World) -> Measured:
    """The same of torch.distributed.checkpoint, as far as there is such a thing in it."""
    measured = Measured()
    with measured.step("encode offers, all ranks"):
        offers = [pickle.dumps(plan) for plan in local_plans(world)]
    measured.facts["offers_bytes"] = sum(map(len, offers))
    with measured.step("decode offers"):
        plans = [pickle.loads(offer) for offer in offers]
    del offers
    with measured.step("plan"):
        ordered, metadata = global_plan(plans)
    del plans
    with measured.step("encode orders"):
        orders = [pickle.dumps(plan) for plan in ordered]
    measured.facts["orders_bytes"] = sum(map(len, orders))
    del orders
    with measured.step("index"):
        index = metadata_file(ordered, metadata)
    chunks = sum(len(plan.items) for plan in ordered)
    measured.facts |= {"chunks": chunks, "index_bytes": len(index), "bytes_a_chunk": len(index) / chunks}
    del metadata, ordered
    with measured.step("open index"):
        metadata = pickle.loads(index)
    with measured.step("plan load"):
        measured.facts["regions_loaded"] = len(read_items(metadata, world))
    return measured


ENGINES: dict[str, Callable[[World], Measured]] = {"distckpt": measure_distckpt, "DCP": measure_dcp}


def main(
    ranks: Annotated[list[int] | None, typer.Option(help="World sizes, powers of two; with --chunks.")] = None,
    chunks: Annotated[list[int] | None, typer.Option(help="About as many distinct boxes, one for each size.")] = None,
    replicas: Annotated[list[int] | None, typer.Option(help="Ranks that hold each optimizer box; default 1.")] = None,
    dcp_chunks: Annotated[int, typer.Option(help="Larger worlds than this are not tried with DCP.")] = 1_000_000,
    out: Annotated[Path, typer.Option(help="Where scale.json goes.")] = Path("out/bench"),
    timeout_s: Annotated[float, typer.Option(help="Of one size and engine.")] = 1800.0,
    engine: Annotated[str, typer.Option(hidden=True, help="Measure here, print JSON.")] = "",
) -> None:
    """Without options a list of sizes is measured. Exits with 1 if one failed."""
    sizes = list(zip(ranks or (), chunks or (), replicas or [1] * len(ranks or ()), strict=True)) or list(SIZES)
    if engine:
        print(json.dumps(asdict(ENGINES[engine](World(*sizes[0])))))
        return
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    runs = []
    for size in sizes:
        for name in ENGINES:
            run: dict[str, object] = {"engine": name, **asdict(World(*size))}
            if name == "DCP" and size[1] * size[2] > dcp_chunks:
                run["skipped"] = f"more than {dcp_chunks:,} shards: not tried"
            else:
                with console.status(f"{name}, {size[0]:,} ranks, {size[1]:,} chunks"):
                    run |= _measure_apart(name, size, timeout_s)
            runs.append(run)
    record = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": describe_machine(),
        "versions": versions(),
        "runs": runs,
    }
    (out / "scale.json").write_text(json.dumps(record, indent=1) + "\n")
    print_runs(console, runs)
    console.print(f"written: {out / 'scale.json'}", highlight=False)
    if any("failed" in run for run in runs):
        raise typer.Exit(1)


def _measure_apart(engine: str, size: Sequence[int], timeout_s: float) -> dict[str, object]:
    """In a process of its own, whose peak memory is then that of this size."""
    options = [f"--{name}={n}" for name, n in zip(("ranks", "chunks", "replicas"), size, strict=True)]
    command = [sys.executable, "-m", "benchmarks.scale", *options, f"--engine={engine}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {timeout_s:.0f} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    return dict(json.loads(done.stdout))


def print_runs(console: Console, runs: Sequence[dict[str, Any]]) -> None:
    table = Table(caption="CPU seconds; peak memory so far in GB; rank 0's unless said otherwise", show_lines=False)
    table.add_column("")
    for run in runs:
        replicas = f"\nx {run['replicas']} replicas" if run["replicas"] > 1 else ""
        head = f"{run['engine']}\n{run['ranks']:,} ranks\n{run['chunks']:,} chunks{replicas}"
        table.add_column(head, justify="right", no_wrap=True)
    for step in dict.fromkeys(step for run in runs for step in run.get("seconds", ())):
        table.add_row(step, *(_seconds(run, step) for run in runs))
    table.add_section()
    for fact in dict.fromkeys(fact for run in runs for fact in run.get("facts", ())):
        table.add_row(fact.replace("_", " "), *(_fact(run.get("facts", {}).get(fact)) for run in runs))
    console.print(table)
    for run in runs:
        if why := run.get("skipped") or run.get("failed"):
            console.print(f"{run['engine']}, {run['ranks']:,} ranks, {run['chunks']:,} chunks: {why}", markup=False)


def _seconds(run: dict[str, Any], step: str) -> str:
    if step not in run.get("seconds", ()):
        return ""
    return f"{run['seconds'][step]:.3f}  {run['peak_bytes'][step] / 1e9:5.2f}"


def _fact(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3f}"


if __name__ == "__main__":
    typer.run(main)
