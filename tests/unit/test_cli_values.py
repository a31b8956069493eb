"""`distckpt diff` and `distckpt cat`: what they print, for people and as JSON, and their exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from distckpt import Checkpointer, PerRank, ShardedTensor
from distckpt.cli import app
from distckpt.coordinator import Coordinator
from distckpt.storage import PosixStorage
from distckpt.testing import run_ranks
from tests.unit.damage import change, flip, newest
from tests.unit.laid_out import Layout, save_laid_out
from tests.unit.saved_roots import save

WEIGHT = torch.arange(24, dtype=torch.float32).reshape(6, 4)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    path: Path = tmp_path_factory.mktemp("values")
    storage = PosixStorage(path)
    tensors = {"w": WEIGHT, "b": torch.ones(3, dtype=torch.bfloat16)}
    save_laid_out(storage, tensors, Layout(2, {"w": 0}), iteration=10, values={"lr": 0.1, "n": {"betas": (0.9, 0.95)}})
    changed = {"w": WEIGHT.clone(), "b": torch.ones(3, dtype=torch.bfloat16)}
    changed["w"][2, 3] = torch.nan
    changed["w"][5, 0] += 0.5
    save_laid_out(storage, changed, Layout(3, {"w": 1}), iteration=20, values={"lr": 0.2, "n": {"betas": (0.9, 0.95)}})
    return path


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    storage = PosixStorage(tmp_path)
    save(storage, 1, 2)
    directory, index = newest(storage)
    change(storage, f"{directory}/{index.files[1].name}", flip(3 << 20))
    return tmp_path


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own, in which torch cannot be imported."""
    return process("from distckpt.cli import main; main()", *arguments)


def process(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    script = f"import sys; sys.modules['torch'] = None; {script}"
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )


def peak_bytes(*arguments: object) -> int:
    """The most memory that the command had at once, as a process of its own. Not ru_maxrss: that begins with ours."""
    script = """
from pathlib import Path
from distckpt.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0], file=sys.stderr)
"""
    done = process(script, *arguments)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.splitlines()[-1]) * 1024


def test_diff_says_what_differs(root: Path) -> None:
    code, said = run("diff", root, root, "--iteration", 10, "--other-iteration", 20)
    assert code == 1
    assert "A: iteration 10, " in said
    assert "B: iteration 20, " in said
    row = next(line for line in said.splitlines() if " w " in line)
    assert "float32" in row
    assert "2 (8.3 %)" in row
    assert "[2, 3]: 11, nan" in row
    assert " b " not in said.partition("value")[0].replace("tensor", "")
    assert next(line for line in said.splitlines() if " lr " in line).split()[3::2] == ["0.1", "0.2"]
    assert "DIFFERENT: tensors compared: 2, equal: 1, bit for bit: 1, values compared: 2, places that differ: 1" in said


def test_diff_as_json_has_all_of_it(root: Path) -> None:
    code, said = run("diff", root / "iter_0000010", root / "iter_0000020", "--json")
    report = json.loads(said)
    (tensor,) = report["tensors"]
    assert (code, report["is_equal"], report["is_complete"]) == (1, False, True)
    assert (tensor["key"], tensor["differing"], tensor["nans"], tensor["max_abs"]) == ("w", 2, 1, 0.5)
    assert (tensor["first_index"], tensor["first_a"], tensor["first_b"]) == ([2, 3], 11.0, "nan")
    assert [(one["path"], one["a"], one["b"]) for one in report["values"]] == [("lr", 0.1, 0.2)]


def test_diff_of_what_is_equal_ends_with_0(root: Path) -> None:
    code, said = run("diff", root, root)
    assert (code, said.splitlines()[-1].startswith("equal: ")) == (0, True)
    assert run("diff", root, root, "--iteration", 10, "--other-iteration", 20, "--select", "b")[0] == 0
    assert run("diff", root, root, "--iteration", 10, "--other-iteration", 20, "--drop", "[wl]*")[0] == 0
    assert run("diff", root, root, "--iteration", 10, "--other-iteration", 20, "--atol", 1, "--drop", "w")[0] == 0


def test_diff_shows_the_worst_and_how_many_more_there_are(tmp_path: Path) -> None:
    for name, scale in (("a", 0.0), ("b", 1.0)):
        tensors = {f"w{i}": torch.full((2,), i * scale) for i in range(1, 5)}
        save_laid_out(PosixStorage(tmp_path / name), tensors, Layout())
    code, said = run("diff", tmp_path / "a", tmp_path / "b", "--top", 2)
    assert code == 1
    assert said.index(" w4 ") < said.index(" w3 ")
    assert " w2 " not in said
    assert "... and 2 more tensors that differ; --top shows more" in said
    assert len(json.loads(run("diff", tmp_path / "a", tmp_path / "b", "--json")[1])["tensors"]) == 4


def test_diff_names_what_is_damaged_and_ends_with_2(damaged: Path) -> None:
    code, said = run("diff", damaged, damaged, "--iteration", 1, "--other-iteration", 2)
    assert code == 2
    assert "not compared: B: " in said
    assert "block 3 (bytes " in said
    assert "NOT COMPARED in full: " in said
    assert " bias " in said
    report = json.loads(run("diff", damaged, damaged, "--iteration", 1, "--other-iteration", 2, "--json")[1])
    assert "block 3" in report["tensors"][0]["problem"]


