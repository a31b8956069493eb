"""How commands show one checkpoint of a catalog: as JSON, as a line."""

from __future__ import annotations

import msgspec

from distckpt.cataloging import CheckpointEntry
from distckpt.cli.output import console, print_json, shown
from distckpt.json_value import encode_value


def json_of(entry: CheckpointEntry) -> dict[str, object]:
    """Its fields; metadata is tagged JSON, as in the index."""
    fields: dict[str, object] = msgspec.structs.asdict(entry)
    fields["metadata"] = msgspec.Raw(encode_value(entry.metadata, "metadata"))
    return fields


def marks_of(entry: CheckpointEntry) -> list[str]:
    """What there is to be said of its state, the worst first."""
    marks = {
        "DAMAGED": entry.damage is not None,
        "UNSOUND": entry.unsound,
        "labels damaged": entry.labels_damage is not None,
        "pinned": entry.pinned,
        "verified": entry.verified,
    }
    return [mark for mark, is_set in marks.items() if is_set]


def metric_text(value: float | None) -> str:
    """Of a metric that was measured."""
    return "not finite" if value is None else f"{value:.6g}"


def print_labelled(entry: CheckpointEntry, *, as_json: bool) -> None:
    """The checkpoint whose labels were changed."""
    if as_json:
        print_json(json_of(entry))
        return
    metrics = [f"{name} {metric_text(value)}" for name, value in entry.metrics.items()]
    parts = {"tags": entry.tags, "metrics": metrics, "": marks_of(entry), "note:": [entry.note] if entry.note else []}
    said = [f"{what} {', '.join(values)}".strip() for what, values in parts.items() if values]
    console.print(shown(f"iteration {entry.iteration}: {'; '.join(said) or 'no labels'}", 1000))
