"""The results as one HTML page that needs nothing beside it. Made with jinja2, which comes with torch."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.figures import KINDS
from benchmarks.report.charts import draw_section
from benchmarks.report.wording import HOW_TO_READ, cell, columns, describe, limit_lines, remarks, title
from benchmarks.results import Record

TEMPLATES = Path(__file__).parent


def to_html(record: Record) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    charts = [b64encode(draw_section(section, "svg")).decode() for section in record.sections]
    return environment.get_template("page.html").render(
        record=record,
        charts=charts,
        kinds=KINDS,
        title=title(record),
        how_to_read=HOW_TO_READ,
        cell=cell,
        columns=columns,
        describe=describe,
        limit_lines=limit_lines,
        remarks=remarks,
    )
