"""Retention: which committed checkpoints stay. Pure; removing is commit.py's."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from distckpt.commit import Commit


def superfluous(
    commits: Sequence[Commit],
    *,
    keep_last: int | None,
    tracked: int | None,
    first_epoch: int = 0,
    order: Sequence[Commit] = (),
    unsound: Collection[Commit] = (),
) -> list[Commit]:
    """Commits to retire, oldest first.

    first_epoch: the oldest epoch whose commits may go. A job that did not resume from what lies here has no say
    over it: it may have started afresh by mistake. order: all commits, the most wanted first; by default, newest
    first. unsound: commits that are known not to be what was written.

    Those of an iteration that was committed again since; and, with keep_last, those of all but the first
    keep_last iterations. Never the newest, never the iteration that the tracker names. One that
    is unsound takes no other's place, and goes when a sound one could take its own.
    """
    newest: dict[int, Commit] = {}
    for commit in sorted(set(commits) - set(unsound), reverse=True):
        newest.setdefault(commit.iteration, commit)
    wanted = set(newest.values())
    kept = [commit for commit in order or sorted(commits, reverse=True) if commit in wanted]
    if keep_last is not None:
        kept = kept[: max(1, keep_last)] + [c for c in kept[max(1, keep_last) :] if c.iteration == tracked]
    for commit in unsound:
        replacing = newest.get(commit.iteration) if keep_last is None else max(kept, default=None)
        if replacing is None or replacing < commit:
            kept.append(commit)
    return sorted(commit for commit in set(commits) - set(kept) if commit.epoch >= first_epoch)
