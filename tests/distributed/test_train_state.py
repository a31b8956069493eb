"""Training states of FSDP2 and DistributedDataParallel jobs; the checks themselves are in train_state_ranks.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.checks import assert_ok, names_of_checks, outcomes_of
from tests.distributed.launch import launch

SCRIPT = Path(__file__).with_name("train_state_ranks.py")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, str]]]:
    """The outcomes of all checks, by number of ranks; three go on from what two have saved."""
    root = tmp_path_factory.mktemp("train_state")
    results = {n: launch(SCRIPT, n, args=[str(root)], launcher="forked", timeout_s=120) for n in (2, 3)}
    return {n: [outcomes_of(result.stdout) for result in of_ranks] for n, of_ranks in results.items()}


@pytest.mark.parametrize("name", names_of_checks(SCRIPT))
def test_ranks(name: str, jobs: dict[int, list[dict[str, str]]]) -> None:
    assert_ok(name, jobs[int(name.split("_")[1])])
