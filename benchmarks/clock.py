"""Numbers of something that all ranks do together. Every function is collective."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist


def slowest(action: Callable[[], None]) -> float:
    """Start together; the seconds of the rank that took longest, on every rank."""
    dist.barrier()
    start = time.perf_counter()
    action()
    return maximum(time.perf_counter() - start)


def maximum(value: float) -> float:
    """The largest of the ranks' values."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def total(value: int) -> int:
    """The sum of the ranks' values."""
    tensor = torch.tensor(value)
    dist.all_reduce(tensor)
    return int(tensor)
