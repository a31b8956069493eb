"""Retention: which committed checkpoints stay, and why. Pure: facts in, verdicts out; removing is removing.py's."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from distckpt.commit import Commit
from distckpt.metrics import check_metric_name

Mode: TypeAlias = Literal["min", "max"]
BestRule: TypeAlias = tuple[str, int, Mode]


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Which checkpoints stay: those that any of the rules keeps; with no keep_ rule, all.

    keep_last: so many of the newest. keep_every: those whose iteration it divides. keep_best: (metric, count, "min" or
    "max"), or several of them: so many with the lowest or highest metric. keep_younger_than_s: those saved no longer
    ago. max_bytes: what all of them may take together; of what the rules keep, the least wanted goes first.

    Always kept: tagged and pinned ones, the newest, what the tracker names, the last good one. A checkpoint whose
    iteration was saved again is given up for the new one; a damaged one, or one that lacks files, takes no other's
    place.
    """

    keep_last: int | None = None
    keep_every: int | None = None
    keep_best: BestRule | Sequence[BestRule] | None = None
    keep_younger_than_s: float | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and operator.index(value) < 1:
                raise ValueError(f"{name}={value}: expected at least 1, or None for no such rule")
        if self.keep_younger_than_s is not None and not (0 < self.keep_younger_than_s < math.inf):
            raise ValueError(f"keep_younger_than_s={self.keep_younger_than_s}: expected more than 0, or None")
        if self.max_bytes is not None and operator.index(self.max_bytes) < 0:
            raise ValueError(f"max_bytes={self.max_bytes}: expected at least 0, or None for no limit")
        self.best_rules()

    def best_rules(self) -> list[BestRule]:
        """keep_best as a list. Raises ValueError."""
        given = self.keep_best
        rules = [] if given is None else [given] if len(given) == 3 and isinstance(given[0], str) else list(given)
        checked: list[BestRule] = []
        for rule in rules:
            if not isinstance(rule, (tuple, list)) or len(rule) != 3 or rule[2] not in ("min", "max"):
                raise ValueError(f'keep_best={rule!r}: expected (metric, count, "min" or "max")')
            metric, count, mode = rule
            if operator.index(count) < 1:
                raise ValueError(f"keep_best={rule!r}: expected a count of at least 1")
            checked.append((check_metric_name(metric), count, mode))
        return checked

    @property
    def has_rules(self) -> bool:
        """Whether anything is given up for other reasons than bytes, or that its iteration was saved again."""
        return not (
            self.keep_last is None
            and self.keep_every is None
            and self.keep_younger_than_s is None
            and not self.best_rules()
        )


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one commit. is_protected: tagged or pinned. is_readable: its index. is_sound: not known to be damaged.
    is_repairable: files are missing that may be made again."""

    commit: Commit
    size_bytes: int = 0
    created_unix_s: float = 0.0
    metrics: Mapping[str, float | None] | None = None
    is_protected: bool = False
    is_readable: bool = True
    is_sound: bool = True
    is_repairable: bool = False

    @property
    def is_good(self) -> bool:
        return self.is_readable and self.is_sound


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a commit stays, and why, for people."""

    commit: Commit
    stays: bool
    why: str


def judge(
    facts: Sequence[Facts],
    retention: Retention,
    *,
    tracked: int | None,
    now_unix_s: float,
    first_epoch: int = 0,
    order: Sequence[Commit] = (),
) -> list[Verdict]:
    """A verdict on every commit under a root, newest first.

    tracked: the iteration that the tracker names. first_epoch: the oldest epoch whose commits may go. A job that did
    not resume from what lies here has no say over it: it may have started afresh by mistake. order: all commits, the
    most wanted first; by default, newest first.

    An index that cannot be read stays, as nothing says what belongs to it; it counts nowhere. One that is unsound goes
    when a good one could take its place: a newer one that stays or, without rules, a newer one of its iteration.
    """
    by_commit = {fact.commit: fact for fact in facts}
    ordered = [by_commit[commit] for commit in order or sorted(by_commit, reverse=True)]
    newest_good: dict[int, Commit] = {}
    for commit in sorted((fact.commit for fact in facts if fact.is_good), reverse=True):
        newest_good.setdefault(commit.iteration, commit)
    wanted = [fact for fact in ordered if newest_good.get(fact.commit.iteration) == fact.commit]

    always = _always(facts, wanted, newest_good, tracked, first_epoch)
    kept = always | {
        commit: why for commit, why in _ruled(wanted, retention, now_unix_s).items() if commit not in always
    }
    for fact in facts:
        if fact.is_readable and not fact.is_sound and fact.commit not in kept:
            rivals = [f.commit for f in wanted if f.commit in kept]
            rival = max(rivals, default=None) if retention.has_rules else newest_good.get(fact.commit.iteration)
            if rival is None or rival < fact.commit:
                kept[fact.commit] = "nothing good is newer, though it is unsound"
    given_up = _over_budget(ordered, kept, always, retention)
    return [
        Verdict(commit, commit in kept and commit not in given_up, _why(by_commit[commit], kept, given_up, newest_good))
        for commit in sorted(by_commit, reverse=True)
    ]


