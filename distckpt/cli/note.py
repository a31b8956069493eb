"""distckpt note: write something beside a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distckpt.cli.entries import print_labelled
from distckpt.cli.output import ROOT, WHICH
from distckpt.labelling import label


def note(
    root: Annotated[Path, typer.Argument(help=ROOT)],
    text: Annotated[str, typer.Argument(help='The note, in place of an earlier one; "" removes it.')],
    iteration: Annotated[str | None, typer.Option(help=WHICH, show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Write a note on a checkpoint.

    Example: distckpt note /checkpoints/run7 "before the learning rate was halved" --iteration 1000
    """
    print_labelled(label(root, iteration, note=text), as_json=json)
