"""`python -m benchmarks`: measure the engines and the machine's limits in one run, and report them."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, TypeVar, get_args

import typer
from rich.console import Console

from benchmarks.comparison import compare
from benchmarks.engines import ENGINES
from benchmarks.figures import KINDS
from benchmarks.layout import Layout
from benchmarks.machine import commit, core_count, describe_file_system, describe_machine, versions
from benchmarks.model import Model, Precision
from benchmarks.plan import Section, plan_sections
from benchmarks.report import read_record, write_report
from benchmarks.report.terminal import print_record
from benchmarks.results import Record
from benchmarks.runs import Bench

LOG_WIDTH = 150  # characters, where no terminal says how wide it is
Name = TypeVar("Name", bound=str)

app = typer.Typer(add_completion=False)


@app.command()
def main(
    size_gb: Annotated[float, typer.Option(min=0.001, help="State of all ranks, in 1e9 bytes.")] = 2.2,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel size.")] = 2,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline-parallel size.")] = 2,
    dp: Annotated[int, typer.Option(min=1, help="Data-parallel size; the ranks are tp x pp x dp.")] = 1,
    precision: Annotated[str, typer.Option(help="mixed, fp32, or both; all but sync take the first.")] = ("mixed,fp32"),
    figures: Annotated[str, typer.Option(help="Kinds of figures, separated by commas.")] = ",".join(KINDS),
    engines: Annotated[str, typer.Option(help="Names, separated by commas.")] = ",".join(ENGINES),
    repeats: Annotated[int, typer.Option(min=1, help="Of each figure, after the first save.")] = 5,
    small_tensors: Annotated[int, typer.Option(min=1, help="Of 4 KiB, over all ranks.")] = 50_000,
    directory: Annotated[Path, typer.Option(help="Made if missing; its file system is measured.")] = Path("out/bench"),
    out: Annotated[Path, typer.Option(help="Where the report goes: json, md, html, png.")] = Path("out/bench"),
    timeout_s: Annotated[float, typer.Option(help="Of one job of one engine.")] = 600.0,
    render: Annotated[Path | None, typer.Option(help="Measure nothing: report this results.json again.")] = None,
) -> None:
    """Exits with 1 if an engine failed; one that is not installed is skipped and named."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # As Ctrl-C: jobs end, files go.
    kinds = _names(figures, KINDS, "--figures")
    engine_names = _names(engines, ENGINES, "--engines")
    precisions = _names(precision, get_args(Precision), "--precision")
    for path in (directory, out):
        path.mkdir(parents=True, exist_ok=True)
    console = Console()
    if not console.is_terminal:
        console.width = LOG_WIDTH
    if render is None:
        layout = Layout(tp=tp, pp=pp, dp=dp)
        model = Model(precision=precisions[0], size_bytes=round(size_gb * 1e9), small_tensors=small_tensors)
        sections = list(plan_sections(kinds, layout, model, precisions, core_count()))
        bench = Bench(repeats, directory.resolve(), timeout_s)
        record = _measure(bench, sections, engine_names, lambda text: console.log(text, highlight=False))
    else:
        record = read_record(render)
    print_record(console, record)
    console.print(f"written: {', '.join(map(str, write_report(record, out)))}", highlight=False)
    if any(result.failure for section in record.sections for result in section.engines.values()):
        raise typer.Exit(1)


def _measure(bench: Bench, sections: Iterable[Section], engines: list[str], tell: Callable[[str], None]) -> Record:
    start = time.monotonic()
    results = compare(bench, sections, engines, tell)
    return Record(
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=" ".join(["python -m benchmarks", *sys.argv[1:]]),
        commit=commit(),
        machine=describe_machine(),
        file_system=describe_file_system(bench.directory),
        versions=versions(),
        repeats=bench.repeats,
        duration_s=time.monotonic() - start,
        sections=results,
    )


def _names(text: str, known: Iterable[Name], option: str) -> list[Name]:
    """The known names in a list with commas. Raises typer.BadParameter for another."""
    by_name = {str(name): name for name in known}
    names = [name.strip() for name in text.split(",")]
    if unknown := sorted(set(names) - by_name.keys()):
        raise typer.BadParameter(f"{', '.join(unknown)}; there are {', '.join(by_name)}", param_hint=option)
    return [by_name[name] for name in names]


if __name__ == "__main__":
    app()
