"""What is exported, and how its tensors come: step by step, in the order in which they are stored. No torch.

Every byte is checked. Several threads take steps at the same time, each with a source and an equal part of the memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from math import prod
from typing import TypeVar

import msgspec
import numpy as np

from distckpt.checkpoint_files import OnBytes
from distckpt.commit import read_index
from distckpt.elements import Elements, can_convert, convert, overflows, view_elements
from distckpt.errors import CheckpointError
from distckpt.geometry import Box
from distckpt.index import Index, Spec
from distckpt.key_globs import is_selected, unmatched_globs
from distckpt.reader import StoredTensors, Wanted
from distckpt.reading_order import reading_order
from distckpt.selecting import Selector, open_selected, select_commits
from distckpt.shard_file import DTYPES
from distckpt.storage import Storage
from distckpt.tensor_source import OPEN_FILES, TensorSource

T = TypeVar("T")
LEAST_MEMORY_BYTES = 16 << 20
_MAX_SHOWN = 5  # keys, in an error
_BATCH_BYTES = 32 << 20  # that one thread takes at a time, of neighbours: the blocks that these share are read once


@dataclass(frozen=True, slots=True)
class ExportSource:
    """What of a committed checkpoint is exported. keys: of its tensors, in the order in which they are stored,
    those without elements first. dtype: into which floating-point tensors are rounded; None leaves all as they are."""

    storage: Storage
    directory: str
    index: Index
    stored: StoredTensors
    keys: Sequence[str]
    select: Sequence[str]
    drop: Sequence[str]
    dtype: str | None

    @classmethod
    def open(
        cls,
        root: str | os.PathLike[str] | Storage,
        iteration: Selector = None,
        *,
        select: Sequence[str] = (),
        drop: Sequence[str] = (),
        dtype: str | None = None,
    ) -> ExportSource:
        """select, drop: patterns of keys (`*`, `?`, `[...]`): those that match one of `select`, or all if it is empty,
        without those that match one of `drop`.

        Raises CheckpointNotFoundError; CorruptionError; ValueError for a pattern that no tensor matches, or a dtype
        that nothing is rounded to; OSError.
        """
        storage, selector = open_selected(root, iteration)
        commit = select_commits(storage, selector)[0]
        index, _ = read_index(storage, commit)
        for pattern in unmatched_globs((*select, *drop), index.tensors):
            like = ", ".join(map(repr, list(index.tensors)[:_MAX_SHOWN]))
            raise ValueError(f"no tensor of iteration {index.iteration} matches {pattern!r}; keys are such as {like}")
        if dtype is not None and not can_convert("float32", dtype):
            raise ValueError(f"dtype {dtype!r}: expected a floating-point type that tensors can be rounded to")
        keys = [key for key in index.tensors if is_selected(key, select, drop)]
        stored = StoredTensors.read(storage, commit.directory, index, keys)
        ordered = [keys[number] for number in reading_order(stored.located)]
        return cls(storage, commit.directory, index, stored, ordered, select, drop, dtype)

    def is_selected(self, key: str) -> bool:
        return is_selected(key, self.select, self.drop)

    def spec(self, key: str) -> Spec:
        """Of a tensor, as it is exported."""
        spec = self.index.tensors[key].spec
        if self.dtype is None or not can_convert(spec.dtype, self.dtype):
            return spec
        return msgspec.structs.replace(spec, dtype=self.dtype)

    @property
    def size_bytes(self) -> int:
        """Of the tensors, as they are exported."""
        return sum(self.spec(key).size_bytes for key in self.keys)

    def stored_bytes(self, key: str, box: Box) -> int:
        return box.size * DTYPES[self.index.tensors[key].dtype].item_bytes

    def read(self, tensors: TensorSource, parts: Sequence[tuple[str, Box]]) -> list[Elements]:
        """The elements of boxes of tensors, in C order, as they are exported. What is asked for together is planned
        together: of small tensors, planning takes longest. Raises CorruptionError; OSError; CheckpointError for a
        number that the dtype asked for cannot hold."""
        memory = [np.empty(self.stored_bytes(key, box), np.uint8).data for key, box in parts]
        wanted = []
        for (key, box), data in zip(parts, memory, strict=True):
            item_bytes = DTYPES[self.index.tensors[key].dtype].item_bytes
            strides = tuple(prod(box.shape[d + 1 :]) * item_bytes for d in range(len(box.shape)))
            wanted.append(Wanted(key, box, data, 0, strides, item_bytes))
        tensors.fill(wanted)
        return [self._as_exported(key, box, data) for (key, box), data in zip(parts, memory, strict=True)]

    def _as_exported(self, key: str, box: Box, data: memoryview) -> Elements:
        stored, target = self.index.tensors[key].dtype, self.spec(key).dtype
        elements = view_elements(data, stored, box.shape)
        if stored == target:
            return elements
        converted = convert(elements, target)
        if overflows(elements, converted):
            raise CheckpointError(
                f"{key!r}, elements {box}: some are larger than a {target} can hold; they are stored as {stored}. "
                f"Export them as they are"
            )
        return converted


class Workers:
    """Threads that take the steps of an export. memory_bytes: of each, its cache of blocks included."""

    def __init__(self, source: ExportSource, memory_bytes: int, jobs: int | None, on_bytes: OnBytes) -> None:
        """memory_bytes: of all threads together. jobs: how many; the processors if None. Raises ValueError."""
        self.jobs, self.memory_bytes = threads_and_memory(memory_bytes, jobs)
        self._source = source
        self._on_bytes = on_bytes
        self._lock = threading.Lock()
        self._failures: list[BaseException] = []

    def run(self, steps: Iterator[tuple[int, T]], work: Callable[[TensorSource, T], None]) -> None:
        """Have work(source, step) done for each (bytes, step), by whichever thread comes next. Raises what one of them
        raised first, once all have stopped."""
        # No threads that are joined here: Python 3.11 takes one whose join() is interrupted for one that has ended.
        with ThreadPoolExecutor(self.jobs, "distckpt-export") as threads:
            try:
                wait([threads.submit(self._run, steps, work) for _ in range(self.jobs)])
            except BaseException as error:  # Ctrl-C.
                self._failures.append(error)
                raise
        if self._failures:
            raise self._failures[0]

    def _run(self, steps: Iterator[tuple[int, T]], work: Callable[[TensorSource, T], None]) -> None:
        try:
            self._take(steps, work)
        except BaseException as error:
            self._failures.append(error)

    def _take(self, steps: Iterator[tuple[int, T]], work: Callable[[TensorSource, T], None]) -> None:
        source = self._source
        with TensorSource(
            source.storage,
            source.directory,
            source.stored,
            cache_bytes=self.memory_bytes // 4,
            max_open_files=max(8, 2 * OPEN_FILES // self.jobs),  # Of all threads together: a process has a limit.
        ) as tensors:
            while batch := self._next(steps):
                for _, step in batch:
                    if self._failures:
                        return
                    work(tensors, step)

    def _next(self, steps: Iterator[tuple[int, T]]) -> list[tuple[int, T]]:
        batch: list[tuple[int, T]] = []
        left = _BATCH_BYTES
        with self._lock:
            while left > 0 and (step := next(steps, None)) is not None:
                batch.append(step)
                left -= step[0]
        return batch

    def tell(self, step_bytes: int) -> None:
        """Of progress, one thread at a time. Raises what on_bytes does, to give up, and CheckpointError once another
        thread has failed: a step may be long."""
        if self._failures:
            raise CheckpointError("given up, as another thread has failed")
        with self._lock:
            self._on_bytes(step_bytes)


def threads_and_memory(memory_bytes: int, jobs: int | None) -> tuple[int, int]:
    """How many threads there are, and how much memory each has. Raises ValueError."""
    if memory_bytes < LEAST_MEMORY_BYTES:
        raise ValueError(
            f"memory of {memory_bytes} bytes is too little: give at least {LEAST_MEMORY_BYTES} bytes "
            f"({LEAST_MEMORY_BYTES >> 20} MiB)"
        )
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs={jobs}: expected at least 1")
    count = jobs or os.cpu_count() or 1
    count = max(1, min(count, memory_bytes // LEAST_MEMORY_BYTES))
    return count, memory_bytes // count
