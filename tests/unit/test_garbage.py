"""Cyclic collection waits while records are made, and is afterwards as it was."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from distckpt.garbage import postponed_collection


@pytest.fixture(autouse=True)
def collection_as_before() -> Iterator[None]:
    yield
    gc.enable()


def test_there_is_no_collection_in_the_body() -> None:
    with postponed_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_collection_goes_on_after_an_error() -> None:
    with pytest.raises(KeyError), postponed_collection():
        raise KeyError
    assert gc.isenabled()


def test_collection_that_the_program_switched_off_stays_off() -> None:
    gc.disable()
    with postponed_collection():
        pass
    assert not gc.isenabled()


def test_bodies_of_two_threads_may_overlap_in_any_order() -> None:
    for first_out in (0, 1):
        bodies = [postponed_collection(), postponed_collection()]
        for body in bodies:
            body.__enter__()
        for body in (bodies[first_out], bodies[1 - first_out]):
            body.__exit__(None, None, None)
        assert gc.isenabled()


def test_body_that_begins_while_another_ends_leaves_collection_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ends after this one has looked whether collection is on, and before it switches it off."""
    other = postponed_collection()
    other.__enter__()
    has_ended = []

    def disable() -> None:
        if not has_ended:
            has_ended.append(True)
            other.__exit__(None, None, None)
        disabling()

    disabling = gc.disable
    monkeypatch.setattr(gc, "disable", disable)
    with postponed_collection():
        assert not gc.isenabled()
    if not has_ended:
        other.__exit__(None, None, None)
    assert gc.isenabled()


def test_process_that_is_forked_meanwhile_collects() -> None:
    program = """
import gc, os, sys
from distckpt.garbage import postponed_collection
with postponed_collection():
    child = os.fork()
    if not child:
        os._exit(not gc.isenabled())
sys.exit(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
