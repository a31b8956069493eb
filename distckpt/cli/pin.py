"""distckpt pin: keep a checkpoint for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distckpt.cli.entries import print_labelled
from distckpt.cli.output import ROOT, WHICH
from distckpt.labelling import label


def pin(
    root: Annotated[Path, typer.Argument(help=ROOT)],
    iteration: Annotated[str | None, typer.Option(help=WHICH, show_default=False)] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Let retention have it again.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Pin a checkpoint: retention never removes it.

    Example: distckpt pin /checkpoints/run7 --iteration 1000
    """
    print_labelled(label(root, iteration, pinned=not remove), as_json=json)
