"""Comparing: what two checkpoints differ by, whatever their layouts are, through a fixed amount of memory. No torch.

Tensors are read on both sides in the same bands, in the order of A's files; while a band is compared the next is read.
A tensor that cannot be read, of either, is named, and the others are compared all the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
import numpy as np

from distckpt.checkpoint_files import OnBytes, is_damage, read_per_rank
from distckpt.commit import Commit, list_commits, read_index
from distckpt.errors import CheckpointError, CheckpointNotFoundError
from distckpt.index import Index, PerRankEntry, TensorEntry
from distckpt.json_value import encode_value
from distckpt.key_globs import is_selected, unmatched_globs
from distckpt.number_differences import Differences, Number, Tolerance, add_differences, are_comparable
from distckpt.paired_reading import PairedPiece, PairReader
from distckpt.roots import open_root
from distckpt.selecting import Selector, open_selected, select_commits
from distckpt.storage import Storage
from distckpt.tensor_source import MEMORY_BYTES
from distckpt.value_differences import ValueDifference, differing_paths

_MAX_PLACES = 100  # of one value that are listed
_NO_FILE = -1  # that holds a per-rank value of some coordinates


class ComparedCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One side of a comparison. directory: below the root."""

    root: str
    directory: str
    iteration: int
    save_id: str


class OneSided(msgspec.Struct, frozen=True):
    """What only one of two checkpoints has. kind: "tensor", "value" or "per-rank value"."""

    key: str
    kind: str


