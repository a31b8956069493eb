"""The Arena: host memory that is touched once and used again by every save. Decides how much it may take."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from distckpt._C import Memory
from distckpt.host import available_memory_bytes
from distckpt.shard_file import ALIGNMENT
from distckpt.transport import Registration, Transports


class Arena:
    """Reused host memory. One user at a time: what was staged is gone when the next image is.

    max_bytes: what it may take; None is half of what the host and its control groups have left, divided by the
    ranks_on_host. Taking more than a control group allows is a kill and not an error, so it looks before it takes.
    """

    def __init__(self, max_bytes: int | None = None, ranks_on_host: int = 1) -> None:
        self._max_bytes = max_bytes
        self._ranks_on_host = ranks_on_host
        self.threads = max(1, (os.cpu_count() or 1) // ranks_on_host)  # that copy to it
        self._memory: Memory | None = None
        self._registration: Registration | None = None

    def reserve(self, size_bytes: int) -> str | None:
        """Have at least size_bytes, populated. Returns None, or, holding nothing any more, why it may not or cannot."""
        if len(self) >= size_bytes:
            return None
        self.release()  # The old goes before it is asked what there is.
        bound = self.bound()
        if size_bytes > bound:
            return f"this rank's {size_bytes} bytes are more than the {bound} that staging may take"
        try:
            memory = Memory(size_bytes)
            memory.populate(threads=self.threads)
        except OSError as error:
            return f"the host has no {size_bytes} bytes for staging: {error}"
        self._memory = memory
        return None

    def bound(self) -> int:
        """Bytes that it may take now."""
        if self._max_bytes is not None:
            return self._max_bytes
        return (len(self) + available_memory_bytes()) // 2 // self._ranks_on_host

    def __len__(self) -> int:
        return 0 if self._memory is None else len(self._memory)

    @property
    def memory(self) -> memoryview:
        """All of it; empty before the first reserve()."""
        return memoryview(bytearray()) if self._memory is None else memoryview(self._memory)

    @property
    def degraded(self) -> tuple[str, ...]:
        """What the host refused, so that copies and writes are slower than they could be."""
        refused = []
        if self._memory is not None and not self._memory.huge_pages:
            refused.append("huge pages are refused here: staging memory is on small ones")
        if self._registration is not None and self._registration.refusal is not None:
            refused.append(self._registration.refusal)
        return tuple(refused)

    def page_lock(self, transports: Transports, tensors: Iterable[Tensor]) -> None:
        """Have the memory page-locked for copies of these tensors, as far as their devices ask for it and grant it."""
        on_devices = [tensor for tensor in tensors if not transports.of(tensor).is_host]
        if on_devices and self._memory is not None and self._registration is None:
            self._registration = transports.register(self._memory, on_devices)

    def abandon(self) -> None:
        """Take other memory for the next save: a device may still write to this, whose page locks stay."""
        self._memory = self._registration = None

    def release(self) -> None:
        """Free the memory. Nothing may be on its way to it."""
        if self._registration is not None:
            self._registration.release()
        self._memory = self._registration = None


@dataclass(frozen=True, slots=True)
class Region:
    """Where in an Arena a shard is to lie."""

    number: int
    start: int


def arrange(files: Sequence[tuple[Sequence[int], Sequence[int], int]]) -> tuple[list[Region], int]:
    """Where the shards of each file (numbers, starts in its data, data bytes) go, so that its data are one piece that
    lies in memory as in the file; and the bytes that all take."""
    regions: list[Region] = []
    base = 0
    for numbers, starts, size_bytes in files:
        regions += [Region(n, base + start) for n, start in zip(numbers, starts, strict=True)]
        base += -(-size_bytes // ALIGNMENT) * ALIGNMENT
    return regions, base
