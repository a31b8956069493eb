"""`python -m benchmarks`: measure the engines and the machine's limits in one run; write JSON, a table and a chart."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.chart import draw_results
from benchmarks.engines import ENGINES
from benchmarks.machine import commit, describe_file_system, describe_machine, versions
from benchmarks.request import Answer, Mode
from benchmarks.results import engine_results, limit_figures
from benchmarks.runs import Bench, JobError
from benchmarks.state import Layout
from benchmarks.table import print_results

LOG_WIDTH = 140  # characters, where no terminal says how wide it is


def main(
    ranks: Annotated[int, typer.Option(min=1, help="Processes, tp x pp.")] = 4,
    tp: Annotated[int, typer.Option(min=0, help="Tensor-parallel size; 0: 2 if it divides the ranks, else 1.")] = 0,
    size_gb: Annotated[float, typer.Option(min=0.01, help="State of all ranks, in 1e9 bytes.")] = 2.2,
    engines: Annotated[str, typer.Option(help="Names, separated by commas.")] = ",".join(ENGINES),
    repeats: Annotated[int, typer.Option(min=1, help="Of each figure, after the first save.")] = 5,
    directory: Annotated[Path, typer.Option(help="Made if missing; its file system is measured.")] = Path("out/bench"),
    out: Annotated[Path, typer.Option(help="Where results.json and results.png go.")] = Path("out/bench"),
    timeout_s: Annotated[float, typer.Option(help="Of one engine's job.")] = 1800.0,
) -> None:
    """Exits with 1 if an engine failed; one that is not installed is skipped and named."""
    names = [name.strip() for name in engines.split(",")]
    if unknown := sorted(set(names) - set(ENGINES)):
        raise typer.BadParameter(f"{', '.join(unknown)}; there are {', '.join(ENGINES)}", param_hint="--engines")
    tp = tp or (2 if ranks % 2 == 0 else 1)
    if ranks % tp:
        raise typer.BadParameter(f"{tp} does not divide {ranks} ranks", param_hint="--tp")
    for path in (directory, out):
        path.mkdir(parents=True, exist_ok=True)
    console = Console()
    if not console.is_terminal:
        console.width = LOG_WIDTH
    bench = Bench(Layout(tp, ranks // tp), round(size_gb * 1e9), repeats, directory.resolve(), timeout_s)

    limits_answer = _run(bench, console, "limits", "")
    answers, failures = _measure(bench, console, names)
    limits = limit_figures(limits_answer)
    peers = {name for name in names if ENGINES[name].is_peer}
    results = engine_results(answers, failures, peers, limits)

    size = f"{limits_answer.state_bytes / 1e9:.2f} GB on {ranks} ranks ({bench.layout})"
    machine, file_system = describe_machine(), describe_file_system(directory)
    title = f"{size}, {machine['cores']} cores, {file_system['type']}, {repeats} repeats"
    record = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine,
        "file_system": file_system,
        "versions": versions(),
        "tp": bench.layout.tp,
        "pp": bench.layout.pp,
        "state_bytes": limits_answer.state_bytes,
        "repeats": repeats,
        "limits": {name: asdict(figure) for name, figure in limits.items()},
        "limit_notes": limits_answer.notes,
        "engines": {name: asdict(result) for name, result in results.items()},
    }
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    draw_results(out / "results.png", title, limits, results)
    print_results(console, title, limits, results)
    for note in limits_answer.notes:
        console.print(f"limit {note}", highlight=False)
    console.print(f"written: {out / 'results.json'}, {out / 'results.png'}", highlight=False)
    if failures:
        raise typer.Exit(1)


def _measure(
    bench: Bench, console: Console, names: list[str]
) -> tuple[dict[str, list[Answer]], dict[str, dict[str, str]]]:
    """Answers, and the reasons of failures, of each engine. One that fails or is missing does not end the run."""
    answers: dict[str, list[Answer]] = {name: [] for name in names}
    failures: dict[str, dict[str, str]] = {}
    for name in names:
        modes: tuple[Mode, ...] = ("sync", "async") if ENGINES[name].has_async else ("sync",)
        for mode in modes:
            try:
                answers[name].append(_run(bench, console, mode, name))
            except JobError as error:
                failures.setdefault(name, {})[mode] = str(error)
            if answers[name] and answers[name][-1].missing:
                break
    return answers, failures


def _run(bench: Bench, console: Console, mode: Mode, name: str) -> Answer:
    with console.status(f"{name} {mode}"):
        return bench.run(mode, name)


if __name__ == "__main__":
    typer.run(main)
