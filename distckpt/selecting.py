"""Selectors: words for a checkpoint, as people and configurations give them, and the commit that they mean.

None, "latest"        the newest; a load passes over damaged ones to the next
1000, "1000", "step:1000"   of this iteration
"latest-verified"     the newest that was read back after it was saved
"best:val_loss"       with the lowest metric; "best:accuracy:max" with the highest
"tag:NAME"            the one that has the tag
"iter_0001000"        an iteration's directory: its name, or its path, in the root; or the path of a link to it

All but the first name one checkpoint. One whose index is damaged is never the best, nor the latest verified: what was
measured of it is not known. Reads; changes nothing.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from distckpt.cataloging import Record, survey, tag_holders
from distckpt.commit import Commit, find_commits, iteration_of, list_commits, newest_by_iteration, newest_verified
from distckpt.errors import CheckpointError, CheckpointNotFoundError
from distckpt.metrics import Metrics, check_name
from distckpt.roots import open_root, without_link
from distckpt.storage import Storage
from distckpt.surroundings import describe_iteration, not_found

Selector: TypeAlias = int | str | os.PathLike[str] | None

_MAX_SHOWN = 20
_FORMS = "latest, latest-verified, a number, step:1000, best:val_loss, best:accuracy:max, tag:NAME, iter_0001000"


def parse_selector(selector: Selector) -> int | str | None:
    """In one form: None for the latest, a number for an iteration, or the text. Raises ValueError or TypeError."""
    if selector is None or selector == "latest":
        return None
    if isinstance(selector, os.PathLike):
        return os.fspath(selector)
    if not isinstance(selector, str):
        return operator.index(selector)
    number = re.fullmatch(r"(?:step:)?(\d{1,18})", selector)
    if number:
        return int(number[1])
    word, _, name = selector.partition(":")
    if selector != "latest-verified" and not (word in ("best", "tag") and name) and not _is_path(selector):
        raise ValueError(f"iteration {selector!r}: expected one of {_FORMS}")
    if word == "tag":
        check_name("tag", name)
    return selector


def selector_text(selector: int | str | None) -> str:
    """For an error, after "no checkpoint under ...": what was asked for there."""
    if selector is None:
        return ""
    return f" for {selector!r}" if isinstance(selector, str) else f" of iteration {selector}"


def _is_path(selector: str) -> bool:
    return not selector.startswith(("best:", "tag:")) and ("/" in selector or iteration_of(selector) is not None)


def best_of(selector: str) -> tuple[str, bool]:
    """Of "best:accuracy:max": the name of the metric, and whether the highest is best."""
    name = selector.removeprefix("best:")
    for ending, is_max in ((":max", True), (":min", False)):
        if name.endswith(ending):
            return name.removesuffix(ending), is_max
    return name, False


def select_commits(storage: Storage, selector: Selector) -> list[Commit]:
    """The commits that a selector means, best first: those after the first are what a load falls back to, if any.

    Raises CheckpointNotFoundError, which says what there is; ValueError; OSError.
    """
    wanted = parse_selector(selector)
    if not isinstance(wanted, str):
        return _of_iteration(storage, wanted)
    if _is_path(wanted):
        if not list_commits(storage):
            raise not_found(storage)
        return _of_iteration(storage, _iteration_of_path(storage, wanted))
    return [_named([storage], wanted)]


def select_one(storages: Sequence[Storage], selector: str) -> Commit:
    """The commit that a text means in several roots taken as one, the nearest first. Of copies in several, the tags of
    all count, and of two values of a metric the nearest.

    Raises CheckpointNotFoundError, which says what there is; ValueError; OSError.
    """
    if not _is_path(selector):
        return _named(storages, selector)
    found: list[Commit] = []
    missing: list[CheckpointNotFoundError] = []
    for storage in storages:
        try:
            found += select_commits(storage, selector)
        except CheckpointNotFoundError as error:
            missing.append(error)
    if not found:
        raise _joined(missing)
    return max(found)


def _named(storages: Sequence[Storage], selector: str) -> Commit:
    commits = sorted({commit for storage in storages for commit in list_commits(storage)}, reverse=True)
    if not commits:
        raise _joined([not_found(storage) for storage in storages])
    word, _, name = selector.partition(":")
    if word == "best":
        return _best(storages, selector, _survey(storages, newest_by_iteration(commits)))
    if word == "tag":
        holders = tag_holders(_survey(storages, commits, labelled_only=True))
        if name not in holders:
            raise _not_found(storages, selector, f"no checkpoint has this tag; {_listed('tags', holders)}")
        return holders[name]
    verified = newest_verified(*storages)
    if verified is None:
        raise _not_found(storages, selector, "none was read back after it was saved (verify_after_save)")
    return verified


def _survey(storages: Sequence[Storage], commits: Sequence[Commit], *, labelled_only: bool = False) -> list[Record]:
    """Of several roots: a commit has a record for each that has it, that of the nearest first."""
    records: list[Record] = []
    for storage in storages:
        there = set(list_commits(storage))
        records += survey(storage, [c for c in commits if c in there], labelled_only=labelled_only)
    return records


def _of_iteration(storage: Storage, iteration: int | None) -> list[Commit]:
    try:
        return find_commits(storage, iteration)
    except CheckpointNotFoundError as error:
        if not list_commits(storage):
            raise not_found(storage) from None
        if iteration is None:
            raise
        raise CheckpointNotFoundError(f"{error}{describe_iteration(storage, iteration)}") from None


def _best(storages: Sequence[Storage], selector: str, records: Iterable[Record]) -> Commit:
    name, is_max = best_of(selector)
    metrics: dict[Commit, Metrics] = {}
    for record in records:
        if record.is_good:
            metrics[record.commit] = record.metrics | metrics.get(record.commit, {})
    measured = [
        (value if is_max else -value, commit)
        for commit, values in metrics.items()
        if (value := values.get(name)) is not None
    ]
    if not measured:
        names = {metric for values in metrics.values() for metric, value in values.items() if value is not None}
        raise _not_found(storages, selector, f"no checkpoint has this metric; {_listed('metrics', names)}")
    return max(measured)[1]


def _listed(what: str, names: Iterable[str]) -> str:
    ordered = sorted(name if name.isprintable() else repr(name) for name in names)  # From disk, to a terminal.
    more = f" and {len(ordered) - _MAX_SHOWN} more" if len(ordered) > _MAX_SHOWN else ""
    return f"{what} are {', '.join(ordered[:_MAX_SHOWN])}{more}" if ordered else f"there are no {what}"


def _iteration_of_path(storage: Storage, path: str) -> int:
    path = without_link(os.path.normpath(path))
    above, name = os.path.split(path)
    iteration = iteration_of(name)
    if iteration is None or (above and os.path.realpath(above) != os.path.realpath(storage.location)):
        raise CheckpointNotFoundError(
            f"{path!r} is no iteration's directory in {storage.location}: expected {storage.location}/iter_0001000, "
            f"or one of {_FORMS}"
        )
    return iteration


def _not_found(storages: Sequence[Storage], selector: str, why: str) -> CheckpointNotFoundError:
    has = [
        f"{storage.location} has iterations {sorted({c.iteration for c in list_commits(storage)})[-10:]}"
        for storage in storages
    ]
    return CheckpointNotFoundError(f"{selector}: {why}. {'; '.join(has)}")


def _joined(errors: Sequence[CheckpointNotFoundError]) -> CheckpointNotFoundError:
    """One error for all roots that were looked in."""
    near = tuple(path for error in errors for path in error.candidates)
    return CheckpointNotFoundError("; ".join(map(str, errors)), candidates=near)


def open_selected(root: str | os.PathLike[str] | Storage, iteration: Selector) -> tuple[Storage, int | str | None]:
    """The storage of a root and what is selected in it: an iteration's directory, given as root, selects that.

    Raises CheckpointError if something else is selected too; ValueError.
    """
    storage, of_path = open_root(root)
    selector = parse_selector(iteration)
    if isinstance(selector, str) and _is_path(selector):
        selector = _iteration_of_path(storage, selector)
    if of_path is None:
        return storage, selector
    if selector is not None and selector != of_path:
        raise CheckpointError(
            f"{root} is the directory of iteration {of_path}, and {iteration!r} is asked for: give the root "
            f"{storage.location}, or leave the other out"
        )
    return storage, of_path
