"""What is imported becomes a committed checkpoint of a new root: by the protocol of a save, of one process. No torch.

Tensors lie in files of bounded size of rank 0, which are written as they are read, through a fixed amount of memory;
a value that differs by rank lies in a file of the rank that held it, with its coordinates: so a load finds each.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import msgspec
import numpy as np
from typing_extensions import Buffer

from distckpt.assembling import JoinedRecords, join_records
from distckpt.checkpoint_files import OnBytes
from distckpt.chunk_table import Chunks, encode_record
from distckpt.commit import iteration_directory, list_commits, new_save_id, pending_marker
from distckpt.errors import CheckpointError
from distckpt.exchange.zarr_layout import PerRankFacts, RankValues
from distckpt.geometry import Box
from distckpt.heartbeat import Heartbeat
from distckpt.index import MAX_NATURAL, Index, Mesh, PerRankEntry, ShardFile, Spec, decode_index, encode_index
from distckpt.metrics import Metrics
from distckpt.planner import PerRankKind
from distckpt.removing import discard
from distckpt.report import ImportReport
from distckpt.roots import claim_root
from distckpt.shard_file import FORMAT, FORMAT_VERSION, FileLayout, file_name
from distckpt.share_files import facts_of_all, plan_share_files, shared_metadata
from distckpt.storage import PosixStorage, Storage, new_file
from distckpt.writing import header_metadata, write_shard_file

MAX_FILE_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class IncomingTensor:
    """A tensor that is to be stored. boxes: in which parts, which tile it. read: a part's elements in C order, as
    bytes, piece by piece. Several threads read different parts at a time."""

    spec: Spec
    boxes: Sequence[Box]
    read: Callable[[Box], Iterable[Buffer]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """All that a checkpoint is to hold. values, metadata: tagged JSON. ranks: who holds what of `per_rank`."""

    tensors: Mapping[str, IncomingTensor]
    values: Mapping[str, msgspec.Raw] = field(default_factory=dict)
    metadata: msgspec.Raw = field(default_factory=lambda: msgspec.Raw(b"null"))
    metrics: Metrics = field(default_factory=dict)
    per_rank: Mapping[str, PerRankFacts] = field(default_factory=dict)
    ranks: Sequence[RankValues] = ()
    mesh: Mapping[str, int] = field(default_factory=dict)
    world_size: int = 1

    @property
    def size_bytes(self) -> int:
        return sum(tensor.spec.size_bytes for tensor in self.tensors.values())


@dataclass(frozen=True, slots=True)
class _File:
    """One file that is to be written. numbers: of the parts of tensors, in its order."""

    rank: int
    mesh: Mesh
    layout: FileLayout
    numbers: Sequence[int]


def commit_incoming(
    root: str | os.PathLike[str] | Storage,
    incoming: Incoming,
    iteration: int,
    *,
    source: str,
    jobs: int,
    max_file_bytes: int = MAX_FILE_BYTES,
    on_bytes: OnBytes = lambda _: None,
) -> ImportReport:
    """Write and commit it. jobs: files that are written at a time. on_bytes: as of export_zarr.

    Raises CheckpointError if the root has checkpoints, lies in an iteration, or has no room; CorruptionError for what
    is no sound checkpoint; OSError; what reading raises. Then nothing is committed.
    """
    if not 0 <= iteration <= MAX_NATURAL:
        raise ValueError(f"iteration {iteration}: expected a natural number")
    storage = PosixStorage(root) if isinstance(root, (str, os.PathLike)) else root
    started = time.perf_counter()
    parts = [(key, tensor.spec, box) for key, tensor in incoming.tensors.items() for box in tensor.boxes]
    save_id = new_save_id()
    files = _plan_files(incoming, parts, iteration, save_id, max_file_bytes)
    _check_place(storage, files)
    writer = claim_root(storage)
    writer.announce(iteration, save_id)
    pending = pending_marker(iteration, save_id)
    try:
        with Heartbeat(storage, pending, active=True):
            written = _write_files(storage, incoming, parts, files, iteration, save_id, jobs, on_bytes)
            records = _records(incoming, parts, files)
            index = _index(incoming, files, written, records, save_id, iteration)
            index = msgspec.structs.replace(index, epoch=writer.epoch, commit_seq=writer.commit_seq)
            decode_index(encode_index(index), name=source)  # What came from elsewhere must pass what any index must.
            table = f"{iteration_directory(iteration)}/{index.chunk_table.name}"
            with new_file(storage, table, len(records.content)) as out:
                out.write(0, records.content)
            writer.publish(index)
    except BaseException:
        with suppress(OSError):
            discard(storage, iteration, save_id)  # Unless it is committed after all.
        raise
    storage.remove(pending)
    return ImportReport(
        iteration=iteration,
        save_id=save_id,
        source=source,
        target=storage.location,
        tensors=len(incoming.tensors),
        values=len(incoming.values) + len(incoming.per_rank),
        bytes=sum(file.size_bytes for file in written) + len(records.content),
        total_s=time.perf_counter() - started,
    )


def _check_place(storage: Storage, files: Sequence[_File]) -> None:
    commits = list_commits(storage)
    if commits:
        raise CheckpointError(
            f"{storage.location} holds checkpoints already ({len(commits)} of them): another would be taken for the "
            f"newest of that run, and a job that saves there be stopped. Import into a root of its own. Nothing was "
            f"written."
        )
    needed, free = sum(file.layout.size_bytes for file in files), storage.free_space()
    if free is not None and needed > free.size_bytes:
        raise CheckpointError(
            f"not enough space: the checkpoint takes {needed} bytes in {storage.location}, which has {free.size_bytes} "
            f"bytes free"
        )


def _plan_files(
    incoming: Incoming, parts: Sequence[tuple[str, Spec, Box]], iteration: int, save_id: str, max_file_bytes: int
) -> list[_File]:
    """Those of rank 0 first. Raises CheckpointError for values that are too long for a header's file."""
    held = {values.rank: values for values in incoming.ranks}
    first = held.get(0, RankValues(0, dict.fromkeys(incoming.mesh, 0), {}))
    specs = {key: tensor.spec for key, tensor in incoming.tensors.items()}
    files: list[_File] = []
    for values in [first, *(held[rank] for rank in sorted(held) if rank != 0)]:
        rank = values.rank
        mesh = {axis: (values.mesh.get(axis, 0), size) for axis, size in incoming.mesh.items()}
        kinds = {
            key: PerRankKind(tuple(axis for axis, _ in incoming.per_rank[key].axes), incoming.per_rank[key].on_change)
            for key in values.values
        }
        of_all = facts_of_all(sorted({0, *held}), specs) if rank == 0 else {}
        own = parts if rank == 0 else ()
        share = plan_share_files(own, range(len(own)), per_rank=kinds, of_all=of_all, max_data_bytes=max_file_bytes)
        common = header_metadata(save_id, iteration, rank, mesh)
        for number, file in enumerate(share):
            shared = {}
            if rank == number == 0:
                shared = shared_metadata(incoming.values, bytes(incoming.metadata), incoming.metrics)
            per_rank = b"{}" if number else msgspec.json.encode(values.values)
            layout = file.plan.lay_out(per_rank, common | file.metadata | shared)
            files.append(_File(rank, mesh, layout, file.numbers))
    return files


