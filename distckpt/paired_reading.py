"""Paired reading: the same boxes of two checkpoints side by side, in steps of a fixed amount of memory. No torch.

Decides in which order tensors are read, and which of them together. Each side has a thread of its own, and reads the
next step while this one is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

import numpy as np
from typing_extensions import Self

from distckpt.checkpoint_files import is_damage
from distckpt.errors import CheckpointError
from distckpt.geometry import Box, bands, strides_of
from distckpt.index import Index
from distckpt.number_differences import Uint8Array
from distckpt.reader import StoredTensors, Wanted
from distckpt.reading_order import reading_order
from distckpt.shard_file import DTYPES
from distckpt.storage import Storage
from distckpt.tensor_source import MEMORY_BYTES, TensorSource

MIN_MEMORY_BYTES = 16 << 20
_ALIGNMENT = 64
_STEP_PARTS = 4096  # of small tensors: what is known of a part is more than a scalar

Stored: TypeAlias = tuple[Storage, str, Index]  # the storage, the iteration's directory below it, its index


@dataclass(frozen=True, slots=True, eq=False)
class PairedPiece:
    """A part of a tensor as it is stored in both checkpoints: the elements from the flat index `at` on, in C order.

    is_last: of its tensor. problem: why one of them cannot be read; there is nothing in the memories then, and the
    piece is its tensor's last.
    """

    key: str
    at: int
    a: Uint8Array
    b: Uint8Array
    is_last: bool
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class _Part:
    """A box of a tensor, and where in the memory of its step each side's elements lie: first byte and bytes."""

    key: str
    box: Box
    at: int
    is_last: bool
    starts: tuple[int, int]
    sizes: tuple[int, int]


class PairReader:
    """Tensors that both checkpoints have in one shape: iterates over their PairedPieces, those of a tensor in a row and
    in C order. A context manager; the memory of a piece is good until the next is asked for.

    memory_bytes: a quarter for elements, half for blocks that are begun, the rest for what else there is. Raises
    CorruptionError for a chunk table; OSError for what is no damage; ValueError.
    """

    def __init__(self, a: Stored, b: Stored, keys: Sequence[str], *, memory_bytes: int = MEMORY_BYTES) -> None:
        if memory_bytes < MIN_MEMORY_BYTES:
            raise ValueError(f"memory of {memory_bytes} bytes: expected at least {MIN_MEMORY_BYTES}")
        self._step_bytes = memory_bytes // 16
        self._failed: set[str] = set()
        with ExitStack() as opened:
            stored = [StoredTensors.read(*side, keys) for side in (a, b)]
            self._sources = [
                opened.enter_context(TensorSource(*side[:2], tensors, cache_bytes=memory_bytes // 4))
                for side, tensors in zip((a, b), stored, strict=True)
            ]
            self._threads = [opened.enter_context(ThreadPoolExecutor(1, "distckpt-compare")) for _ in stored]
            self._opened = opened.pop_all()
        self._shapes = {key: a[2].tensors[key].global_shape for key in keys}
        self._items = {
            key: (DTYPES[a[2].tensors[key].dtype].item_bytes, DTYPES[b[2].tensors[key].dtype].item_bytes)
            for key in keys
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.shutdown(wait=False, cancel_futures=True)
        self._opened.close()  # Waits for the step that is being read.

    @property
    def bytes_read(self) -> int:
        """From both storages."""
        return sum(source.bytes_read for source in self._sources)

    def __iter__(self) -> Iterator[PairedPiece]:
        memories = [[np.empty(self._step_bytes, np.uint8) for _ in self._sources] for _ in range(2)]
        ahead: tuple[list[_Part], list[Uint8Array], list[Future[dict[int, str]]]] | None = None
        for number, parts in enumerate(chain(self._steps(), [[]])):  # Behind the last step there is nothing to read.
            memory = memories[number % 2]
            reading = [
                thread.submit(_fill, source, side, parts, memory[side])
                for side, (thread, source) in enumerate(zip(self._threads, self._sources, strict=True))
            ]
            if ahead is not None:
                yield from self._pieces(*ahead)
            ahead = parts, memory, reading

    def _pieces(
        self, parts: Sequence[_Part], memory: Sequence[Uint8Array], reading: Sequence[Future[dict[int, str]]]
    ) -> Iterator[PairedPiece]:
        problems = reading[0].result() | reading[1].result()
        for number, part in enumerate(parts):
            if part.key in self._failed:
                continue
            a, b = (m[start : start + size] for m, start, size in zip(memory, part.starts, part.sizes, strict=True))
            problem = problems.get(number)
            if problem is not None:
                self._failed.add(part.key)
                a, b = a[:0], b[:0]
            yield PairedPiece(part.key, part.at, a, b, part.is_last or problem is not None, problem)

    def _steps(self) -> Iterator[list[_Part]]:
        """Parts of tensors that are read together, as many as the memory of a step holds."""
        parts: list[_Part] = []
        used = [0, 0]
        stored = self._sources[0].stored
        for number in reading_order(stored.located):
            key = stored.keys[number]
            whole, items = Box.whole(self._shapes[key]), self._items[key]
            at = 0
            for box in bands(whole, self._step_bytes // max(items)) if whole.size else (whole,):
                if key in self._failed:  # Since the step before was looked at.
                    break
                sizes = box.size * items[0], box.size * items[1]
                is_full = any(u + n > self._step_bytes for u, n in zip(used, sizes, strict=True))
                if parts and (is_full or len(parts) == _STEP_PARTS):
                    yield parts
                    parts, used = [], [0, 0]
                parts.append(_Part(key, box, at, at + box.size == whole.size, (used[0], used[1]), sizes))
                used = [-(-(u + n) // _ALIGNMENT) * _ALIGNMENT for u, n in zip(used, sizes, strict=True)]
                at += box.size
        yield parts


def _fill(source: TensorSource, side: int, parts: Sequence[_Part], memory: Uint8Array) -> dict[int, str]:
    """Read what one side has of a step; returns why parts cannot be read, by their number."""
    wanted = [(number, _wanted(source, part, side, memory)) for number, part in enumerate(parts) if part.box.size]
    try:
        source.fill([one for _, one in wanted])
    except (CheckpointError, OSError) as error:
        if not is_damage(error):
            raise
    else:
        return {}
    problems: dict[int, str] = {}
    for number, one in wanted:  # Which of them it is.
        try:
            source.fill([one])
        except (CheckpointError, OSError) as error:
            if not is_damage(error):
                raise
            problems[number] = f"{'AB'[side]}: {error}"
    return problems


def _wanted(source: TensorSource, part: _Part, side: int, memory: Uint8Array) -> Wanted:
    item_bytes = DTYPES[source.stored.index.tensors[part.key].dtype].item_bytes
    (strides,) = strides_of(np.array([part.box.shape], np.int64).reshape(1, -1)).tolist() or [()]
    return Wanted(
        part.key, part.box, memory.data, part.starts[side], tuple(n * item_bytes for n in strides), item_bytes
    )
