"""The example job: every layout learns the same, and a resumed run is the run that was never interrupted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = Path(__file__).parents[2] / "examples" / "gpt" / "train.py"
SMALL = "--hidden 64 --ffn 96 --layers 4 --heads 4 --sequence 32 --global-batch 8 --micro-batch 1"


def train(directory: Path, options: str, *, tp: int = 1, pp: int = 1, dp: int = 1) -> dict[int, float]:
    """Run the job to its end; returns iteration -> loss of this run."""
    log = directory / "log.jsonl"
    log.unlink(missing_ok=True)
    command = [
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(tp * pp * dp),
        ),
        *(str(TRAIN), "--tp", str(tp), "--pp", str(pp), "--dp", str(dp), *SMALL.split(), *options.split()),
        *("--checkpoint-dir", str(directory / "checkpoints"), "--log-file", str(log)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180, check=False)
    assert run.returncode == 0, run.stderr
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return {r["iteration"]: float.fromhex(r["loss_hex"]) for r in records if "iteration" in r}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return train(tmp_path_factory.mktemp("one"), "--iterations 6 --dropout 0 --save-interval 100")


@pytest.mark.parametrize(
    "layout",
    [{"tp": 2}, {"pp": 2, "dp": 2}, {"tp": 2, "pp": 2}],
    ids=lambda layout: "-".join(f"{axis}{size}" for axis, size in layout.items()),
)
def test_layout_gives_the_loss_of_one_process(
    layout: dict[str, int], one_process: dict[int, float], tmp_path: Path
) -> None:
    losses = train(tmp_path, "--iterations 6 --dropout 0 --save-interval 100", **layout)
    assert losses == pytest.approx(one_process, rel=1e-5)
