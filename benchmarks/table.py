"""The results in the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from benchmarks.results import EngineResult, Figure

COLUMNS = {
    "save_first": "first save",
    "save": "save",
    "stall_first": "first stall",
    "stall": "stall",
    "durable": "async, durable",
    "load_cold": "cold load",
    "load_warm": "warm load",
}


def print_results(
    console: Console, title: str, limits: Mapping[str, Figure], results: Mapping[str, EngineResult]
) -> None:
    console.rule(title)
    for name, limit in limits.items():
        spread = f"({limit.min_s:.3f} to {limit.max_s:.3f})"
        console.print(f"limit {name}: {limit.median_s:.3f} s {spread}, {limit.gb_per_s:.2f} GB/s", highlight=False)
    table = Table(caption="median s, min-max; percent of the limit's speed; times as fast as the best peer")
    table.add_column("engine", no_wrap=True)
    for header in COLUMNS.values():
        table.add_column(header, justify="right", no_wrap=True)
    for name, result in results.items():
        if result.figures:
            table.add_row(name, *(_cell(result.figures.get(column)) for column in COLUMNS), end_section=True)
    console.print(table)
    for name, result in results.items():
        _print_remarks(console, name, result)


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    lines = [f"{figure.median_s:.3f}", f"{figure.min_s:.3f}-{figure.max_s:.3f}"]
    shares = []
    if figure.of_limit is not None:
        shares.append(f"{figure.of_limit:.0%}")
    if figure.of_best_peer is not None:
        shares.append(f"{figure.of_best_peer:.2f}x")
    return "\n".join([*lines, " ".join(shares)])


def _print_remarks(console: Console, name: str, result: EngineResult) -> None:
    remarks = list(result.notes)
    if result.missing:
        remarks.append(f"skipped: {result.missing}")
    if "prepare" in result.figures and not result.is_peer:
        remarks.append(f"prepare() took {result.figures['prepare'].median_s:.3f} s, before its first async save")
    if result.cached_before_cold_load > 0.01:
        remarks.append(f"{result.cached_before_cold_load:.0%} of the files was cached before a cold load")
    remarks += [f"{mode} failed: {why}" for mode, why in result.failures.items()]
    for remark in remarks:
        console.print(f"{name}: {remark}", markup=False, highlight=False)
