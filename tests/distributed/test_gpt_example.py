"""The GPT job: every layout learns the same, and goes on with what another has saved. See test_resume.py, too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.distributed.launch import REPOSITORY, launch

SMALL = "--hidden 64 --ffn 96 --layers 4 --heads 4 --sequence 32 --global-batch 8 --micro-batch 1"


def train(directory: Path, options: str, *, tp: int = 1, pp: int = 1, dp: int = 1) -> dict[int, float]:
    """Run the job to its end, resuming from what `directory` has; returns iteration -> loss of this run."""
    log = directory / "log.jsonl"
    log.unlink(missing_ok=True)
    layout = f"--tp {tp} --pp {pp} --dp {dp}"
    files = ["--checkpoint-dir", str(directory / "checkpoints"), "--log-file", str(log)]
    script = REPOSITORY / "examples" / "gpt" / "train.py"
    arguments = [*f"{layout} {SMALL} {options}".split(), *files]
    launch(script, tp * pp * dp, args=arguments, launcher="forked", timeout_s=120)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return {r["iteration"]: float.fromhex(r["loss_hex"]) for r in records if "iteration" in r}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, float]]:
    """The directory of a run in one process, which holds a checkpoint of iteration 4, and its losses."""
    directory = tmp_path_factory.mktemp("one")
    return directory, train(directory, "--iterations 6 --dropout 0 --save-interval 4")


@pytest.mark.parametrize("layout", [{"pp": 2, "dp": 2}, {"tp": 2, "pp": 2}], ids=str)
def test_layout_gives_the_loss_of_one_process(
    layout: dict[str, int], one_process: tuple[Path, dict[int, float]], tmp_path: Path
) -> None:
    losses = train(tmp_path, "--iterations 6 --dropout 0 --save-interval 100", **layout)
    assert losses == pytest.approx(one_process[1], rel=1e-5)


def test_run_resumes_on_another_layout(one_process: tuple[Path, dict[int, float]], tmp_path: Path) -> None:
    directory, losses = one_process
    shutil.copytree(directory / "checkpoints", tmp_path / "checkpoints")
    resumed = train(tmp_path, "--iterations 6 --dropout 0 --save-interval 4", tp=2, dp=2)
    assert resumed == pytest.approx({iteration: losses[iteration] for iteration in (5, 6)}, rel=1e-5)
