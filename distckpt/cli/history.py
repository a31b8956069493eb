"""distckpt history: what was saved, loaded and copied under a root, and how long that took."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from distckpt.cli.history_plot import plot_history
from distckpt.cli.output import ROOT, console, plain_text, print_json, print_table, size_text
from distckpt.cli.whole_file import whole_file
from distckpt.history_log import HistoryLine, read_history
from distckpt.report import CopyReport, SaveReport
from distckpt.roots import open_root


def history(
    root: Annotated[Path, typer.Argument(help=ROOT)],
    last: Annotated[int | None, typer.Option(min=1, help="Only the last so many lines.", show_default=False)] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw stall, seconds and bytes over time into this PNG.", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON for each.")] = False,
) -> None:
    """Show the saves, loads and copies of a root, or of one iteration, oldest first, from its history.jsonl.

    Seconds are rank 0's; "slowest" is the phase that kept any rank busy for longest, and that rank.

    Example: distckpt history /checkpoints/run7 --last 50 --plot history.png
    """
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is no directory")
    storage, only = open_root(root)
    found = read_history(storage)
    lines = [line for line in found.lines if only is None or line.iteration == only]
    lines = lines if last is None else lines[-last:]
    if json:
        for line in lines:
            print_json(line)
    elif lines:
        print_table(_table(lines))
    else:
        console.print(f"{root}: nothing was logged")
    if found.skipped and not json:
        console.print(f"lines that could not be read: {found.skipped}")
    if plot is not None:
        with whole_file(plot) as file:
            plot_history(lines, file, title=plain_text(str(root.resolve())))
        if not json:
            console.print(f"drawn: {plot}")


def _table(lines: list[HistoryLine]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("time", "what"):
        table.add_column(name, no_wrap=True)
    for name in ("iteration", "size", "seconds", "stall"):
        table.add_column(name, no_wrap=True, justify="right")
    table.add_column("slowest", no_wrap=True)
    table.add_column("peak memory", no_wrap=True, justify="right")
    table.add_column("", overflow="fold")
    for line in lines:
        table.add_row(*_row(line))
    return table


def _row(line: HistoryLine) -> tuple[str, ...]:
    when = datetime.fromtimestamp(line.time_unix_s).strftime("%Y-%m-%d %H:%M:%S")
    iteration = "" if line.iteration is None else str(line.iteration)
    report = line.report
    if report is None:
        return when, line.kind, iteration, "", "", "", "", "", plain_text(line.error or "")
    size = size_text(report.bytes)
    if isinstance(report, CopyReport):
        return when, line.kind, iteration, size, f"{report.total_s:.2f}", "", "", "", plain_text(f"to {report.target}")
    stall = f"{report.stall_s:.3f}" if isinstance(report, SaveReport) else ""
    memory = size_text(report.peak_rss_bytes) if report.peak_rss_bytes else ""
    remarks = report.degraded if isinstance(report, SaveReport) else report.warnings
    return (
        *(when, line.kind, iteration, size, f"{report.total_s:.2f}", stall, _slowest(report.slowest), memory),
        plain_text("; ".join(remarks)),
    )


def _slowest(phases: Mapping[str, tuple[int, float]]) -> str:
    if not phases:
        return ""
    phase, (rank, seconds) = max(phases.items(), key=lambda item: item[1][1])
    return plain_text(f"{phase} {seconds:.2f} s, rank {rank}")
