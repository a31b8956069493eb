"""Which jobs make which figures. Pure: decides, runs nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.figures import KINDS, LAYOUT_CHANGES, Kind
from benchmarks.layout import Layout, layout_of
from benchmarks.model import Model, Precision
from benchmarks.request import Mode

SMALL_REPEATS = 2  # Some peers take a minute for one save or load of 50,000 tensors.


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One torchrun job of an engine. most_repeats: where more would take too long."""

    mode: Mode
    layout: Layout
    model: Model
    label: str = ""
    most_repeats: int = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One table of the report. groups: the jobs of a group run one after the other in the same directory.

    limits: the job that measures what the figures are held against, None if they are held against nothing.
    """

    kind: Kind
    title: str
    limits: Job | None
    groups: tuple[tuple[Job, ...], ...]


def plan_sections(
    kinds: Sequence[Kind], layout: Layout, model: Model, precisions: Sequence[Precision], cores: int
) -> Iterator[Section]:
    """The sections in the order of KINDS. `sync` is measured in each precision, all else in the first."""
    first = replace(model, precision=precisions[0])
    limits = _job("limits", layout, first)
    for kind in KINDS:
        if kind not in kinds:
            continue
        if kind == "sync":
            for precision in precisions:
                yield _section(kind, limits, [[_job(kind, layout, replace(model, precision=precision))]])
        else:
            yield _section(kind, limits, _groups(kind, layout, first, cores))


def _groups(kind: Kind, layout: Layout, model: Model, cores: int) -> list[list[Job]]:
    small = replace(model, content="small")
    if kind == "async":
        return [[_job("async", layout, model)]]
    if kind == "loop":
        # As many ranks as cores: each computes all the time, and what a save takes is taken from training.
        return [[_job("loop", layout_of(min(layout.ranks, cores)), model)]]
    if kind == "layouts":
        return [
            [
                _job("store", Layout(tp=change.saved[0], pp=change.saved[1]), replace(model, content=change.content)),
                _job(
                    "reload",
                    Layout(tp=change.loaded[0], pp=change.loaded[1]),
                    replace(model, content=change.content),
                    label,
                ),
            ]
            for label, change in LAYOUT_CHANGES.items()
        ]
    if kind == "memory":
        return [
            [_job("peak_save", layout, model), _job("peak_load", layout, model)],
            [_job("peak_async", layout, model)],
        ]
    if kind == "index":
        return [[_job("index", layout, small)]]
    if kind == "small":
        return [[Job(mode=mode, layout=layout, model=small, most_repeats=SMALL_REPEATS)] for mode in ("sync", "async")]
    return [[_job("sync", _with_replicas(layout), model)]]


def _with_replicas(layout: Layout) -> Layout:
    """As many ranks, but two data-parallel ones for each part; fewer stages or tensor-parallel ranks."""
    if layout.dp > 1:
        return layout
    if layout.pp % 2 == 0:
        return replace(layout, pp=layout.pp // 2, dp=2)
    if layout.tp % 2 == 0:
        return replace(layout, tp=layout.tp // 2, dp=2)
    return replace(layout, dp=2)


def _job(mode: Mode, layout: Layout, model: Model, label: str = "") -> Job:
    return Job(mode=mode, layout=layout, model=model, label=label)


def _section(kind: Kind, limits: Job, groups: Sequence[Sequence[Job]]) -> Section:
    job = groups[0][0]
    what = f"{job.model.small_tensors} tensors of 4 KiB" if job.model.content == "small" else job.model.precision
    where = "" if kind == "layouts" else f", {job.layout}"
    has_limits = any(spec.limit not in ("", "1") for spec in KINDS[kind].figures.values())
    return Section(
        kind=kind,
        title=f"{KINDS[kind].title}: {what}{where}",
        limits=limits if has_limits else None,
        groups=tuple(map(tuple, groups)),
    )
