"""From samples to figures: medians, the share of the machine's limit, the ratio to the best peer. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from benchmarks.figures import KINDS, FigureSpec, Kind
from benchmarks.request import Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What the machine did with `state_bytes`, in seconds, and as 1e9 bytes a second."""

    median_s: float
    min_s: float
    max_s: float
    samples_s: list[float]
    gb_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Of one engine, in the unit of its FigureSpec.

    of_limit: the limit for as many bytes over the median; 1 is as good as the machine. of_best_peer: the best peer's
    median over this one; above 1 is better than every peer; among peers, 1 is the best one.
    """

    median: float
    min: float
    max: float
    samples: list[float]
    of_limit: float | None = None
    of_best_peer: float | None = None


@dataclass(slots=True, kw_only=True)
class EngineResult:
    """missing: why it could not be imported. failure: why a job of it has no answer; figures of others remain."""

    is_peer: bool
    backend: str = ""
    missing: str = ""
    failure: str = ""
    notes: list[str] = field(default_factory=list)
    cached_before_cold_load: float = 0.0
    figures: dict[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the machine could do just before the engines of a section ran. transfers: empty if that was not measured.

    checksum_cost: of a save and of a load, as a fraction of the time without: what the C++ core takes beside the
    transfer.
    """

    transfers: dict[str, Limit] = field(default_factory=dict)
    checksum_cost: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class SectionResult:
    """One table. state_bytes, chunks: of a checkpoint; rank_bytes: of the largest rank's state; 0 if nothing ran."""

    kind: Kind
    title: str
    state_bytes: int
    rank_bytes: int
    chunks: int
    limits: Limits
    engines: dict[str, EngineResult]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run: all that results.json holds."""

    time: str
    command: str
    commit: str
    machine: dict[str, str | int]
    file_system: dict[str, str | int]
    versions: dict[str, str]
    repeats: int
    duration_s: float
    sections: list[SectionResult]


def limits_of(answer: Answer) -> Limits:
    """Of a job of mode "limits"."""
    transfers = {
        name: Limit(
            median_s=median(samples),
            min_s=min(samples),
            max_s=max(samples),
            samples_s=samples,
            gb_per_s=answer.state_bytes / median(samples) / 1e9,
        )
        for name, samples in answer.samples.items()
    }
    checksum_cost = {
        "save": transfers["write_checked"].median_s / transfers["write"].median_s - 1,
        "load": transfers["read_checked"].median_s / transfers["read_copied"].median_s - 1,
    }
    return Limits(transfers=transfers, checksum_cost=checksum_cost, notes=answer.notes)


def section_result(
    kind: Kind,
    title: str,
    answers: Mapping[str, Sequence[Answer]],
    failures: Mapping[str, str],
    peers: set[str],
    limits: Limits,
) -> SectionResult:
    """answers: of each engine's jobs, as far as they have one; failures: engine -> why not."""
    specs = KINDS[kind].figures
    best = _best_peers(specs, {name: answers[name] for name in answers if name in peers})
    engines = {}
    for name, jobs in answers.items():
        result = EngineResult(is_peer=name in peers, failure=failures.get(name, ""))
        for answer in jobs:
            result.backend = answer.backend or result.backend
            result.missing = answer.missing or result.missing
            result.notes += answer.notes
            result.cached_before_cold_load = max(result.cached_before_cold_load, answer.cached_before_cold_load)
            for figure in specs.keys() & answer.samples.keys():
                limit = limit_of(specs[figure], answer.state_bytes, limits)
                result.figures[figure] = _figure(answer.samples[figure], limit, best.get(figure))
        engines[name] = result
    ran = [answer for jobs in answers.values() for answer in jobs if answer.state_bytes]
    return SectionResult(
        kind=kind,
        title=title,
        state_bytes=ran[0].state_bytes if ran else 0,
        rank_bytes=ran[0].rank_bytes if ran else 0,
        chunks=ran[0].chunks if ran else 0,
        limits=limits,
        engines=engines,
    )


def _best_peers(specs: Mapping[str, FigureSpec], answers: Mapping[str, Sequence[Answer]]) -> dict[str, float]:
    """The least median of each figure in which engines are compared."""
    compared = {figure for figure, spec in specs.items() if spec.is_compared}
    best: dict[str, float] = {}
    for jobs in answers.values():
        for answer in jobs:
            for figure in compared & answer.samples.keys():
                best[figure] = min(best.get(figure, float("inf")), median(answer.samples[figure]))
    return best


def limit_of(spec: FigureSpec, state_bytes: int, limits: Limits) -> float | None:
    """What a figure would be at its limit; None if it has none, or none was measured."""
    if spec.limit == "1":
        return 1.0
    limit = limits.transfers.get(spec.limit)
    return None if limit is None else state_bytes / 1e9 / limit.gb_per_s


def _figure(samples: list[float], limit: float | None, best_peer: float | None) -> Figure:
    """Ratios are of what is above zero: an extra time can come out below."""
    middle = median(samples)
    return Figure(
        median=middle,
        min=min(samples),
        max=max(samples),
        samples=samples,
        of_limit=limit / middle if limit is not None and middle > 0 else None,
        of_best_peer=best_peer / middle if best_peer is not None and best_peer > 0 and middle > 0 else None,
    )
