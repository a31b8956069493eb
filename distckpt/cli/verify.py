"""distckpt verify: whether what is stored is what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from distckpt.cli.interruption import leaving
from distckpt.cli.output import DAMAGED, MAX_JOBS, ROOT, WHICH, console, print_json, progress_bar, size_text
from distckpt.commit import Commit, tracker_warning
from distckpt.errors import CheckpointNotFoundError
from distckpt.selecting import open_selected, select_commits
from distckpt.storage import Storage
from distckpt.verifying import VerifyReport, stored_bytes, verify_commit


def verify(
    root: Annotated[Path, typer.Argument(help=ROOT)],
    iteration: Annotated[str | None, typer.Option(help=WHICH, show_default=False)] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every iteration, newest first.")] = False,
    sample: Annotated[
        float,
        typer.Option(help="Which part of the blocks of every file to read, 0.05 is 5 %; headers and indexes always."),
    ] = 1.0,
    jobs: Annotated[
        int | None,
        typer.Option(help="Files read at a time; as many as there are processors if not given.", min=1, max=MAX_JOBS),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON for each iteration.")] = False,
) -> None:
    """Check a checkpoint against its checksums, past the page cache; change nothing.

    Prints every damaged block with its file. Exit code 0: sound; 1: damaged; 2: not found, or cannot be read.

    Example: distckpt verify /checkpoints/run7 --sample 0.05
    """
    if all_ and iteration is not None:
        raise typer.BadParameter("give --all or --iteration, not both")
    if not 0 < sample <= 1:
        raise ValueError(f"--sample {sample:g}: expected more than 0, and at most 1 for all")
    storage, selector = open_selected(root, iteration)
    commits = select_commits(storage, selector)
    warning = tracker_warning(storage, commits[0]) if selector is None else None
    is_sound = True
    for commit in commits if all_ else commits[:1]:
        try:
            report = _verify_with_progress(storage, commit, sample, jobs)
        except CheckpointNotFoundError:
            if not all_:
                raise
            continue  # Retention took it; what is left is what was asked for.
        if warning is not None and commit == commits[0]:
            report = msgspec.structs.replace(report, warnings=(warning,))
        is_sound = is_sound and report.is_sound
        if json:
            print_json(report)
        else:
            _print_report(report)
    raise typer.Exit(0 if is_sound else DAMAGED)


def _verify_with_progress(storage: Storage, commit: Commit, sample: float, jobs: int | None) -> VerifyReport:
    total = round(stored_bytes(storage, commit, with_parity=True) * sample)
    with leaving("nothing was changed"), progress_bar(f"verify iteration {commit.iteration}", total) as on_bytes:
        return verify_commit(storage, commit, sample=sample, jobs=jobs, on_bytes=on_bytes)


def _print_report(report: VerifyReport) -> None:
    speed = report.bytes_read / max(report.total_s, 1e-9)
    read = f"{size_text(report.bytes_read)} of {size_text(report.bytes)} read in {report.total_s:.1f} s"
    verdict = "sound" if report.is_sound else f"DAMAGED, faults: {len(report.faults)}"
    console.print(
        f"iteration {report.iteration}: {verdict}; shard files: {report.files}; {read} ({size_text(round(speed))}/s)"
    )
    for fault in report.faults:
        shown = fault.problem if fault.problem.startswith(fault.file) else f"{fault.file}: {fault.problem}"
        console.print(f"  {shown}")
    if report.faults:
        console.print("  `distckpt repair` mends what can be mended; a load goes back to the newest good checkpoint")
    for warning in report.warnings:
        console.print(f"  warning: {warning}; `distckpt repair` mends it")
