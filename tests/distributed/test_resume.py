"""The example jobs, killed in the middle of a save and started again, repeat the losses of a run without interruption.

Bit by bit on the same ranks. On another number of ranks the samples of every step are the same, in the same order, and
losses agree within TOLERANCE: sums over the batch are split otherwise. Without dropout, whose masks go by rank.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.launch import REPOSITORY, launch, start

EXAMPLES = REPOSITORY / "examples"
HELD_SAVE = Path(__file__).with_name("held_save.py")
STEPS, SAVE_INTERVAL = 12, 4
RESUMED, CUT = 4, 8  # the last save that is committed, and the one that the kill cuts
TOLERANCE = 1e-6  # relative; 2e-7 was measured


@dataclass(frozen=True)
class Example:
    script: str
    options: str

    def arguments(self, root: Path, log: Path) -> list[str]:
        """log: emptied first."""
        log.unlink(missing_ok=True)
        steps = f"--save-interval {SAVE_INTERVAL} --checkpoint-dir {root} --log-file {log}"
        return [str(EXAMPLES / self.script), *self.options.split(), *steps.split()]

    def run(self, root: Path, *, ranks: int = 2) -> Steps:
        """To the end, from what is in root; returns the steps of this run."""
        log = root.with_suffix(".jsonl")
        script, *arguments = self.arguments(root, log)
        launch(Path(script), ranks, args=arguments, launcher="forked", timeout_s=120)
        return steps_in(log)

    def kill_while_saving(self, root: Path) -> Steps:
        """Until the save of CUT is about to be committed, and training has gone on after it; then SIGKILL."""
        log = root.with_suffix(".jsonl")
        with start(HELD_SAVE, 2, args=[str(CUT), *self.arguments(root, log)], launcher="forked") as job:
            job.wait_for(0, "held")
            deadline = time.monotonic() + 60
            while CUT + 1 not in steps_in(log):
                assert time.monotonic() < deadline, job.stdout(0)
                time.sleep(0.01)
            job.kill()
        return {step: record for step, record in steps_in(log).items() if step <= CUT}


Steps = dict[int, dict[int, dict]]  # step -> rank -> what it logged


def steps_in(log: Path) -> Steps:
    """A line that a kill has cut is left out."""
    steps: Steps = {}
    for line in log.read_text().splitlines(keepends=True) if log.exists() else []:
        record = json.loads(line) if line.endswith("\n") else {}
        if "iteration" in record:  # the GPT job's
            steps[record["iteration"]] = {0: {"loss": record["loss_hex"], "grad_norm": record["grad_norm"]}}
        elif "step" in record:
            steps.setdefault(record["step"], {})[record["rank"]] = record
    return steps


def is_committed(root: Path, iteration: int) -> bool:
    return any((root / f"iter_{iteration:07d}").glob("index-*"))


GPT = "--hidden 32 --ffn 64 --layers 2 --heads 2 --sequence 32 --global-batch 4 --micro-batch 1 --dropout 0.1 --tp 2"
JOBS = {
    "ddp": Example("ddp.py", f"--steps {STEPS}"),
    "fsdp2": Example("fsdp2.py", f"--steps {STEPS}"),
    "gpt": Example("gpt/train.py", f"{GPT} --iterations {STEPS}"),
    "peft": Example("peft_finetune.py", f"--steps {STEPS} --base-steps 4 --base-dir BASE"),
}


@pytest.mark.parametrize("name", JOBS)
def test_job_killed_while_saving_repeats_the_uninterrupted_one_bit_by_bit(name: str, tmp_path: Path) -> None:
    example = Example(JOBS[name].script, JOBS[name].options.replace("BASE", str(tmp_path / "base")))
    expected = example.run(tmp_path / "whole")
    assert sorted(expected) == list(range(1, STEPS + 1))

    root = tmp_path / "killed"
    before = example.kill_while_saving(root)
    assert before == {step: expected[step] for step in range(1, CUT + 1)}
    assert (is_committed(root, RESUMED), is_committed(root, CUT)) == (True, False)
    assert any((root / f"iter_{CUT:07d}").glob("shard-*"))

    assert example.run(root) == {step: expected[step] for step in range(RESUMED + 1, STEPS + 1)}


@pytest.mark.parametrize("script", ["ddp.py", "fsdp2.py"])
def test_job_goes_on_with_the_same_samples_on_another_number_of_ranks(script: str, tmp_path: Path) -> None:
    example = Example(script, f"--steps {STEPS} --plain")
    expected = example.run(tmp_path / "first", ranks=2)
    for resumed_from, ranks, source, root in ((4, 1, "first", "second"), (8, 2, "second", "third")):
        later = [f"iter_{step:07d}" for step in range(resumed_from + 1, STEPS + 1)]
        shutil.copytree(tmp_path / source, tmp_path / root, ignore=shutil.ignore_patterns(*later))
        found = example.run(tmp_path / root, ranks=ranks)
        assert sorted(found) == list(range(resumed_from + 1, STEPS + 1))
        for step, records in found.items():
            assert samples_of(records) == samples_of(expected[step])
            assert loss_of(records) == pytest.approx(loss_of(expected[step]), rel=TOLERANCE, abs=0)


def samples_of(records: dict[int, dict]) -> list[int]:
    """Those of a step, in the order of the data: in each pass, one rank's after the other's."""
    micro_batch = 4
    own = [records[rank]["samples"] for rank in sorted(records)]
    starts = range(0, len(own[0]), micro_batch)
    return [sample for at in starts for samples in own for sample in samples[at : at + micro_batch]]


def loss_of(records: dict[int, dict]) -> float:
    return sum(float.fromhex(record["loss"]) for record in records.values()) / len(records)


def test_adapter_on_another_base_is_an_error_that_names_both(tmp_path: Path) -> None:
    def finetune(base: str, expect_exit: int) -> str:
        root, options = tmp_path / "lora", f"--steps {SAVE_INTERVAL} --base-steps 4 --base-dir {tmp_path / base}"
        script, *arguments = Example("peft_finetune.py", options).arguments(root, tmp_path / "lora.jsonl")
        return launch(Path(script), 1, args=arguments, launcher="forked", expect_exit=expect_exit)[0].stderr

    finetune("base", 0)
    said = finetune("other", 1)
    assert "MismatchError: the adapter of iteration 4 was trained on another base" in said
    assert all(f"{tmp_path / base}, iteration 4" in said for base in ("base", "other"))
