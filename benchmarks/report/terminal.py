"""The results in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from benchmarks.report.wording import HOW_TO_READ, cell, columns, describe, limit_lines, remarks, title
from benchmarks.results import Record, SectionResult


def print_record(console: Console, record: Record) -> None:
    console.rule(title(record))
    for section in record.sections:
        _print_section(console, section)
    console.print(HOW_TO_READ, highlight=False)


def _print_section(console: Console, section: SectionResult) -> None:
    table = Table(title=section.title, caption=describe(section), title_justify="left", caption_justify="left")
    table.add_column("engine", no_wrap=True)
    specs = columns(section)
    for spec in specs.values():
        table.add_column(spec.title, justify="right")
    for name, result in section.engines.items():
        cells = []
        for figure, spec in specs.items():
            shown = cell(spec, result.figures[figure]) if figure in result.figures else None
            cells.append("" if shown is None else f"{shown.middle}\n{shown.spread}\n{shown.shares}")
        if any(cells):
            table.add_row(name, *cells, end_section=True)
    console.print(table)
    for line in limit_lines(section):
        console.print(line, markup=False, highlight=False)
    for name, result in section.engines.items():
        for remark in remarks(name, result):
            console.print(remark, markup=False, highlight=False)
