"""distckpt metric: add what was measured after the save."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distckpt.cli.entries import print_labelled
from distckpt.cli.output import ROOT, WHICH
from distckpt.labelling import label


def metric(
    root: Annotated[Path, typer.Argument(help=ROOT)],
    values: Annotated[list[str], typer.Argument(help="NAME=VALUE, several if need be.")],
    iteration: Annotated[str | None, typer.Option(help=WHICH, show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Add metrics to a checkpoint, such as those of an evaluation that ran after the save.

    They win over metrics of the same name that were saved with it.

    Example: distckpt metric /checkpoints/run7 val_loss=2.33 accuracy=0.71 --iteration 1000
    """
    metrics: dict[str, float] = {}
    for text in values:
        name, equals, value = text.rpartition("=")
        try:
            metrics[name] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"metric {text!r}: expected NAME=VALUE, such as val_loss=2.33")
    print_labelled(label(root, iteration, metrics=metrics), as_json=json)