def _write_files(
    storage: Storage,
    incoming: Incoming,
    parts: Sequence[tuple[str, Spec, Box]],
    files: Sequence[_File],
    iteration: int,
    save_id: str,
    jobs: int,
    on_bytes: OnBytes,
) -> list[ShardFile]:
    """In the order of `files`. Raises what the first that failed did, once all have stopped."""
    is_stopped = threading.Event()
    lock = threading.Lock()
    numbers = {file.rank: count() for file in files}

    def read(number: int) -> Iterator[Buffer]:
        key, _, box = parts[number]
        for piece in incoming.tensors[key].read(box):
            if is_stopped.is_set():
                raise CheckpointError("given up, as another file could not be written")
            yield piece
            with lock:
                on_bytes(memoryview(piece).nbytes)

    def write(file: _File) -> ShardFile:
        names = (file_name(file.rank, part, incoming.world_size, save_id) for part in numbers[file.rank])
        return write_shard_file(
            storage,
            iteration_directory(iteration),
            names,
            file.layout,
            [partial(read, number) for number in file.numbers],
            rank=file.rank,
            mesh={axis: at for axis, (at, _) in file.mesh.items()},
            max_bytes_per_s=0.0,
        )

    # The first gets the lowest name of rank 0: it says what belongs to all.
    written = [write(files[0])]
    with ThreadPoolExecutor(jobs, "distckpt-import") as threads:
        futures = [threads.submit(write, file) for file in files[1:]]
        try:
            written += [future.result() for future in futures]
        except BaseException:
            is_stopped.set()
            threads.shutdown(cancel_futures=True)
            raise
    return written


def _records(incoming: Incoming, parts: Sequence[tuple[str, Spec, Box]], files: Sequence[_File]) -> JoinedRecords:
    places = np.zeros((len(parts), 2), np.int64)
    for number, file in enumerate(files):
        at = np.array(file.numbers, np.int64)
        places[at, 0], places[at, 1] = number, file.layout.starts
    records: dict[str, bytes] = {}
    begin = 0
    for key, tensor in incoming.tensors.items():
        stop, ndim = begin + len(tensor.boxes), len(tensor.spec.global_shape)
        offsets = np.array([box.offset for box in tensor.boxes], np.int64).reshape(stop - begin, ndim)
        shapes = np.array([box.shape for box in tensor.boxes], np.int64).reshape(stop - begin, ndim)
        chunks = Chunks(offsets, shapes, places[begin:stop, 0], places[begin:stop, 1])
        records[key] = encode_record(chunks, tensor.spec.global_shape)
        begin = stop
    return join_records({key: tensor.spec for key, tensor in incoming.tensors.items()}, records)


def _index(
    incoming: Incoming,
    files: Sequence[_File],
    written: Sequence[ShardFile],
    records: JoinedRecords,
    save_id: str,
    iteration: int,
) -> Index:
    first_file = {file.rank: number for number, file in reversed(list(enumerate(files)))}
    return Index(
        format=FORMAT,
        version=FORMAT_VERSION,
        save_id=save_id,
        epoch=0,
        commit_seq=0,
        iteration=iteration,
        parent=None,
        created_unix_s=time.time(),
        world_size=incoming.world_size,
        mesh=dict(incoming.mesh),
        tensors=records.tensors,
        values=dict(incoming.values),
        metadata=incoming.metadata,
        metrics=incoming.metrics,
        per_rank={
            key: PerRankEntry(
                axes=facts.axes,
                on_change=facts.on_change,
                holders=tuple(
                    (tuple(values.mesh[axis] for axis, _ in facts.axes), first_file[values.rank])
                    for values in incoming.ranks
                    if key in values.values
                ),
            )
            for key, facts in incoming.per_rank.items()
        },
        files=tuple(written),
        chunk_table=records.table(save_id),
    )
