"""Staging: the bytes of tensors on the host, as they were when a save began. Decides when they are copied, and whether
they have changed before; where they lie is the Arena's, what they mean in a file the layout's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from distckpt._C import gather
from distckpt.arena import Arena, Region
from distckpt.errors import CheckpointError
from distckpt.garbage import postponed_collection
from distckpt.storage import Part
from distckpt.transport import (
    Event,
    Transports,
    byte_checksums,
    copy_to_host,
    host_bytes,
    host_view,
    pieces,
    plain_bytes,
    sample_checksums,
)

_ADVICE = (
    "A lazy snapshot copies what a guarded optimizer's step changes while training goes on. Call before_mutation() "
    "ahead of whatever else changes, frees or resizes it, or use snapshot='eager'."
)


@dataclass(frozen=True, slots=True)
class _Later:
    """A shard whose copy is left for later, or not ordered yet, and what shows that it has not changed until then.

    start: in the Arena. sample: of a host tensor; None of one on a device, where the version has to do.
    """

    name: str
    tensor: Tensor
    start: int
    version: int
    storage_bytes: int
    sample: int | None

    @classmethod
    def of(cls, name: str, tensor: Tensor, start: int, sample: int | None) -> _Later:
        return cls(name, tensor, start, tensor._version, tensor.untyped_storage().nbytes(), sample)

    def check_storage(self) -> None:
        # Before it is read: the memory that a storage had, and has no more, is somebody else's.
        if self.tensor.untyped_storage().nbytes() < self.storage_bytes:
            raise CheckpointError(
                f"{self.name}: its storage was freed or resized before the snapshot had it. {_ADVICE}"
            )

    def check_version(self) -> None:
        if self.tensor._version != self.version:
            raise self.changed()

    def changed(self) -> CheckpointError:
        return CheckpointError(f"{self.name}: it was changed before the snapshot had it. {_ADVICE}")


_SMALL_BYTES = 64 << 10
_COPIED_BYTES = 32 << 20
_PIECE_BYTES = 16 << 20


class Snapshot:
    """Shards by number, as bytes on the host; some perhaps still to be copied, or on their way from a device.

    Made and changed by one thread; then before_change() by the one that is about to change the tensors, complete() by
    the one that is about to read the copies.
    """

    def __init__(self, parts: Mapping[int, Part], memory: memoryview, transports: Transports) -> None:
        self.parts = parts
        self._memory = memory
        self._transports = transports
        self._events: list[Event] = []
        self._unordered: Event | None = None
        self._later: list[_Later] = []
        self._waits_for_host = False
        self._changed: CheckpointError | None = None
        self._lock = threading.Lock()

    def copy(self, tensors: Mapping[int, Tensor], regions: Sequence[Region], *, threads: int) -> None:
        """Copy host tensors, and enqueue copies of others, ahead of what the caller's stream is asked to do next."""
        here, there = self._by_place(tensors, regions)
        event = self._enqueue(tensors, there)
        event.order_before_compute()
        copy_on_host([tensors[r.number] for r in here], self._memory, [r.start for r in here], threads=threads)

    def copy_later(
        self, tensors: Mapping[int, Tensor], regions: Sequence[Region], name_of: Callable[[int], str]
    ) -> None:
        """Leave host tensors for complete(), and enqueue copies of others, to be ordered by before_change()."""
        here, there = self._by_place(tensors, regions)
        self._unordered = self._enqueue(tensors, there)
        samples: list[int | None] = [*sample_checksums([tensors[r.number] for r in here], self._transports).tolist()]
        samples += [None] * len(there)
        self._later = [
            _Later.of(name_of(region.number), tensors[region.number], region.start, sample)
            for region, sample in zip([*here, *there], samples, strict=True)
        ]
        self._waits_for_host = bool(here)

    def _by_place(self, tensors: Mapping[int, Tensor], regions: Sequence[Region]) -> tuple[list[Region], list[Region]]:
        here: list[Region] = []
        there: list[Region] = []
        for region in regions:
            (here if self._transports.of(tensors[region.number]).is_host else there).append(region)
        return here, there

    def _enqueue(self, tensors: Mapping[int, Tensor], regions: Sequence[Region]) -> Event:
        copies = [(tensors[r.number], self._place(r.start, tensors[r.number])) for r in regions]
        event = self._transports.copy_to_host(copies)
        self._events.append(event)
        return event

    def _place(self, start: int, tensor: Tensor) -> Tensor:
        return host_view(self._memory[start : start + tensor.nbytes], torch.uint8)

    def before_change(self) -> bool:
        """Order the copies of device tensors ahead of what the caller's stream is asked to do next. Whether that is
        enough: host tensors may have to be waited for."""
        with self._lock:
            on_device = [item for item in self._later if item.sample is None]
            self._later = [item for item in self._later if item.sample is not None]
        try:
            for item in on_device:
                item.check_version()
        except CheckpointError as error:
            self._changed = error
        if self._unordered is not None:
            self._unordered.order_before_compute()
        return not self._waits_for_host

    @property
    def is_left(self) -> bool:
        """Whether something is left for complete() that before_change() must be called for."""
        return bool(self._later)

    @property
    def is_under_way(self) -> bool:
        """Whether a device may still write to the memory; after a complete() that failed it may go on for ever."""
        return bool(self._events)

    def complete(self, timeout_s: float) -> None:
        """Have everything copied. Any thread, once.

        Raises CheckpointError, naming it, if a tensor changed before it was copied; TimeoutError.
        """
        while self._events:
            self._events[-1].wait(timeout_s)
            self._events.pop()
        with self._lock:  # A step that comes now finds nothing to look at, and may go on to change what was looked at.
            later, self._later = self._later, []
            for item in later:
                if item.sample is None:
                    item.check_version()
        here = [item for item in later if item.sample is not None]
        for item in here:
            item.check_storage()
        try:
            copy_on_host([item.tensor for item in here], self._memory, [item.start for item in here], threads=1)
        finally:  # torch may have noticed, and said so in its own words.
            for item in here:
                item.check_storage()
        for item in here:
            item.check_version()
        self._check_samples(here)
        if self._changed is not None:
            raise self._changed

    def _check_samples(self, items: Sequence[_Later]) -> None:
        # Fused kernels and writes through .data move no version counter, so the values are looked at too.
        copies = [self._memory[item.start : item.start + item.tensor.nbytes] for item in items]
        sums = byte_checksums(copies, [item.tensor.element_size() for item in items])
        for item, sample in zip(items, sums.tolist(), strict=True):
            if sample != item.sample:
                raise item.changed()


