"""The Transport port: copies between host memory and the tensors of one kind of device.

A copy is a pair (source, target), of which the one on the host is 1-d uint8, as long as the other's elements and
aligned to their size. Elements lie there in C order, whatever the strides of the tensor.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from distckpt._C import Memory

Copies: TypeAlias = Sequence[tuple[Tensor, Tensor]]


def check_sizes(copies: Copies) -> None:
    """ValueError when one side of a copy has more bytes than the other."""
    for source, target in copies:
        if source.nbytes != target.nbytes:
            raise ValueError(f"a copy of {source.nbytes} bytes into {target.nbytes}: both sides must have as many")


class Event(Protocol):
    """The end of a batch of copies, and of all that were enqueued before it for the same device."""

    def wait(self, timeout_s: float) -> None:
        """Return when the copies are done. Any thread, any number of times.

        Raises TimeoutError when they are not after timeout_s, and what the device reports if it failed.
        """

    def order_before_compute(self) -> None:
        """Have the device run what this thread enqueues on its current stream from now on after the copies.

        From here on the tensors may be changed, freed (sources) or used (targets) by that stream. The host does not
        wait: its side of the copies is neither complete nor free to be changed before wait() has returned.
        """


class Registration(Protocol):
    """Host memory that a device has page-locked, so that copies do not go through a second buffer."""

    @property
    def size_bytes(self) -> int:
        """How much of the memory, from its start, is page-locked."""

    @property
    def refusal(self) -> str | None:
        """Why not all of it is, if the device asks for it; copies from and to the rest work, more slowly."""

    def release(self) -> None:
        """Give the page locks back. After the last copy from or to the memory, before the memory is freed."""


class Transport(Protocol):
    """Copies for one kind of device. One thread enqueues at a time.

    Until their event has been waited for, or has been ordered before what changes them, the tensors of the device must
    not be changed; the host's memory must not be touched until it has been waited for. Both are held until then: the
    caller may drop its references.
    """

    @property
    def is_host(self) -> bool:
        """Whether the tensors lie in host memory, where they can be read and written without a copy."""

    def register(self, memory: Memory, device: torch.device) -> Registration:
        """Page-lock memory for copies of this kind of device, one of which is given. Never fails."""

    def copy_to_host(self, copies: Copies) -> Event:
        """Enqueue copies of tensors (any strides, any element type) into host memory.

        They see what the caller's current stream was asked to do before. Raises ValueError, with nothing enqueued, when
        the sides of a copy differ in size.
        """

    def copy_from_host(self, copies: Copies) -> Event:
        """The same in the other direction, into tensors whose strides do not lead twice to one place."""


class Done:
    """The event of copies that were complete on return."""

    def wait(self, timeout_s: float) -> None:
        return

    def order_before_compute(self) -> None:
        return


class AllOf:
    """The event of copies by several transports or devices."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._events = events

    def wait(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for event in self._events:
            event.wait(max(deadline - time.monotonic(), 0.0))

    def order_before_compute(self) -> None:
        for event in self._events:
            event.order_before_compute()


class NoRegistration:
    """That of a device which asks for none."""

    size_bytes = 0
    refusal: str | None = None

    def release(self) -> None:
        return
