"""verify: whether what is stored of a checkpoint is what was written. Reads everything, or a sample; changes nothing.

No torch and no other ranks: it runs beside a job, on a machine without accelerators, after a copy to other storage.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial

import msgspec
import numpy as np

from distckpt.checkpoint_files import (
    CheckedFile,
    ExpectedEntry,
    OnBytes,
    decode_per_rank,
    expected_entries,
    is_damage,
    read_chunks,
)
from distckpt.commit import Commit, list_commits, read_index, tracker_warning
from distckpt.errors import CheckpointError, CheckpointNotFoundError
from distckpt.geometry import Box
from distckpt.index import Index, ShardFile, check_locations
from distckpt.json_value import decode_value
from distckpt.parity import ParityGroup, open_parity, read_record
from distckpt.planner import plan_load
from distckpt.selecting import open_selected, select_commits
from distckpt.shard_file import BLOCK_BYTES
from distckpt.storage import Storage

_PIECE_BLOCKS = 64  # blocks that are read between two words to on_bytes


class Fault(msgspec.Struct, frozen=True):
    """One thing that is not as it was written. file: below the root."""

    file: str
    problem: str


class VerifyReport(msgspec.Struct, frozen=True, kw_only=True):
    """What verifying one checkpoint found.

    save_id: "" if the index could not be read. bytes: of the index, all files that it names, and parity; bytes_read: of
    those, what was read and checked. warnings: what is odd, but loses nothing.
    """

    iteration: int
    epoch: int
    commit_seq: int
    save_id: str
    files: int
    bytes: int
    bytes_read: int
    total_s: float
    is_sound: bool
    faults: tuple[Fault, ...]
    warnings: tuple[str, ...] = ()


def verify(
    root: str | os.PathLike[str] | Storage,
    iteration: int | str | None = None,
    *,
    sample: float = 1.0,
    jobs: int | None = None,
    on_bytes: OnBytes = lambda _: None,
) -> VerifyReport:
    """Check the newest checkpoint under a root, or the selected one, against its checksums.

    Past the page cache. Each damaged block is found, not only the first. sample: which part of the blocks of each file
    is read, chosen anew by every call; index, chunk table, headers, checksum tables and parity are always read. jobs:
    files that are read at a time. on_bytes: told, by any thread, how many bytes were read since it was told last.

    Raises CheckpointNotFoundError; CheckpointError for a format that is newer than this package; OSError for what says
    nothing of the checkpoint (no right to read it).
    """
    storage, selector = open_selected(root, iteration)
    commits = select_commits(storage, selector)
    report = verify_commit(storage, commits[0], sample=sample, jobs=jobs, on_bytes=on_bytes)
    warning = tracker_warning(storage, commits[0]) if selector is None else None
    return report if warning is None else msgspec.structs.replace(report, warnings=(warning,))


def verify_commit(
    storage: Storage,
    commit: Commit,
    *,
    sample: float = 1.0,
    jobs: int | None = None,
    on_bytes: OnBytes = lambda _: None,
) -> VerifyReport:
    """The same of a particular commit. Raises CheckpointNotFoundError if it is removed meanwhile."""
    if not 0 < sample <= 1:
        raise ValueError(f"sample={sample}: expected more than 0, and at most 1 for all")
    started = time.perf_counter()
    faults: list[Fault] = []
    index, bytes_read = _index(storage, commit, faults)
    size_bytes = bytes_read
    on_bytes(bytes_read)
    if index is not None:
        size_bytes += _total_bytes(index)
        entries: list[list[ExpectedEntry]] = [[] for _ in index.files]
        with _noting(faults, f"{commit.directory}/{index.chunk_table.name}"):
            entries = _entries_by_file(storage, commit.directory, index)
            bytes_read += index.chunk_table.size_bytes
            on_bytes(index.chunk_table.size_bytes)
        with _threads(jobs) as (threads, is_stopped):
            verify = partial(_verify_file, storage, commit.directory, sample, on_bytes, is_stopped)
            for found, read in threads.map(verify, index.files, entries):
                faults += found
                bytes_read += read
            parity = _parity_groups(storage, commit.directory, index, faults)
            verify_parity = partial(_verify_parity, storage, commit.directory, on_bytes, is_stopped)
            for group, found in zip(parity, threads.map(verify_parity, parity), strict=True):
                faults += found
                size_bytes += group.size_bytes
                bytes_read += group.size_bytes
    if faults and commit not in list_commits(storage):
        raise CheckpointNotFoundError(f"{commit.name}: it was removed while it was being verified")
    return VerifyReport(
        iteration=commit.iteration,
        epoch=commit.epoch,
        commit_seq=commit.commit_seq,
        save_id="" if index is None else index.save_id,
        files=0 if index is None else len(index.files),
        bytes=size_bytes,
        bytes_read=bytes_read,
        total_s=time.perf_counter() - started,
        is_sound=not faults,
        faults=tuple(faults),
    )


@contextmanager
def _threads(jobs: int | None) -> Iterator[tuple[ThreadPoolExecutor, threading.Event]]:
    """Threads, and an event that is set for them when the body fails or is interrupted: then nobody waits for them."""
    is_stopped = threading.Event()
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1, "distckpt-verify") as threads:
        try:
            yield threads, is_stopped
        except BaseException:
            is_stopped.set()
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def _index(storage: Storage, commit: Commit, faults: list[Fault]) -> tuple[Index | None, int]:
    """The index, if it can be read, and its length."""
    found: tuple[Index | None, bytes] = None, b""
    with _noting(faults, commit.name):
        found = read_index(storage, commit, past_cache=True)
    return found[0], len(found[1])


def damaged_files(report: VerifyReport) -> set[str]:
    """Names, below the iteration's directory, of the files in which there are faults."""
    return {fault.file.rpartition("/")[2] for fault in report.faults}


