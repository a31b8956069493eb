"""Globs of keys, as --select and --drop take them: "*" fits "/" and "." too. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def is_selected(key: str, select: Sequence[str], drop: Sequence[str]) -> bool:
    """Whether a key matches a glob of `select`, or there is none, and matches none of `drop`."""
    return (not select or any(fnmatchcase(key, glob) for glob in select)) and not any(
        fnmatchcase(key, glob) for glob in drop
    )


def unmatched_globs(globs: Iterable[str], keys: Iterable[str]) -> list[str]:
    """The globs that no key matches: what is misspelt must not pass for nothing."""
    known = list(keys)
    return [glob for glob in globs if not any(fnmatchcase(key, glob) for key in known)]
