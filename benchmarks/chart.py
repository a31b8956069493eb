"""The results as one picture. Drawn with matplotlib, of the `bench` extra."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from benchmarks.results import LIMIT_OF, EngineResult, Figure
from benchmarks.table import COLUMNS

PANELS = ("save", "durable", "stall", "load_cold", "load_warm", "stall_first")
OWN, PEER, LIMIT = "#1b6ca8", "#b0b7bf", "#c0392b"


def draw_results(path: Path, title: str, limits: Mapping[str, Figure], results: Mapping[str, EngineResult]) -> None:
    drawing = Drawing(figsize=(15, 7))
    for axis, name in zip(drawing.subplots(2, 3).flat, PANELS, strict=True):
        _draw_panel(axis, name, limits, results)
    explanation = "median, whiskers from fastest to slowest repeat; dashed: the machine's limit"
    drawing.suptitle(f"{title}\n{explanation}", fontsize=10)
    drawing.tight_layout()
    drawing.savefig(path, dpi=120)


def _draw_panel(axis: Axes, name: str, limits: Mapping[str, Figure], results: Mapping[str, EngineResult]) -> None:
    rows = [
        (engine, result.figures[name], PEER if result.is_peer else OWN)
        for engine, result in reversed(results.items())
        if name in result.figures
    ]
    for y, (_, figure, colour) in enumerate(rows):
        whiskers = [[figure.median_s - figure.min_s], [figure.max_s - figure.median_s]]
        axis.barh(y, figure.median_s, color=colour, xerr=whiskers, ecolor="#444444", capsize=3)
        axis.annotate(f" {figure.median_s:.2f}", (figure.max_s, y), va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [engine for engine, _, _ in rows])
    axis.set_title(f"{COLUMNS[name]}, s")
    axis.margins(x=0.12)
    limit = limits.get(LIMIT_OF[name])
    if limit is not None:
        axis.axvline(limit.median_s, color=LIMIT, linestyle="--", linewidth=1)
    axis.set_xlim(left=0)
