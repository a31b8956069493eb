"""The `distckpt` command: what it prints, for people and as JSON, its exit codes, and that it needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from distckpt.cli import app
from distckpt.commit import TRACKER, list_commits
from distckpt.storage import PosixStorage
from tests.unit.damage import change, flip, newest
from tests.unit.saved_roots import check_loads, save


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    root: Path = tmp_path_factory.mktemp("saved")
    save(PosixStorage(root), 10, 20, parity=True)
    return root


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    for path in saved.rglob("*"):
        copy = tmp_path / path.relative_to(saved)
        copy.mkdir() if path.is_dir() else copy.write_bytes(path.read_bytes())
    return tmp_path


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout


def test_verify_says_that_a_checkpoint_is_sound(root: Path) -> None:
    code, said = run("verify", root)
    assert code == 0
    assert said.startswith("iteration 20: sound; shard files: 3; ")
    code, said = run("verify", root, "--all", "--json")
    reports = [json.loads(line) for line in said.splitlines()]
    assert code == 0
    assert [(report["iteration"], report["is_sound"]) for report in reports] == [(20, True), (10, True)]


def test_verify_names_what_is_damaged(root: Path) -> None:
    storage = PosixStorage(root)
    directory, index = newest(storage)
    change(storage, f"{directory}/{index.files[1].name}", flip(5000))
    storage.replace(TRACKER, b"10")
    code, said = run("verify", root)
    assert code == 1
    assert "iteration 20: DAMAGED, faults: 1; " in said
    assert f"{directory}/{index.files[1].name}, block 0 (bytes 0-" in said
    assert "warning: latest_checkpointed_iteration.txt says 10" in said
    code, said = run("verify", root, "--json")
    report = json.loads(said)
    assert (code, report["is_sound"], len(report["faults"]), len(report["warnings"])) == (1, False, 1, 1)
    assert run("verify", root, "--iteration", 10)[0] == 0


def test_repair_mends_what_verify_finds(root: Path) -> None:
    storage = PosixStorage(root)
    directory, index = newest(storage)
    change(storage, f"{directory}/{index.files[1].name}", flip(5000))
    storage.replace(TRACKER, b"10")
    code, said = run("repair", root, "--dry-run")
    assert code == 1
    assert said.count("would repair: ") == 2
    assert run("verify", root)[0] == 1
    code, said = run("repair", root)
    assert said.count("repaired: ") == 2
    assert run("verify", root)[0] == 0
    assert run("repair", root) == (0, "nothing to repair\n")
    check_loads(storage, 20)


def test_repair_says_what_it_cannot_mend(root: Path) -> None:
    storage = PosixStorage(root)
    storage.remove(list_commits(storage)[0].name)
    code, said = run("repair", root, "--iteration", 20)
    assert code == 1
    assert "--force" in said
    code, said = run("repair", root, "--iteration", 20, "--force", "--json")
    assert (code, json.loads(said)["is_sound"]) == (0, True)
    check_loads(storage, 20)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own, in which torch cannot be imported."""
    script = "import sys; sys.modules['torch'] = None; from distckpt.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )


def test_command_runs_without_torch(root: Path) -> None:
    done = command("verify", root)
    assert done.returncode == 0
    assert all(line.startswith("verify iteration 20: ") for line in done.stderr.splitlines())
    assert "iteration 20: sound" in done.stdout


def test_what_cannot_be_done_is_said_without_a_traceback_and_exit_code_2(root: Path, tmp_path: Path) -> None:
    missing = command("verify", tmp_path / "nothing")
    assert missing.returncode == 2
    assert missing.stderr.startswith("distckpt: no checkpoint under ")
    assert all(line.startswith("  ") for line in missing.stderr.splitlines()[1:])
    assert f"; around it are these:\n  checkpoints: {root}: 2" in missing.stderr
    assert command("verify", root, "--sample", 2).stderr.startswith("distckpt: --sample 2: expected")
    assert command("verify", root, "--all", "--iteration", 3).returncode == 2
    assert command("nonsense").returncode == 2


def test_help_names_the_commands() -> None:
    code, said = run("--help")
    assert code == 0
    assert "verify" in said
    assert "repair" in said


def test_copy_copies_a_checkpoint_once(root: Path, tmp_path: Path) -> None:
    target = tmp_path / "copies"
    code, said = run("copy", root, target)
    assert (code, said.startswith("iteration 20: ")) == (0, True)
    code, said = run("copy", root, target, "--iteration", 10, "--json")
    report = json.loads(said)
    assert (code, report["iteration"], report["target"]) == (0, 10, str(target))
    assert report["bytes_copied"] > report["bytes"] > 0  # Parity too.
    code, said = run("copy", root, target, "--json", "--limit", 1)
    assert json.loads(said)["bytes_copied"] == 0
    check_loads(PosixStorage(target), 20)
    assert run("verify", target, "--all")[0] == 0


@pytest.mark.parametrize("command", [one.name or one.callback.__name__.rstrip("_") for one in app.registered_commands])  # type: ignore[union-attr]
def test_help_shows_examples_as_they_are_typed(command: str) -> None:
    """Of two asterisks in a line Markdown makes italics, and a glob without them fits nothing."""
    [function] = [one.callback for one in app.registered_commands if command in (one.name, one.callback.__name__)]  # type: ignore[union-attr]
    said = CliRunner().invoke(app, [command, "--help"]).stdout.partition("Arguments")[0]
    assert said.count("*") == (function.__doc__ or "").count("*")
