"""Copies that torch does at once: of host tensors, and of devices that have no transport of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from distckpt._C import Memory
from distckpt.transport.elements import movable
from distckpt.transport.port import Copies, Done, Event, NoRegistration, Registration, check_sizes


def copy_to_host(source: Tensor, target: Tensor) -> None:
    """Write the elements of `source`, any strides and device, in C order into `target`, 1-d uint8 on the host."""
    elements = movable(source)
    target.view(elements.dtype).view(elements.shape).copy_(elements)


class BlockingTransport:
    """Every copy is complete on return."""

    def __init__(self, *, is_host: bool) -> None:
        self._is_host = is_host

    @property
    def is_host(self) -> bool:
        return self._is_host

    def register(self, memory: Memory, device: torch.device) -> Registration:
        return NoRegistration()

    def copy_to_host(self, copies: Copies) -> Event:
        check_sizes(copies)
        for source, target in copies:
            copy_to_host(source, target)
        return Done()

    def copy_from_host(self, copies: Copies) -> Event:
        check_sizes(copies)
        for source, target in copies:
            elements = movable(target)
            elements.copy_(source.view(elements.dtype).view(elements.shape))
        return Done()
