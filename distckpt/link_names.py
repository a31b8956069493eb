"""Readable names: symbolic links beside the iteration directories, for people. Nothing reads a checkpoint by them.

A link is one of ours if its content begins with "./iter_": those are made and removed as checkpoints come and go, and
others are left alone. They are not made durable: what a crash takes, or leaves, is put right after the next commit.
"""

from __future__ import annotations

import os
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType

from distckpt.commit import TRACKER, Commit, list_commits, read_head
from distckpt.errors import CheckpointError
from distckpt.history_log import FILE
from distckpt.storage import PosixStorage

_STEPS = ("step", "iteration")
_OURS = "./iter_"
_MAX_BYTES = 200
_NOT_GIVEN = "none"
_RESERVED = re.compile(rf"\.|iter_|writer-|{re.escape(TRACKER)}$|{re.escape(FILE)}$")


@dataclass(frozen=True, slots=True)
class LinkNames:
    """How checkpoints are called: "{run}--val_loss={val_loss:.2f}-step={step}".

    template: as of str.format, without items. Names in it are `step` (or `iteration`), those of
    `values`, and metrics of the save, by name; for a metric that a save does not have, or that is not finite, "none"
    stands. What a file name cannot have becomes "_". Where two checkpoints, or another file, would have one name, the
    iteration is added.
    """

    template: str
    values: Mapping[str, str | int | float] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        taken = sorted(set(self.values) & set(_STEPS))
        if taken:
            raise ValueError(f"link_names: {taken[0]!r} is the checkpoint's own, and cannot be among the values")
        self.name_of(1, dict.fromkeys(self._metrics(), 1.0))

    def _metrics(self) -> list[str]:
        """The names that can only be metrics."""
        return [name for name, _ in self._fields() if name not in (*_STEPS, *self.values)]

    def _fields(self) -> Iterable[tuple[str, str]]:
        """Each name with its format. Raises ValueError."""
        for _, name, form, conversion in self._parsed():
            if name is None:
                continue
            if not name or name.isdigit() or re.search(r"[\[\]]", name) or conversion or "{" in (form or ""):
                raise ValueError(
                    f"link_names={self.template!r}: {{{name}}}: expected a name alone, or a name and a format"
                )
            yield name, form or ""

    def _parsed(self) -> list[tuple[str, str | None, str | None, str | None]]:
        try:
            return list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise ValueError(f"link_names={self.template!r}: {error}") from error

    def name_of(self, iteration: int, metrics: Mapping[str, float | None]) -> str:
        """The name of a checkpoint. Raises ValueError for a format that does not fit its value."""
        known = dict.fromkeys(_STEPS, iteration) | dict(self.values)
        forms = iter(list(self._fields()))
        text = ""
        for literal, name, _, _ in self._parsed():
            text += literal
            if name is not None:
                _, form = next(forms)
                value = known.get(name, metrics.get(name))
                try:
                    text += _NOT_GIVEN if value is None else format(value, form)
                except ValueError as error:
                    raise ValueError(f"link_names={self.template!r}: {{{name}:{form}}}: {error}") from error
        return _as_file_name(text)


def _as_file_name(text: str) -> str:
    name = "".join(c if c.isprintable() and c != "/" else "_" for c in text)
    name = name.encode(errors="replace")[:_MAX_BYTES].decode(errors="ignore").strip()
    return f"_{name}" if not name or _RESERVED.match(name) else name


@dataclass(slots=True)
class Links:
    """The links of one root. One thread at a time."""

    storage: PosixStorage
    names: LinkNames
    _known: dict[Commit, str] = field(default_factory=dict)

    def update(self) -> None:
        """Make the links what they are to be for the checkpoints that there are. Raises OSError."""
        root = self.storage.location
        there = _read_links(root)
        wanted = self._wanted(taken=set(os.listdir(root)) - there.keys())
        for name, target in there.items():
            if wanted.get(name) != target:
                with suppress(FileNotFoundError):
                    os.unlink(os.path.join(root, name))
        for name, target in wanted.items():
            if there.get(name) != target:
                with suppress(FileExistsError):  # Somebody was faster; after the next commit it counts as taken.
                    os.symlink(target, os.path.join(root, name))

    def _wanted(self, taken: set[str]) -> dict[str, str]:
        """Name -> content of the link. taken: names of other files."""
        newest: dict[int, Commit] = {}
        for commit in list_commits(self.storage):
            newest.setdefault(commit.iteration, commit)
        self._known = {commit: name for commit in newest.values() if (name := self._name_of(commit)) is not None}
        count = Counter(self._known.values())
        wanted: dict[str, str] = {}
        # Those that have their name for themselves first, so that no other's longer name takes it.
        for commit, name in sorted(self._known.items(), key=lambda item: (count[item[1]] > 1, item[0])):
            if count[name] > 1 or name in taken:
                name = f"{name}-{commit.iteration}"
                while name in taken or name in wanted:
                    name += "_"
            wanted[name] = f"./{commit.directory}"
        return wanted

    def _name_of(self, commit: Commit) -> str | None:
        """None if its index cannot be read, or it is gone."""
        if commit in self._known:
            return self._known[commit]
        try:
            return self.names.name_of(commit.iteration, read_head(self.storage, commit).metrics)
        except (CheckpointError, FileNotFoundError):
            return None


def _read_links(root: str) -> dict[str, str]:
    """Our links: name -> content."""
    found = {}
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.is_symlink():
                with suppress(OSError):
                    target = os.readlink(entry.path)
                    if target.startswith(_OURS):
                        found[entry.name] = target
    return found
