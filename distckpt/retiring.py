"""Retiring: what retention gives up of a root, by what lies there. Rank 0's; decides by distckpt.retention alone."""

from __future__ import annotations

from distckpt.commit import Commit, by_lineage, list_commits, read_tracker, unsound_commits
from distckpt.removing import retire
from distckpt.retention import superfluous
from distckpt.storage import Storage


def retire_superfluous(
    storage: Storage,
    keep_last: int | None,
    *,
    first_epoch: int = 0,
    unsound: frozenset[Commit] = frozenset(),
    spared: Commit | None = None,
) -> None:
    """Retire it; its files go at a sweep. first_epoch, unsound: as of `superfluous`. spared: what stays for now, as it
    is being read. Raises OSError."""
    commits, tracked = list_commits(storage), read_tracker(storage)
    given_up = superfluous(
        commits,
        keep_last=keep_last,
        tracked=tracked,
        first_epoch=first_epoch,
        order=[] if keep_last is None else by_lineage(storage, commits),
        unsound=unsound | unsound_commits(storage, commits),
    )
    retire(storage, [commit for commit in given_up if commit != spared])
