"""distckpt inspect: what lies under a root, and what one checkpoint holds and where."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from distckpt.cataloging import CheckpointEntry
from distckpt.checkpoint_files import is_damage
from distckpt.cli import inspect_text as text
from distckpt.cli.entries import json_of
from distckpt.cli.output import DAMAGED, ROOT, WHICH, console, print_json, shown
from distckpt.cli.whole_file import whole_file
from distckpt.commit import Commit, list_commits, read_index
from distckpt.errors import CheckpointNotFoundError, CorruptionError
from distckpt.index import Index
from distckpt.inspecting import (
    ORDERS,
    ChunkFacts,
    Contents,
    HeldValue,
    PerRankFacts,
    Placement,
    RankFacts,
    RootFacts,
    TensorFacts,
    ValueFacts,
    contents_of,
    held_values,
    keys_matching,
    list_per_rank,
    list_ranks,
    list_tensors,
    list_values,
    placements,
    read_entry,
    read_root,
)
from distckpt.selecting import open_selected, select_commits
from distckpt.storage import Storage
from distckpt.surroundings import not_found
from distckpt.tensor_values import advice
from distckpt.training.resumable import Resumability, resumability


class _Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be listed of a checkpoint. Nothing: then it is summed up."""

    tensors: bool
    globs: list[str]
    order: str
    top: int | None
    ranks: bool
    values: bool
    key: str | None
    html: Path | None

    @property
    def is_summary(self) -> bool:
        return not (self.tensors or self.ranks or self.values or self.key is not None or self.html is not None)


