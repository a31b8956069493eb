"""Garbage: when Python's cyclic collector may run. It decides nothing else, and frees nothing."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Postponed:
    """Module state, as the collector is one of the process: how many bodies there are, and whether it ran before."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.bodies = 0
        self.was_enabled = False

    def enter(self) -> None:
        with self.lock:
            if not self.bodies:
                self.was_enabled = gc.isenabled()
                gc.disable()
            self.bodies += 1

    def leave(self) -> None:
        with self.lock:
            self.bodies -= 1
            if not self.bodies and self.was_enabled:
                gc.enable()

    def begin_anew(self) -> None:
        """In a process that was forked: the threads whose bodies these were are not in it."""
        if self.bodies and self.was_enabled:
            gc.enable()
        self.lock, self.bodies = threading.Lock(), 0


_postponed = _Postponed()
os.register_at_fork(after_in_child=_postponed.begin_anew)


@contextmanager
def postponed_collection() -> Iterator[None]:
    """No cyclic collection in the body, which makes thousands of small records that live on and have no cycles.

    For these the collector would go through all objects of the process, again and again: with torch and a model that
    takes longer than to make them. Any threads, but no fork in the body; whoever disabled collection before finds it so
    afterwards.
    """
    _postponed.enter()
    try:
        yield
    finally:
        _postponed.leave()