def stored_bytes(storage: Storage, commit: Commit, *, with_parity: bool = False) -> int:
    """Of the files that an index names, and of its parity if asked for; 0 if the index cannot be read."""
    total = 0
    with suppress(CheckpointError, OSError):
        index, _ = read_index(storage, commit)
        total = _total_bytes(index)
        record = read_record(storage, commit.directory, index) if with_parity else None
        total += sum(group.size_bytes for group in record.groups) if record is not None else 0
    return total


def _total_bytes(index: Index) -> int:
    return sum(file.size_bytes for file in index.files) + index.chunk_table.size_bytes


@contextmanager
def _noting(faults: list[Fault], name: str) -> Iterator[None]:
    """Note what is wrong with the file of that name, and go on after the body."""
    try:
        yield
    except (CheckpointError, OSError) as error:
        if not is_damage(error):
            raise
        faults.append(Fault(name, str(error)))


def _entries_by_file(storage: Storage, directory: str, index: Index) -> list[list[ExpectedEntry]]:
    """The chunks that the chunk table has in each file. Raises CorruptionError or OSError."""
    keys = list(index.tensors)
    boxes = [Box.whole(entry.global_shape) for entry in index.tensors.values()]
    entries: list[list[ExpectedEntry]] = [[] for _ in index.files]
    for copies in plan_load(read_chunks(storage, directory, index, keys, past_cache=True), np.arange(len(keys)), boxes):
        of_tensor = copies.target
        check_locations(index, keys, of_tensor, copies.hits)
        for file, entry in zip(
            copies.hits.files.tolist(), expected_entries(index, keys, of_tensor, copies.hits), strict=True
        ):
            entries[file].append(entry)
    return entries


def _verify_file(
    storage: Storage,
    directory: str,
    sample: float,
    on_bytes: OnBytes,
    is_stopped: threading.Event,
    expected: ShardFile,
    entries: Sequence[ExpectedEntry],
) -> tuple[list[Fault], int]:
    """What is wrong with a shard file, and how much of it was read."""
    name = f"{directory}/{expected.name}"
    faults: list[Fault] = []
    bytes_read = 0
    with _noting(faults, name), CheckedFile(storage, directory, expected, past_cache=True) as file:
        with _noting(faults, name):
            file.check_entries(entries)
        bytes_read = file.table.nbytes  # The header is read once more, as part of the first block.
        on_bytes(bytes_read)
        for piece in _pieces(expected, sample):
            if is_stopped.is_set():
                break
            before = file.bytes_read
            faults += [Fault(name, problem) for problem in file.faults(piece)]
            on_bytes(file.bytes_read - before)
            bytes_read += file.bytes_read - before
        if not faults:
            for key, value in decode_per_rank(file.read(*expected.per_rank), name).items():
                decode_value(bytes(value), f"{name}: {key!r}")
    return faults, bytes_read


def _parity_groups(storage: Storage, directory: str, index: Index, faults: list[Fault]) -> Sequence[ParityGroup]:
    record = None
    with _noting(faults, f"{directory}/parity-{index.save_id}.json"):
        record = read_record(storage, directory, index)
    return () if record is None else record.groups


def _verify_parity(
    storage: Storage, directory: str, on_bytes: OnBytes, is_stopped: threading.Event, group: ParityGroup
) -> list[Fault]:
    faults: list[Fault] = []
    name = f"{directory}/{group.name}"
    with _noting(faults, name), open_parity(storage, directory, group) as file:
        on_bytes(group.size_bytes - group.data_bytes)
        for begin in range(0, group.data_bytes, _PIECE_BLOCKS * BLOCK_BYTES):
            if is_stopped.is_set():
                break
            end = min(begin + _PIECE_BLOCKS * BLOCK_BYTES, group.data_bytes)
            faults += [Fault(name, problem) for problem in file.faults([(begin, end)])]
            on_bytes(end - begin)
    return faults


def _pieces(file: ShardFile, sample: float) -> Iterator[Iterable[tuple[int, int]]]:
    """The blocks to read of a file as ranges of bytes, a bounded number at a time."""
    blocks = -(-file.checksum_start // BLOCK_BYTES)
    chosen = list(range(blocks))
    if sample < 1:
        chosen = sorted(random.sample(chosen, max(1, round(sample * blocks))))
    for first in range(0, len(chosen), _PIECE_BLOCKS):
        yield _ranges(chosen[first : first + _PIECE_BLOCKS], file.checksum_start)


def _ranges(blocks: Sequence[int], end: int) -> list[tuple[int, int]]:
    """Ascending blocks as ranges that do not touch."""
    numbers = np.array(blocks)
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return [(int(run[0]) * BLOCK_BYTES, min((int(run[-1]) + 1) * BLOCK_BYTES, end)) for run in runs]
