"""distckpt copy: a checkpoint to another root, every byte checked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from distckpt.cli.interruption import leaving
from distckpt.cli.output import WHICH, console, print_json, progress_bar, size_text
from distckpt.copying import OFFLINE, check_is_of_one_run, copy_commit
from distckpt.roots import check_place
from distckpt.selecting import open_selected, select_commits
from distckpt.storage import PosixStorage
from distckpt.verifying import stored_bytes


def copy(
    source: Annotated[Path, typer.Argument(help="The root to copy from.")],
    target: Annotated[Path, typer.Argument(help="The root to copy to; made if it is missing.")],
    iteration: Annotated[str | None, typer.Option(help=WHICH, show_default=False)] = None,
    limit: Annotated[
        float | None,
        typer.Option(
            help="MB (of 1000 kB) per second at the most; no limit if not given.", min=0.001, show_default=False
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Copy one checkpoint to another root, every byte checked. What was cut short goes on where it stopped.

    Parity and labels go with it. What is damaged is not copied: exit code 2. The copy keeps its place in the order of
    commits: a root of copies should be of one run.

    Example: distckpt copy /local/run7 /shared/run7
    """
    if limit is not None and not math.isfinite(limit):
        raise ValueError(f"--limit {limit}: expected MB per second")
    storage, selector = open_selected(source, iteration)
    commit = select_commits(storage, selector)[0]
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is no directory, and so no root to copy to")
    copies = PosixStorage(target)
    check_place(copies)
    check_is_of_one_run(storage, copies, commit)
    left = f"whole files stay in {target}, where they are no checkpoint yet; the same command goes on from there"
    with (
        leaving(left),
        progress_bar(f"copy iteration {commit.iteration}", stored_bytes(storage, commit, with_parity=True)) as on_bytes,
    ):
        report = copy_commit(
            storage,
            copies,
            commit,
            marker=OFFLINE,
            max_bytes_per_s=1e6 * (limit or 0.0),
            on_bytes=on_bytes,
        )
    if json:
        print_json(report)
    else:
        size, copied = size_text(report.bytes), size_text(report.bytes_copied)
        if report.bytes_copied == 0:
            said = f"all of it, {size}, was there"
        elif report.bytes_copied < report.bytes:
            said = f"{copied} of {size} copied in {report.total_s:.1f} s, the rest was there"
        else:
            said = f"{copied} copied in {report.total_s:.1f} s"
        console.print(f"iteration {report.iteration}: {said}")