class TensorDifference(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor that both checkpoints have, and that is not the same.

    differing: elements whose bits differ; of two dtypes, whose values do; None if they were not compared, as the shapes
    differ. outside: those beyond the tolerance; all that differ without one. nans: of those that differ, where one is
    NaN, or both are, with other bits. max_abs, max_rel (to the larger magnitude of the two): over the others that
    differ; None where there are no numbers. first_index: of the first that is outside, in C order; first_a, first_b:
    what stands there, a complex number as its two parts. problem: why it could not be read or compared.
    """

    key: str
    dtype_a: str
    dtype_b: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    differing: int | None = None
    outside: int | None = None
    nans: int | None = None
    max_abs: int | float | None = None
    max_rel: float | None = None
    first_index: tuple[int, ...] | None = None
    first_a: Number | None = None
    first_b: Number | None = None
    problem: str | None = None


class ComparisonReport(msgspec.Struct, frozen=True, kw_only=True):
    """What comparing two checkpoints found.

    is_equal: nothing differs, by more than the tolerance if there is one. is_complete: all could be read and compared.
    tensors_compared: that both have, in one shape; of those tensors_equal, and of those tensors_same_bits. tensors:
    those that are not equal, the worst first. values: of
    shared and per-rank values, metadata and metrics. bytes_read: of both.
    """

    a: ComparedCheckpoint
    b: ComparedCheckpoint
    is_equal: bool
    is_complete: bool
    only_in_a: tuple[OneSided, ...]
    only_in_b: tuple[OneSided, ...]
    tensors_compared: int
    tensors_equal: int
    tensors_same_bits: int
    tensors: tuple[TensorDifference, ...]
    values_compared: int
    values: tuple[ValueDifference, ...]
    bytes_read: int
    total_s: float


@dataclass(frozen=True, slots=True)
class _Side:
    storage: Storage
    commit: Commit
    index: Index

    @classmethod
    def open(cls, root: str | os.PathLike[str] | Storage, iteration: Selector) -> _Side:
        storage, selector = open_selected(root, iteration)
        commit = select_commits(storage, selector)[0]
        return cls(storage, commit, read_index(storage, commit)[0])

    def described(self) -> ComparedCheckpoint:
        return ComparedCheckpoint(
            root=self.storage.location,
            directory=self.commit.directory,
            iteration=self.commit.iteration,
            save_id=self.index.save_id,
        )


def compare_checkpoints(
    a: str | os.PathLike[str] | Storage,
    b: str | os.PathLike[str] | Storage,
    iteration: Selector = None,
    other_iteration: Selector = None,
    *,
    select: Sequence[str] = (),
    drop: Sequence[str] = (),
    rtol: float | None = None,
    atol: float | None = None,
    ignore_dtype: bool = False,
    metadata: bool = False,
    memory_bytes: int = MEMORY_BYTES,
    on_bytes: OnBytes = lambda _: None,
) -> ComparisonReport:
    """Compare two checkpoints, tensor by tensor and value by value. Reads; changes nothing.

    a, b: roots, or directories of iterations. iteration: which of a; and of b, unless other_iteration says which of
    that, or b is an iteration's directory. select, drop: globs of keys; "*" goes over "/" too. rtol, atol: as of
    Tolerance; without either, equal means bit for bit. ignore_dtype: tensors of two dtypes are equal if their values
    are. metadata: compare metadata and metrics too. on_bytes: told how many bytes of A's tensors were compared.

    Raises CheckpointNotFoundError; CorruptionError for an index or chunk table; ValueError, also for a glob that no key
    matches; OSError for what says
    nothing of the checkpoints (no right to read them). Damage of tensors and values is in the report.
    """
    started = time.perf_counter()
    tolerance = None if rtol is None and atol is None else Tolerance(rtol or 0.0, atol or 0.0)
    if other_iteration is None and open_root(b)[1] is None:
        other_iteration = iteration
    sides = _Side.open(a, iteration), _Side.open(b, other_iteration)
    is_wanted = partial(is_selected, select=select, drop=drop)
    known = [key for side in sides for _, keys in _kinds(side.index) for key in keys]
    for glob in unmatched_globs((*select, *drop), known):
        raise ValueError(f"no key of either checkpoint matches {glob!r}; the glob is for the whole key: '*part*'")
    only = [_one_sided(one.index, other.index, is_wanted) for one, other in (sides, sides[::-1])]
    shapes, names = _common_tensors(*sides, is_wanted)
    comparison = _TensorComparison(sides, tolerance, ignore_dtype)
    bytes_read = comparison.run(names, memory_bytes, on_bytes)
    values = list(_value_differences(*sides, is_wanted, tolerance, metadata=metadata))
    tensors = sorted([*shapes, *comparison.found()], key=_badness)
    is_complete = all(one.problem is None for one in tensors) and all(one.problem is None for one in values)
    if not is_complete:
        for side in sides:
            if side.commit not in list_commits(side.storage):
                raise CheckpointNotFoundError(f"{side.commit.name}: it was removed while it was being compared")
    return ComparisonReport(
        a=sides[0].described(),
        b=sides[1].described(),
        is_equal=not (tensors or values or only[0] or only[1]),
        is_complete=is_complete,
        only_in_a=only[0],
        only_in_b=only[1],
        tensors_compared=len(names),
        tensors_equal=len(names) - len(tensors) + len(shapes),
        tensors_same_bits=comparison.same_bits,
        tensors=tuple(tensors),
        values_compared=_common_values(*sides, is_wanted),
        values=tuple(values),
        bytes_read=bytes_read,
        total_s=time.perf_counter() - started,
    )


def _kinds(index: Index) -> Iterator[tuple[str, Mapping[str, object]]]:
    yield from (("tensor", index.tensors), ("value", index.values), ("per-rank value", index.per_rank))


def _one_sided(one: Index, other: Index, is_wanted: Callable[[str], bool]) -> tuple[OneSided, ...]:
    return tuple(
        OneSided(key, kind)
        for (kind, mine), (_, others) in zip(_kinds(one), _kinds(other), strict=True)
        for key in mine
        if key not in others and is_wanted(key)
    )


def _common_tensors(a: _Side, b: _Side, is_wanted: Callable[[str], bool]) -> tuple[list[TensorDifference], list[str]]:
    """Those whose elements cannot be compared, and the keys of those whose can."""
    different, names = [], []
    for key, entry in a.index.tensors.items():
        other = b.index.tensors.get(key)
        if other is None or not is_wanted(key):
            continue
        if entry.global_shape != other.global_shape:
            different.append(_difference(key, entry, other))
        elif not are_comparable(entry.dtype, other.dtype):
            problem = f"elements of {entry.dtype} and {other.dtype} cannot be compared"
            different.append(_difference(key, entry, other, problem=problem))
        else:
            names.append(key)
    return different, names


def _difference(
    key: str, a: TensorEntry, b: TensorEntry, found: Differences | None = None, problem: str | None = None
) -> TensorDifference:
    facts = TensorDifference(
        key=key, dtype_a=a.dtype, dtype_b=b.dtype, shape_a=a.global_shape, shape_b=b.global_shape, problem=problem
    )
    if found is None:
        return facts
    index, first_a, first_b = None, None, None
    if found.first is not None:
        flat, first_a, first_b = found.first
        index = tuple(int(i) for i in np.unravel_index(flat, a.global_shape)) if a.global_shape else ()
    return msgspec.structs.replace(
        facts,
        differing=found.differing,
        outside=found.outside,
        nans=found.nans,
        max_abs=found.max_abs,
        max_rel=found.max_rel,
        first_index=index,
        first_a=first_a,
        first_b=first_b,
    )


def _badness(one: TensorDifference) -> tuple[bool, bool, bool, float, int, str]:
    """Sorts what could not be read first, then other shapes, NaNs, and by the largest difference."""
    largest = float("inf") if one.max_abs is None else float(one.max_abs)
    return one.problem is None, one.differing is not None, not one.nans, -largest, -(one.outside or 0), one.key


class _TensorComparison:
    """Tensors that both checkpoints have in one shape, as they are compared. same_bits: how many have the same."""

    def __init__(self, sides: tuple[_Side, _Side], tolerance: Tolerance | None, ignore_dtype: bool) -> None:
        self.same_bits = 0
        self._sides = sides
        self._tolerance = tolerance
        self._ignore_dtype = ignore_dtype
        self._done: list[TensorDifference] = []

    def run(self, keys: Sequence[str], memory_bytes: int, on_bytes: OnBytes) -> int:
        """Compare; returns how many bytes were read."""
        a, b = ((side.storage, side.commit.directory, side.index) for side in self._sides)
        key, found = "", Differences()
        with PairReader(a, b, keys, memory_bytes=memory_bytes) as pairs:
            for piece in pairs:
                if piece.key != key:
                    key, found = piece.key, Differences()
                if piece.problem is None:
                    dtypes = self._entries(key)[0].dtype, self._entries(key)[1].dtype
                    add_differences(found, piece.at, piece.a, piece.b, *dtypes, self._tolerance)
                    on_bytes(len(piece.a))
                if piece.is_last:
                    self._end(piece, found)
            return pairs.bytes_read

    def found(self) -> list[TensorDifference]:
        return self._done

    def _entries(self, key: str) -> tuple[TensorEntry, TensorEntry]:
        return self._sides[0].index.tensors[key], self._sides[1].index.tensors[key]

    def _end(self, piece: PairedPiece, found: Differences) -> None:
        a, b = self._entries(piece.key)
        is_equal = not found.outside and (self._ignore_dtype or a.dtype == b.dtype)
        if piece.problem is not None:
            self._done.append(_difference(piece.key, a, b, problem=piece.problem))
            return
        self.same_bits += found.same_bits and a.dtype == b.dtype
        if not is_equal:
            self._done.append(_difference(piece.key, a, b, found))


def _common_values(a: _Side, b: _Side, is_wanted: Callable[[str], bool]) -> int:
    return sum(
        is_wanted(key)
        for mine, others in ((a.index.values, b.index.values), (a.index.per_rank, b.index.per_rank))
        for key in mine.keys() & others.keys()
    )


def _value_differences(
    a: _Side, b: _Side, is_wanted: Callable[[str], bool], tolerance: Tolerance | None, *, metadata: bool
) -> Iterator[ValueDifference]:
    for key, value in a.index.values.items():
        if key in b.index.values and is_wanted(key):
            yield from _differences_of(key, bytes(value), bytes(b.index.values[key]), tolerance)
    yield from _per_rank_differences(a, b, is_wanted, tolerance)
    if metadata:
        yield from _differences_of("metadata", bytes(a.index.metadata), bytes(b.index.metadata), tolerance)
        metrics = [encode_value(side.index.metrics, "metrics") for side in (a, b)]
        yield from _differences_of("metrics", metrics[0], metrics[1], tolerance)


def _differences_of(
    key: str, a: bytes, b: bytes, tolerance: Tolerance | None, coordinates: dict[str, int] | None = None
) -> Iterator[ValueDifference]:
    try:
        for count, (path, one, other) in enumerate(differing_paths(key, a, b, tolerance)):
            if count == _MAX_PLACES:
                break
            yield ValueDifference(path=path, a=one, b=other, coordinates=coordinates)
    except CheckpointError as error:
        yield ValueDifference(path=key, coordinates=coordinates, problem=str(error))


def _per_rank_differences(
    a: _Side, b: _Side, is_wanted: Callable[[str], bool], tolerance: Tolerance | None
) -> Iterator[ValueDifference]:
    """By the files that hold them, each of which is opened once if the ranks of both lie alike."""
    wanted: dict[tuple[int, int], list[tuple[str, dict[str, int]]]] = {}
    for key, entry in a.index.per_rank.items():
        other = b.index.per_rank.get(key)
        if other is None or not is_wanted(key):
            continue
        has_same_axes = sorted(entry.axes) == sorted(other.axes)
        if not has_same_axes:
            yield ValueDifference(path=key, a=_axes_of(entry), b=_axes_of(other))
        holders = _holders(entry), _holders(other)
        for place in sorted(holders[0].keys() | holders[1].keys()):
            files = holders[0].get(place, _NO_FILE), holders[1].get(place, _NO_FILE)
            if has_same_axes or _NO_FILE not in files:
                wanted.setdefault(files, []).append((key, dict(place)))
    readers = _PerRankFile(a), _PerRankFile(b)
    for files in sorted(wanted):
        values = [reader.read(number) for reader, number in zip(readers, files, strict=True)]
        for key, coordinates in wanted[files]:
            yield from _per_rank_difference(key, coordinates, values, files, tolerance)


def _per_rank_difference(
    key: str,
    coordinates: dict[str, int],
    values: Sequence[Mapping[str, msgspec.Raw] | str],
    files: tuple[int, int],
    tolerance: Tolerance | None,
) -> Iterator[ValueDifference]:
    """values: of both files, or why they cannot be read."""
    found: list[msgspec.Raw | None] = []
    for name, held, file in zip("AB", values, files, strict=True):
        problem = f"{name}: {held}" if isinstance(held, str) else None
        value = None if isinstance(held, str) else held.get(key)
        if problem is None and value is None and file != _NO_FILE:
            problem = f"{name}: the file that the index says has it does not"
        if problem is not None:
            yield ValueDifference(path=key, coordinates=coordinates, problem=problem)
            return
        found.append(value)
    one, other = found
    if one is None or other is None:
        yield ValueDifference(path=key, a=one, b=other, coordinates=coordinates)
    else:
        yield from _differences_of(key, bytes(one), bytes(other), tolerance, coordinates)


def _axes_of(entry: PerRankEntry) -> msgspec.Raw | None:
    """None if no rank has a value, as after a reshard that could not place them."""
    return msgspec.Raw(msgspec.json.encode({"axes": dict(entry.axes)})) if entry.holders else None


def _holders(entry: PerRankEntry) -> dict[tuple[tuple[str, int], ...], int]:
    """Coordinates by axis -> file number."""
    names = [name for name, _ in entry.axes]
    return {tuple(sorted(zip(names, coordinates, strict=True))): number for coordinates, number in entry.holders}


class _PerRankFile:
    """Per-rank values of one file of a checkpoint at a time: those, or why they cannot be read."""

    def __init__(self, side: _Side) -> None:
        self._side = side
        self._number: int | None = None
        self._values: dict[str, msgspec.Raw] | str = {}

    def read(self, number: int) -> dict[str, msgspec.Raw] | str:
        if number == _NO_FILE:
            return {}
        if number != self._number:
            side, self._number = self._side, number
            try:
                self._values = read_per_rank(side.storage, side.commit.directory, side.index, number)
            except (CheckpointError, OSError) as error:
                if not is_damage(error):
                    raise
                self._values = str(error)
        return self._values
