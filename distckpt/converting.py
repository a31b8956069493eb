"""Converting: filling targets of another element type than is stored. Decides how much is held meanwhile.

Rounding is torch's: a bfloat16 into a float32 is exact, the reverse is to the nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from distckpt.errors import CheckpointError
from distckpt.geometry import Box
from distckpt.transport import pieces
from distckpt.wanted_tensor import WantedTensor

HELD_BYTES = 64 << 20


def fill_converted(
    targets: Sequence[tuple[WantedTensor, torch.dtype]],
    read: Callable[[Sequence[WantedTensor]], None],
    *,
    held_bytes: int = HELD_BYTES,
) -> None:
    """Fill each target from what is stored with the given element type. read: fills host tensors of that type.

    Raises CheckpointError for a number that the target's type cannot hold.
    """
    for batch in _batches(targets, held_bytes):
        read([stored for stored, _ in batch])
        for stored, view in batch:
            view.copy_(stored.data)
            # The larger type's numbers may be no numbers of the smaller one: that would be seen much later.
            if torch.finfo(view.dtype).max < torch.finfo(stored.data.dtype).max and _overflows(stored.data, view):
                raise CheckpointError(
                    f"{stored.key!r}: stored is {stored.data.abs().max().item():g}, more than a {view.dtype} can hold; "
                    f"the state has been changed. Load it as it is stored"
                )


def _overflows(stored: Tensor, view: Tensor) -> bool:
    return bool(torch.isfinite(stored).sum() != torch.isfinite(view).sum())


def _batches(
    targets: Sequence[tuple[WantedTensor, torch.dtype]], held_bytes: int
) -> Iterator[list[tuple[WantedTensor, Tensor]]]:
    """(what to read, where to convert it to), as many as are held together."""
    batch: list[tuple[WantedTensor, Tensor]] = []
    held = 0
    for target, dtype in targets:
        view_bytes = held_bytes * target.data.element_size() // max(target.data.element_size(), dtype.itemsize)
        for at, view in pieces(target.data.detach(), view_bytes):
            offset = tuple(o + a for o, a in zip(target.box.offset, at, strict=True))
            stored = WantedTensor(target.key, Box(offset, tuple(view.shape)), torch.empty(view.shape, dtype=dtype))
            if batch and held + stored.data.nbytes > held_bytes:
                yield batch
                batch, held = [], 0
            batch.append((stored, view))
            held += stored.data.nbytes
    if batch:
        yield batch
