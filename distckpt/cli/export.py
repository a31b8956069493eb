"""distckpt export: a checkpoint in a format of others."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from distckpt.cli.interruption import leaving
from distckpt.cli.output import DROP, MEMORY, ROOT, SELECT, WHICH, console, counted, print_json, progress_bar, size_text
from distckpt.cli.quantities import dtype_name, size_bytes
from distckpt.exchange.export_source import ExportSource
from distckpt.exchange.exporting import write_safetensors, write_zarr
from distckpt.report import ExportReport


class Format(str, Enum):
    zarr = "zarr"
    safetensors = "safetensors"


class Compressed(str, Enum):
    zstd = "zstd"
    none = "none"


# Of both commands.
JOBS = "How many threads; the processors if not given, fewer where the memory is little."


def export(
    root: Annotated[Path, typer.Argument(help=ROOT)],
    target: Annotated[Path, typer.Argument(help="The directory to make; nothing may be there.")],
    to: Annotated[Format, typer.Option(help="A zarr v3 group, or safetensors files of whole tensors.")],
    iteration: Annotated[str | None, typer.Option(help=WHICH, show_default=False)] = None,
    select: Annotated[
        list[str] | None,
        typer.Option(help=SELECT, show_default=False),
    ] = None,
    drop: Annotated[list[str] | None, typer.Option(help=DROP, show_default=False)] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Round floating-point tensors to bf16, fp16, fp32 or another type by its name in torch.",
            show_default=False,
        ),
    ] = None,
    compression: Annotated[
        Compressed | None, typer.Option(help="Of the chunks in zarr; zstd if not given.", show_default=False)
    ] = None,
    max_file_size: Annotated[
        str | None, typer.Option(help="Of a safetensors file; 5GB if not given.", show_default=False)
    ] = None,
    strip: Annotated[
        str | None,
        typer.Option(help="Leave this out where a key begins with it, in names in safetensors.", show_default=False),
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            help="OLD=NEW: replace a text in names in safetensors; several times: in this order.", show_default=False
        ),
    ] = None,
    memory: Annotated[str, typer.Option(help=MEMORY)] = "256MiB",
    jobs: Annotated[int | None, typer.Option(help=JOBS, min=1, show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Make a zarr group, or safetensors files as Hugging Face has them, of one checkpoint, every byte checked.

    The target appears when it is whole. A zarr group has all that the checkpoint has, and `distckpt import` takes it
    back bit by bit; safetensors files have the tensors only.

    Example: distckpt export run7 run7-hf --to safetensors --select 'model/*' --strip model/ --dtype bf16
    """
    _check_options(to, compression=compression, max_file_size=max_file_size, strip=strip, rename=rename)
    wanted = None if dtype is None else dtype_name(dtype)
    source = ExportSource.open(root, iteration, select=select or (), drop=drop or (), dtype=wanted)
    memory_bytes = size_bytes(memory)
    with (
        leaving(f"{target} was not made"),
        progress_bar(f"export iteration {source.index.iteration}", source.size_bytes) as on_bytes,
    ):
        if to is Format.zarr:
            report = write_zarr(
                source,
                target,
                compression=(compression or Compressed.zstd).value,
                memory_bytes=memory_bytes,
                jobs=jobs,
                on_bytes=on_bytes,
            )
        else:
            report = write_safetensors(
                source,
                target,
                strip=strip or "",
                rename=[_replacement(text) for text in rename or ()],
                max_file_bytes=size_bytes(max_file_size or "5GB"),
                memory_bytes=memory_bytes,
                jobs=jobs,
                on_bytes=on_bytes,
            )
    if json:
        print_json(report)
    else:
        _print_report(report)


def _check_options(to: Format, **given: object) -> None:
    others = ("max_file_size", "strip", "rename") if to is Format.zarr else ("compression",)
    for name in others:
        if given[name]:
            raise typer.BadParameter(f"--{name.replace('_', '-')} is not for --to {to.value}")


def _replacement(text: str) -> tuple[str, str]:
    old, is_there, new = text.partition("=")
    if not old or not is_there:
        raise typer.BadParameter(f"--rename {text!r}: expected OLD=NEW")
    return old, new


def _print_report(report: ExportReport) -> None:
    without = f"; {counted(report.left_out, 'value')} left out" if report.left_out else ""
    console.print(
        f"iteration {report.iteration}: {counted(report.tensors, 'tensor')}, {size_text(report.bytes)}, in "
        f"{counted(report.files, 'file')}; "
        f"{report.total_s:.1f} s{without}"
    )
