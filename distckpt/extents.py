"""Extents: ranges of bytes of a file, and how many of them lie where. numpy alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distckpt.geometry import Int64Array


@dataclass(frozen=True, slots=True)
class Extents:
    """Ranges of bytes, ascending, that do not touch."""

    lows: Int64Array
    highs: Int64Array

    @classmethod
    def joined(cls, lows: Int64Array, highs: Int64Array) -> Extents:
        """Of ranges in any order that may touch and overlap; none is empty."""
        order = np.argsort(lows, kind="stable")
        lows, reach = lows[order], np.maximum.accumulate(highs[order])
        is_first = np.ones(len(lows), bool)
        is_first[1:] = lows[1:] > reach[:-1]
        firsts = np.flatnonzero(is_first)
        return cls(lows[firsts], reach[np.append(firsts[1:], len(lows)) - 1] if len(firsts) else lows)

    def bytes_in(self, begin: Int64Array, stop: Int64Array) -> Int64Array:
        """How many of their bytes lie in each of the ranges begin..stop."""
        return self._bytes_before(stop) - self._bytes_before(begin)

    def _bytes_before(self, at: Int64Array) -> Int64Array:
        before = np.concatenate([[0], np.cumsum(self.highs - self.lows)])
        number = np.searchsorted(self.highs, at, side="right")  # Of those that end there, or before.
        of_next = np.clip(at - np.append(self.lows, 0)[number], 0, None)
        found: Int64Array = before[number] + np.where(number < len(self.lows), of_next, 0)
        return found