def copy_on_host(tensors: Sequence[Tensor], memory: memoryview, starts: Sequence[int], *, threads: int) -> None:
    """Write the elements of each, in C order, from its start on; `threads` copy what is contiguous."""
    plain: list[memoryview] = []
    places: list[int] = []
    for tensor, start in zip(tensors, starts, strict=True):
        data = plain_bytes(tensor)
        if data is None:
            copy_to_host(tensor, host_view(memory[start : start + tensor.nbytes], torch.uint8))
        else:
            plain.append(data)
            places.append(start)
    gather(plain, memory, places, threads=threads)


def empty_snapshot(
    tensors: Mapping[int, Tensor], regions: Sequence[Region], arena: Arena, transports: Transports
) -> Snapshot:
    """One that has a place in the Arena for each tensor, and nothing in it yet."""
    memory = arena.memory
    parts = {region.number: memory[region.start : region.start + tensors[region.number].nbytes] for region in regions}
    return Snapshot(parts, memory, transports)


@postponed_collection()
def take_snapshot(
    snapshot: Snapshot,
    tensors: Mapping[int, Tensor],
    regions: Sequence[Region],
    arena: Arena,
    transports: Transports,
    may_wait: Callable[[Tensor], bool],
    name_of: Callable[[int], str],
) -> None:
    """Copy the tensors to their regions; on return they may change, but for those of which `may_wait` is true.

    The snapshot is the caller's before anything is enqueued: if this fails, it says whether a device is under way.
    """
    later = [region for region in regions if may_wait(tensors[region.number])]
    if not all(transports.of(tensors[region.number]).is_host for region in later):
        # Optimizers keep step counts on the host: a step would wait there for what the device could order.
        later = [r for r in later if not _is_small_on_host(tensors[r.number], transports)]
    left = {region.number for region in later}
    arena.page_lock(transports, tensors.values())
    # What is ordered first comes first: the end of a batch is the end of all that were enqueued before it.
    snapshot.copy(tensors, [region for region in regions if region.number not in left], threads=arena.threads)
    snapshot.copy_later(tensors, later, name_of)


def _is_small_on_host(tensor: Tensor, transports: Transports) -> bool:
    return transports.of(tensor).is_host and tensor.nbytes <= _SMALL_BYTES


@postponed_collection()
def hold_in_place(tensors: Mapping[int, Tensor], transports: Transports) -> Snapshot:
    """A snapshot without a copy, for tensors that stay as they are until the files are written.

    Of what is not a plain block of host memory 32 MiB are copied at once; more, a piece at a time when it is written.
    """
    parts: dict[int, Part] = {}
    room = _COPIED_BYTES
    for number, tensor in tensors.items():
        plain = plain_bytes(tensor) if transports.of(tensor).is_host else None
        if plain is None and tensor.nbytes <= room:
            plain, room = host_bytes(tensor), room - tensor.nbytes
        parts[number] = partial(_pieces_on_host, tensor) if plain is None else plain
    return Snapshot(parts, memoryview(bytearray()), transports)


def _pieces_on_host(tensor: Tensor) -> Iterator[memoryview]:
    for _, piece in pieces(tensor, _PIECE_BYTES):
        yield host_bytes(piece)
