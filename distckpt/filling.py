"""Filling: the tensors of a load, each on its own way: in place, with its host's ranks, through a ring, converted.

Decides which way. Knows nothing of other checkpoints, and agrees with nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from distckpt.checkpoint_files import read_per_rank
from distckpt.converting import fill_converted
from distckpt.errors import CorruptionError
from distckpt.garbage import postponed_collection
from distckpt.geometry import Box, intersect
from distckpt.host_group import Board
from distckpt.index import Index, TensorEntry
from distckpt.leaf_value import decode_leaf
from distckpt.matching import Request, empty_tensors
from distckpt.meta import is_meta_module, make_module_real
from distckpt.open_files import read_files
from distckpt.reader import FileReads, StoredTensors, open_checked, plan_reads
from distckpt.ring import fill_through_ring
from distckpt.sharded_tensor import Shard, torch_dtype
from distckpt.shared_reading import read_together
from distckpt.state_dict import ObjectLeaf
from distckpt.storage import Storage
from distckpt.tied_memory import fill_tied, split_tied
from distckpt.transport import Transports, is_lazy
from distckpt.wanted_tensor import WantedTensor

Device: TypeAlias = torch.device | str
DeviceOf: TypeAlias = Device | Mapping[str, Device]


def device_of(path: str, devices: DeviceOf) -> torch.device:
    """The device for a path: the one there is, or that of the longest given path which leads to it; else the CPU."""
    if not isinstance(devices, Mapping):
        return torch.device(devices)
    while path and path not in devices:
        path = path.rpartition("/")[0]
    return torch.device(devices.get(path, "cpu"))


def make_modules_real(objects: Iterable[ObjectLeaf], devices: DeviceOf) -> bool:
    """Give modules on the meta device empty real tensors; whether there were any."""
    found = [(leaf.owner, leaf.path) for leaf in objects]
    modules = [(owner, path) for owner, path in found if isinstance(owner, torch.nn.Module) and is_meta_module(owner)]
    for module, path in modules:
        make_module_real(module, device_of(path, devices))
    return bool(modules)


@postponed_collection()
def targets_of(request: Request, index: Index, devices: DeviceOf) -> list[WantedTensor]:
    """Every box to fill and its tensor. Makes what is on the meta device, and what has no tensor of the state's own."""
    targets: list[WantedTensor] = []
    for leaf, entry in request.tensors:
        if leaf.materialize is not None:
            leaf.shards, leaf.materialize = leaf.materialize(device_of(leaf.key, devices)), None
        is_whole = leaf.spec.global_shape == entry.global_shape  # Then its boxes are inside: they were made so.
        for shard in leaf.shards:
            target = (shard.box, shard.data) if is_whole else _clip(shard, entry)
            if target is not None and target[1].numel():
                targets.append(WantedTensor(leaf.key, *target))
    request.whole_tensors = empty_tensors(index, request.whole)
    for key, tensor in request.whole_tensors.items():
        if tensor.numel():
            targets.append(WantedTensor(key, Box.whole(tensor.shape), tensor))
    return targets


def _clip(shard: Shard, entry: TensorEntry) -> tuple[Box, Tensor] | None:
    """The part that is stored of a shard whose tensor has another shape, and the view of its data."""
    box = intersect(shard.box, Box.whole(entry.global_shape))
    if box is None:
        return None
    inner = tuple(slice(o - s, o - s + n) for o, s, n in zip(box.offset, shard.box.offset, box.shape, strict=True))
    return box, shard.data[inner]


@dataclass(frozen=True, slots=True)
class Filled:
    """bytes_read: from storage. not_shared: why ranks of this host could not read for each other. warning: any."""

    bytes_read: int
    not_shared: str | None
    warning: str | None


def fill_targets(
    storage: Storage,
    directory: str,
    index: Index,
    targets: Sequence[WantedTensor],
    board: Board,
    transports: Transports,
    timeout_s: float,
) -> Filled:
    """Targets in host memory where they are, and together with the ranks of this host; others through the ring.

    Raises CorruptionError, OSError, PeerFailed, TimeoutError, MismatchError (tied targets); all are then undefined.
    """
    open_file = partial(open_checked, storage, directory, index)
    in_place: list[WantedTensor] = []
    others: list[WantedTensor] = []
    converted: list[tuple[WantedTensor, torch.dtype]] = []
    for target in targets:
        stored = torch_dtype(index.tensors[target.key].dtype, target.key)
        if stored != target.data.dtype:
            converted.append((target, stored))
        elif transports.of(target.data).is_host and not is_lazy(target.data):
            in_place.append(target)
        else:
            others.append(target)
    stored_tensors = StoredTensors.read(storage, directory, index, sorted({target.key for target in targets}))
    bytes_read = 0

    def plan(wanted: Sequence[WantedTensor]) -> list[FileReads]:
        return plan_reads(stored_tensors, [one.in_memory() for one in wanted])

    def read(wanted: Sequence[WantedTensor]) -> None:
        nonlocal bytes_read
        bytes_read += read_files(plan(wanted), open_file)

    apart, tied = split_tied(in_place)
    reads = plan(apart)
    bytes_read += read_together(reads, open_file, index, board)
    warning = fill_through_ring(
        [(target.box, target.data) for target in others],
        lambda pieces: read([WantedTensor(others[p.number].key, p.box, p.data) for p in pieces]),
        transports,
        timeout_s=timeout_s,
    )
    for target, twin in tied:
        fill_tied(target, twin, read)
    fill_converted(converted, read)
    for target in in_place:  # Filled behind autograd's back: a backward through the old values must fail.
        torch.autograd.graph.increment_version(target.data)
    return Filled(bytes_read, board.obstacle, warning)


def read_values(storage: Storage, directory: str, index: Index, request: Request) -> None:
    """Decode what was asked for and is no tensor, for when it is applied. Raises CorruptionError, OSError."""
    numbers = {number for _, number in request.per_rank}
    stored = {number: read_per_rank(storage, directory, index, number) for number in numbers}
    for leaf, number in request.per_rank:
        if leaf.key not in stored[number]:
            raise CorruptionError(f"{index.files[number].name}: per-rank value {leaf.key!r} is not in it")
        request.per_rank_values[leaf.key] = decode_leaf(bytes(stored[number][leaf.key]), leaf.key)
    for key, _ in request.values:
        request.decoded[key] = decode_leaf(bytes(index.values[key]), key)
