"""distckpt repair: mend what can be known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from distckpt.cli.interruption import leaving
from distckpt.cli.output import DAMAGED, ROOT, WHICH, console, print_json, progress_bar
from distckpt.errors import CheckpointError
from distckpt.repairing import repair as repair_root
from distckpt.selecting import open_selected, select_commits
from distckpt.verifying import stored_bytes


def repair(
    root: Annotated[Path, typer.Argument(help=ROOT)],
    iteration: Annotated[str | None, typer.Option(help=WHICH, show_default=False)] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Make an index where none is: this makes a checkpoint, the newest.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Look, and print what would be done.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Mend the tracker, a damaged index or chunk table, and, where there is parity, damaged shard files.

    An index is made again from the headers of the shard files, of which every block is checked first: nothing that is
    damaged gets a new checksum. Exit code 0: nothing is damaged (any more); 1: something still is, and is printed; with
    --dry-run also what could be mended.

    Example: distckpt repair /checkpoints/run7 --dry-run
    """
    left = "nothing was changed" if dry_run else "nothing is half mended; the same command goes on"
    with leaving(left), _progress(root, iteration) as on_bytes:
        report = repair_root(root, iteration, force=force, dry_run=dry_run, on_bytes=on_bytes)
    if json:
        print_json(report)
    else:
        for what in report.repaired:
            console.print(f"{'would repair' if dry_run else 'repaired'}: {what}")
        for what in report.damaged:
            console.print(f"DAMAGED: {what}")
        if report.damaged:
            console.print("what is damaged stays so; `distckpt verify --all` tells which checkpoints are sound")
        if not report.repaired and not report.damaged:
            console.print("nothing to repair")
    raise typer.Exit(0 if report.is_sound else DAMAGED)


@contextmanager
def _progress(root: Path, iteration: str | None) -> Iterator[Callable[[int], None]]:
    """Of reading what is selected. What is wrong with that, `repair` finds out."""
    try:
        storage, selector = open_selected(root, iteration)
        commit = select_commits(storage, selector)[0]
    except (CheckpointError, OSError):
        yield lambda _: None
        return
    with progress_bar(
        f"check iteration {commit.iteration}", stored_bytes(storage, commit, with_parity=True)
    ) as on_bytes:
        yield on_bytes
