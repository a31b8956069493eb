"""Numbers in keys (layers, experts), and how they are dealt out to the coordinates of a mesh axis. Pure; no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from distckpt.errors import CheckpointError

_MAX_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Numbering:
    """What is numbered after a word, and how many of it each coordinate of an axis gets."""

    word: str
    counts: Sequence[int]

    @classmethod
    def of(cls, axis: str, word: str, numbers: set[int], size: int, counts: Sequence[int] | None) -> Numbering:
        """Raises CheckpointError where they cannot be dealt out as asked."""
        total = len(numbers)
        if numbers != set(range(total)):
            raise CheckpointError(f"the numbers after {word!r} are {sorted(numbers)[:_MAX_SHOWN]}: they have gaps")
        if counts is None:
            if total % size:
                each = _balanced(total, size)
                in_plan = f'{{"stages": {{"{axis}": {{"counts": {each}}}}}}} in a plan (--plan FILE)'
                raise CheckpointError(
                    f"{total} {word} do not fill {size} coordinates of {axis!r} equally: say how many each gets, "
                    f"such as {'--pp-layers ' + ','.join(map(str, each)) if axis == 'pp' else in_plan}"
                )
            counts = [total // size] * size
        if len(counts) != size or sum(counts) != total:
            raise CheckpointError(
                f"{list(counts)}: {size} numbers expected, one for each coordinate of {axis!r}, that sum to the "
                f"{total} {word} of the checkpoint"
            )
        return cls(word, counts)

    def number(self, key: str) -> int | None:
        return dict(numbers_in(key)).get(self.word)

    def coordinate(self, number: int, size: int) -> int:
        return int(np.searchsorted(np.cumsum(self.counts), number, side="right"))


def _balanced(total: int, size: int) -> list[int]:
    return [total * (i + 1) // size - total * i // size for i in range(size)]


def numbers_in(key: str) -> list[tuple[str, int]]:
    """(word before it, number) of each segment of a key that is a number; of several after one word the first."""
    segments = re.split(r"[./]", key)
    found: dict[str, int] = {}
    for word, segment in pairwise(segments):
        if segment.isdecimal() and len(segment) < 10 and not word.isdecimal():
            found.setdefault(word, int(segment))
    return list(found.items())
