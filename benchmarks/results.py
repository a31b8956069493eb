"""From seconds to figures: medians, the share of the machine's limit, the ratio to the best peer. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from benchmarks.request import Answer

LIMIT_OF = {
    "save_first": "write",
    "save": "write",
    "stall_first": "copy",
    "stall": "copy",
    "durable_first": "write",
    "durable": "write",
    "load_cold": "read",
    "load_warm": "copy",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Seconds. of_limit: the limit's median over this one's, 1 is as fast as the machine. of_best_peer: the best
    peer's median over this one's, above 1 is faster than every peer; among peers, 1 is the best one."""

    median_s: float
    min_s: float
    max_s: float
    samples_s: list[float]
    gb_per_s: float
    of_limit: float | None = None
    of_best_peer: float | None = None


@dataclass(slots=True, kw_only=True)
class EngineResult:
    is_peer: bool
    backend: str = ""
    missing: str = ""
    failures: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    cached_before_cold_load: float = 0.0
    figures: dict[str, Figure] = field(default_factory=dict)


def limit_figures(answer: Answer) -> dict[str, Figure]:
    return {name: _figure(seconds, answer.state_bytes) for name, seconds in answer.seconds.items()}


def engine_results(
    answers: Mapping[str, list[Answer]],
    failures: Mapping[str, dict[str, str]],
    peers: set[str],
    limits: Mapping[str, Figure],
) -> dict[str, EngineResult]:
    """By engine. answers: of its jobs; failures: mode -> why, of the jobs that have none."""
    seconds = {name: {k: v for answer in answers[name] for k, v in answer.seconds.items()} for name in answers}
    best: dict[str, float] = {}
    for name in peers & set(seconds):
        for figure, samples in seconds[name].items():
            best[figure] = min(best.get(figure, float("inf")), median(samples))
    results = {}
    for name in answers:
        result = EngineResult(is_peer=name in peers, failures=failures.get(name, {}))
        for answer in answers[name]:
            result.backend = answer.backend or result.backend
            result.missing = answer.missing or result.missing
            result.notes += answer.notes
            result.cached_before_cold_load = max(result.cached_before_cold_load, answer.cached_before_cold_load)
            for figure, samples in answer.seconds.items():
                limit = limits.get(LIMIT_OF.get(figure, ""))
                limit_s = None if limit is None else limit.median_s
                peer_s = best.get(figure) if figure in LIMIT_OF else None
                result.figures[figure] = _figure(samples, answer.state_bytes, limit_s, peer_s)
        results[name] = result
    return results


def _figure(
    samples: list[float], state_bytes: int, limit_s: float | None = None, peer_s: float | None = None
) -> Figure:
    middle = median(samples)
    return Figure(
        median_s=middle,
        min_s=min(samples),
        max_s=max(samples),
        samples_s=samples,
        gb_per_s=state_bytes / middle / 1e9,
        of_limit=None if limit_s is None else limit_s / middle,
        of_best_peer=None if peer_s is None else peer_s / middle,
    )
