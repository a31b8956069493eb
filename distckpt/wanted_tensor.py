"""A box of a stored tensor, and the tensor that takes it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distckpt.geometry import Box
from distckpt.reader import Wanted
from distckpt.transport import writable_bytes


@dataclass(frozen=True, slots=True)
class WantedTensor:
    """data: of the shape of the box, any strides; any device, as long as it is not asked where in memory it lies."""

    key: str
    box: Box
    data: Tensor

    def in_memory(self) -> Wanted:
        """The same, of a tensor on the host, as a reader takes it."""
        item_bytes = self.data.element_size()
        strides = tuple(stride * item_bytes for stride in self.data.stride())
        return Wanted(self.key, self.box, writable_bytes(self.data), 0, strides, item_bytes)
