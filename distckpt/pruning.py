"""Pruning: a retention policy applied to what lies under a root: facts gathered, verdicts reached, checkpoints retired.

After each commit the job itself does it; `prune` does it by hand, beside a job or without one.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import msgspec

from distckpt.cataloging import Record, survey, tag_holders
from distckpt.commit import Commit, list_commits, order_by_lineage, read_tracker
from distckpt.removing import retire, sweep
from distckpt.retention import Facts, Retention, Verdict, judge
from distckpt.roots import open_root
from distckpt.storage import Storage
from distckpt.surroundings import not_found


class PrunedCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint, and why it stays, or goes. bytes: of its index, files and parity; 0 if its index is damaged."""

    iteration: int
    directory: str
    save_id: str
    bytes: int
    why: str


class PruneReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a prune did, or, of a dry run, would do; newest first. swept: files that were removed: of saves that died,
    and of checkpoints that were given up longer ago than the grace period."""

    dry_run: bool
    kept: tuple[PrunedCheckpoint, ...]
    removed: tuple[PrunedCheckpoint, ...]
    swept: tuple[str, ...]

    @property
    def kept_bytes(self) -> int:
        return sum(one.bytes for one in self.kept)

    @property
    def removed_bytes(self) -> int:
        return sum(one.bytes for one in self.removed)


def prune(
    root: str | os.PathLike[str] | Storage,
    retention: Retention,
    *,
    dry_run: bool = False,
    removal_grace_s: float = 60.0,
) -> PruneReport:
    """Remove the checkpoints under a root that a retention policy gives up, and sweep. Not collective.

    Safe beside a job that saves and loads here, and beside other prunes: it claims nothing, and decides by the same
    names and markers as the job itself does after a commit. A save under way is spared, as its marker is fresh. The
    newest checkpoint is never given up: a job may be loading it, names it as parent of its next save, and would fall
    back to it if that one fails. Who has a removed one open keeps its files for removal_grace_s; a later save or prune
    removes them. dry_run: change nothing, and report what would be done; nothing is swept then.

    Raises CheckpointNotFoundError if there is no checkpoint; ValueError for an iteration's directory; OSError.
    """
    storage, only = open_root(root)
    if only is not None:
        raise ValueError(f"{root} is the directory of iteration {only}: give the root {storage.location}")
    records = survey(storage, list_commits(storage))
    if not records:
        raise not_found(storage)
    verdicts = _judge(storage, records, retention, first_epoch=0, unsound=())
    gone = {verdict.commit for verdict in verdicts if not verdict.stays}
    swept: list[str] = []
    if not dry_run:
        gone = set(_retire(storage, verdicts, records))
        swept = sweep(storage, grace_s=removal_grace_s)
    of_commit = {record.commit: record for record in records}
    told = [
        (verdict.commit in gone, _told(of_commit[verdict.commit], _reason(verdict, verdict.commit in gone)))
        for verdict in verdicts
    ]
    return PruneReport(
        dry_run=dry_run,
        kept=tuple(one for is_gone, one in told if not is_gone),
        removed=tuple(one for is_gone, one in told if is_gone),
        swept=tuple(swept),
    )


def _reason(verdict: Verdict, is_gone: bool) -> str:
    return verdict.why if verdict.stays or is_gone else f"labelled meanwhile ({verdict.why} before)"


def _told(record: Record, why: str) -> PrunedCheckpoint:
    return PrunedCheckpoint(
        iteration=record.commit.iteration,
        directory=record.commit.directory,
        save_id="" if record.head is None else record.head.save_id,
        bytes=record.size_bytes,
        why=why,
    )


def retire_superfluous(
    storage: Storage,
    retention: Retention,
    *,
    first_epoch: int = 0,
    unsound: Collection[Commit] = (),
    may_retire: Callable[[Commit], bool] = lambda _: True,
) -> list[Commit]:
    """Retire what a policy gives up; which that was. For the job itself, after a commit; the files go at a sweep.

    first_epoch: see distckpt.retention.judge. unsound: commits that this job knows not to be what was written.
    may_retire: asked of each that is to go, just before; what it refuses stays for now. Raises OSError.
    """
    commits = list_commits(storage)
    if not retention.has_rules and retention.max_bytes is None:
        # Only where an iteration was saved again can something go: nothing else needs to be read.
        counts = Counter(commit.iteration for commit in commits)
        commits = [commit for commit in commits if counts[commit.iteration] > 1]
        if not commits:
            return []
    records = survey(storage, commits)
    verdicts = _judge(storage, records, retention, first_epoch=first_epoch, unsound=unsound)
    return _retire(storage, [verdict for verdict in verdicts if verdict.stays or may_retire(verdict.commit)], records)


def _judge(
    storage: Storage,
    records: Sequence[Record],
    retention: Retention,
    *,
    first_epoch: int,
    unsound: Collection[Commit],
) -> list[Verdict]:
    """records: newest first."""
    holders = tag_holders(survey(storage, list_commits(storage), labelled_only=True))
    facts = [_facts(record, holders.values(), unsound) for record in records]
    heads = {record.commit: record.head for record in records if record.head is not None}
    return judge(
        facts,
        retention,
        tracked=read_tracker(storage),
        now_unix_s=time.time(),
        first_epoch=first_epoch,
        order=order_by_lineage([record.commit for record in records], heads),
    )


def _facts(record: Record, tagged: Collection[Commit], unsound: Collection[Commit]) -> Facts:
    labels = record.labels
    return Facts(
        commit=record.commit,
        size_bytes=record.size_bytes,
        created_unix_s=0.0 if record.head is None else record.head.created_unix_s,
        metrics=record.metrics,
        # Labels that cannot be read may have been a pin.
        is_protected=labels.labels.pinned or labels.damage is not None or record.commit in tagged,
        is_readable=record.head is not None,
        is_sound=not record.is_unsound and not record.missing and record.commit not in unsound,
        is_repairable=bool(record.missing) and record.has_parity,
    )


def _retire(storage: Storage, verdicts: Sequence[Verdict], records: Sequence[Record]) -> list[Commit]:
    """Oldest first, so that a crash leaves what is wanted more."""
    numbers = {record.commit: record.labels.number for record in records}
    return retire(storage, sorted(verdict.commit for verdict in verdicts if not verdict.stays), numbers)
