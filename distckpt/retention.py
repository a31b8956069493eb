"""Retention: which committed checkpoints stay. Pure; removing is commit.py's."""

from __future__ import annotations

from collections.abc import Sequence

from distckpt.commit import Commit


def superfluous(
    commits: Sequence[Commit], *, keep_last: int | None, tracked: int | None, first_epoch: int = 0
) -> list[Commit]:
    """Commits to retire, oldest first.

    first_epoch: the oldest epoch whose commits may go. A job that did not resume from what lies here has no say
    over it: it may have started afresh by mistake.

    Those of an iteration that was committed again since; and, with keep_last, those of all but the newest
    keep_last iterations by (epoch, commit_seq). Never the newest, never the iteration that the tracker names.
    """
    newest: dict[int, Commit] = {}
    for commit in sorted(commits, reverse=True):
        newest.setdefault(commit.iteration, commit)
    kept = list(newest.values())
    if keep_last is not None:
        kept = kept[: max(1, keep_last)] + [c for c in kept[max(1, keep_last) :] if c.iteration == tracked]
    return sorted(commit for commit in set(commits) - set(kept) if commit.epoch >= first_epoch)
