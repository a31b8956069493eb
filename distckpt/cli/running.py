"""Running the command line as a process: how it ends, in words and in numbers. The table of exit codes is here."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import cast

import typer
import typer.main

from distckpt.cli.interruption import Interrupted, interruption_in
from distckpt.cli.output import harmless_text, print_json
from distckpt.errors import CheckpointError

# Exit codes: 0 all is well; 1 (DAMAGED, DIFFERENT in distckpt.cli.output) what was asked about is not so, and that is
# printed; 128 + the number of a signal that ended it.
NOT_DONE = 2  # the command could not do what it was asked to, or was asked the wrong way

# The library's ClickException, of which it shows only this one: it may have a click of its own.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[2])


def run(app: typer.Typer, arguments: Sequence[str] | None = None) -> None:
    """Be the process of a command: run what the arguments name, those of the process by default, and exit.

    Who reads standard output and has seen enough is no error.
    """
    _mend_streams()
    try:
        code = run_command(app, sys.argv[1:] if arguments is None else arguments)
        if code != NOT_DONE:  # Then why was told.
            sys.stdout.flush()
    except BrokenPipeError:
        code = 0
    except Interrupted as error:  # While it printed an error, or its last line.
        code = 128 + error.number
    except OSError as error:  # The disk is full that standard output lies on.
        _print_text(_message(error))
        code = NOT_DONE
    _give_up_unwritten()
    sys.exit(code)


def run_command(app: typer.Typer, arguments: Sequence[str]) -> int:
    """Run a command; its exit code. Why it could not be done is told on standard error and, with --json, also on
    standard output, as a line of JSON: whoever reads that gets one in any case. Raises BrokenPipeError."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    as_json = "--json" in options
    command = typer.main.get_command(app)
    try:
        _check_not_empty(arguments)
        with command.make_context("distckpt", list(arguments) or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as ended:
        return ended.exit_code if arguments else NOT_DONE
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # rich ends with 1 then, which means damage here.
            return 0
        raise
    except _UsageError as error:
        where = getattr(error, "ctx", None)
        path = "distckpt" if where is None else where.command_path
        message = error.format_message().rstrip(".")
        end = "" if message.endswith("?") else "."
        _print_error("UsageError", f"{message}{end} Try '{path} --help'.", as_json)
    except Interrupted as error:
        _print_error("Interrupted", str(error), as_json)
        return 128 + error.number
    except (CheckpointError, OSError, ValueError) as error:
        if isinstance(error, BrokenPipeError) and error.filename is None:
            raise
        _print_error(type(error).__name__, _message(error), as_json)
    except MemoryError:
        _print_error(
            "MemoryError", "there is not enough memory; give less with --memory or --jobs if it has them", as_json
        )
    except Exception as error:  # A defect of ours, and no finding: Python's own exit code would be 1.
        interrupted = interruption_in(error)
        if interrupted is not None:  # In an import.
            _print_error("Interrupted", str(interrupted), as_json)
            return 128 + interrupted.number
        traceback.print_exc()
        _print_error(type(error).__name__, f"this should not have happened: {error}", as_json)
    else:
        return 0
    return NOT_DONE


def _message(error: Exception) -> str:
    """Without the number of an OSError, which tells people nothing: "Permission denied: '/checkpoints/run7'"."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    paths = [name for name in (error.filename, error.filename2) if name is not None]
    return f"{error.strerror}{': ' if paths else ''}{' -> '.join(map(repr, paths))}"


def _check_not_empty(arguments: Sequence[str]) -> None:
    """A path that is empty would be the current directory, in which nobody wants to prune by mistake."""
    if "" in (arguments[:2] if arguments[:1] == ["note"] else arguments):  # An empty note is none.
        raise typer.BadParameter("an argument is empty; is a variable of the shell not set?")


def _print_error(kind: str, message: str, as_json: bool) -> None:
    _print_text(message)
    if as_json:
        with suppress(OSError):
            print_json({"error": {"kind": kind, "message": message}})


def _print_text(message: str) -> None:
    with suppress(OSError):
        print(f"distckpt: {harmless_text(message)}", file=sys.stderr, flush=True)


def _mend_streams() -> None:
    """Standard streams that are closed, or of an encoding that has not all letters."""
    # In this order: each is opened anew under the number that it had, which no later file must get.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # Both are there by now.


def _give_up_unwritten() -> None:
    """What is left in the buffer of standard output nobody takes: Python would complain of it, and exit with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
