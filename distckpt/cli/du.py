"""distckpt du: where the bytes of a root are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.table import Table

from distckpt.cataloging import disk_usage
from distckpt.cli.output import ROOT, print_json, print_table, size_text
from distckpt.roots import open_root
from distckpt.surroundings import not_found


def du(
    root: Annotated[Path, typer.Argument(help=ROOT)],
    json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Bytes of each iteration: of its checkpoint, of saves that are none, of checkpoints being removed, of other files.

    Sizes are those of the files, by their names; a damaged index takes all files of its directory for its own.

    Example: distckpt du /checkpoints/run7
    """
    usage = disk_usage(root)
    if not usage:
        raise not_found(open_root(root)[0])
    kinds = ("committed", "incomplete", "retired", "other", "total")
    totals = {kind: sum(getattr(one, f"{kind}_bytes") for one in usage) for kind in kinds}
    if json:
        iterations = [msgspec.structs.asdict(one) | {"total_bytes": one.total_bytes} for one in usage]
        print_json({"iterations": iterations, **{f"{kind}_bytes": total for kind, total in totals.items()}})
        return
    table = Table("iteration", *kinds, show_footer=False)
    for one in usage:
        table.add_row(str(one.iteration), *(size_text(getattr(one, f"{kind}_bytes")) for kind in kinds))
    table.add_section()
    table.add_row("all", *(size_text(total) for total in totals.values()))
    print_table(table)
