"""The target of a reshard, as rank 0 deals with it: what may be written there, and how it becomes a checkpoint.

Decides what an earlier run has left to go on from; writes no tensors.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from distckpt.assembling import join_records
from distckpt.checkpoint_files import is_damage
from distckpt.chunk_table import Chunks, encode_record
from distckpt.commit import (
    TRACKER,
    Commit,
    CommitFailed,
    Writer,
    iteration_directory,
    list_commits,
    new_save_id,
    pending_marker,
    read_head,
    read_index,
    tracker_warning,
)
from distckpt.copying import check_is_of_one_run
from distckpt.errors import CheckpointError, DistributedError
from distckpt.geometry import Int64Array
from distckpt.index import Index, IndexHead, PerRankEntry, ShardFile, Spec
from distckpt.reader import StoredTensors
from distckpt.removing import sweep
from distckpt.resharding.part import Journal, journal_name, read_journal
from distckpt.resharding.planning import PlannedReshard
from distckpt.resharding.steps import PlacedTensor
from distckpt.resharding.target_files import PlannedFiles, TargetFile
from distckpt.root_owner import RootOwner
from distckpt.roots import check_place, owner_of
from distckpt.shard_file import FORMAT, FORMAT_VERSION
from distckpt.storage import PosixStorage, Storage
from distckpt.utf8_text import utf8_text

logger = logging.getLogger("distckpt")
_GRACE_S = 60.0  # of readers of what is swept in the target
_MAX_PARTS = 1 << 16
_JOURNAL = re.compile(r"reshard-00000-([0-9a-f]{32})\.json")


class Order(msgspec.Struct, frozen=True):
    """What rank 0 decided. parts: how many the files are written in. epoch: of the writer, as in distckpt.commit.
    is_there: nothing is to be done."""

    save_id: str
    parts: int
    epoch: int = 0
    is_resumed: bool = False
    is_there: bool = False


class Outcome(msgspec.Struct, frozen=True):
    """What a rank has written: its files, by number in the target, and how much it moved."""

    files: dict[int, ShardFile]
    bytes_read: int
    bytes_written: int
    peak_rss_bytes: int


class Totals(msgspec.Struct, frozen=True):
    files: int
    size_bytes: int
    bytes_read: int
    bytes_written: int
    peak_rss_bytes: int


@dataclass(frozen=True, slots=True)
class TargetFiles:
    """The files of the target, and where each tensor lies in them."""

    planned: PlannedFiles
    files: Sequence[TargetFile]
    tensors: Sequence[PlacedTensor]


def begin(target: Storage, planned: PlannedReshard, world_size: int) -> tuple[Order, Writer | None]:
    """Look at the target, claim it, and announce. No writer: the target has the checkpoint already.

    Raises CheckpointError where nothing may be written; OSError.
    """
    check_place(target)
    if _is_same_directory(planned.storage, target):
        raise CheckpointError(
            f"{target.location} is the root that is read: a reshard there would end the job that saves to it. Give a "
            f"root of its own."
        )
    owner = owner_of(target)
    there = _find_twin(target, planned)
    if there is not None:
        if owner is not None and owner.reshards is not None:
            _finish_twin(target, planned, there)
        return Order(there, 1, is_there=True), None
    _check_is_free(target, planned, owner)
    journal = _find_journal(target, planned)
    writer = Writer.claim(target, reshards=utf8_text(planned.storage.location))
    save_id = new_save_id() if journal is None else journal.save_id
    directory = iteration_directory(planned.index.iteration)
    target.make_directory(directory)
    # Before the sweep: whoever began this, its marker is of an epoch that has ended, and it is ours now.
    target.replace(pending_marker(planned.index.iteration, save_id), str(writer.epoch).encode())
    sweep(target, grace_s=_GRACE_S)
    _check_room(target, planned, save_id)
    parts = world_size if journal is None else journal.parts
    return Order(save_id, parts, writer.epoch, is_resumed=journal is not None), writer


def _finish_twin(target: Storage, planned: PlannedReshard, save_id: str) -> None:
    """What a reshard does after its commit, if it was cut short in between."""
    directory = iteration_directory(planned.index.iteration)
    for name in target.list(directory):
        if save_id in name and name.startswith(("reshard-", "pending-")):
            target.remove(f"{directory}/{name}")
    if tracker_warning(target, list_commits(target)[0]) is not None:
        target.replace(TRACKER, str(list_commits(target)[0].iteration).encode())


def _check_is_free(target: Storage, planned: PlannedReshard, owner: RootOwner | None) -> None:
    """Raise CheckpointError for the root of another run, and for one that a job saves to: that would be ended, and what
    it has saved would no longer count as the newest."""
    if owner is not None and owner.reshards is None:
        raise CheckpointError(
            f"{target.location} is a root that a job saves to (process {owner.pid} on {owner.host!r} was the last): a "
            f"reshard there would end that job, and count as newer than what it has saved. Give a root of its "
            f"own. Nothing was written."
        )
    _check_order(target, planned)
    # What was resharded here before may be of checkpoints that the source has pruned since: then nothing else tells.
    if owner is None or owner.reshards != utf8_text(planned.storage.location):
        check_is_of_one_run(planned.storage, target, planned.commit)


def _check_order(target: Storage, planned: PlannedReshard) -> None:
    """Raise CheckpointError if the target has something that the source saved later: it would not be the newest there
    any more. What cannot be read, or has gone meanwhile, says nothing."""
    made_of = {head.parent for head in _heads(target, list_commits(target))} - {None}
    later = [commit for commit in list_commits(planned.storage) if commit > planned.commit] if made_of else []
    for head in _heads(planned.storage, later):
        if head.save_id in made_of:
            raise CheckpointError(
                f"{target.location} has iteration {head.iteration} already, which {planned.storage.location} saved "
                f"after iteration {planned.commit.iteration}, and which would not be the newest any more. Reshard in "
                f"the order in which they were saved, or into a root of its own. Nothing was written."
            )


def _heads(storage: Storage, commits: Sequence[Commit]) -> Iterator[IndexHead]:
    for commit in commits:
        try:
            yield read_head(storage, commit)
        except (CheckpointError, OSError) as error:
            if not is_damage(error) and not isinstance(error, FileNotFoundError):
                raise


def _check_room(target: Storage, planned: PlannedReshard, save_id: str) -> None:
    free = target.free_space()
    directory = iteration_directory(planned.index.iteration)
    there = 0
    for name in target.list(directory):
        if name.startswith("shard-") and save_id in name:
            file = target.open(f"{directory}/{name}")
            there += file.size_bytes
            file.close()
    needed = int(planned.layout.bytes_by_rank.sum()) - there
    if free is not None and needed > free.size_bytes:
        raise CheckpointError(
            f"not enough space: the new checkpoint takes {needed} bytes more in {target.location}, which has "
            f"{free.size_bytes} bytes free"
        )


def commit(
    target: Storage,
    planned: PlannedReshard,
    order: Order,
    files: TargetFiles,
    outcomes: Sequence[Outcome],
    writer: Writer,
) -> Totals:
    """Make the files that all ranks have written a checkpoint. Raises DistributedError that says whether it is one."""
    found = {number: file for outcome in outcomes for number, file in outcome.files.items()}
    written = [found[number] for number in range(len(files.files))]
    directory = iteration_directory(planned.index.iteration)
    try:
        index, table = _index_of(planned, order.save_id, files, written, writer)
        name = f"{directory}/{index.chunk_table.name}"
        writer.check_fence()
        # Over that of a try that was cut short here, never without one: somebody who went on with our files has the
        # same, and may have committed it by now.
        target.replace(name, table)
        writer.publish(index)
    except (CommitFailed, OSError) as error:
        raise DistributedError(
            f"resharding iteration {planned.index.iteration}: {error}",
            failures={0: str(error)},
            committed=error.committed if isinstance(error, CommitFailed) else "no",
        ) from error
    for part in range(order.parts):
        target.remove(journal_name(directory, order.save_id, part))
    target.remove(pending_marker(planned.index.iteration, order.save_id))
    return Totals(
        len(written) + 1,
        sum(file.size_bytes for file in written) + len(table),
        sum(outcome.bytes_read for outcome in outcomes),
        sum(outcome.bytes_written for outcome in outcomes),
        max(outcome.peak_rss_bytes for outcome in outcomes),
    )


def _is_same_directory(a: Storage, b: Storage) -> bool:
    if not isinstance(a, PosixStorage) or not isinstance(b, PosixStorage):
        return a is b
    return os.path.exists(b.location) and os.path.samefile(a.location, b.location)


def _find_twin(target: Storage, planned: PlannedReshard) -> str | None:
    """The save_id of a checkpoint of the target that is what this reshard would make."""
    for commit in list_commits(target):
        if commit.iteration != planned.index.iteration:
            continue
        try:
            index, _ = read_index(target, commit)
            # The newest of the iteration counts.
            return index.save_id if _is_twin(target, commit, index, planned) else None
        except (CheckpointError, OSError) as error:
            if not is_damage(error):
                raise
    return None


def _is_twin(target: Storage, commit: Commit, index: Index, planned: PlannedReshard) -> bool:
    """Whether a checkpoint has what this reshard would write, in files of the same ranks. Raises as read_index does."""
    content, layout = planned.content, planned.layout
    specs = {tensor.key: tensor.spec for tensor in layout.tensors}
    per_rank = {key: (kept.axes, kept.kind.on_change, set(kept.holders)) for key, kept in content.per_rank.items()}
    is_alike = (
        index.parent == planned.index.save_id
        and index.mesh == dict(layout.mesh.sizes)
        and index.values == dict(content.values)
        and {key: (e.axes, e.on_change, {at for at, _ in e.holders}) for key, e in index.per_rank.items()} == per_rank
        and {key: entry.spec for key, entry in index.tensors.items()} == specs
    )
    if not is_alike:
        return False
    there = StoredTensors.read(target, commit.directory, index, content.keys)
    rank_of = np.array([file.rank for file in index.files], np.int64)
    for tensor, chunks in zip(layout.tensors, layout.chunks, strict=True):
        hits = there.chunks_of(tensor.key)
        found = _sorted_rows(hits.offsets, hits.shapes, rank_of[hits.files])
        if not np.array_equal(found, _sorted_rows(chunks.offsets, chunks.shapes, chunks.ranks)):
            return False
    return True


def _sorted_rows(*columns: Int64Array) -> Int64Array:
    rows: Int64Array = np.column_stack(columns)
    return rows[np.lexsort(rows.T[::-1])]


def _find_journal(target: Storage, planned: PlannedReshard) -> Journal | None:
    """Of a reshard that would write the same, and was cut short."""
    directory = iteration_directory(planned.index.iteration)
    for match in filter(None, map(_JOURNAL.fullmatch, target.list(directory))):
        name = journal_name(directory, match[1], 0)
        try:
            journal = read_journal(target, name)
        except (CheckpointError, OSError) as error:
            logger.warning("%s is passed over: %s", name, error)
            continue
        if journal.digest == planned.digest and journal.parts <= _MAX_PARTS:
            return journal
        logger.warning("%s is of a reshard with other options, which is given up", name)
    return None


def _index_of(
    planned: PlannedReshard, save_id: str, target: TargetFiles, files: Sequence[ShardFile], writer: Writer
) -> tuple[Index, bytes]:
    """The index of the target and the content of its chunk table."""
    layout, source = planned.layout, planned.index
    specs: Mapping[str, Spec] = {tensor.key: tensor.spec for tensor in layout.tensors}
    records = {
        tensor.key: encode_record(Chunks(tensor.offsets, tensor.shapes, tensor.outputs, tensor.starts), tensor.shape)
        for tensor in target.tensors
    }
    joined = join_records(specs, records)
    first_file = {file.rank: number for number, file in reversed(list(enumerate(files)))}
    per_rank = {
        key: PerRankEntry(
            axes=kept.axes,
            on_change=kept.kind.on_change,
            holders=tuple((at, first_file[rank]) for at, (rank, _) in kept.holders.items()),
        )
        for key, kept in planned.content.per_rank.items()
    }
    index = Index(
        format=FORMAT,
        version=FORMAT_VERSION,
        save_id=save_id,
        epoch=writer.epoch,
        commit_seq=writer.commit_seq,
        iteration=source.iteration,
        parent=source.save_id,
        created_unix_s=time.time(),
        world_size=layout.mesh.world_size,
        mesh=dict(layout.mesh.sizes),
        tensors=joined.tensors,
        values=dict(planned.content.values),
        metadata=source.metadata,
        metrics=source.metrics,
        per_rank=per_rank,
        files=tuple(files),
        chunk_table=joined.table(save_id),
    )
    return index, joined.content
