"""Cyclic collection waits while records are made, and is afterwards as it was."""

from __future__ import annotations

import gc
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
