"""distckpt export and import: what they print, their options and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from distckpt import Checkpointer
from distckpt.cli import app
from distckpt.storage import PosixStorage
from tests.unit.stored_tensors import check_same

WEIGHT = torch.arange(6.0).reshape(2, 3)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with Checkpointer(tmp_path / "root") as checkpointer:
        checkpointer.save({"model": {"w": WEIGHT, "b": torch.ones(3)}, "step": 3}, iteration=4)
    return tmp_path / "root"


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.output


def test_export_to_zarr_and_import(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    said = run("export", root, tmp_path / "x", "--to", "zarr", "--compression", "none", "--memory", "64MiB")
    assert said.startswith("iteration 4: 2 tensors, 36 bytes, in 2 files; ")
    report = json.loads(run("import", tmp_path / "x", tmp_path / "back", "--from", "zarr", "--json"))
    assert (report["iteration"], report["tensors"], report["values"]) == (4, 2, 1)
    check_same(PosixStorage(root), PosixStorage(tmp_path / "back"))
    assert run("verify", tmp_path / "back").startswith("iteration 4: sound")


def test_export_to_safetensors_and_import(root: Path, tmp_path: Path) -> None:
    options = ("--select", "model/*", "--drop", "*/b", "--strip", "model/", "--rename", "w=weight", "--dtype", "bf16")
    report = json.loads(run("export", root, tmp_path / "x", "--to", "safetensors", *options, "--json"))
    assert (report["tensors"], report["bytes"], report["files"], report["left_out"]) == (1, 12, 1, 1)
    found = load_file(tmp_path / "x" / "model.safetensors")
    assert list(found) == ["weight"]
    assert torch.equal(found["weight"], WEIGHT.bfloat16())
    said = run("import", tmp_path / "x", tmp_path / "back", "--from", "safetensors", "--prefix", "m/", "--iteration", 9)
    assert said.startswith("iteration 9: 1 tensor and 0 values, ")
    with Checkpointer(tmp_path / "back") as checkpointer:
        state = checkpointer.read()
    assert torch.equal(state["m"]["weight"], WEIGHT.bfloat16())  # type: ignore[index]


@pytest.mark.parametrize(
    "options",
    [
        ("--to", "zarr", "--strip", "a"),
        ("--to", "zarr", "--max-file-size", "1GB"),
        ("--to", "safetensors", "--compression", "zstd"),
        ("--to", "safetensors", "--rename", "a"),
        ("--to", "hdf5"),
        (),
    ],
)
def test_options_that_do_not_go_together_are_refused(root: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    run("export", root, tmp_path / "x", *options, code=2)
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_done_is_exit_code_2_and_one_line(root: Path, tmp_path: Path) -> None:
    for arguments, said in (
        (
            ["export", root, root, "--to", "safetensors"],
            f"distckpt: something is there already; give a path where nothing is: '{root}'",
        ),
        (["export", tmp_path / "no", tmp_path / "x", "--to", "safetensors"], "no checkpoint"),
        (
            ["export", root, tmp_path / "x", "--to", "safetensors", "--select", "zz"],
            "no tensor of iteration 4 matches 'zz'; keys are such as 'model/",
        ),
        (
            ["export", root, tmp_path / "x", "--to", "safetensors", "--memory", "1MB"],
            "at least 16777216 bytes (16 MiB)",
        ),
        (["import", tmp_path, root, "--from", "safetensors"], "holds no safetensors file"),
        (
            ["import", tmp_path / "no", root, "--from", "safetensors"],
            "no safetensors file or directory of them is there",
        ),
    ):
        script = [sys.executable, "-m", "distckpt.cli", *map(str, arguments)]
        done = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_neither_needs_torch(root: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from distckpt.cli import app\n"
        "root, made, back = sys.argv[1:]\n"
        "app(['export', root, made, '--to', 'safetensors'], standalone_mode=False)\n"
        "app(['import', made, back, '--from', 'safetensors'], standalone_mode=False)\n"
    )
    script_of = [sys.executable, "-c", script, str(root), str(tmp_path / "x"), str(tmp_path / "back")]
    done = subprocess.run(script_of, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "back" / "latest_checkpointed_iteration.txt").read_text() == "0"
