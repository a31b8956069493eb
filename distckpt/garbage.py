"""Garbage: when Python's cyclic collector may run. It decides nothing else, and frees nothing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def postponed_collection() -> Iterator[None]:
    """No cyclic collection in the body, which makes thousands of small records that live on and have no cycles.

    For these the collector would go through all objects of the process, again and again: with torch and a model that
    takes longer than to make them. Any thread; whoever disabled collection before finds it so afterwards.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
