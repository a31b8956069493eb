"""The commands that list, label and prune: what they print, for people and as JSON, and what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from distckpt.cli import app
from distckpt.cli.quantities import duration_s, size_bytes
from distckpt.commit import Writer, list_commits, new_save_id
from distckpt.storage import PosixStorage
from tests.unit.damage import change, flip
from tests.unit.protocol import save, write_files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "run"
    writer = Writer.claim(PosixStorage(root))
    save(writer, 10, metrics={"loss": 1.0})
    save(writer, 20, metrics={"loss": 3.0, "acc": None})
    save(writer, 30, metrics={"loss": 2.0})
    return root


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == code, done.output
    return done.stdout


def refused(*arguments: object) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code != 0
    return str(done.exception) if not isinstance(done.exception, SystemExit) else done.output


def rows(said: str) -> list[list[str]]:
    """The cells of a printed table, without the heading."""
    return [[c.strip() for c in line.strip("│").split("│")] for line in said.splitlines() if line.startswith("│")]


def iterations(said: str) -> list[str]:
    return [row[0] for row in rows(said)]


def test_ls_lists_newest_first_or_as_asked(root: Path) -> None:
    assert iterations(run("ls", root)) == ["30", "20", "10"]
    assert iterations(run("ls", root, "--sort", "loss")) == ["10", "30", "20"]
    assert iterations(run("ls", root, "--sort", "loss:max")) == ["20", "30", "10"]
    assert iterations(run("ls", root, "--sort", "iteration")) == ["10", "20", "30"]
    assert iterations(run("ls", root / "iter_0000010")) == ["10"]
    assert "metrics are acc, loss" in refused("ls", root, "--sort", "val_loss")


def test_ls_shows_labels_metrics_and_saves_that_are_none(root: Path) -> None:
    storage = PosixStorage(root)
    run("tag", root, "best", "--iteration", "best:loss")
    run("pin", root, "--iteration", 20)
    run("note", root, "a note\nof two lines", "--iteration", "step:20")
    storage.make_directory("iter_0000040")
    write_files(storage, 40, new_save_id())
    said = run("ls", root)
    assert rows(said)[2][-3:] == ["best", "", ""]
    assert rows(said)[1][-5:] == ["not finite", "3", "", "pinned", "a note of two lines"]
    assert "no checkpoint: iter_0000040: " in said
    told = json.loads(run("ls", root, "--json"))
    assert [(one["iteration"], one["tags"]) for one in told["checkpoints"]] == [(30, []), (20, []), (10, ["best"])]
    assert [one["state"] for one in told["incomplete"]] == ["died"]


def test_ls_says_what_is_damaged_and_exits_with_1(root: Path) -> None:
    change(PosixStorage(root), list_commits(PosixStorage(root))[0].name, flip(30))
    said = run("ls", root, code=1)
    assert iterations(said) == ["30", "20", "10"]
    assert "iteration 30: DAMAGED: iter_0000030/index-" in said


def test_ls_says_which_file_is_missing_and_exits_with_1(root: Path) -> None:
    (table,) = (root / "iter_0000020").glob("chunks-*")
    table.unlink()
    assert f"iteration 20: DAMAGED: iter_0000020/{table.name} is missing" in run("ls", root, code=1)


def test_ls_says_which_labels_are_damaged_and_exits_with_0(root: Path) -> None:
    run("note", root, "x", "--iteration", 20)
    (labels,) = (root / "iter_0000020").glob("labels-*")
    labels.write_bytes(b"")
    said = run("ls", root)
    assert "iteration 20: labels damaged: iter_0000020/labels-" in said
    assert "DAMAGED" not in said


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_output_that_nobody_reads_to_its_end_is_no_damage(root: Path, options: list[str]) -> None:
    script = [sys.executable, "-m", "distckpt.cli", "ls", str(root), *options]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(script, stdout=writing, stderr=subprocess.PIPE, timeout=120, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_text_from_disk_does_nothing_to_a_terminal(root: Path) -> None:
    """A hand-made index may hold what no save lets through."""
    save(Writer.claim(PosixStorage(root)), 40, metrics={"\x1b[31mred\n": 1.0})
    said = run("ls", root)
    assert "\x1b" not in said
    assert " [31mred" in said


def test_labels_are_changed_and_printed(root: Path) -> None:
    assert run("tag", root, "best", "--iteration", 20).startswith(
        "iteration 20: tags best; metrics acc not finite, loss 3"
    )
    assert json.loads(run("tag", root, "best", "--json"))["iteration"] == 30
    assert "best" not in run("tag", root, "best", "--remove")
    assert "no checkpoint has this tag; there are no tags" in refused("tag", root, "best", "--remove")
    assert "pinned" in run("pin", root)
    assert "pinned" not in run("pin", root, "--remove")
    assert "note: x" in run("note", root, "x", "--iteration", "best:loss")
    assert "note" not in run("note", root, "", "--iteration", "best:loss")
    assert "a=b 0.5, loss 0.25" in run("metric", root, "loss=0.25", "a=b=0.5")
    assert iterations(run("ls", root, "--sort", "loss"))[0] == "30"
    assert "expected NAME=VALUE" in refused("metric", root, "loss")
    assert "expected NAME=VALUE" in refused("metric", root, "loss=low")


def test_prune_prints_what_stays_and_goes_and_why(root: Path) -> None:
    run("pin", root, "--iteration", 20)
    arguments = ("prune", root, "--keep-last", 1, "--keep-best", "loss:1")
    said = run(*arguments, "--dry-run")
    assert [(row[0], row[2], row[3]) for row in rows(said)] == [
        ("30", "stays", "newest"),
        ("20", "stays", "tagged or pinned"),
        ("10", "stays", "keep_best loss"),
    ]
    assert "would remove 0 checkpoints" in said
    told = json.loads(run("prune", root, "--keep-best", "loss:max:1", "--json", "--grace", "0s"))
    assert [one["iteration"] for one in told["removed"]] == [10]
    assert told["removed_bytes"] == told["removed"][0]["bytes"]
    assert iterations(run("ls", root)) == ["30", "20"]
    assert not (root / "iter_0000010").exists()


def test_prune_without_a_rule_or_with_a_wrong_one_is_refused(root: Path) -> None:
    done = CliRunner().invoke(app, ["prune", str(root)], terminal_width=500)
    assert done.exit_code == 2
    for rule in ("--keep-last", "--keep-every", "--keep-best", "--keep-younger-than", "--max-size"):
        assert rule in done.output
    for wrong in ("loss", "loss:", "loss:x", "loss:0", ":3"):
        assert refused("prune", root, "--keep-best", wrong)
    assert "expected a number and a unit" in refused("prune", root, "--max-size", "many")
    assert iterations(run("ls", root)) == ["30", "20", "10"]


def test_help_says_every_way_to_name_a_checkpoint() -> None:
    said = " ".join(CliRunner().invoke(app, ["inspect", "--help"], terminal_width=500).output.replace("│", " ").split())
    for way in (
        "a number",
        "step:NUMBER",
        "latest-verified",
        "best:METRIC[:max]",
        "tag:NAME",
        "the path of an iteration",
    ):
        assert way in said


def test_du_adds_up(root: Path) -> None:
    told = json.loads(run("du", root, "--json"))
    assert told["total_bytes"] == sum(path.stat().st_size for path in root.glob("iter_*/*"))
    assert [row[0] for row in rows(run("du", root))] == ["10", "20", "30", "all"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("12B", 12), ("2TB", 2 * 10**12), ("1.5gb", 15 * 10**8), ("1 KiB", 1024), ("2G", 2 * 10**9)],
)
def test_sizes(text: str, expected: int) -> None:
    assert size_bytes(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("7d", 604800), ("1.5h", 5400), ("30 min", 1800), ("30m", 1800), ("45s", 45), ("2w", 1209600)],
)
def test_durations(text: str, expected: float) -> None:
    assert duration_s(text) == expected


@pytest.mark.parametrize("text", ["", "d", "-1d", "1", "7y", "1e3s", "7dd"])
def test_durations_without_a_known_unit_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a number and a unit"):
        duration_s(text)


def test_commands_run_without_torch(root: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = None; import distckpt; root = sys.argv[1]; "
        "distckpt.label(root, add_tags=['a']); distckpt.catalog(root); "
        "distckpt.prune(root, distckpt.Retention(keep_last=1)); from distckpt.cli import main; "
        "sys.argv[:] = ['distckpt', 'ls', root]; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(root)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert iterations(done.stdout) == ["30"]
