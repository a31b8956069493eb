"""The `distckpt` command. Each command is a module of this package; none of them needs torch to be loaded."""

from __future__ import annotations

import sys
import traceback

import typer

from distckpt.cli.cat import cat
from distckpt.cli.copy import copy
from distckpt.cli.diff import diff
from distckpt.cli.du import du
from distckpt.cli.history import history
from distckpt.cli.inspect import inspect
from distckpt.cli.ls import ls
from distckpt.cli.metric import metric
from distckpt.cli.note import note
from distckpt.cli.pin import pin
from distckpt.cli.prune import prune
from distckpt.cli.repair import repair
from distckpt.cli.reshard import reshard
from distckpt.cli.tag import tag
from distckpt.cli.verify import verify
from distckpt.errors import CheckpointError

NOT_DONE = 2  # exit code: the command could not do what it was asked; 1 is what it found out

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Look after sharded checkpoints: list, inspect, compare, label, prune, copy, verify and repair them.",
)
for command in (ls, inspect, cat, diff, du, tag, note, pin, metric, prune, copy, reshard, history, verify, repair):
    app.command()(command)


def main() -> None:
    """Run the command line. Exit codes: 0 all is well, 1 damage was found, 2 it could not be done; 0 too if who reads
    the output has seen enough."""
    try:
        app()
    except SystemExit as ended:
        # Typer and rich end with 1 then, which means damage here.
        if not isinstance(ended.__context__, BrokenPipeError):
            raise
        sys.exit(0)
    except (CheckpointError, OSError, ValueError) as error:
        print(f"distckpt: {error}", file=sys.stderr)
        sys.exit(NOT_DONE)
    except Exception:  # A defect of ours, and no finding: Python's own exit code would be 1.
        traceback.print_exc()
        sys.exit(NOT_DONE)
