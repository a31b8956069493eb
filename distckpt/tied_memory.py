"""Tied memory: targets of a load that share memory, as tied weights do. Decides what becomes of it.

Requests complete in any order. Two tensors that are read into one memory at once would leave a mixture of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distckpt.errors import MismatchError
from distckpt.geometry import Box
from distckpt.reader import Wanted
from distckpt.transport import carrier, pieces

_PIECE_BYTES = 16 << 20


def split_tied(targets: Sequence[Wanted]) -> tuple[list[Wanted], list[tuple[Wanted, Wanted | None]]]:
    """Targets of which no two reach into each other's memory, and the rest: each with its twin, a target before it that
    is the very same memory, if there is one."""
    apart: list[Wanted] = []
    tied: list[tuple[Wanted, Wanted | None]] = []
    known: dict[tuple[int, torch.Size, tuple[int, ...], int], Wanted] = {}
    reach = 0
    for target in sorted((t for t in targets if t.data.numel()), key=lambda t: t.data.data_ptr()):
        data = target.data
        place = (data.data_ptr(), data.shape, data.stride(), data.element_size())
        if data.data_ptr() >= reach:
            apart.append(target)
        else:
            tied.append((target, known.get(place)))
        known.setdefault(place, target)
        reach = max(reach, data.data_ptr() + _span_bytes(data))
    return apart, tied


def _span_bytes(data: Tensor) -> int:
    return data.element_size() * (1 + sum((n - 1) * s for n, s in zip(data.shape, data.stride(), strict=True)))


def fill_tied(target: Wanted, twin: Wanted | None, read: Callable[[Sequence[Wanted]], None]) -> None:
    """Fill a target once all that shares its memory is filled; where it has a twin, only look whether they are equal.

    read: fills what it is given. Raises MismatchError, which names both, when the stored tensors of twins differ.
    """
    for at, view in pieces(target.data, _PIECE_BYTES):
        offset = tuple(o + a for o, a in zip(target.box.offset, at, strict=True))
        stored = torch.empty(view.shape, dtype=view.dtype)
        read([Wanted(target.key, Box(offset, tuple(view.shape)), stored)])
        if twin is None:
            view.copy_(stored)
        elif not torch.equal(carrier(stored), carrier(view)):
            raise MismatchError(
                f"{twin.key!r} and {target.key!r} are one memory in the state (tied weights?), but what is stored of "
                f"them differs. The state has been changed. Untie them, or load one of them alone with strict=False.",
                mismatched=(twin.key, target.key),
            )