def test_commands_run_without_torch_and_say_what_cannot_be_done(root: Path, damaged: Path, tmp_path: Path) -> None:
    done = command("diff", root, root, "--iteration", 10, "--other-iteration", 20, "--json")
    assert (done.returncode, json.loads(done.stdout)["is_equal"]) == (1, False)
    assert all(line.startswith("compare: ") for line in done.stderr.splitlines())
    missing = command("cat", root, "model/w")
    assert missing.returncode == 2
    assert missing.stderr.startswith("distckpt: ")
    assert "has no key 'model/w'; its keys look like" in missing.stderr
    broken = command("cat", damaged, "weight")
    assert (broken.returncode, broken.stdout) == (2, "")
    assert "block 3 (bytes " in broken.stderr
    assert command("diff", root, tmp_path / "nothing").returncode == 2
    assert command("diff", root, root, "--iteration", 11).returncode == 2


def test_cat_shows_statistics(root: Path) -> None:
    code, said = run("cat", root, "w", "--iteration", 10)
    assert code == 0
    facts = dict(line.split(":", 1) for line in said.splitlines())
    assert facts["shape"].strip() == "[6, 4], 24 elements, 96 bytes"
    assert [facts[name].strip() for name in ("min", "max", "mean", "zeros", "NaNs")] == ["0", "23", "11.5", "1", "0"]
    found = json.loads(run("cat", root, "w", "--json")[1])
    assert (found["iteration"], found["nans"], found["shape"], found["dtype"]) == (20, 1, [6, 4], "float32")


def test_cat_shows_elements(root: Path) -> None:
    code, said = run("cat", root, "w", "--slice", "2, 1:")
    assert (code, said) == (0, "w [2:3, 1:4], float32\n[ 9. 10. nan]\n")
    found = json.loads(run("cat", root, "w", "--slice", "1:3, 2:", "--json")[1])
    assert (found["shape"], found["elements"]) == ([2, 2], [[6.0, 7.0], [10.0, "nan"]])
    assert json.loads(run("cat", root, "w", "--slice=-1,-1", "--json")[1])["elements"] == 23.0
    assert json.loads(run("cat", root, "w", "--slice", "0:0", "--json")[1])["elements"] == []
    assert run("cat", root, "b", "--slice", ":")[1] == "b [0:3], bfloat16\n[1. 1. 1.]\n"


def test_cat_prints_no_more_than_a_person_reads(tmp_path: Path) -> None:
    save_laid_out(PosixStorage(tmp_path), {"w": torch.zeros(400, 300)}, Layout())
    done = command("cat", tmp_path, "w", "--slice", ":")
    assert done.returncode == 2
    assert "has 120000 elements, and at most 100000 are printed" in done.stderr


def test_cat_writes_a_file_and_says_as_what(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "b.npy"
    assert run("cat", root, "b", "--npy", file) == (0, f"{file}: [3] float32, bfloat16 as float32\n")
    assert np.load(file).tolist() == [1.0, 1.0, 1.0]
    refused = command("cat", root, "b", "--npy", file)
    assert (refused.returncode, "--force writes over it" in refused.stderr) == (2, True)
    code, said = run("cat", root, "b", "--npy", file, "--force", "--raw", "--json")
    assert (code, json.loads(said)["npy_dtype"]) == (0, "<u2")
    assert np.load(file).tolist() == [0x3F80] * 3
    run("cat", root, "w", "--npy", tmp_path / "w.npy", "--slice", "1:3, 0", "--iteration", 10)
    assert np.load(tmp_path / "w.npy").tolist() == [4.0, 8.0]


def test_cat_shows_values_as_json(root: Path, damaged: Path) -> None:
    assert run("cat", root, "lr") == (0, "0.2\n")
    assert json.loads(run("cat", root, "n/betas", "--json")[1]) == {
        "key": "n/betas",
        "iteration": 20,
        "kind": "value",
        "value": {"%tuple": [0.9, 0.95]},
    }
    code, said = run("cat", damaged, "random", "--iteration", 1, "--json")
    assert code == 0
    assert [one["value"] for one in json.loads(said)["values"]] == [{"%tuple": [1, rank]} for rank in range(3)]
    assert command("cat", root, "lr", "--slice", "0").stderr == "distckpt: 'lr' is a value, not a tensor\n"


def test_a_tensor_longer_than_all_memory_that_is_used(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(20 << 20, dtype=torch.int64).reshape(40, -1)}
    for name, layout in (("a", Layout(2, {"w": 0})), ("b", Layout(2, {"w": 1}))):
        save_laid_out(PosixStorage(tmp_path / name), tensors, layout)
    a, b, file = tmp_path / "a", tmp_path / "b", tmp_path / "w.npy"
    for arguments in (("diff", a, b), ("cat", b, "w"), ("cat", b, "w", "--npy", file)):
        assert peak_bytes(*arguments, "--memory", "32MiB") < tensors["w"].nbytes - (20 << 20)
    assert np.array_equal(np.load(file, mmap_mode="r"), tensors["w"].numpy())


def test_diff_shows_nothing_where_a_reshard_left_a_per_rank_value_out(tmp_path: Path) -> None:
    def save_rank(coordinator: Coordinator) -> None:
        tp = coordinator.rank
        weight = ShardedTensor.from_rank_offsets("w", torch.ones(2), (0, tp, 2), partition=("tp",))
        state = {"model": [weight], "rng": PerRank(tp, axes=("tp",), on_change="reseed")}
        with Checkpointer(tmp_path / "a", mesh={"tp": (tp, 2)}, coordinator=coordinator) as checkpointer:
            checkpointer.save(state, iteration=1)

    run_ranks(2, save_rank)
    assert run("reshard", tmp_path / "a", tmp_path / "b", "--tp", 1)[0] == 0
    report = json.loads(run("diff", tmp_path / "a", tmp_path / "b", "--json")[1])
    assert [(one["path"], one["a"], one["b"]) for one in report["values"]] == [("rng", {"axes": {"tp": 2}}, None)]
    assert run("diff", tmp_path / "a", tmp_path / "b", "--drop", "rng")[0] == 0
