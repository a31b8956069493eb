"""Figures and remarks in words, the same in every form of the report. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.figures import KINDS, FigureSpec, Unit
from benchmarks.results import EngineResult, Figure, Record, SectionResult

MOST_CACHED = 0.01  # of the files, before a load that is called cold
HOW_TO_READ = (
    "Each cell: the median, the fastest and slowest repeat; then the share of the machine's limit for as many bytes, "
    "and how many times as good as the best peer it is (a peer shows 1.00x if it is the best one). Less is better in "
    "every figure. Compare within one run only."
)


@dataclass(frozen=True, slots=True)
class Cell:
    """middle: the median with its unit. spread, shares: the rest; "" where there is none."""

    middle: str
    spread: str
    shares: str


def cell(spec: FigureSpec, figure: Figure) -> Cell:
    shares = [f"{figure.of_limit:.0%}"] if figure.of_limit is not None else []
    if figure.of_best_peer is not None:
        shares.append(f"{figure.of_best_peer:.2f}x")
    spread = "" if len(figure.samples) < 2 else f"{number(spec.unit, figure.min)}-{number(spec.unit, figure.max)}"
    return Cell(f"{number(spec.unit, figure.median)} {symbol(spec.unit, figure.median)}", spread, " ".join(shares))


def number(unit: Unit, value: float) -> str:
    if unit == "bytes":
        return f"{value / 1e6:.0f}" if abs(value) >= 1e5 else f"{value:.0f}"
    if unit == "per_cent":
        return f"{value:.0f}"
    return f"{value:.2f}" if unit == "times" else f"{value:.3f}"


def symbol(unit: Unit, value: float) -> str:
    if unit == "bytes":
        return "MB" if abs(value) >= 1e5 else "B"
    return {"s": "s", "times": "times", "per_cent": "%"}[unit]


def size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"


def columns(section: SectionResult) -> dict[str, FigureSpec]:
    """The figures that at least one engine of the section has."""
    specs = KINDS[section.kind].figures
    present = {name for engine in section.engines.values() for name in engine.figures}
    return {name: spec for name, spec in specs.items() if name in present}


def title(record: Record) -> str:
    machine = record.machine
    return f"{machine['cpu']}, {machine['cores']} cores, {record.file_system['type']}, {record.repeats} repeats"


def describe(section: SectionResult) -> str:
    """What the numbers of a section are of."""
    kind = KINDS[section.kind]
    return (
        f"{kind.meaning}; {size(section.state_bytes)}, {section.chunks} chunks, "
        f"at most {size(section.rank_bytes)} a rank"
    )


def limit_lines(section: SectionResult) -> Iterator[str]:
    """What the machine could do just before."""
    limits = section.limits
    for name, limit in limits.transfers.items():
        spread = f"{limit.min_s:.3f} to {limit.max_s:.3f}"
        yield f"limit {name}: {limit.gb_per_s:.2f} GB/s ({limit.median_s:.3f} s, {spread})"
    for name, cost in limits.checksum_cost.items():
        yield f"checksum cost of a {name}: {cost:+.0%} of its transfer"
    for note in limits.notes:
        yield f"limit {note}"


def remarks(name: str, result: EngineResult) -> Iterator[str]:
    """What a reader has to know about the figures of an engine, or about their absence."""
    if result.missing:
        yield f"{name}: skipped: {result.missing}"
    if result.failure:
        yield f"{name}: failed: {result.failure}"
    if result.cached_before_cold_load > MOST_CACHED:
        yield f"{name}: {result.cached_before_cold_load:.0%} of the files was cached before a cold load"
    for note in result.notes:
        yield f"{name}: {note}"
