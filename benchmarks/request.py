"""What the command asks of its worker processes, and what they answer: plain records, passed as JSON files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from benchmarks.layout import Layout
from benchmarks.model import Model

# What one torchrun job measures; "store" only saves. Those of ASYNC_MODES need an engine with async saves.
Mode = Literal["limits", "sync", "async", "loop", "store", "reload", "peak_save", "peak_load", "peak_async", "index"]
ASYNC_MODES: frozenset[Mode] = frozenset({"async", "loop", "peak_async"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One torchrun job. engine: a name of benchmarks.engines.ENGINES; unused by mode "limits".

    stored_step: of the checkpoint that an earlier job left in root for this one. label: what the names of the
    figures start with, where several jobs of one table measure the same.
    """

    mode: Mode
    engine: str
    layout: Layout
    model: Model
    repeats: int
    root: str
    answer: str
    stored_step: int = 0
    label: str = ""


@dataclass(slots=True, kw_only=True)
class Answer:
    """What a job measured: figure -> one sample per repeat, each of the rank with the largest.

    state_bytes, chunks: of the checkpoint. rank_bytes: of the state of the largest rank. last_step: of the newest
    checkpoint that was left. cached_before_cold_load: the fraction of the files that stayed in the page cache, at
    worst. missing: why the engine could not be imported; nothing was measured then.
    """

    state_bytes: int = 0
    rank_bytes: int = 0
    chunks: int = 0
    last_step: int = 0
    backend: str = ""
    samples: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    cached_before_cold_load: float = 0.0
    missing: str = ""

    def add(self, figure: str, sample: float) -> None:
        self.samples.setdefault(figure, []).append(sample)
