"""The sections as pictures: a panel per figure. Drawn with matplotlib, of the `bench` extra."""

from __future__ import annotations

import math
from io import BytesIO
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from benchmarks.figures import FigureSpec
from benchmarks.report.wording import columns, number, size, symbol
from benchmarks.results import SectionResult, limit_of

OWN, PEER, LIMIT = "#1b6ca8", "#b0b7bf", "#c0392b"
INK, WHISKER = "#222222", "#444444"


def draw_section(section: SectionResult, kind: Literal["png", "svg"]) -> bytes:
    """The file's content."""
    specs = columns(section)
    across = 4 if len(specs) and len(specs) % 4 == 0 else min(3, max(1, len(specs)))  # pairs of figures stay in one row
    down = max(1, math.ceil(len(specs) / across))
    engines = sum(bool(result.figures) for result in section.engines.values())
    drawing = Drawing(figsize=(5 * across, 0.6 + down * (0.9 + 0.28 * engines)), layout="constrained")
    axes = drawing.subplots(down, across, squeeze=False)
    for axis, (name, spec) in zip(axes.flat, specs.items(), strict=False):
        _draw_panel(axis, name, spec, section)
    for axis in axes.flat[len(specs) :]:
        axis.set_visible(False)
    drawing.suptitle(f"{section.title} ({size(section.state_bytes)})", fontsize=11, color=INK)
    content = BytesIO()
    drawing.savefig(content, format=kind, dpi=110)
    return content.getvalue()


def _draw_panel(axis: Axes, name: str, spec: FigureSpec, section: SectionResult) -> None:
    rows = [
        (engine, result.figures[name], PEER if result.is_peer else OWN)
        for engine, result in reversed(section.engines.items())
        if name in result.figures
    ]
    unit = symbol(spec.unit, max(figure.max for _, figure, _ in rows))
    scale = 1e-6 if unit == "MB" else 1.0
    for y, (_, figure, colour) in enumerate(rows):
        whiskers = [[scale * (figure.median - figure.min)], [scale * (figure.max - figure.median)]]
        axis.barh(y, scale * figure.median, color=colour, xerr=whiskers, ecolor=WHISKER, capsize=3, height=0.7)
        label = f" {number(spec.unit, figure.median)}"
        axis.annotate(label, (scale * max(figure.max, 0), y), va="center", fontsize=8, color=INK)
    axis.set_yticks(range(len(rows)), [engine for engine, _, _ in rows], fontsize=8)
    axis.set_title(f"{spec.title}, {unit}", fontsize=9, loc="left")
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.15)
    at = limit_of(spec, section.state_bytes, section.limits)
    if at is not None:
        axis.axvline(at, color=LIMIT, linestyle="--", linewidth=1)
    if all(figure.min >= 0 for _, figure, _ in rows):
        axis.set_xlim(left=0)
