"""distckpt ls: the checkpoints under a root."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from distckpt.cataloging import CheckpointEntry, IncompleteSave, catalog, incomplete_saves
from distckpt.cli.entries import json_of, marks_of, metric_text
from distckpt.cli.output import DAMAGED, ROOT, age_text, console, print_json, print_table, shown, size_text
from distckpt.roots import open_root
from distckpt.selecting import best_of
from distckpt.surroundings import not_found

_MAX_METRICS = 8  # columns


def ls(
    root: Annotated[Path, typer.Argument(help=ROOT)],
    sort: Annotated[
        str,
        typer.Option(help="By commit, iteration, age, size, or a metric, the lowest first; METRIC:max the highest."),
    ] = "commit",
    json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """List the checkpoints under a root, newest first, and saves that are none.

    Nothing but indexes and labels is read; `distckpt verify` reads the rest. Exit code 0; 1: an index is damaged
    or a file is missing; 2: there is nothing.

    Example: distckpt ls /checkpoints/run7 --sort val_loss
    """
    entries, incomplete = catalog(root), incomplete_saves(root)
    if not entries and not incomplete:
        raise not_found(open_root(root)[0])
    entries = _sorted(entries, sort)
    if json:
        print_json({"checkpoints": [json_of(entry) for entry in entries], "incomplete": incomplete})
    else:
        _print(entries, incomplete, best_of(sort)[0])
    raise typer.Exit(DAMAGED if any(entry.damage is not None for entry in entries) else 0)


def _sorted(entries: Sequence[CheckpointEntry], by: str) -> list[CheckpointEntry]:
    """Newest first where it makes no other difference. Raises ValueError."""
    if by == "commit":
        return list(entries)
    name, is_max = best_of(by)
    known: list[tuple[float, int]] = []
    for number, entry in enumerate(entries):
        columns = {"iteration": entry.iteration, "age": entry.age_s, "size": entry.bytes}
        value = columns[name] if name in columns else entry.metrics.get(name)
        if value is not None:
            known.append((-value if is_max else value, number))
    if not known and entries:
        metrics = sorted({metric for entry in entries for metric in entry.metrics})
        raise ValueError(f"--sort {by}: no checkpoint has this metric; metrics are {', '.join(metrics) or 'none'}")
    order = [number for _, number in sorted(known)]
    return [entries[n] for n in [*order, *sorted(set(range(len(entries))) - set(order))]]


def _print(entries: Sequence[CheckpointEntry], incomplete: Sequence[IncompleteSave], sorted_by: str) -> None:
    names = sorted({name for entry in entries for name in entry.metrics}, key=lambda name: (name != sorted_by, name))
    table = Table("iteration", "age", "size", "ranks", *map(shown, names[:_MAX_METRICS]), "tags", "state", "note")
    for entry in entries:
        metrics = [metric_text(entry.metrics[n]) if n in entry.metrics else "" for n in names[:_MAX_METRICS]]
        table.add_row(
            str(entry.iteration),
            "" if entry.age_s is None else age_text(entry.age_s),
            size_text(entry.bytes),
            "" if entry.world_size is None else str(entry.world_size),
            *metrics,
            shown(", ".join(entry.tags)),
            ", ".join(marks_of(entry)),
            shown(entry.note, 60),
        )
    print_table(table)
    if len(names) > _MAX_METRICS:
        console.print(f"more metrics, in --json: {shown(', '.join(names[_MAX_METRICS:]), 1000)}")
    for entry in entries:
        for what, problem in (("DAMAGED", entry.damage), ("labels damaged", entry.labels_damage)):
            if problem is not None:
                console.print(f"iteration {entry.iteration}: {what}: {shown(problem, 1000)}")
    for save in incomplete:
        console.print(
            f"no checkpoint: {save.directory}: {size_text(save.bytes)}, {age_text(save.age_s)} old: {save.why}"
        )
