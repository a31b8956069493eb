"""What the command asks of its worker processes, and what they answer: plain records, passed as JSON files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Mode = Literal["sync", "async", "limits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One torchrun job. engine: a name of benchmarks.engines.ENGINES; unused by mode "limits"."""

    mode: Mode
    engine: str
    tp: int
    pp: int
    size_bytes: int
    repeats: int
    root: str
    answer: str


@dataclass(slots=True, kw_only=True)
class Answer:
    """What a job measured: figure -> seconds per repeat, each of the rank that took longest.

    state_bytes: of all ranks. cached_before_cold_load: the fraction of the files that stayed in the page cache, at
    worst. missing: why the engine could not be imported; nothing was measured then.
    """

    state_bytes: int = 0
    backend: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    cached_before_cold_load: float = 0.0
    missing: str = ""

    def add(self, figure: str, seconds: float) -> None:
        self.seconds.setdefault(figure, []).append(seconds)
