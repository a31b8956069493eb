"""Tied memory: targets of a load that share memory, as tied weights do. Decides what becomes of it.

Requests complete in any order. Two tensors that are read into one memory at once would leave a mixture of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from distckpt.errors import MismatchError
from distckpt.geometry import Box
from distckpt.transport import carrier, pieces, span_bytes
from distckpt.wanted_tensor import WantedTensor

_PIECE_BYTES = 16 << 20


def split_tied(
    targets: Sequence[WantedTensor],
) -> tuple[list[WantedTensor], list[tuple[WantedTensor, WantedTensor | None]]]:
    """Targets of which no two reach into each other's memory, and the rest: each with its twin, a target before it that
    is the very same memory, if there is one."""
    given = sorted((t for t in targets if t.data.numel()), key=lambda t: t.data.data_ptr())
    starts = np.array([target.data.data_ptr() for target in given], np.int64)
    reach = np.maximum.accumulate(starts + np.array([span_bytes(target.data) for target in given], np.int64))
    reached_into = np.flatnonzero(starts[1:] < reach[:-1]) + 1
    tied: list[tuple[WantedTensor, WantedTensor | None]] = []
    known: dict[tuple[int, torch.Size, tuple[int, ...], int], WantedTensor] = {}
    firsts = np.searchsorted(starts, starts[reached_into])  # Of those that start there: only it may be apart.
    for first, number in zip(firsts.tolist(), reached_into.tolist(), strict=True):
        target = given[number]
        if first < number:
            known.setdefault(_place(given[first].data), given[first])
        tied.append((target, known.get(_place(target.data))))
        known.setdefault(_place(target.data), target)
    return [given[i] for i in np.setdiff1d(np.arange(len(given)), reached_into).tolist()], tied


def _place(data: Tensor) -> tuple[int, torch.Size, tuple[int, ...], int]:
    return data.data_ptr(), data.shape, data.stride(), data.element_size()


def fill_tied(target: WantedTensor, twin: WantedTensor | None, read: Callable[[Sequence[WantedTensor]], None]) -> None:
    """Fill a target once all that shares its memory is filled; where it has a twin, only look whether they are equal.

    read: fills what it is given. Raises MismatchError, which names both, when the stored tensors of twins differ.
    """
    for at, view in pieces(target.data, _PIECE_BYTES):
        offset = tuple(o + a for o, a in zip(target.box.offset, at, strict=True))
        stored = torch.empty(view.shape, dtype=view.dtype)
        read([WantedTensor(target.key, Box(offset, tuple(view.shape)), stored)])
        if twin is None:
            view.copy_(stored)
        elif not torch.equal(carrier(stored), carrier(view)):
            raise MismatchError(
                f"{twin.key!r} and {target.key!r} are one memory in the state (tied weights?), but what is stored of "
                f"them differs. The state has been changed. Untie them, or load one of them alone with strict=False.",
                mismatched=(twin.key, target.key),
            )
