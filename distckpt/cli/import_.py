"""distckpt import: a zarr group or safetensors files as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distckpt.cli.export import JOBS, Format
from distckpt.cli.interruption import leaving
from distckpt.cli.output import MEMORY, console, counted, print_json, progress_bar, size_text
from distckpt.cli.quantities import size_bytes
from distckpt.exchange.export_source import threads_and_memory
from distckpt.exchange.import_commit import Incoming, commit_incoming
from distckpt.exchange.importing import open_safetensors, open_zarr
from distckpt.report import ImportReport


def import_(
    source: Annotated[
        Path, typer.Argument(help="A zarr group; or a safetensors file, the index of several, or their directory.")
    ],
    root: Annotated[Path, typer.Argument(help="The root to make. It may hold no checkpoint.")],
    from_: Annotated[Format, typer.Option("--from", help="What the source is.")],
    iteration: Annotated[
        int | None,
        typer.Option(help="That of the checkpoint; as exported if not given, or else 0.", min=0, show_default=False),
    ] = None,
    prefix: Annotated[
        str, typer.Option(help='Put before each name: with model/ a state has them below "model".', show_default=False)
    ] = "",
    drop: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave out arrays of a foreign zarr group whose path matches (* ? [...]).", show_default=False
        ),
    ] = None,
    memory: Annotated[str, typer.Option(help=MEMORY)] = "256MiB",
    jobs: Annotated[int | None, typer.Option(help=JOBS, min=1, show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Make a checkpoint, in a root of its own, of a zarr group or of safetensors files.

    What `distckpt export --to zarr` made comes back as it was, values and what differs by rank included. Of any other
    zarr group arrays become tensors and attributes values. The checkpoint is there when it is whole.

    Example: distckpt import meta-llama/Llama-3.1-8B /checkpoints/base --from safetensors --prefix model/
    """
    threads, memory_bytes = threads_and_memory(size_bytes(memory), jobs)
    if from_ is Format.zarr:
        incoming, own = open_zarr(source, prefix=prefix, drop=drop or (), memory_bytes=memory_bytes)
        report = _commit(root, incoming, own if iteration is None else iteration, source, threads)
    else:
        if drop:
            raise typer.BadParameter("--drop is not for --from safetensors")
        report = _commit(root, open_safetensors(source, prefix=prefix), iteration or 0, source, threads)
    if json:
        print_json(report)
    else:
        console.print(
            f"iteration {report.iteration}: {counted(report.tensors, 'tensor')} and "
            f"{counted(report.values, 'value')}, "
            f"{size_text(report.bytes)} in {report.total_s:.1f} s"
        )


def _commit(root: Path, incoming: Incoming, iteration: int, source: Path, jobs: int) -> ImportReport:
    left = f"{root} has no checkpoint of it; a later save or prune there sweeps what was written"
    with leaving(left), progress_bar(f"import iteration {iteration}", incoming.size_bytes) as on_bytes:
        return commit_incoming(root, incoming, iteration, source=str(source), jobs=jobs, on_bytes=on_bytes)
