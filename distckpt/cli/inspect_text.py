"""What `distckpt inspect` says to people. Long lists are plain columns: a table of rich takes a millisecond a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timezone

import msgspec
from rich.table import Table
from rich.tree import Tree

from distckpt.cataloging import CheckpointEntry, IncompleteSave
from distckpt.cli.entries import marks_of, metric_text
from distckpt.cli.numbers import shape_text
from distckpt.cli.output import age_text, console, counted, plain_text, print_table, shown, size_text
from distckpt.inspecting import (
    ChunkFacts,
    Contents,
    HeldValue,
    PerRankFacts,
    RankFacts,
    RootFacts,
    TensorFacts,
    ValueFacts,
)
from distckpt.training.resumable import RECORD, Resumability

RANK_AXIS = "rank"  # of a job that gave no mesh: its ranks are told anyway
_MAX_SHOWN = 20  # checkpoints in a tree
_OF_RUN = ("environment", "arguments", "models", "assets", "resumed_from", "base")  # of the record, shown in this order


def print_root(root: RootFacts) -> None:
    """The tree of a root: its checkpoints, newest commit first, and the saves that are none."""
    tree = Tree(
        f"{shown(root.location, 1000)}: {counted(len(root.checkpoints), 'checkpoint')}, {size_text(root.bytes)}"
    )
    iterations = {entry.save_id: entry.iteration for entry in root.checkpoints if entry.save_id}
    for number, entry in enumerate(root.checkpoints[:_MAX_SHOWN]):
        before = root.checkpoints[number + 1] if number + 1 < len(root.checkpoints) else None
        branch = tree.add(_entry_text(root, entry, before, iterations))
        for what, problem in (("DAMAGED", entry.damage), ("labels damaged", entry.labels_damage), ("note", entry.note)):
            if problem:
                branch.add(f"{what}: {shown(problem, 1000)}")
    if len(root.checkpoints) > _MAX_SHOWN:
        tree.add(f"and {len(root.checkpoints) - _MAX_SHOWN} older ones: `distckpt ls` lists them all")
    for save in root.incomplete[-_MAX_SHOWN:]:
        tree.add(unfinished_text(save))
    if root.tracker_warning is not None:
        tree.add(f"warning: {root.tracker_warning}; `distckpt repair` mends it")
    print_table(tree)


def _entry_text(
    root: RootFacts, entry: CheckpointEntry, before: CheckpointEntry | None, iterations: dict[str, int]
) -> str:
    names = [
        "newest" if entry is root.checkpoints[0] else "",
        "tracker" if entry.iteration == root.tracker else "",
        *(f"tag {tag}" for tag in entry.tags),
        *marks_of(entry),
    ]
    after = ""
    if entry.parent in iterations and (before is None or before.save_id != entry.parent):
        after = f"after {iterations[entry.parent]}"
    facts = [
        size_text(entry.bytes) if entry.bytes else "",
        f"{age_text(entry.age_s)} ago" if entry.age_s is not None else "",
        layout_text(entry),
        after,
        *(f"{name} {metric_text(value)}" for name, value in list(entry.metrics.items())[:4]),
        ", ".join(name for name in names if name),
    ]
    return f"{entry.directory}  {shown('  '.join(fact for fact in facts if fact), 1000)}"


def layout_text(entry: CheckpointEntry) -> str:
    """8 ranks (tp2 pp2 dp2)."""
    if entry.world_size is None:
        return ""
    mesh = " ".join(f"{axis}{size}" for axis, size in entry.mesh.items() if axis != RANK_AXIS)
    return f"{counted(entry.world_size, 'rank')}{f' ({mesh})' if mesh else ''}"


def unfinished_text(save: IncompleteSave) -> str:
    return f"{save.directory}  no checkpoint: {size_text(save.bytes)}, {age_text(save.age_s)} old: {save.why}"


def print_head(entry: CheckpointEntry, contents: Contents) -> None:
    """One line, above what is listed."""
    tensors = f"{counted(contents.tensors, 'tensor')} of {size_text(contents.tensor_bytes)}"
    facts = [f"iteration {entry.iteration}", tensors, layout_text(entry)]
    console.print(shown(", ".join(fact for fact in facts if fact), 1000))
    if entry.damage is not None:
        console.print(f"DAMAGED: {shown(entry.damage, 1000)}")


def summary_facts(entry: CheckpointEntry, contents: Contents, answer: Resumability) -> list[tuple[str, str]]:
    """(name, text) of what is to be said of one checkpoint, without what is listed on demand."""
    shares = [f"{share.dtype} {size_text(share.bytes)}" for share in contents.dtypes]
    facts = [
        ("iteration", str(entry.iteration)),
        ("DAMAGED", entry.damage or ""),
        ("resumable", str(answer)),
        ("saved", f"{time_text(entry.created_unix_s or 0)}, {age_text(entry.age_s or 0)} ago, save {entry.save_id}"),
        ("after", f"save {entry.parent}" if entry.parent else ""),
        ("layout", layout_text(entry)),
        ("size", f"{size_text(entry.bytes)}; {_files_text(contents)}"),
        (
            "tensors",
            f"{contents.tensors:,}, {size_text(contents.tensor_bytes)}{': ' * bool(shares)}{', '.join(shares)}",
        ),
        ("values", f"{contents.values:,}; {contents.per_rank:,} that differ by rank"),
        ("metrics", ", ".join(f"{name} {metric_text(value)}" for name, value in entry.metrics.items())),
        ("tags", ", ".join(entry.tags)),
        ("state", ", ".join(marks_of(entry))),
        ("note", entry.note),
    ]
    return [(name, text) for name, text in facts if text]


def time_text(unix_s: float) -> str:
    """2026-11-26 07:37:13 UTC."""
    try:
        return f"{datetime.fromtimestamp(unix_s, timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError, OSError):  # An index may say anything.
        return f"{unix_s:g} s after 1970"


def print_summary(entry: CheckpointEntry, contents: Contents, answer: Resumability) -> None:
    for name, text in summary_facts(entry, contents, answer):
        console.print(f"{name + ':':<11}{shown(text, 1000)}")
    table = Table("section", "tensors", "values", "per rank", "size")
    for section in contents.sections:
        counts = (section.tensors, section.values, section.per_rank)
        table.add_row(shown(section.name), *(str(count or "") for count in counts), size_text(section.bytes))
    print_table(table)
    rows = metadata_rows(entry.metadata)
    if rows:
        run = Table("of the run", "")
        for name, text in rows:
            run.add_row(shown(name), shown(text))
        print_table(run)


def _files_text(contents: Contents) -> str:
    files = f"{counted(contents.files, 'shard file')} of {counted(contents.writers, 'rank')}"
    if contents.largest_rank is None or contents.writers < 2:
        return files
    ratio = contents.largest_bytes * contents.writers / max(1, contents.file_bytes)
    return (
        f"{files}, the largest {size_text(contents.largest_bytes)} of rank {contents.largest_rank} ({ratio:.2f} x mean)"
    )


def metadata_rows(metadata: object) -> list[tuple[str, str]]:
    """(dotted name, text) of what a checkpoint was made with, and of what else stands in its metadata."""
    if not isinstance(metadata, dict):
        return [] if metadata is None else [("metadata", str(metadata))]
    record = metadata.get(RECORD)
    others = {str(name): value for name, value in metadata.items() if name != RECORD or not isinstance(record, dict)}
    rows = list(_flattened(others))
    if isinstance(record, dict):
        rows = [*_flattened({name: record.get(name) for name in _OF_RUN}), *rows]
    return rows


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


def print_tensors(tensors: Sequence[TensorFacts], of: int) -> None:
    """of: how many there are, of which these are the first."""
    # Of many tensors few are unlike.
    ranges = {ranks: ranges_text(ranks) for ranks in {tensor.ranks for tensor in tensors}}
    splits = {split: split_text(*split) for split in {_split_of(tensor) for tensor in tensors}}
    rows = [
        (
            shown(tensor.key),
            tensor.dtype,
            shape_text(tensor.shape),
            size_text(tensor.bytes),
            splits[_split_of(tensor)],
            f"{tensor.chunks:,}",
            ranges[tensor.ranks],
        )
        for tensor in tensors
    ]
    _print_columns(("key", "dtype", "shape", "size", "split by", "chunks", "on ranks"), rows, right=(3, 5))
    _print_rest(len(tensors), of, "tensors")


def print_ranks(ranks: Sequence[RankFacts], top: int | None, world_size: int) -> None:
    ranks, of = ranks[:top], len(ranks)
    axes = list(dict.fromkeys(axis for rank in ranks for axis in rank.mesh if axis != RANK_AXIS))
    rows = [
        (
            str(rank.rank),
            *(str(rank.mesh.get(axis, "")) for axis in axes),
            f"{rank.tensors:,}",
            f"{rank.chunks:,}",
            size_text(rank.tensor_bytes),
            size_text(rank.bytes),
            rank.files[0] + (f" and {len(rank.files) - 1} more" if len(rank.files) > 1 else ""),
        )
        for rank in ranks
    ]
    head = ("rank", *map(shown, axes), "tensors", "chunks", "bytes of them", "files", "")
    _print_columns(head, rows, right=range(len(head) - 1))
    _print_rest(len(ranks), of, "ranks")
    if world_size > of:
        console.print(f"ranks that have no file: {world_size - of:,} of {world_size:,}")


def print_tensor(tensor: TensorFacts, chunks: Sequence[ChunkFacts]) -> None:
    """One tensor and its chunks."""
    console.print(
        f"{shown(tensor.key, 1000)}: {tensor.dtype} {shape_text(tensor.shape)}, {size_text(tensor.bytes)}, "
        f"{counted(tensor.chunks, 'chunk')}, split by {split_text(*_split_of(tensor)) or 'nothing'}"
    )
    rows = [
        (
            box_text(chunk.offset, chunk.shape),
            str(chunk.rank),
            shown(coordinates_text(chunk.mesh)),
            size_text(chunk.bytes),
            f"{chunk.start}-{chunk.start + chunk.bytes - 1}",
            chunk.file,
        )
        for chunk in chunks
    ]
    _print_columns(("box", "rank", "at", "size", "bytes", "file"), rows, right=(1, 3, 4))
    _print_rest(len(chunks), tensor.chunks, "chunks")


def print_value(value: ValueFacts) -> None:
    console.print(f"{shown(value.key, 1000)}: {plain_text(_json_text(value.value))}")


def print_values(values: Sequence[ValueFacts], per_rank: Sequence[PerRankFacts], top: int | None) -> None:
    rows = [(shown(one.key), size_text(one.bytes), shown(_json_text(one.value), 120)) for one in values[:top]]
    _print_columns(("value", "size", ""), rows, right=(1,))
    _print_rest(len(rows), len(values), "values")
    if per_rank:
        console.print()
        held = [
            (
                shown(one.key),
                str(one.holders),
                shown(" ".join(f"{axis}{size}" for axis, size in one.axes)),
                one.on_change,
            )
            for one in per_rank[:top]
        ]
        _print_columns(("differs by rank", "values", "by", "on another layout"), held, right=(1,))
        _print_rest(len(held), len(per_rank), "values that differ by rank")


def print_held(per_rank: PerRankFacts, held: Sequence[HeldValue]) -> None:
    """One value that differs by rank, of its holders."""
    names = [axis for axis, _ in per_rank.axes]
    rows = [
        (
            shown(coordinates_text(dict(zip(names, one.coordinates, strict=True)))),
            str(one.rank),
            shown(_json_text(one.value), 4000),
        )
        for one in held
    ]
    _print_columns(("at", "rank", shown(per_rank.key)), rows, right=(1,))
    _print_rest(len(held), per_rank.holders, "values")


def _json_text(value: msgspec.Raw) -> str:
    return bytes(value).decode("utf-8", "replace")


def box_text(offset: Sequence[int], shape: Sequence[int]) -> str:
    """[0:4, 2:6], as one would slice."""
    ends = [f"{low}:{low + extent}" for low, extent in zip(offset, shape, strict=True)]
    return f"[{', '.join(ends)}]"


def coordinates_text(mesh: dict[str, int]) -> str:
    return " ".join(f"{axis}={at}" for axis, at in mesh.items() if axis != RANK_AXIS)


def _split_of(tensor: TensorFacts) -> tuple[tuple[str | None, ...], tuple[int, ...], str | None]:
    return tensor.partition or (), tensor.blocks or (), tensor.owner


def split_text(partition: Sequence[str | None], blocks: Sequence[int], owner: str | None) -> str:
    """tp@0 of 3 blocks, held by pp: which mesh axis splits which dimension, and whose coordinate holds it."""
    parts = []
    for dimension in range(max(len(partition), len(blocks))):
        axis = partition[dimension] if partition else None
        count = blocks[dimension] if blocks else 1
        if axis is not None or count > 1:
            parts.append(f"{axis or 'none'}@{dimension}{f' of {count} blocks' if count > 1 else ''}")
    if owner is not None:
        parts.append(f"held by {owner}")
    return shown(", ".join(parts))


def ranges_text(numbers: Sequence[int], max_ranges: int = 8) -> str:
    """0-3,8 of ascending numbers."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    texts = [str(low) if low == high else f"{low}-{high}" for low, high in ranges[:max_ranges]]
    return ",".join(texts) + (f",... ({len(numbers)})" if len(ranges) > max_ranges else "")


def _print_columns(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = enumerate(zip(row, widths, strict=True))
        line = [text.rjust(width) if i in right else text.ljust(width) for i, (text, width) in cells]
        print("  ".join(line).rstrip())


def _print_rest(shown_count: int, of: int, what: str) -> None:
    if shown_count < of:
        console.print(f"and {of - shown_count:,} more {what}: give a larger --top, or none")
