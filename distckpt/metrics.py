"""Metrics, and names that people give: which names and values there may be. Pure.

A metric is a number that a checkpoint is judged by: {"val_loss": 2.33}. None stands for one that is not finite: it is
known to have been measured, and is never the best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

Metrics: TypeAlias = dict[str, float | None]

MAX_NAME_LENGTH = 200
MAX_METRICS = 1000


def check_name(what: str, name: object) -> str:
    """The name of a metric or tag, as it is. Raises ValueError for one that could not be shown or typed again."""
    if not isinstance(name, str) or not name or len(name) > MAX_NAME_LENGTH:
        raise ValueError(f"{what} {str(name)[:50]!r}: expected a text of 1 to {MAX_NAME_LENGTH} characters")
    if not name.isprintable() or name != name.strip():
        raise ValueError(f"{what} {name!r}: no control characters, and no spaces at its ends")
    return name


def check_metric_name(name: object) -> str:
    """As check_name. Raises ValueError also for what a selector would take for a name and a direction."""
    checked = check_name("metric", name)
    if checked.endswith((":min", ":max")):
        raise ValueError(
            f"metric {checked!r}: no name may end in :min or :max, as these say which is best (best:loss:max)"
        )
    return checked


def known_metrics(metrics: Mapping[str, float] | None) -> Metrics:
    """As they are stored, by name. Numbers are whatever float() takes. Raises ValueError or TypeError."""
    if metrics is not None and not isinstance(metrics, Mapping):
        raise TypeError(f"metrics: expected numbers by name, not {type(metrics).__name__}")
    found: Metrics = {}
    for name, value in sorted((metrics or {}).items()):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"metric {name!r}: {value!r} is no number") from error
        found[check_metric_name(name)] = number if math.isfinite(number) else None
    if len(found) > MAX_METRICS:
        raise ValueError(f"{len(found)} metrics, at most {MAX_METRICS} expected")
    return found
