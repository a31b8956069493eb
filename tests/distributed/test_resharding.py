"""The command `distckpt reshard` among real processes: jobs that go on from what it made, kills, mpirun."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import distckpt
from distckpt.commit import list_commits, read_index
from distckpt.storage import PosixStorage
from tests.distributed.launch import MPIRUN, REPOSITORY, launch, start
from tests.distributed.test_gpt_example import train
from tests.unit.model_states import Layout, check_holds, gpt, read_tensors, save_model

STEPS_SCRIPT = Path(__file__).with_name("reshard_steps.py")
STEP_BYTES = 256 << 10
OPTIONS = "--iterations 6 --dropout 0 --save-interval 4"


def reshard(source: Path, target: Path, options: str) -> str:
    """By the command; what it printed."""
    command = [sys.executable, "-m", "distckpt.cli", "reshard", str(source), str(target), *options.split()]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# A training job.


def test_training_goes_on_from_resharded_checkpoints(tmp_path: Path) -> None:
    """Losses are bit by bit those of a job that loads the original on that layout, and within rounding those of the job
    that was never interrupted."""
    whole = train(made(tmp_path / "222"), OPTIONS, tp=2, pp=2, dp=2)
    (tmp_path / "ends.json").write_text(
        json.dumps(
            {
                "tensors": [
                    {"match": "embedding.*", "at": "first"},
                    {"match": "norm.*", "at": "last"},
                    {"match": "head.*", "at": "last"},
                ]
            }
        )
    )
    roots = [tmp_path / name / "checkpoints" for name in ("222", "411", "122")]
    reshard(roots[0], roots[1], "--tp 4 --pp 1 --dp 1")
    reshard(roots[1], roots[2], f"--pp 2 --dp 2 --plan {tmp_path / 'ends.json'}")
    for name, layout in (("411", {"tp": 4}), ("122", {"pp": 2, "dp": 2})):
        direct = made(tmp_path / f"direct {name}")
        shutil.copytree(roots[0], direct / "checkpoints")
        expected = train(direct, OPTIONS, **layout)
        found = train(tmp_path / name, OPTIONS, **layout)
        assert list(found) == [5, 6]
        assert found == expected
        assert found == pytest.approx({iteration: whole[iteration] for iteration in (5, 6)}, rel=1e-5)


def made(directory: Path) -> Path:
    directory.mkdir()
    return directory


# Kills.


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model whose tensors have several megabytes."""
    root: Path = tmp_path_factory.mktemp("source")
    save_model(PosixStorage(root), MODEL, Layout(tp=2, pp=2))
    return root


MODEL = gpt(layers=2, hidden=256, vocabulary=2048)
TARGET = Layout(tp=3, pp=2, dp=2)
ARGUMENTS = "--tp 3 --pp 2 --dp 2"


def content(root: Path) -> dict[str, bytes]:
    """Name -> what is in it, of the files that a reshard decides byte by byte, without save_ids."""
    storage = PosixStorage(root)
    commit = list_commits(storage)[0]
    index, _ = read_index(storage, commit)
    found = {}
    for file in index.files:
        data = (root / commit.directory / file.name).read_bytes()
        assert len(data) == file.size_bytes
        found[file.name] = data[: file.checksum_start]
    found[index.chunk_table.name] = (root / commit.directory / index.chunk_table.name).read_bytes()
    names = {path.name for path in (root / commit.directory).iterdir() if not path.name.startswith(".tmp-")}
    assert names == {*found, commit.name.split("/")[1]}  # But for temporaries of a kill, which a later sweep takes.
    own = index.save_id.encode()
    return {name.replace(index.save_id, "ID"): data.replace(own, b"ID") for name, data in found.items()}


def test_reshard_killed_at_any_moment_goes_on_until_it_ends(source: Path, tmp_path: Path) -> None:
    reshard(source, tmp_path / "whole", ARGUMENTS)
    total = sum(tensor.nbytes for tensor in MODEL.stored().values())
    moments = random.Random(7)
    written, kills, killed = 0, 0, tmp_path / "killed"
    arguments = [f"{STEP_BYTES}n", "reshard", str(source), str(killed), *ARGUMENTS.split(), "--json"]
    while True:
        with start(STEPS_SCRIPT, 1, args=arguments, launcher="forked") as job:
            if kills < 20:
                job.wait_for(0, "begins")
                steps = moments.randint(0, 7)
                while job.stdout(0).count("wrote") < steps and job.returncode(0) is None:
                    time.sleep(0.001)
                time.sleep(moments.uniform(0, 0.01))
                job.kill()
            (result,) = job.wait(expect_exit=None)
        written += sum(map(int, re.findall(r"^wrote (\d+)$", result.stdout, re.MULTILINE)))
        if result.returncode == 0:
            break
        assert result.returncode == -9, result
        kills += 1
        assert not list_commits(PosixStorage(killed)) or distckpt.verify(killed).is_sound
    assert content(killed) == content(tmp_path / "whole")
    check_holds(PosixStorage(killed), MODEL, TARGET)
    print("KILLS", kills, written / total)
    assert kills > 10
    # Of what a kill struck, the step that was not noted yet, and none before it.
    assert total - kills * STEP_BYTES <= written <= total + kills * STEP_BYTES


# Several processes and threads.


def same_tensors(a: Path, b: Path) -> bool:
    first, second = (read_tensors(PosixStorage(root)) for root in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.skipif(not MPIRUN.exists(), reason="needs mpi4py and mpirun")
def test_mpirun_shares_the_work(source: Path, tmp_path: Path) -> None:
    arguments = [str(STEP_BYTES), "reshard", str(source), str(tmp_path / "two"), *ARGUMENTS.split(), "--json"]
    results = launch(STEPS_SCRIPT, 2, args=arguments, launcher="mpirun")
    total = sum(tensor.nbytes for tensor in MODEL.stored().values())
    shares = [sum(map(int, re.findall(r"^wrote (\d+)$", r.stdout, re.MULTILINE))) for r in results]
    assert sum(shares) == total
    assert min(shares) > total // 4
    report = json.loads(results[0].stdout.splitlines()[-1])
    assert report["bytes_written"] == total
    assert not re.search(r"^\{", results[1].stdout, re.MULTILINE)
    check_holds(PosixStorage(tmp_path / "two"), MODEL, TARGET)


def test_jobs_write_the_same_files_as_one(source: Path, tmp_path: Path) -> None:
    for jobs in (1, 2):
        reshard(source, tmp_path / str(jobs), f"{ARGUMENTS} --jobs {jobs}")
    assert content(tmp_path / "1") == content(tmp_path / "2")
    check_holds(PosixStorage(tmp_path / "2"), MODEL, TARGET)
