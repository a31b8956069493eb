"""A job that is told to end, at any rank, ends at the same step on all ranks, and within its bound."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from distckpt import Termination
from distckpt.coordinator import Coordinator, SingleProcess
from distckpt.testing import run_ranks


def test_signal_is_agreed_and_the_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with Termination(signals=(signal.SIGUSR1,)) as termination:
        assert not termination.is_agreed()
        assert termination.remaining_s() is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert termination.is_agreed()
        assert termination.is_agreed()
    assert signal.getsignal(signal.SIGUSR1) is before


def test_all_ranks_stop_at_the_same_step_whoever_was_told() -> None:
    def train(coordinator: Coordinator) -> int:
        termination = Termination(signals=(), coordinator=coordinator)
        for step in range(100):
            if coordinator.rank == 2 and step == 7:
                termination.tell("the scheduler")
            if termination.is_agreed():
                return step
        return -1

    assert run_ranks(4, train) == [7] * 4


def test_ranks_ask_each_other_at_every_so_many_calls_only() -> None:
    def train(coordinator: Coordinator) -> int:
        termination = Termination(signals=(), coordinator=coordinator, every=5)
        if coordinator.rank == 0:
            termination.tell("a test")
        return next(step for step in range(100) if step > 0 and termination.is_agreed() and step)

    def count(coordinator: Coordinator) -> list[bool]:
        termination = Termination(signals=(), coordinator=coordinator, every=3)
        agreed = []
        for step in range(7):
            if step == 1:
                termination.tell("a test")
            agreed.append(termination.is_agreed())
        return agreed

    assert run_ranks(2, count) == [[False, False, False, True, True, True, True]] * 2
    assert len(set(run_ranks(2, train))) == 1


def test_remaining_time_counts_down_from_when_it_was_told() -> None:
    with Termination(signals=(), grace_s=1000, coordinator=SingleProcess()) as termination:
        assert termination.remaining_s() is None
        termination.tell("a test")
        remaining = termination.remaining_s()
        assert remaining is not None
        assert 0 < remaining <= 1000


HANGS = """
import ctypes, os, signal, subprocess, sys, time
sys.modules["torch"] = None
from distckpt.termination import Termination
with Termination(grace_s=0.5):
    subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -TERM {os.getpid()}"])
    print("told", flush=True)
    {hang}
"""
# The second holds the main thread in C, where no handler in Python runs.
WAYS = {
    "in Python": "time.sleep(600)",
    "in C": "lock = ctypes.create_string_buffer(64); libc = ctypes.CDLL(None); "
    "libc.pthread_mutex_lock(lock); libc.pthread_mutex_lock(lock)",
}


@pytest.mark.parametrize("way", WAYS)
def test_process_that_hangs_leaves_within_its_grace(way: str) -> None:
    script = HANGS.replace("{hang}", WAYS[way])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "told\n"), done.stderr
    assert "exits now" in done.stderr


def test_every_must_be_a_number_of_calls() -> None:
    with pytest.raises(ValueError, match="every=0"):
        Termination(every=0)
