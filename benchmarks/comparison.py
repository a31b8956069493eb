"""Every engine through every section of the plan. What fails is reported, and the rest goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks.engines import ENGINES
from benchmarks.plan import Job, Section
from benchmarks.request import Answer
from benchmarks.results import Limits, SectionResult, limits_of, section_result
from benchmarks.runs import Bench, JobError


def compare(
    bench: Bench,
    sections: Iterable[Section],
    names: Sequence[str],
    tell: Callable[[str], None],
) -> list[SectionResult]:
    """names: of ENGINES. tell: is told what is about to run, and what failed."""
    peers = {name for name in names if ENGINES[name].is_peer}
    missing: set[str] = set()
    results = []
    for section in sections:
        limits = _limits(bench, section, tell)
        answers: dict[str, list[Answer]] = {}
        failures: dict[str, str] = {}
        for name in names:
            groups = _groups(section, name)
            if not groups or name in missing:
                continue
            tell(f"{section.title}: {name}")
            answers[name], failure = _measure(bench, groups, name)
            if failure:
                failures[name] = failure
                tell(f"{name} failed: {failure}")
            if any(answer.missing for answer in answers[name]):
                missing.add(name)
        results.append(section_result(section.kind, section.title, answers, failures, peers, limits))
    return results


def _limits(bench: Bench, section: Section, tell: Callable[[str], None]) -> Limits:
    """Measured anew for each section: an hour later a shared disk can be twice as fast."""
    if section.limits is None:
        return Limits()
    tell(f"{section.title}: limits")
    try:
        [answer] = bench.run([section.limits])
    except JobError as error:
        tell(f"limits failed: {error}")
        return Limits(notes=[f"not measured: {error}"])
    return limits_of(answer)


def _groups(section: Section, name: str) -> list[list[Job]]:
    """The jobs of a section that an engine takes."""
    entry = ENGINES[name]
    if section.kind not in entry.kinds:
        return []
    groups = ([job for job in group if entry.takes(job.mode)] for group in section.groups)
    return [jobs for jobs in groups if jobs]


def _measure(bench: Bench, groups: Sequence[Sequence[Job]], name: str) -> tuple[list[Answer], str]:
    """The answers of the jobs, and why some are missing."""
    answers: list[Answer] = []
    failures: list[str] = []
    for jobs in groups:
        try:
            for answer in bench.run(jobs, name):
                answers.append(answer)  # noqa: PERF402  # Those before a failure count.
        except JobError as error:
            failures.append(f"{jobs[-1].label or jobs[0].mode}: {error}")
        if any(answer.missing for answer in answers):
            break
    return answers, "\n".join(failures)
