"""The ring: bounded host memory through which a load fills tensors that are not plainly in host memory.

While one slot of it is copied to the device, the next is read into. Decides what is read together, not how.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distckpt._C import Memory
from distckpt.geometry import Box
from distckpt.transport import Event, Registration, Transports, pieces

RING_BYTES = 64 << 20
_SLOTS = 2
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of target `number` and a tensor of its shape, which holds the box or is about to."""

    number: int
    box: Box
    data: Tensor


def fill_through_ring(
    targets: Sequence[tuple[Box, Tensor]],
    read: Callable[[Sequence[Piece]], None],
    transports: Transports,
    *,
    timeout_s: float,
    ring_bytes: int = RING_BYTES,
) -> str | None:
    """Fill the targets with what `read` puts into the host tensors that it is given, some pieces of targets at a time.

    At most ring_bytes (128 at least) of host memory are taken; timeout_s bounds each wait for a device. Complete on
    return. Returns why the memory could not be page-locked, or None. Raises what `read` raises, TimeoutError; the
    targets are then undefined.
    """
    slot_bytes = ring_bytes // _SLOTS // _ALIGNMENT * _ALIGNMENT
    batches = list(_batches(targets, slot_bytes))
    if not batches:
        return None
    used = max(sum(_aligned(piece.data.nbytes) for piece in batch) for batch in batches)
    memory = Memory(_SLOTS * used)
    slots = torch.frombuffer(memory, dtype=torch.uint8).view(_SLOTS, used)
    registration = transports.register(memory, [target for _, target in targets])
    in_flight: deque[Event] = deque()
    try:
        for turn, batch in enumerate(batches):
            if len(in_flight) == _SLOTS:
                in_flight.popleft().wait(timeout_s)
            host = _places(batch, slots[turn % _SLOTS])
            read([_on_host(piece, data) for piece, data in zip(batch, host, strict=True)])
            copies = [(data, piece.data) for piece, data in zip(batch, host, strict=True)]
            in_flight.append(transports.copy_from_host(copies))
    finally:
        _end(in_flight, registration, timeout_s)
    return registration.refusal


def _end(in_flight: Iterable[Event], registration: Registration, timeout_s: float) -> None:
    """Wait for all copies, and give the page locks back if all have ended: others still need them.

    Raises what the first wait raised that failed, unless an error is on its way already.
    """
    failures: list[Exception] = []
    for event in in_flight:
        try:
            event.wait(timeout_s)
        except Exception as error:
            failures.append(error)
    if not failures:
        registration.release()
    elif sys.exc_info()[1] is None:
        raise failures[0]


def _batches(targets: Sequence[tuple[Box, Tensor]], slot_bytes: int) -> Iterator[list[Piece]]:
    """Pieces that fit into a slot together; targets larger than a slot are cut."""
    batch: list[Piece] = []
    room = slot_bytes
    for number, (box, target) in enumerate(targets):
        for at, view in pieces(target, slot_bytes):
            size = _aligned(view.nbytes)
            if batch and size > room:
                yield batch
                batch, room = [], slot_bytes
            offset = tuple(o + a for o, a in zip(box.offset, at, strict=True))
            batch.append(Piece(number, Box(offset, tuple(view.shape)), view))
            room -= size
    if batch:
        yield batch


def _places(batch: Sequence[Piece], slot: Tensor) -> list[Tensor]:
    """Where in a slot the bytes of each piece go."""
    places: list[Tensor] = []
    at = 0
    for piece in batch:
        places.append(slot[at : at + piece.data.nbytes])
        at += _aligned(piece.data.nbytes)
    return places


def _on_host(piece: Piece, data: Tensor) -> Piece:
    return Piece(piece.number, piece.box, data.view(piece.data.dtype).view(piece.data.shape))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
