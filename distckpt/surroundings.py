"""Surroundings: where no checkpoint is, what lies around that may have been meant. Reads names; changes nothing.

Only of mounted file systems, where there is an around; and bounded, as a wrong path may lead anywhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from distckpt.cataloging import incomplete_in, incomplete_saves
from distckpt.commit import iteration_directory, list_commits, read_head
from distckpt.errors import CheckpointError, CheckpointNotFoundError
from distckpt.roots import root_above
from distckpt.storage import PosixStorage, Storage

MAX_NAMES = 1000
_MAX_SHOWN = 10
# Names by which other programs' checkpoints are known; is_run: of a run, which could be gone on with.
_FOREIGN = (
    (re.compile(r"((pytorch_)?model|adapter_model)(-\d+-of-\d+)?\.(bin|safetensors)"), "model", False),
    (re.compile(r"(pytorch_model|model)\.(bin|safetensors)\.index\.json"), "model", False),
    (re.compile(r"consolidated(\.\d\d)?\.(pth|safetensors)"), "consolidated weights", False),
    (re.compile(r"checkpoint-\d+"), "Hugging Face Trainer", True),
    (re.compile(r"global_step\d+|zero_pp_rank_.*"), "DeepSpeed", True),
    (re.compile(r"mp_rank_\d\d(_\d+)?"), "Megatron-LM or DeepSpeed", True),
    (re.compile(r"\.metadata|__\d+_\d+\.distcp"), "torch.distributed.checkpoint", True),
    (re.compile(r".*\.(ckpt|nemo)"), "Lightning or NeMo", True),
    (re.compile(r".*\.(pt|pth)"), "a file of torch.save", False),
)


@dataclass(slots=True)
class _Around:
    """What was found: lines of text, and the paths of checkpoints that the path leads past."""

    lines: list[str] = field(default_factory=list)
    candidates: list[str] = field(default_factory=list)


class _Root(NamedTuple):
    """A root beside the path; ordered by when its newest checkpoint was saved."""

    created_unix_s: float
    path: str
    iteration: int
    checkpoints: int


def not_found(storage: Storage) -> CheckpointNotFoundError:
    """The error for a root that holds no checkpoint: it says what may have been meant."""
    around = _Around()
    with suppress(OSError):  # That nothing is there is what matters.
        incomplete = incomplete_saves(storage)[:_MAX_SHOWN]
        around.lines += [f"incomplete: {save.directory}: {save.why}" for save in incomplete]
        if isinstance(storage, PosixStorage):
            _look_around(storage.location, around)
    return CheckpointNotFoundError(
        f"no checkpoint under {storage.location}: it has no committed checkpoint{_text(around.lines)}",
        candidates=tuple(around.candidates),
    )


def describe_iteration(storage: Storage, iteration: int) -> str:
    """What lies in the directory of an iteration that is not committed, for the end of an error."""
    saves = incomplete_in(storage, iteration, iteration_directory(iteration))
    return _text([f"incomplete: {save.directory}: {save.why}" for save in saves])


def _text(lines: Iterable[str]) -> str:
    return "".join(f"\n  {line}" for line in lines)


def _look_around(path: str, around: _Around) -> None:
    found = root_above(path)
    commits = [] if found is None else list_commits(PosixStorage(found[0]))
    if found is not None and commits:
        above, iteration = found
        around.candidates.append(above)
        if any(commit.iteration == iteration for commit in commits):
            says = f"give that as the root, and iteration {iteration}"
        else:
            says = (
                f"which is incomplete: give that as the root; its newest checkpoint is iteration {commits[0].iteration}"
            )
        around.lines.append(f"it lies in iteration {iteration} of {above}, {says}")
        return
    if not os.path.isdir(path):
        # What lies there are other runs, beside one that begins, or its base: named, as the path may be mistyped, and
        # none of them recommended.
        roots = sorted(_roots(os.path.dirname(path)), reverse=True)
        beside = "; around it are these:" if roots else ""
        around.lines += [f"there is no directory {path}{beside}", *_listed(roots)]
        return
    roots = sorted(_roots(path), reverse=True)
    around.lines += _listed(roots)
    if roots:
        more = ", the one with the newest complete checkpoint," if len(roots) > 1 else ""
        around.lines.append(f"give {roots[0].path}{more} as the root")
    around.candidates += [root.path for root in roots]
    _look_for_foreign(path, around)


def _listed(roots: Iterable[_Root]) -> list[str]:
    return [
        f"checkpoints: {root.path}: {root.checkpoints}, the newest of iteration {root.iteration}"
        for root in islice(roots, _MAX_SHOWN)
    ]


def _names(path: str) -> Iterator[os.DirEntry[str]]:
    with suppress(OSError), os.scandir(path) as entries:
        yield from islice(entries, MAX_NAMES)


def _roots(path: str) -> Iterator[_Root]:
    """Of the directory and its children, those that hold checkpoints; one to which links lead is told once."""
    seen: set[str] = set()
    children = sorted((entry for entry in _names(path) if _is_directory(entry)), key=lambda entry: entry.is_symlink())
    for candidate in (path, *(entry.path for entry in children)):
        real = os.path.realpath(candidate)
        if real in seen:
            continue
        seen.add(real)
        with suppress(OSError):
            storage = PosixStorage(candidate)
            commits = list_commits(storage)
            for commit in commits:
                with suppress(CheckpointError):
                    head = read_head(storage, commit)
                    yield _Root(head.created_unix_s, candidate, commit.iteration, len({c.iteration for c in commits}))
                    break


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _look_for_foreign(path: str, around: _Around) -> None:
    """What other programs have saved there, a line for each kind."""
    names: dict[str, list[str]] = {}
    for entry in _names(path):
        kind, is_run = next(((kind, is_run) for p, kind, is_run in _FOREIGN if p.fullmatch(entry.name)), ("", False))
        if kind:
            names.setdefault(kind, []).append(entry.name)
        if is_run:
            around.candidates.append(entry.path)
    for kind, found in names.items():
        around.lines.append(f"not saved by distckpt ({kind}): {', '.join(sorted(found)[:_MAX_SHOWN])}")
