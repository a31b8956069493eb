"""DTensor, tensor parallelism and FSDP2 among real processes; the checks themselves are in dtensor_ranks.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distckpt import Checkpointer
from tests.distributed.checks import assert_ok, names_of_checks, outcomes_of
from tests.distributed.launch import launch

SCRIPT = Path(__file__).with_name("dtensor_ranks.py")
CHECKS = names_of_checks(SCRIPT)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """All checks run in one job: starting processes takes longer than the checks."""
    root = tmp_path_factory.mktemp("dtensor")
    results = launch(SCRIPT, 4, args=[str(root)], timeout_s=150)
    return root, [outcomes_of(result.stdout) for result in results]


@pytest.mark.parametrize("name", CHECKS)
def test_four_processes(name: str, job: tuple[Path, list[dict[str, str]]]) -> None:
    assert_ok(name, job[1])


def test_one_process_reads_what_fsdp_and_tensor_parallelism_saved(job: tuple[Path, list[dict[str, str]]]) -> None:
    expected = torch.load(job[0] / "fsdp-full.pt", weights_only=True)
    with Checkpointer(job[0] / "fsdp") as checkpointer:
        found: Any = checkpointer.read()
        assert found["model"].keys() == expected["model"].keys()
        for key, tensor in expected["model"].items():
            assert torch.equal(found["model"][key], tensor), key
        for key, moments in expected["optim"]["state"].items():
            for name, tensor in moments.items():
                assert torch.equal(found["optim"]["state"][key][name], tensor), (key, name)
        assert found["optim"]["param_groups"] == expected["optim"]["param_groups"]
        assert len(expected["optim"]["state"]) == 12

        target = {key: torch.zeros_like(tensor) for key, tensor in expected["model"].items()}
        checkpointer.load({"model": target})
        assert all(torch.equal(target[key], tensor) for key, tensor in expected["model"].items())
