"""Protecting: what follows a commit, if it is asked for: reading back what was written, and parity. Collective.

The checkpoint exists already, and stays whatever comes of this. That it was read back is kept as `verified-<save_id>`
beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import msgspec

from distckpt.checkpoint_files import CheckedFile, is_damage, read_chunks
from distckpt.commit import Commit, iteration_directory, read_index, unsound_marker, verified_marker
from distckpt.coordinator import Coordinator, agree
from distckpt.errors import CheckpointError, DistributedError
from distckpt.index import ShardFile
from distckpt.parity import ParityGroup, group_files, put_record, write_parity
from distckpt.storage import Storage


class Protection(msgspec.Struct, frozen=True):
    """What to do after a commit. parity: files in a group, 0 for none; see distckpt.parity. read_back: whether to."""

    parity: int = 0
    read_back: bool = False

    @property
    def is_wanted(self) -> bool:
        return self.parity > 0 or self.read_back


@dataclass(frozen=True, slots=True)
class Saved:
    """The save that was committed. files: this rank's. commit: rank 0's."""

    iteration: int
    save_id: str
    files: Sequence[ShardFile]
    commit: Commit | None


@dataclass(frozen=True, slots=True)
class Protected:
    """What came of it. parity_bytes: of all parity files. problem: why there is no parity."""

    is_verified: bool
    parity_bytes: int
    problem: str | None
    seconds: float


class _Own(msgspec.Struct, frozen=True):
    """A rank's files, and what is wrong with them."""

    files: list[ShardFile]
    problems: list[str]


class _Group(msgspec.Struct, frozen=True):
    number: int
    files: list[ShardFile]


class _Made(msgspec.Struct, frozen=True):
    groups: list[tuple[int, ParityGroup]]
    problem: str | None = None


class _Recorded(msgspec.Struct, frozen=True):
    size_bytes: int
    problem: str | None


def protect(
    storage: Storage,
    coordinator: Coordinator,
    saved: Saved,
    wanted: Protection,
    *,
    label: str,
    timeout_s: float,
    max_bytes_per_s: float,
) -> Protected:
    """Do what is wanted for a save that was just committed. Collective; any thread.

    Raises DistributedError on all ranks, which says that the save is committed, if it cannot be read back, or what is
    read is not what was written, or ranks are lost. That parity could not be made is only reported.
    """
    started = time.perf_counter()
    directory = iteration_directory(saved.iteration)

    def read_back() -> _Own:
        found = _read_back(storage, directory, saved.files) if wanted.read_back else []
        return _Own(list(saved.files), found)

    def judge(ranks: Sequence[_Own]) -> list[list[_Group]]:
        if wanted.read_back:
            problems = {rank: "; ".join(own.problems) for rank, own in enumerate(ranks) if own.problems}
            problems = problems or _read_back_index(storage, saved)
            if problems:
                with suppress(OSError):
                    storage.put_if_absent(unsound_marker(saved.iteration, saved.save_id), b"")
                raise DistributedError(
                    f"it was not read back as it was written: {'; '.join(problems.values())}", failures=problems
                )
        return _give_groups([own.files for own in ranks], wanted.parity)

    agreed = partial(agree, coordinator, timeout_s=timeout_s)
    with _committed_all_the_same(saved.iteration):
        groups: list[_Group] = agreed(f"{label}: read back", read_back, judge, message=_Own, decision=list[_Group])
        recorded = _Recorded(0, None)
        if wanted.parity:
            make = partial(_make, storage, directory, saved.save_id, groups, max_bytes_per_s)
            record: Callable[[Sequence[_Made]], list[_Recorded]] = partial(_record, storage, directory, saved.save_id)
            recorded = agreed(f"{label}: parity", make, record, message=_Made, decision=_Recorded)
    return Protected(wanted.read_back, recorded.size_bytes, recorded.problem, time.perf_counter() - started)


@contextmanager
def _committed_all_the_same(iteration: int) -> Iterator[None]:
    """Have what fails in the body say so."""
    try:
        yield
    except DistributedError as error:
        raise DistributedError(
            f"iteration {iteration} is committed, but {error}", failures=error.failures, committed="yes"
        ) from error


def _read_back(storage: Storage, directory: str, files: Sequence[ShardFile]) -> list[str]:
    """What is wrong with files, as they lie on the storage."""
    problems: list[str] = []
    for file in files:
        try:
            with CheckedFile(storage, directory, file, past_cache=True) as opened:
                problems += opened.faults([(0, file.checksum_start)])
        except (CheckpointError, OSError) as error:
            problems.append(_what(error))
    return problems


def _what(error: Exception) -> str:
    return str(error) if is_damage(error) else f"it could not be read: {error}"


def _read_back_index(storage: Storage, saved: Saved) -> dict[int, str]:
    """Rank 0, last: what is wrong with the rest; if nothing is, that becomes known."""
    assert saved.commit is not None
    try:
        index, _ = read_index(storage, saved.commit, past_cache=True)
        read_chunks(storage, saved.commit.directory, index, list(index.tensors), past_cache=True)
        storage.put_if_absent(verified_marker(saved.iteration, saved.save_id), b"")
    except (CheckpointError, OSError) as error:
        return {0: _what(error)}
    return {}


def _give_groups(files: Sequence[Sequence[ShardFile]], parity: int) -> list[list[_Group]]:
    """To every rank the groups whose parity it makes: those whose first file is its own."""
    given: list[list[_Group]] = [[] for _ in files]
    everything = [file for of_rank in files for file in of_rank]
    for number, group in enumerate(group_files(everything, parity) if parity else []):
        given[group[0].rank].append(_Group(number, group))
    return given


def _make(storage: Storage, directory: str, save_id: str, groups: Sequence[_Group], max_bytes_per_s: float) -> _Made:
    write = partial(write_parity, storage, directory, save_id, max_bytes_per_s=max_bytes_per_s)
    try:
        return _Made([(group.number, write(group.number, group.files)) for group in groups])
    except (CheckpointError, OSError) as error:
        return _Made([], str(error))


def _record(storage: Storage, directory: str, save_id: str, ranks: Sequence[_Made]) -> list[_Recorded]:
    problems = [f"rank {rank}: {made.problem}" for rank, made in enumerate(ranks) if made.problem is not None]
    groups = [group for _, group in sorted((group for made in ranks for group in made.groups), key=lambda g: g[0])]
    if not problems:
        try:
            put_record(storage, directory, save_id, groups)
        except OSError as error:
            problems = [str(error)]
    if problems:  # Without a record what was made is garbage, and it would lie there as long as the checkpoint.
        with suppress(OSError):
            for name in storage.list(directory):
                if name.startswith("parity-") and save_id in name:
                    storage.remove(f"{directory}/{name}")
    size_bytes = 0 if problems else sum(group.size_bytes for group in groups)
    return [_Recorded(size_bytes, "; ".join(problems) or None)] * len(ranks)
