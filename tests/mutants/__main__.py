"""Takes one safeguard away at a time and looks whether a test turns red.

    python -m tests.mutants [--only NAME] [--jobs N] [--list]

One mutant stands in the tables beside this file for every fsync, every comparison of checksums, every agreement and
every check of fence or path in the Python sources. Each is applied to a scratch copy of the tree, the tests named with
it are run there, and a mutant that they do not notice has SURVIVED: a test is missing, or the safeguard does nothing.
Two more results mean that a table is out of date: "text not found" (or found twice), and "broken" (the tests could not
be run, or fail without the mutant too).
"""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tests.mutants import (
    committing,
    exchange,
    life,
    loading,
    offline,
    optimizer,
    resharding,
    saving,
    storage,
    training,
)
from tests.mutants.mutant import Mutant

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("distckpt", "tests", "examples", "tools", "docs", "pyproject.toml", "README.md")
TIMEOUT_S = 300.0
KILLED = "killed"
TABLES = (storage, committing, life, saving, loading, optimizer, training, resharding, exchange, offline)
MUTANTS = tuple(mutant for table in TABLES for mutant in table.MUTANTS)


@dataclass(frozen=True)
class Result:
    verdict: str
    seconds: float
    detail: str


def copy_tree(target: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(source, target / name)
    where = run_python(target, ["-c", "import distckpt; print(distckpt.__file__)"]).stdout.strip()
    if not where.startswith(str(target)):
        raise RuntimeError(f"the tests would import {where or 'nothing'} instead of the copy in {target}")


def run_python(tree: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def run_tests(tree: Path, tests: Sequence[str]) -> Result:
    """Run the tests in the tree until one fails."""
    started = time.monotonic()
    arguments = ["-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *tests]
    try:
        done = run_python(tree, arguments)
    except subprocess.TimeoutExpired:
        return Result(KILLED, time.monotonic() - started, "by a hang")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if done.returncode < 0:
        return Result(KILLED, time.monotonic() - started, f"by signal {-done.returncode}")
    verdict = {0: "SURVIVED", 1: KILLED}.get(done.returncode, "broken")
    detail = failed[0].split(" ")[1].partition("::")[2] if failed else done.stdout[-300:] + done.stderr[-300:]
    return Result(verdict, time.monotonic() - started, detail if verdict != "SURVIVED" else "")


def run_mutant(tree: Path, mutant: Mutant) -> Result:
    """Apply it, run its tests, take it back."""
    path = tree / mutant.file
    source = path.read_text()
    if source.count(mutant.text) != 1:
        return Result("text not found", 0.0, f"{source.count(mutant.text)} times in {mutant.file}")
    path.write_text(source.replace(mutant.text, mutant.replacement) + mutant.appended)
    try:
        return run_tests(tree, mutant.tests)
    finally:
        path.write_text(source)


def run_group(trees: queue.SimpleQueue[Path], mutants: Sequence[Mutant]) -> list[Result]:
    """Mutants with the same tests, which must pass without any."""
    tree = trees.get()
    try:
        if run_tests(tree, mutants[0].tests).verdict != "SURVIVED":
            return [Result("broken", 0.0, "fails without any mutant")] * len(mutants)
        return [run_mutant(tree, mutant) for mutant in mutants]
    finally:
        trees.put(tree)


def main(
    only: Annotated[str, typer.Option(help="Only mutants whose name contains this.")] = "",
    jobs: Annotated[int, typer.Option(help="How many are run at a time, each in a copy of its own.", min=1)] = 1,
    list_: Annotated[bool, typer.Option("--list", help="List the mutants and stop.")] = False,
) -> None:
    """Run the mutants; exit code 1 unless every one is killed."""
    console = Console()
    chosen = [mutant for mutant in MUTANTS if only in mutant.name]
    if list_ or not chosen:
        for mutant in chosen:
            console.print(f"{mutant.name}  [dim]{mutant.file}[/dim]", highlight=False)
        raise typer.Exit(0 if chosen else 2)
    groups: dict[tuple[str, ...], list[Mutant]] = {}
    for mutant in chosen:
        groups.setdefault(mutant.tests, []).append(mutant)
    results: dict[Mutant, Result] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch, ThreadPoolExecutor(jobs) as threads:
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(jobs):
            tree = Path(scratch).resolve() / str(number)
            tree.mkdir()
            copy_tree(tree)
            trees.put(tree)
        running = {threads.submit(run_group, trees, mutants): mutants for mutants in groups.values()}
        for group in as_completed(running):
            for mutant, result in zip(running[group], group.result(), strict=True):
                results[mutant] = result
                console.print(f"{mutant.name}: {result.verdict}", highlight=False)
    table = Table("mutant", "result", "s", "by", title=f"{len(chosen)} mutants")
    for mutant in chosen:
        result = results[mutant]
        color = "green" if result.verdict == KILLED else "red"
        row = (mutant.name, f"[{color}]{result.verdict}[/{color}]", f"{result.seconds:.0f}")
        table.add_row(*row, result.detail.replace("[", "\\["))
    console.print(table)
    killed = sum(result.verdict == KILLED for result in results.values())
    console.print(f"{killed} of {len(chosen)} killed", highlight=False)
    raise typer.Exit(0 if killed == len(chosen) else 1)


if __name__ == "__main__":
    typer.run(main)
