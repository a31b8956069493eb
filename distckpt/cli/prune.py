"""distckpt prune: remove the checkpoints that a policy does not keep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.table import Table

from distckpt.cli.interruption import leaving
from distckpt.cli.output import console, counted, print_json, print_table, size_text
from distckpt.cli.quantities import duration_s, size_bytes
from distckpt.pruning import PruneReport
from distckpt.pruning import prune as prune_root
from distckpt.retention import BestRule, Retention
from distckpt.selecting import best_of


def prune(
    root: Annotated[Path, typer.Argument(help="The directory that holds latest_checkpointed_iteration.txt.")],
    keep_last: Annotated[int | None, typer.Option(help="So many of the newest.", show_default=False)] = None,
    keep_every: Annotated[
        int | None, typer.Option(help="Those whose iteration this divides.", show_default=False)
    ] = None,
    keep_best: Annotated[
        list[str] | None,
        typer.Option(
            help="METRIC:COUNT, so many with the lowest metric; METRIC:max:COUNT, with the highest. May be repeated.",
            show_default=False,
        ),
    ] = None,
    keep_younger_than: Annotated[
        str | None, typer.Option(help="Those saved no longer ago: 7d, 12h.", show_default=False)
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(help="What all may take together: 2TB, 500GiB.", show_default=False)
    ] = None,
    grace: Annotated[str, typer.Option(help="How long readers may still have the files of what is removed.")] = "60s",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Look, and print what would be done.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Remove checkpoints that no rule keeps, and what dead saves have left. Safe beside a job.

    Always kept: tagged and pinned ones, the newest, the last good one, the one that the tracker names. With --max-size
    alone, the oldest go until the rest fits.

    Example: distckpt prune /checkpoints/run7 --keep-last 3 --keep-every 1000 --keep-best val_loss:3 --dry-run
    """
    retention = Retention(
        keep_last=keep_last,
        keep_every=keep_every,
        keep_best=[_best_rule(text) for text in keep_best or ()],
        keep_younger_than_s=None if keep_younger_than is None else duration_s(keep_younger_than),
        max_bytes=None if max_size is None else size_bytes(max_size),
    )
    if not retention.has_rules and retention.max_bytes is None:
        raise typer.BadParameter(
            "give at least one rule: --keep-last, --keep-every, --keep-best, --keep-younger-than or --max-size"
        )
    grace_s = duration_s(grace)
    with leaving("nothing was changed" if dry_run else "checkpoints are removed one by one; the same command goes on"):
        report = prune_root(root, retention, dry_run=dry_run, removal_grace_s=grace_s)
    if json:
        sums = {"kept_bytes": report.kept_bytes, "removed_bytes": report.removed_bytes}
        print_json(msgspec.structs.asdict(report) | sums)
    else:
        _print(report, grace)


def _best_rule(text: str) -> BestRule:
    """Of METRIC:COUNT, METRIC:min:COUNT, METRIC:max:COUNT and the same with the count before the mode."""
    name, is_max = best_of(text)
    name, colon, count = name.rpartition(":")
    if not colon or not count.isdecimal() or len(count) > 9:
        raise ValueError(f"--keep-best {text}: expected METRIC:COUNT, METRIC:max:COUNT, such as val_loss:3")
    name, is_highest = best_of(name)
    return name, int(count), "max" if is_max or is_highest else "min"


def _print(report: PruneReport, grace: str) -> None:
    table = Table("iteration", "size", "", "why")
    told = [(one, "stays") for one in report.kept] + [(one, "goes") for one in report.removed]
    for one, verdict in sorted(told, key=lambda pair: pair[0].iteration, reverse=True):
        table.add_row(str(one.iteration), size_text(one.bytes), verdict, one.why)
    print_table(table)
    removed = f"{counted(len(report.removed), 'checkpoint')}, {size_text(report.removed_bytes)}"
    if report.dry_run:
        console.print(f"would remove {removed}; {size_text(report.kept_bytes)} stay")
        return
    console.print(f"removed {removed}; {size_text(report.kept_bytes)} stay; {counted(len(report.swept), 'file')} swept")
    if report.removed and duration_s(grace) > 0:
        console.print(f"files of what was removed stay for readers; a save or prune after {grace} takes them")
