"""System calls that fail below a save, at any moment and in many ways; the checks are in io_fault_saves.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.io_faults import environment
from tests.distributed.checks import assert_ok, names_of_checks, outcomes_of
from tests.distributed.launch import launch

SCRIPT = Path(__file__).with_name("io_fault_saves.py")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One process makes all the saves: starting one takes longer than a save."""
    root = tmp_path_factory.mktemp("io_faults")
    (result,) = launch(SCRIPT, 1, args=[str(root)], env=environment(), timeout_s=230)
    return outcomes_of(result.stdout)


@pytest.mark.parametrize("name", names_of_checks(SCRIPT))
def test_saves_under_faults(name: str, outcomes: dict[str, str]) -> None:
    assert_ok(name, [outcomes])


def test_many_faults_struck_and_many_roots_were_checked(outcomes: dict[str, str]) -> None:
    assert int(outcomes["faults"]) > 200
    assert int(outcomes["roots checked"]) > 200
