"""The demo's figures: loss curves, and what training did while its state was being saved."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from runs import Log

COLORS = ("0.8", "tab:blue", "tab:orange")
WIDTHS = (9, 4, 1.5)  # narrower on wider, so that curves that coincide are all seen
PHASES = {"plan": "tab:orange", "stage": "tab:red", "write": "tab:blue", "commit": "tab:green"}
TRAINING = "0.8"


def draw_losses(families: dict[str, dict[str, Log]], path: Path) -> None:
    """One panel per family: title -> label -> log. The first log is the reference."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = figure.subplots(1, len(families), sharey=True)
    for axes, (title, logs) in zip(panels, families.items(), strict=True):
        for order, (label, log) in enumerate(logs.items()):
            losses = [record["loss"] for record in log.iterations.values()]
            axes.plot(list(log.iterations), losses, label=label, color=COLORS[order], linewidth=WIDTHS[order])
        axes.set(title=title, xlabel="iteration")
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylabel("loss")
    figure.savefig(path, dpi=120)


def draw_saves(log: Log, path: Path) -> None:
    """One row per save: its phases, and below them the iterations that were computed meanwhile."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplots()
    spans = [save["phases"]["commit"][1] - save["phases"]["plan"][0] for save in log.saves.values()]
    axes.set_xlim(-0.2 * max(spans), 1.2 * max(spans))
    for row, save in enumerate(log.saves.values()):
        _draw_save(axes, row, save, log)
    axes.set_yticks(range(len(log.saves)), [f"save of\niteration {iteration}" for iteration in log.saves])
    axes.invert_yaxis()
    axes.set(xlabel="seconds since the save was asked for")
    handles = [Patch(color=color, label=phase) for phase, color in PHASES.items()]
    handles.append(Patch(color=TRAINING, label="training"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    figure.savefig(path, dpi=120)


def _draw_save(axes: Axes, row: int, save: dict, log: Log) -> None:
    zero = save["phases"]["plan"][0]
    for phase, (start, end) in save["phases"].items():
        axes.barh(row - 0.15, end - start, 0.3, left=start - zero, color=PHASES[phase])
    for record in log.iterations.values():
        left = record["start"] - zero
        axes.barh(row + 0.15, record["compute_s"], 0.3, left=left, color=TRAINING, edgecolor="white")
