"""A picture of a root's history: stall, seconds and bytes over time. Needs matplotlib, which the `plots` extra has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from distckpt.history_log import HistoryLine
from distckpt.report import SaveReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of a line, what a panel shows; None where it has none.
_ValueOf: TypeAlias = Callable[[HistoryLine], float | None]

_STYLES = {"save": ("o-", "#2563a8"), "load": ("s", "#d9822b"), "copy": ("^", "#3f9142")}
_FAILED = "#c0392b"
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


def plot_history(lines: Sequence[HistoryLine], file: Path, *, title: str) -> None:
    """Write a PNG with three panels that share the time axis. Raises OSError; ValueError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"--plot needs matplotlib: pip install 'distckpt[plots]' ({error})") from error
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Sequence[Axes] = figure.subplots(3, 1, sharex=True)
    scale, unit = _unit_of(lines)
    _draw(panels[0], lines, "training stood still (s)", _stall_s)
    _draw(panels[1], lines, "duration (s)", _seconds)
    _draw(panels[2], lines, f"size ({unit})", lambda line: None if line.report is None else line.report.bytes / scale)
    locator = AutoDateLocator(minticks=4, maxticks=9)  # type: ignore[no-untyped-call]  # matplotlib.dates has no types.
    panels[2].xaxis.set_major_locator(locator)
    panels[2].xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    figure.align_ylabels()
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, parse_math=False)
    found = [axes.get_legend_handles_labels() for axes in panels]
    drawn = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    shown = [label for label in (*_STYLES, "failed") if label in drawn]
    if shown:
        handles = [drawn[label] for label in shown]
        figure.legend(handles, shown, loc="outside upper right", ncols=len(shown), frameon=False)
    figure.savefig(file, format="png", dpi=150)


def _draw(axes: Axes, lines: Sequence[HistoryLine], label: str, value_of: _ValueOf) -> None:
    from matplotlib.dates import date2num

    for kind, (style, colour) in _STYLES.items():
        points = [(_when(line), value_of(line)) for line in lines if line.kind == kind]
        shown = [(when, value) for when, value in points if value is not None]
        if shown:
            axes.plot(*zip(*shown, strict=True), style, color=colour, markersize=4, linewidth=1, label=kind, zorder=3)
    for number, line in enumerate(line for line in lines if line.report is None):
        when = date2num(_when(line))  # type: ignore[no-untyped-call]
        axes.axvline(when, color=_FAILED, linestyle="--", linewidth=1, label="" if number else "failed")
    axes.set_ylabel(label)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
    axes.locator_params(axis="y", nbins=5)
    axes.grid(color="#e3e3e3", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _when(line: HistoryLine) -> datetime:
    return datetime.fromtimestamp(line.time_unix_s)


def _stall_s(line: HistoryLine) -> float | None:
    return line.report.stall_s if isinstance(line.report, SaveReport) else None


def _seconds(line: HistoryLine) -> float | None:
    return None if line.report is None else line.report.total_s


def _unit_of(lines: Sequence[HistoryLine]) -> tuple[float, str]:
    """In which the largest size is a small number."""
    largest = max((line.report.bytes for line in lines if line.report is not None), default=0)
    return next((scale, unit) for scale, unit in _UNITS if largest >= scale or unit == "bytes")
