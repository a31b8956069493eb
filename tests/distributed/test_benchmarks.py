"""The benchmark harness on a tiny state: that it measures what it names, and leaves a report and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from benchmarks.figures import KINDS, LAYOUT_CHANGES, Kind
from benchmarks.layout import Layout
from benchmarks.model import Model
from benchmarks.plan import Job
from benchmarks.report import read_record
from benchmarks.request import Answer
from benchmarks.runs import Bench, JobError
from tests.distributed.launch import launch

TREE = Path(__file__).resolve().parents[2]
TINY = Model(size_bytes=1_000_000, small_tensors=16)
SYNC_MODES = {"sync", "peak_save", "peak_load"}
GLOBAL_MODES = {"store", "reload", "index"}
ASYNC_MODES = {"async", "loop", "peak_async"}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Answer]]:
    """Engine -> mode -> what two ranks measured."""
    directory = tmp_path_factory.mktemp("benchmarks")
    launch(TREE / "tests/distributed/benchmark_ranks.py", 2, args=[str(directory)], timeout_s=220)
    return msgspec.json.decode((directory / "answers.json").read_bytes(), type=dict[str, dict[str, Answer]])


def figures(kind: Kind) -> set[str]:
    return set(KINDS[kind].figures)


def test_every_engine_gives_all_figures_of_every_mode_it_takes(answers: dict[str, dict[str, Answer]]) -> None:
    change = next(iter(LAYOUT_CHANGES))
    expected = {
        "sync": figures("sync"),
        "async": figures("async"),
        "loop": figures("loop"),
        "store": set(),
        "reload": {name for name in figures("layouts") if name.startswith(change)},
        "peak_save": {"peak_save"},
        "peak_load": {"peak_load"},
        "peak_async": {"peak_async"},
        "index": figures("index"),
    }
    modes = {
        "distckpt": SYNC_MODES | GLOBAL_MODES | ASYNC_MODES,
        "distckpt-lazy": ASYNC_MODES,
        "torch.save": SYNC_MODES,
        "dcp": SYNC_MODES | GLOBAL_MODES | ASYNC_MODES,
    }
    assert {name: set(by_mode) for name, by_mode in answers.items()} == modes
    for name, by_mode in answers.items():
        for mode, answer in by_mode.items():
            optional = {"prepare"} if name == "dcp" else set()  # It has no such call.
            assert set(answer.samples) == expected[mode] - optional, f"{name} {mode}"
            assert answer.backend
            assert answer.state_bytes > 0
            assert not answer.missing


def test_first_saves_are_apart_from_repeats(answers: dict[str, dict[str, Answer]]) -> None:
    counts = {name: len(samples) for name, samples in answers["distckpt"]["sync"].samples.items()}
    assert counts == {"save_first": 1, "save": 2, "load_cold": 2, "load_warm": 2}


def test_engines_save_the_same_bytes(answers: dict[str, dict[str, Answer]]) -> None:
    sizes = {answer.state_bytes for by_mode in answers.values() for mode, answer in by_mode.items() if mode != "index"}
    assert len(sizes) == 1


def test_command_writes_a_report_and_leaves_nothing_else(tmp_path: Path) -> None:
    options = "--tp 1 --pp 1 --size-gb 0.001 --repeats 1 --precision fp32 --figures sync --engines distckpt"
    out, measured = tmp_path / "out", tmp_path / "measured"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *options.split(), "--directory", str(measured), "--out", str(out)],
        cwd=TREE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TREE), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(measured.iterdir())
    assert {path.name for path in out.iterdir()} == {"results.json", "results.md", "results.html", "1-sync.png"}
    record = read_record(out / "results.json")
    [section] = record.sections
    assert set(section.limits.transfers) == {"copy", "write", "write_checked", "read", "read_copied", "read_checked"}
    assert {name: set(result.figures) for name, result in section.engines.items()} == {"distckpt": figures("sync")}
    page = (out / "results.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing is fetched
    assert "Saving and loading" in done.stdout


def test_a_job_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    bench = Bench(repeats=1, directory=tmp_path, timeout_s=200)
    job = Job(mode="sync", layout=Layout(), model=TINY)
    with pytest.raises(JobError, match="KeyError: 'no such engine'"):
        list(bench.run([job], "no such engine"))
    assert not list(tmp_path.iterdir())


def test_a_job_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    bench = Bench(repeats=1, directory=tmp_path, timeout_s=0.1)
    with pytest.raises(JobError, match=r"not finished after 0\.1 s"):
        list(bench.run([Job(mode="sync", layout=Layout(), model=TINY)], "torch.save"))
    assert not list(tmp_path.iterdir())
