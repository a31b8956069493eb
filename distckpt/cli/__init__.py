"""The `distckpt` command. Each command is a module of this package; none of them needs torch to be loaded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distckpt.cli.commands import app as app


def main(arguments: Sequence[str] | None = None) -> None:
    """Be the process of a command, with the arguments of the process if none are given. Ends by SystemExit."""
    from distckpt.cli.interruption import interruption_in, listen_for_signals

    try:
        listen_for_signals()  # First: all the rest takes a good part of a second to import.
        from distckpt.cli.commands import app
        from distckpt.cli.running import run
    except BaseException as error:
        interrupted = interruption_in(error)
        if interrupted is None:
            raise
        print(f"distckpt: {interrupted}", file=sys.stderr)
        sys.exit(128 + interrupted.number)
    run(app, arguments)


def __getattr__(name: str) -> object:
    if name != "app":
        raise AttributeError(f"module 'distckpt.cli' has no attribute {name!r}")
    from distckpt.cli.commands import app

    return app
