"""One run shown: in the terminal, as Markdown, as pictures, as a page."""

from __future__ import annotations

from pathlib import Path

import msgspec

from benchmarks.report.charts import draw_section
from benchmarks.report.markdown import to_markdown
from benchmarks.report.page import to_html
from benchmarks.results import Record


def write_report(record: Record, out: Path) -> list[Path]:
    """results.json, .md and .html, and a picture per section; the paths. The directory is there."""
    json = msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"
    content = {
        "results.json": json,
        "results.md": to_markdown(record).encode(),
        "results.html": to_html(record).encode(),
    }
    for number, section in enumerate(record.sections, start=1):
        content[f"{number}-{section.kind}.png"] = draw_section(section, "png")
    for name, data in content.items():
        (out / name).write_bytes(data)
    return [out / name for name in content]


def read_record(path: Path) -> Record:
    """Of a results.json. Raises OSError, or msgspec.ValidationError if it is of another version of the harness."""
    return msgspec.json.decode(path.read_bytes(), type=Record)
