"""The demo's figures: loss curves, and what training did while its state was being saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from runs import Log

COLORS = ("0.8", "tab:blue", "tab:orange")
WIDTHS = (9, 4, 1.5)  # narrower on wider, so that curves that coincide are all seen
PHASES = {"plan": "tab:orange", "stage": "tab:red", "write": "tab:blue", "commit": "tab:green"}
TRAINING = "0.8"


@dataclass(frozen=True, slots=True)
class Panel:
    """Loss curves by label, the reference first, and the iteration whose save was killed."""

    title: str
    logs: dict[str, Log]
    killed: int


def draw_losses(panels: list[Panel], path: Path) -> None:
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    row = figure.subplots(1, len(panels), sharey=True)
    for axes, panel in zip(row, panels, strict=True):
        for order, (label, log) in enumerate(panel.logs.items()):
            losses = [record["loss"] for record in log.iterations.values()]
            axes.plot(list(log.iterations), losses, label=label, color=COLORS[order], linewidth=WIDTHS[order])
        axes.axvline(panel.killed, color="tab:red", linestyle="--", label=f"SIGKILL while saving {panel.killed}")
        axes.set(title=panel.title, xlabel="iteration")
        axes.grid(alpha=0.3)
        axes.legend(framealpha=1)
    row[0].set_ylabel("loss")
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
    size_mb = max(save["bytes"] for save in log.saves.values()) / 1e6
    axes.set(xlabel="seconds since the save was asked for", title=f"Saves of {size_mb:.0f} MB while training")
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
