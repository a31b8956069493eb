"""distckpt inspect: what one checkpoint holds, and whether a job can go on from it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.table import Table

from distckpt.cataloging import CheckpointEntry, entry_of, survey, tag_holders
from distckpt.cli.entries import json_of, marks_of, metric_text
from distckpt.cli.output import ROOT, WHICH, age_text, console, print_json, print_table, shown, size_text
from distckpt.commit import Commit, list_commits, read_index
from distckpt.errors import CheckpointNotFoundError
from distckpt.index import Index
from distckpt.selecting import open_selected, select_commits
from distckpt.storage import Storage
from distckpt.training.resumable import RECORD, Resumability, resumability

_OF_RUN = ("environment", "arguments", "models", "assets", "resumed_from", "base")  # of the record, shown in this order


class Section(msgspec.Struct, frozen=True):
    """What stands under one name at the top of the state. per_rank: values that differ by rank."""

    name: str
    tensors: int
    values: int
    per_rank: int
    bytes: int


def inspect(
    root: Annotated[Path, typer.Argument(help=ROOT)],
    iteration: Annotated[str | None, typer.Option(help=WHICH, show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Show what one checkpoint holds, what it was made with, and whether a job can go on from it.

    Reads the index and no tensor. Exit code 0; 2: there is no such checkpoint, or its index is damaged.

    Example: distckpt inspect /checkpoints/run7 --iteration best:val_loss
    """
    storage, selector = open_selected(root, iteration)
    commit = select_commits(storage, selector)[0]
    index, _ = read_index(storage, commit)
    entry = _entry(storage, commit)
    answer = resumability(bytes(index.metadata), commit.name)
    sections = sections_of(index)
    if json:
        print_json({**json_of(entry), "sections": sections, "resumable": answer})
    else:
        _print(entry, sections, answer)


def _entry(storage: Storage, commit: Commit) -> CheckpointEntry:
    records = survey(storage, list_commits(storage))
    now_unix_s = datetime.now(timezone.utc).timestamp()
    found = [record for record in records if record.commit == commit]
    if not found:
        raise CheckpointNotFoundError(f"{commit.name}: it was removed meanwhile")
    return entry_of(found[0], tag_holders(records), now_unix_s, storage)


def sections_of(index: Index) -> list[Section]:
    """By name. A tensor with a key of its own counts where it stood."""
    counts: dict[str, list[int]] = {}
    for key, tensor in index.tensors.items():
        home = key if tensor.container is None else tensor.container
        count = counts.setdefault(home.partition("/")[0] or "/", [0, 0, 0, 0])
        count[0] += 1
        count[3] += tensor.size_bytes
    for place, keys in ((1, index.values), (2, index.per_rank)):
        for key in keys:
            counts.setdefault(key.partition("/")[0], [0, 0, 0, 0])[place] += 1
    return [Section(name, *counts[name]) for name in sorted(counts)]


def _print(entry: CheckpointEntry, sections: list[Section], answer: Resumability) -> None:
    created = datetime.fromtimestamp(entry.created_unix_s or 0, timezone.utc)
    mesh = " ".join(f"{axis}{size}" for axis, size in entry.mesh.items())
    facts = {
        "iteration": str(entry.iteration),
        "resumable": str(answer),
        "saved": f"{created:%Y-%m-%d %H:%M:%S} UTC, {age_text(entry.age_s or 0)} ago, save {entry.save_id}",
        "after": f"save {entry.parent}" if entry.parent else "",
        "ranks": f"{entry.world_size}{f' ({mesh})' if mesh else ''}",
        "size": size_text(entry.bytes),
        "metrics": ", ".join(f"{name} {metric_text(value)}" for name, value in entry.metrics.items()),
        "tags": ", ".join(entry.tags),
        "state": ", ".join(marks_of(entry)),
        "note": entry.note,
    }
    for name, text in facts.items():
        if text:
            console.print(f"{name + ':':<11}{shown(text, 1000)}")
    table = Table("section", "tensors", "values", "per rank", "size")
    for section in sections:
        counts = (section.tensors, section.values, section.per_rank)
        table.add_row(shown(section.name), *(str(count or "") for count in counts), size_text(section.bytes))
    print_table(table)
    record = entry.metadata.get(RECORD) if isinstance(entry.metadata, dict) else None
    if isinstance(record, dict):
        run = Table("of the run", "")
        for name, text in _flattened({name: record.get(name) for name in _OF_RUN}):
            run.add_row(shown(name), shown(text))
        print_table(run)


def _flattened(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, text) of all that is recorded, what is empty left out."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _flattened(one, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
        for number, one in enumerate(value):
            yield from _flattened(one, f"{name}.{number}")
    elif value not in (None, [], ""):
        yield name, str(value)