def _why(
    fact: Facts, kept: Mapping[Commit, str], given_up: Collection[Commit], newest_good: Mapping[int, Commit]
) -> str:
    commit = fact.commit
    if commit in given_up:
        return "max_bytes"
    if commit in kept:
        return kept[commit]
    if not fact.is_sound:
        return "unsound, and a good one has taken its place"
    return "its iteration was saved again" if newest_good.get(commit.iteration) != commit else "no rule keeps it"


def _always(
    facts: Sequence[Facts],
    wanted: Sequence[Facts],
    newest_good: Mapping[int, Commit],
    tracked: int | None,
    first_epoch: int,
) -> dict[Commit, str]:
    """What no rule and no limit removes. wanted: the good ones, in order."""
    newest = max((fact.commit for fact in facts), default=None)
    named = [fact.commit for fact in facts if fact.commit.iteration == tracked]
    of_tracker = max(named, key=lambda commit: (commit == newest_good.get(commit.iteration), commit), default=None)
    always: dict[Commit, str] = {}
    for fact in facts:
        commit = fact.commit
        if commit == newest:
            always[commit] = "newest"
        elif wanted and commit == wanted[0].commit:
            always[commit] = "last good"
        elif commit == of_tracker:
            always[commit] = "the tracker names it"
        elif fact.is_protected:
            always[commit] = "tagged or pinned"
        elif not fact.is_readable:
            always[commit] = "its index cannot be read"
        elif fact.is_repairable:
            always[commit] = "files of it are missing, and parity may make them again"
        elif commit.epoch < first_epoch:
            always[commit] = "of an earlier job, from which this one has not resumed"
    return always


_STRONG = ("keep_every", "keep_best")


def _ruled(wanted: Sequence[Facts], retention: Retention, now_unix_s: float) -> dict[Commit, str]:
    """What the rules keep, with the strongest rule."""
    if not retention.has_rules:
        return {fact.commit: "no rule gives it up" for fact in wanted}
    kept: dict[Commit, str] = {}
    for metric, count, mode in retention.best_rules():
        values = [(fact.metrics or {}).get(metric) for fact in wanted]
        measured = [(value, i) for i, value in enumerate(values) if value is not None]
        for _, i in sorted((value if mode == "min" else -value, i) for value, i in measured)[:count]:
            kept.setdefault(wanted[i].commit, f"keep_best {metric}")
    for place, fact in enumerate(wanted):
        if retention.keep_every is not None and fact.commit.iteration % retention.keep_every == 0:
            kept.setdefault(fact.commit, f"keep_every {retention.keep_every}")
        if retention.keep_last is not None and place < retention.keep_last:
            kept.setdefault(fact.commit, f"keep_last {retention.keep_last}")
        age_s = now_unix_s - fact.created_unix_s
        if retention.keep_younger_than_s is not None and age_s < retention.keep_younger_than_s:
            kept.setdefault(fact.commit, "keep_younger_than")
    return kept


def _over_budget(
    ordered: Sequence[Facts], kept: Mapping[Commit, str], always: Collection[Commit], retention: Retention
) -> set[Commit]:
    """What must go so that the rest takes no more than max_bytes: unsound ones, then those that are not the best of
    something or every so-manieth, each from the end of the order."""
    if retention.max_bytes is None:
        return set()
    size_bytes = sum(fact.size_bytes for fact in ordered if fact.commit in kept)
    removable = [fact for fact in reversed(ordered) if fact.commit in kept and fact.commit not in always]
    removable.sort(key=lambda fact: (fact.is_good, kept[fact.commit].startswith(_STRONG)))
    given_up: set[Commit] = set()
    for fact in removable:
        if size_bytes <= retention.max_bytes:
            break
        given_up.add(fact.commit)
        size_bytes -= fact.size_bytes
    return given_up
