"""System calls that fail below a save, at any moment and in many ways; most checks are in io_fault_saves.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from distckpt.storage import PosixStorage
from tests.crash.failing_saves import NEXT, OLD, check_next_save
from tests.crash.io_faults import environment
from tests.crash.states import loaded
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
    assert int(outcomes["faults"]) > 400
    assert int(outcomes["roots checked"]) > 300


JOB = """
import errno, itertools, sys
import torch.distributed as dist
from distckpt import Checkpointer, DistributedError, writing
from distckpt.storage import PosixStorage
from tests.crash.failing_saves import NEW, NEXT, OLD
from tests.crash.io_faults import EVERY, Fault, injected
from tests.crash.states import make_state

dist.init_process_group("gloo")
writing.RETRY_AFTER_S = (0.0, 0.0)

def save(iteration):
    checkpointer.async_save(make_state(iteration, checkpointer._coordinator), iteration=iteration).wait(timeout_s=60)

with Checkpointer(PosixStorage(sys.argv[1], io_backend="threads"), timeout_s=30) as checkpointer:
    save(OLD)
    for kind, victim in itertools.product(sys.argv[2:], (1, 0)):
        with injected(Fault(kind, f"/shard-{victim:05d}", errno.EIO, count=EVERY)) as calls:
            try:
                save(NEW)
            except DistributedError as error:
                reason = "Input/output error" if "Input/output error" in error.failures[victim] else error
                print(kind, sorted(error.failures), error.committed, reason)
        assert (calls.failed > 0) == (dist.get_rank() == victim)
    save(NEXT)
dist.destroy_process_group()
"""
KINDS = ("open", "write", "fsync", "close")


def test_error_of_the_background_writer_of_one_process_is_raised_by_all(tmp_path: Path) -> None:
    expected = [f"{kind} [{victim}] no Input/output error" for kind in KINDS for victim in (1, 0)]
    for result in launch(JOB, 2, args=[str(tmp_path), *KINDS], env=environment(), timeout_s=120):
        assert result.stdout.splitlines() == expected
    storage = PosixStorage(tmp_path)
    assert loaded(storage, 2) == {OLD: OLD, NEXT: NEXT, None: NEXT}
    check_next_save(storage, 2)
