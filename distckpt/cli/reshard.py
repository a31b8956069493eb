"""distckpt reshard: a checkpoint for another number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from distckpt.cli.inspect_text import split_text
from distckpt.cli.interruption import leaving
from distckpt.cli.numbers import shape_text
from distckpt.cli.output import (
    DROP,
    SELECT,
    WHICH,
    console,
    counted,
    plain_text,
    print_json,
    print_table,
    progress_bar,
    shown,
    size_text,
)
from distckpt.cli.quantities import dtype_name, size_bytes
from distckpt.coordinator import launched_coordinator
from distckpt.report import ReshardReport
from distckpt.resharding.job import reshard as reshard_root
from distckpt.resharding.plan_file import ReshardPlan, StageRule, read_plan
from distckpt.resharding.planning import ReshardPreview, preview_reshard

_MAX_SHOWN = 40


def reshard(
    source: Annotated[Path, typer.Argument(help="The root to read from, or the directory of one iteration.")],
    target: Annotated[Path, typer.Argument(help="The root to write to; made if it is missing.")],
    tp: Annotated[
        int | None, typer.Option(help="Tensor-parallel size; 1 if not given.", min=1, show_default=False)
    ] = None,
    pp: Annotated[
        int | None, typer.Option(help="Pipeline-parallel size; 1 if not given.", min=1, show_default=False)
    ] = None,
    dp: Annotated[
        int | None, typer.Option(help="Data-parallel size; 1 if not given.", min=1, show_default=False)
    ] = None,
    ep: Annotated[
        int | None, typer.Option(help="Expert-parallel size; 1 if not given.", min=1, show_default=False)
    ] = None,
    cp: Annotated[
        int | None, typer.Option(help="Context-parallel size; 1 if not given.", min=1, show_default=False)
    ] = None,
    axis: Annotated[
        list[str] | None,
        typer.Option(help="NAME=SIZE, of a mesh axis with another name. May be repeated.", show_default=False),
    ] = None,
    pp_layers: Annotated[
        str | None,
        typer.Option(
            help="How many layers each pipeline stage gets: 7,6,6,5. Equally many if not given.", show_default=False
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="JSON: what the checkpoint does not record, and other wishes (docs/cli.md).", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Convert floating-point tensors: bf16, fp16, fp32, fp64.", show_default=False),
    ] = None,
    select: Annotated[list[str] | None, typer.Option(help=SELECT, show_default=False)] = None,
    drop: Annotated[list[str] | None, typer.Option(help=DROP, show_default=False)] = None,
    iteration: Annotated[str | None, typer.Option(help=WHICH, show_default=False)] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="How much each process takes, whatever the size of the checkpoint: 1GB. If nothing is said 256MiB, "
            "and 84MiB for each thread of more than three.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Threads of each process.", min=1)] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the layout, the bytes of each rank and the memory; write nothing.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Rewrite a checkpoint for another mesh: other tensor-, pipeline-, data-, expert- or context-parallel sizes.

    Axes that are not named get size 1. The source is only read; every block of it is checked, and read once. The
    target is committed as a save is. Cut short, the same command goes on where it stopped. It may also run as several
    processes, by mpirun or torchrun, on several machines.

    Example: distckpt reshard /checkpoints/run7 /checkpoints/run7-tp4pp2 --tp 4 --pp 2

    Example: distckpt reshard run7 weights --tp 8 --select 'model.*' --dtype bf16
    """
    mesh = _mesh({"tp": tp, "cp": cp, "ep": ep, "dp": dp, "pp": pp}, axis or [])
    wishes = _with_layers(ReshardPlan() if plan is None else read_plan(plan), pp_layers)
    wanted = None if dtype is None else dtype_name(dtype)
    memory_bytes = None if memory is None else size_bytes(memory)
    if dry_run:
        preview = preview_reshard(
            source,
            mesh,
            iteration=iteration,
            plan=wishes,
            select=select or (),
            drop=drop or (),
            dtype=wanted,
            memory_bytes=memory_bytes,
            jobs=jobs,
        )
        print_json(preview) if json else _print_preview(preview)
        return
    coordinator = launched_coordinator()
    is_first, world_size = coordinator.rank == 0, coordinator.world_size
    # Rank 0 speaks for all, and of its own part.
    what = "reshard" if world_size == 1 else f"reshard, rank 0 of {world_size}"
    left = f"what is whole stays in {target}; the same command goes on from there, or says that it is done"
    with closing(coordinator), leaving(left), progress_bar(what, 0, is_shown=is_first) as on_bytes:
        report = reshard_root(
            source,
            target,
            mesh,
            iteration=iteration,
            plan=wishes,
            select=select or (),
            drop=drop or (),
            dtype=wanted,
            memory_bytes=memory_bytes,
            jobs=jobs,
            coordinator=coordinator,
            on_bytes=on_bytes,
            on_plan=lambda preview: on_bytes.expect(preview.bytes // world_size),
        )
    if is_first:
        print_json(report) if json else _print_report(report)


def _mesh(named: Mapping[str, int | None], others: list[str]) -> dict[str, int]:
    """Axis -> size of what was given. Raises ValueError."""
    mesh = {axis: size for axis, size in named.items() if size is not None}
    for text in others:
        name, equals, size = text.partition("=")
        if not name or not equals or not size.isdecimal() or len(size) > 9 or int(size) < 1:
            raise ValueError(f"--axis {text}: expected NAME=SIZE, such as fsdp=8")
        if name in mesh:
            raise ValueError(f"--axis {text}: axis {name!r} was given twice")
        mesh[name] = int(size)
    if not mesh:
        raise typer.BadParameter("say for which mesh: at least one of --tp, --pp, --dp, --ep, --cp or --axis")
    return mesh


def _with_layers(plan: ReshardPlan, pp_layers: str | None) -> ReshardPlan:
    if pp_layers is None:
        return plan
    numbers = pp_layers.split(",")
    if not all(number.strip().isdecimal() and len(number) < 10 for number in numbers):
        raise ValueError(f"--pp-layers {pp_layers}: expected a number for each stage, such as 7,6,6,5")
    known = plan.stages.get("pp", StageRule())
    rule = StageRule(numbered_by=known.numbered_by, counts=tuple(map(int, numbers)))
    return ReshardPlan(stages={**plan.stages, "pp": rule}, tensors=plan.tensors)


def _print_preview(preview: ReshardPreview) -> None:
    mesh = " ".join(f"{axis}={size}" for axis, size in preview.mesh.items())
    console.print(
        plain_text(
            f"would write iteration {preview.iteration} for {mesh}: ranks: {preview.world_size}; "
            f"tensors: {len(preview.tensors)}, "
            f"{size_text(preview.bytes)}; memory of each process: {size_text(preview.memory_bytes)}"
        )
    )
    tensors = Table("tensor", "dtype", "shape", "split by", "held by", "chunks", box=None, pad_edge=False)
    for tensor in preview.tensors[:_MAX_SHOWN]:
        split = split_text(tensor.partition or (), tensor.blocks or (), None)
        held = "" if tensor.owner is None else f"{tensor.owner} {tensor.at}"
        tensors.add_row(
            shown(tensor.key),
            tensor.dtype,
            shape_text(tensor.shape),
            plain_text(split),
            plain_text(held),
            str(tensor.chunks),
        )
    console.print()
    print_table(tensors)
    if len(preview.tensors) > _MAX_SHOWN:
        console.print(f"... and {len(preview.tensors) - _MAX_SHOWN} more tensors (--json has all)")
    ranks = Table("rank", "place", "tensors", "size", box=None, pad_edge=False)
    for rank in preview.ranks:
        place = " ".join(f"{axis}={at}" for axis, at in rank.mesh.items())
        ranks.add_row(str(rank.rank), plain_text(place), str(rank.tensors), size_text(rank.bytes))
    console.print()
    print_table(ranks)
    if preview.left_out:
        console.print(f"left out: {counted(len(preview.left_out), 'key')}, {shown(preview.left_out[0])} first")
    for note in preview.notes:
        console.print(shown(note, 1000))


def _print_report(report: ReshardReport) -> None:
    mesh = " ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    if report.is_there:
        console.print(plain_text(f"iteration {report.iteration} is in {report.target} already, for {mesh}"))
        return
    speed = size_text(round(report.bytes_written / max(report.total_s, 1e-9)))
    went_on = f", {size_text(report.bytes_written)} of it now" if report.is_resumed else ""
    console.print(
        plain_text(
            f"iteration {report.iteration} for {mesh}: {counted(report.files, 'file')}, "
            f"{size_text(report.bytes)}{went_on} in "
            f"{report.total_s:.1f} s ({speed}/s); peak memory {size_text(report.peak_rss_bytes)}"
        )
    )
    for note in report.notes:
        console.print(shown(note, 1000))
