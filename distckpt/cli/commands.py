"""The commands, in the groups in which --help shows them."""

from __future__ import annotations

import typer

from distckpt import __version__
from distckpt.cli.cat import cat
from distckpt.cli.copy import copy
from distckpt.cli.diff import diff
from distckpt.cli.du import du
from distckpt.cli.export import export
from distckpt.cli.history import history
from distckpt.cli.import_ import import_
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

# What --help shows, in this order.
_COMMANDS = {
    "Look: change nothing": (ls, inspect, cat, diff, du, history),
    "Check and mend": (verify, repair),
    "Change": (tag, note, pin, metric, prune),
    "Move": (copy, reshard, export, import_),
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
for _panel, _commands in _COMMANDS.items():
    for _command in _commands:
        # The name of one is a word of Python's own, and so its function's cannot be.
        app.command(_command.__name__.rstrip("_"), rich_help_panel=_panel)(_command)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"distckpt {__version__}")
        raise typer.Exit


@app.callback(
    epilog="Exit codes: 0 all is well; 1 it is not: damage, or a difference, was found; 2 it could not be done; 130 "
    "and 143: ended by Ctrl-C and by SIGTERM. With --json, errors are a line of JSON on standard output too."
)
def _distckpt(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version, and exit."
    ),
) -> None:
    """Look after sharded checkpoints: list, inspect, compare, label, prune, move, verify and repair them.

    `distckpt COMMAND --help` says what a command does, with an example.
    """
