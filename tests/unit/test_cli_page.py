"""docs/cli.md: it has every command and no other, its options exist, and its examples print what it says."""

from __future__ import annotations

import io
import os
import re
import shlex
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import typer.main

from distckpt.cli import app
from distckpt.cli.running import run_command

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
TEXT = PAGE.read_text(encoding="utf-8")
CONSOLE = re.compile(r"^```console\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
COMMANDS = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def sections() -> dict[str, str]:
    """Of the commands, by the heading."""
    parts = re.split(r"^#{2,3} (.*)$", TEXT, flags=re.MULTILINE)
    return {name: body for name, body in zip(parts[1::2], parts[2::2], strict=True) if re.fullmatch(r"[a-z]+", name)}


def options_of(command: str) -> set[str]:
    return {"--help"} | {name for parameter in COMMANDS[command].params for name in parameter.opts}


def examples(text: str) -> list[tuple[str, list[str]]]:
    """(command line, the lines that it prints) in the order of the page."""
    found: list[tuple[str, list[str]]] = []
    for block in CONSOLE.findall(text):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def make_root() -> None:
    """What the page says, in the current directory."""
    (script,) = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    exec(script, {})


def printed(line: str) -> list[str]:
    """By a command line of the page, in the current directory."""
    words = shlex.split(line)
    if words[0] == "rm":
        Path(words[1]).unlink()
        return []
    assert words[0] == "distckpt"
    with redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")) as out:
        run_command(app, words[1:])
        out.flush()
    said = out.buffer.getvalue().decode()  # type: ignore[attr-defined]
    return [one.rstrip() for one in said.replace(str(Path.cwd()), "/checkpoints").splitlines()]


def test_page_has_a_section_for_every_command() -> None:
    assert sorted(sections()) == sorted(COMMANDS)


@pytest.mark.parametrize("command", sorted(sections()))
def test_table_of_contents_names_it(command: str) -> None:
    assert f"[`{command}`](#{command})" in TEXT


@pytest.mark.parametrize("command", sorted(sections()))
def test_options_in_its_section_exist(command: str) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", sections()[command]))
    assert named <= options_of(command)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_its_help_has_an_example_of_options_that_exist_and_it_speaks_json(command: str) -> None:
    said = " ".join((COMMANDS[command].help or "").split())
    (example,) = re.findall(rf"Example: (distckpt {command} .*)$", said)
    assert set(re.findall(r"--[a-z][a-z-]*", example)) <= options_of(command)
    assert "--json" in options_of(command)


def pattern_of(line: str) -> str:
    """Without what is another time: numbers, units, identities, the phase that took longest, the width of columns."""
    line = re.sub(r"\b[0-9a-f]{32}\b", "ID", line)
    line = re.sub(r"(?<!\w)-?\d+(\.\d+)?(e-\d+)?|\d+", "N", line)
    line = re.sub(r"N (bytes|[kMGT]B)", "N B", line)
    line = re.sub(r"N (s|min)\b", "N s", line)
    line = re.sub(r"\w+ N s, rank N", "PHASE", line)
    return re.sub(r"[\s─━]+", " ", line).strip()


def test_examples_print_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If they should print something else now: `python -m tests.unit.test_cli_page` writes it into the page."""
    monkeypatch.chdir(tmp_path)
    make_root()
    for line, expected in examples(TEXT):
        assert [pattern_of(one) for one in printed(line)] == [pattern_of(one) for one in expected], line


def rewrite_page() -> None:
    """With what the examples print now."""
    os.chdir(tempfile.mkdtemp())
    make_root()

    def anew(block: re.Match[str]) -> str:
        lines = [line for line in block[1].splitlines() if line.startswith("$ ")]
        said = ["\n".join([line, *printed(line[2:])]) for line in lines]
        return "```console\n" + "\n".join(said) + "\n```"

    PAGE.write_text(CONSOLE.sub(anew, TEXT), encoding="utf-8")


if __name__ == "__main__":
    rewrite_page()
