"""distckpt tag: give a checkpoint a name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distckpt.cli.entries import print_labelled
from distckpt.cli.output import ROOT, WHICH
from distckpt.labelling import label


def tag(
    root: Annotated[Path, typer.Argument(help=ROOT)],
    name: Annotated[str, typer.Argument(help="The tag.")],
    iteration: Annotated[str | None, typer.Option(help=WHICH, show_default=False)] = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Take it away, from whichever has it if none is given.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Tag a checkpoint. A tag names one checkpoint of a root, and is taken from the one that had it.

    A tagged checkpoint is never removed by retention, and is selected by tag:NAME.

    Example: distckpt tag /checkpoints/run7 release --iteration best:val_loss
    """
    if remove:
        entry = label(root, f"tag:{name}" if iteration is None else iteration, remove_tags=[name])
    else:
        entry = label(root, iteration, add_tags=[name])
    print_labelled(entry, as_json=json)