class _Found(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was found in one checkpoint, as --json says it; what was not asked for is not there.

    matching: how many tensors match, of which `tensors` are the first. tensor and chunks: of --key. value: of --key;
    held: what the ranks have, where it differs by rank. page: the file of --html.
    """

    contents: Contents
    resumable: Resumability
    matching: int | None = None
    tensors: list[TensorFacts] | None = None
    ranks: list[RankFacts] | None = None
    values: list[ValueFacts] | None = None
    per_rank: list[PerRankFacts] | None = None
    tensor: TensorFacts | None = None
    chunks: list[ChunkFacts] | None = None
    value: ValueFacts | PerRankFacts | None = None
    held: list[HeldValue] | None = None
    page: str | None = None


def inspect(
    root: Annotated[Path, typer.Argument(help=ROOT)],
    iteration: Annotated[str | None, typer.Option(help=WHICH, show_default=False)] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List the tensors.")] = False,
    keys: Annotated[
        list[str] | None,
        typer.Option(
            help="A glob: list only tensors (and values) whose keys match. May be repeated.", show_default=False
        ),
    ] = None,
    sort: Annotated[str, typer.Option(help=f"Order of the tensors: {', '.join(ORDERS)}.")] = "key",
    top: Annotated[int | None, typer.Option(help="Only so many rows.", min=1, show_default=False)] = None,
    ranks: Annotated[bool, typer.Option("--ranks", help="List the ranks, and what the files of each hold.")] = False,
    values: Annotated[bool, typer.Option("--values", help="List the values that are no tensors.")] = False,
    key: Annotated[
        str | None,
        typer.Option(help="One tensor, and each chunk of it; or one value, in full.", show_default=False),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page for a browser that shows all of it.", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Show a root and its newest checkpoint; or one checkpoint, its tensors, and which rank holds what.

    Reads the index, the chunk table of what is listed, and no tensor. Exit code 0; 1: something is damaged, and is
    printed; 2: there is no such checkpoint, or it cannot be read.

    Example: distckpt inspect /checkpoints/run7

    Example: distckpt inspect /checkpoints/run7 --iteration best:val_loss --keys '*qkv.weight' --sort size --top 20
    """
    if sort not in ORDERS:
        raise ValueError(f"--sort {sort}: expected one of {', '.join(ORDERS)}")
    asked = _Asked(
        tensors=tensors or (bool(keys) and not (ranks or values or key or html)),
        globs=keys or [],
        order=sort,
        top=top,
        ranks=ranks,
        values=values,
        key=key,
        html=html,
    )
    storage, selector = open_selected(root, iteration)
    raise typer.Exit(_inspect(storage, selector, asked, as_json=json))


def _inspect(storage: Storage, selector: int | str | None, asked: _Asked, *, as_json: bool) -> int:
    """Look, print, and return the exit code."""
    overview = read_root(storage) if selector is None and asked.is_summary else None
    if overview is not None and not overview.checkpoints and not overview.incomplete:
        raise not_found(storage)
    entry, found = None, None
    if overview is None or overview.checkpoints:
        commit = select_commits(storage, selector)[0]
        entry, found = _look(storage, commit, _entry(storage, commit, overview), asked)
    if as_json:
        print_json(_as_json(overview, entry, found))
    else:
        _print(overview, entry, found, asked)
    entries = [*(overview.checkpoints if overview is not None else ()), *([entry] if entry is not None else ())]
    return DAMAGED if any(one.damage is not None for one in entries) else 0


def _entry(storage: Storage, commit: Commit, overview: RootFacts | None) -> CheckpointEntry:
    for entry in overview.checkpoints if overview is not None else ():
        if Commit(entry.epoch, entry.commit_seq, entry.iteration) == commit:
            return entry
    return read_entry(storage, commit)


def _look(
    storage: Storage, commit: Commit, entry: CheckpointEntry, asked: _Asked
) -> tuple[CheckpointEntry, _Found | None]:
    """What is found; nothing where it cannot be read, and then the entry says why. Raises OSError for what is no
    damage, CheckpointNotFoundError for what is removed meanwhile."""
    try:
        index, _ = read_index(storage, commit)
        found = _found(storage, commit, index, asked)
        page = None if asked.html is None else _page(storage, commit, index, entry, asked)
    except (CorruptionError, OSError) as error:
        if not is_damage(error):
            raise
        if commit not in list_commits(storage):
            raise CheckpointNotFoundError(f"{commit.name}: it was removed meanwhile") from error
        return msgspec.structs.replace(entry, damage=entry.damage or str(error)), None
    if asked.html is None or page is None:
        return entry, found
    with whole_file(asked.html) as file:  # Out here: that there is no such folder is no damage of the checkpoint.
        file.write_bytes(page)
    return entry, msgspec.structs.replace(found, page=str(asked.html))


def _page(storage: Storage, commit: Commit, index: Index, entry: CheckpointEntry, asked: _Asked) -> bytes:
    from distckpt.cli.inspect_page import page_data, page_of  # Nobody else needs them.

    return page_of(page_data(storage, commit, index, entry, keys_matching(index.tensors, asked.globs)))


def _found(storage: Storage, commit: Commit, index: Index, asked: _Asked) -> _Found:
    answer = resumability(bytes(index.metadata), commit.name)
    found = _Found(contents=contents_of(index), resumable=answer)
    change = msgspec.structs.replace
    if asked.key is not None:
        found = _with_key(storage, commit, index, found, asked.key, asked.top)
    keys = keys_matching(index.tensors, asked.globs)
    known = [*index.tensors, *(() if asked.tensors else (*index.values, *index.per_rank))]
    if asked.globs and not keys_matching(known, asked.globs):
        hint = "" if any("*" in glob for glob in asked.globs) else " (a glob is for the whole key: '*part*')"
        raise ValueError(f"--keys {' --keys '.join(asked.globs)}: no key matches{hint}; {_some(known)}")
    if asked.tensors:
        tensors = list_tensors(storage, commit, index, keys, order=asked.order, top=asked.top)
        found = change(found, matching=len(keys), tensors=tensors)
    if asked.ranks:
        found = change(found, ranks=list_ranks(index, placements(storage, commit, index, keys)))
    if asked.values:
        values, per_rank = list_values(index, asked.globs), list_per_rank(index, asked.globs)
        found = change(found, values=values, per_rank=per_rank)
    return found


def _with_key(storage: Storage, commit: Commit, index: Index, found: _Found, key: str, top: int | None) -> _Found:
    """With what there is under one key. Raises ValueError if there is nothing."""
    change = msgspec.structs.replace
    if key in index.tensors:
        [tensor] = list_tensors(storage, commit, index, [key])
        return change(found, tensor=tensor, chunks=Placement.read(storage, commit, index, [key]).chunks(top))
    if key in index.values:
        text_of = bytes(index.values[key])
        return change(found, value=ValueFacts(key, len(text_of), msgspec.Raw(text_of)))
    if key in index.per_rank:
        entry = index.per_rank[key]
        facts = PerRankFacts(key, entry.axes, entry.on_change, len(entry.holders))
        return change(found, value=facts, held=held_values(storage, commit, index, key, top))
    raise ValueError(f"--key {key}: there is no tensor or value of this key{advice(key, index)}")


def _some(keys: list[str]) -> str:
    """For an error: which keys there are."""
    more = f" and {len(keys) - 10:,} more" if len(keys) > 10 else ""
    return f"there are {', '.join(shown(key) for key in keys[:10])}{more}" if keys else "there are none"


def _as_json(overview: RootFacts | None, entry: CheckpointEntry | None, found: _Found | None) -> dict[str, object]:
    fields: dict[str, object] = {} if entry is None else json_of(entry)
    if found is not None:
        given = {name: value for name, value in msgspec.structs.asdict(found).items() if value is not None}
        fields |= {**given, "sections": found.contents.sections}
    if overview is not None:
        checkpoints = [json_of(one) for one in overview.checkpoints]
        fields["root"] = msgspec.structs.asdict(overview) | {"checkpoints": checkpoints}
    return fields


def _print(overview: RootFacts | None, entry: CheckpointEntry | None, found: _Found | None, asked: _Asked) -> None:
    if overview is not None:
        text.print_root(overview)
    if entry is None:
        return
    if found is None:
        console.print(f"iteration {entry.iteration}: DAMAGED: {shown(entry.damage or '', 1000)}")
        return
    if asked.is_summary:
        if overview is not None:
            console.print()
        text.print_summary(entry, found.contents, found.resumable)
        return
    if found.page is not None:
        console.print(f"iteration {entry.iteration}: written: {shown(found.page, 1000)}")
    else:
        text.print_head(entry, found.contents)
    if found.tensor is not None and found.chunks is not None:
        text.print_tensor(found.tensor, found.chunks)
    if isinstance(found.value, ValueFacts):
        text.print_value(found.value)
    if isinstance(found.value, PerRankFacts) and found.held is not None:
        text.print_held(found.value, found.held)
    if found.tensors is not None and found.matching is not None:
        text.print_tensors(found.tensors, found.matching)
    if found.ranks is not None:
        text.print_ranks(found.ranks, asked.top, entry.world_size or 0)
    if found.values is not None and found.per_rank is not None:
        text.print_values(found.values, found.per_rank, asked.top)
