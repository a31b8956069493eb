"""Candidates: the checkpoints that a load may use, of one root or of two, in the order to try them in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from distckpt.commit import Commit, by_lineage, list_commits, order_by_lineage, read_head
from distckpt.errors import CheckpointError, CheckpointNotFoundError, CorruptionError
from distckpt.index import IndexHead
from distckpt.storage import Storage


@dataclass(frozen=True, slots=True)
class Candidate:
    """A commit in one of the roots; 0 is the nearest."""

    commit: Commit
    root: int = 0


def find_candidates(
    storages: Sequence[Storage],
    select: Callable[[Storage], list[Commit]],
    *,
    by_branch: bool,
) -> list[Candidate]:
    """What `select` finds in each root, best first; of a commit that several have, the nearest first.

    select: raises CheckpointNotFoundError where there is nothing. by_branch: in the order of by_lineage, for what comes
    after the newest. Raises CheckpointNotFoundError if no root has anything; OSError if one cannot be looked at: it may
    have the newest.
    """
    found: list[list[Commit]] = []
    missing: list[CheckpointNotFoundError] = []
    for storage in storages:
        try:
            found.append(select(storage))
        except CheckpointNotFoundError as error:
            found.append([])
            missing.append(error)
    if len(missing) == len(storages):
        near = tuple(path for error in missing for path in error.candidates)
        raise CheckpointNotFoundError("; ".join(map(str, missing)), candidates=near)
    if len(storages) == 1:
        [commits] = found
        return [Candidate(commit) for commit in (by_lineage(storages[0], commits) if by_branch else commits)]
    ordered = sorted({commit for commits in found for commit in commits}, reverse=True)
    if by_branch:
        ordered = order_by_lineage(ordered, _heads(storages, found))
    return [Candidate(commit, root) for commit in ordered for root, commits in enumerate(found) if commit in commits]


def copies_of(storages: Sequence[Storage], commit: Commit) -> list[Candidate]:
    """A commit in the roots that have it. Raises OSError."""
    return [Candidate(commit, root) for root, storage in enumerate(storages) if commit in list_commits(storage)]


def newer_work(storages: Sequence[Storage], nearest: Commit, chosen: Candidate, created_unix_s: float) -> str | None:
    """A warning, if the newest of the first root is of an older epoch than the commit that is chosen, but was saved
    later: by a job that did not look at the other root, so that its epochs began anew. created_unix_s: of the chosen.
    """
    if nearest >= chosen.commit:
        return None
    try:
        head = read_head(storages[0], nearest)
    except (CheckpointError, OSError):
        return None
    if head.created_unix_s <= created_unix_s:
        return None
    return (
        f"iteration {chosen.commit.iteration} of {storages[chosen.root].location} is taken for the newest, but "
        f"iteration {nearest.iteration} in {storages[0].location} was saved later, by a job that had not looked at the "
        f"other root (no copy_to). To go on from that one, load iteration {nearest.iteration}. This job removes "
        f"nothing that earlier ones saved, until it has loaded another"
    )


def _heads(storages: Sequence[Storage], found: Sequence[Sequence[Commit]]) -> dict[Commit, IndexHead]:
    """Of each commit, from the nearest root in which it can be read."""
    heads: dict[Commit, IndexHead] = {}
    for storage, commits in zip(storages, found, strict=True):
        for commit in commits:
            if commit not in heads:
                with suppress(CheckpointError, OSError):
                    heads[commit] = read_head(storage, commit)
    return heads


def newest_in(storages: Sequence[Storage], newest: Callable[[Storage], int | None]) -> int | None:
    """The newest iteration of several roots, of which `newest` tells each one's. Raises OSError; CorruptionError if a
    root has damaged indexes only, and no other has a sound one."""
    found: list[tuple[Commit, int]] = []
    damaged: list[CorruptionError] = []
    for storage in storages:
        try:
            iteration = newest(storage)
        except CorruptionError as error:
            damaged.append(error)
            continue
        if iteration is not None:
            commits = [commit for commit in list_commits(storage) if commit.iteration == iteration]
            found.append((max(commits, default=Commit(0, 0, iteration)), iteration))
    if damaged and not found:
        raise damaged[0]
    return max(found)[1] if found else None
