"""The results as Markdown tables, to be pasted."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.figures import FigureSpec
from benchmarks.report.wording import HOW_TO_READ, cell, columns, describe, limit_lines, remarks, title
from benchmarks.results import Figure, Record, SectionResult


def to_markdown(record: Record) -> str:
    lines = [title(record) + ".", ""]
    for section in record.sections:
        lines += [*_section(section), ""]
    return "\n".join([*lines, HOW_TO_READ, ""])


def _section(section: SectionResult) -> Iterator[str]:
    yield from (f"### {section.title}", describe(section) + ".", "")
    specs = columns(section)
    yield "| | " + " | ".join(spec.title for spec in specs.values()) + " |"
    yield "| --- |" + " ---: |" * len(specs)
    for name, result in section.engines.items():
        if result.figures:
            cells = (_cell(spec, result.figures.get(figure)) for figure, spec in specs.items())
            yield f"| {name} | " + " | ".join(cells) + " |"
    notes = [*limit_lines(section)]
    notes += [remark for name, result in section.engines.items() for remark in remarks(name, result)]
    if notes:
        yield from ("", *("* " + " ".join(note.split()) for note in notes))


def _cell(spec: FigureSpec, figure: Figure | None) -> str:
    if figure is None:
        return ""
    shown = cell(spec, figure)
    return " ".join(filter(None, [shown.middle, shown.spread and f"({shown.spread})", shown.shares]))
