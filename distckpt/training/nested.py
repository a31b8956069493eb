"""Nested values: their items changed, whatever holds them. Knows no leaf."""

from __future__ import annotations

from collections.abc import Callable


def with_items(value: object, change: Callable[[object], object]) -> object:
    """A dict, list or tuple with each item changed; what is none of these as it is."""
    if type(value) is dict:
        return {key: change(item) for key, item in value.items()}
    if type(value) is list:
        return [change(item) for item in value]
    if type(value) is tuple:
        return tuple(change(item) for item in value)
    return value
