"""The programs in README.md run as they stand there, and run again from what they saved."""

import re
from pathlib import Path

import pytest

from tests.distributed.launch import launch

README = Path(__file__).parents[2] / "README.md"
PROGRAMS = re.findall(r"```python\n(# torchrun --nproc-per-node (\d).*?)```", README.read_text(), re.DOTALL)


def test_readme_has_three_programs():
    assert len(PROGRAMS) == 3


@pytest.mark.parametrize(("program", "world_size"), PROGRAMS, ids=["ddp", "plain", "tp_pp"])
def test_readme_program_runs_and_resumes(program, world_size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        launch(program, int(world_size), launcher="forked", timeout_s=120)
    (root,) = [path for path in tmp_path.iterdir() if path.name in ("checkpoints", "plain", "sharded")]
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "100"
