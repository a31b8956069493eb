"""Samples: a checksum by which replicas of a tensor on different ranks are compared. Decides what is looked at.

All elements of a small tensor, else some that are spread over it. Equal tensors have equal samples, whatever their
strides and devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import Buffer

from distckpt import _C
from distckpt._C import crc32c
from distckpt.transport.devices import Transports
from distckpt.transport.elements import carrier, host_bytes, is_plain, movable, plain_bytes
from distckpt.transport.port import Transport

_PLACES = 64  # and the last element
_SMALL_BYTES = 64 << 10
_BATCH_BYTES = 16 << 20
_TIMEOUT_S = 1800.0


def sample_checksums(
    tensors: Sequence[Tensor], transports: Transports, *, timeout_s: float = _TIMEOUT_S
) -> npt.NDArray[np.uint32]:
    """CRC32C of all elements of each tensor of up to 64 KiB, else of 65 spread over it, the first and last among them.

    Those of one accelerator are gathered there and come to the host in one copy, or one for every 16 MiB of them.
    Raises TimeoutError when a copy is not done after timeout_s.
    """
    on_host: list[int] = []
    on_device: dict[tuple[Transport, torch.device], list[int]] = {}
    for number, tensor in enumerate(tensors):
        transport = transports.of(tensor)
        if not tensor.numel():
            continue
        if transport.is_host:
            on_host.append(number)
        else:
            on_device.setdefault((transport, tensor.device), []).append(number)
    sums = np.zeros(len(tensors), np.uint32)
    sums[on_host] = _host_checksums([tensors[i] for i in on_host])
    for (transport, _), numbers in on_device.items():
        for batch in _batches(tensors, numbers):
            samples, order, sizes = _gather([tensors[i] for i in batch])
            host = torch.empty_like(samples, device="cpu")
            transport.copy_to_host([(samples, host)]).wait(timeout_s)
            ends = np.cumsum(sizes).tolist()
            found = [crc32c(host_bytes(host[end - size : end])) for end, size in zip(ends, sizes, strict=True)]
            sums[np.array(batch)[order]] = found
    return sums


def sample_checksum(tensor: Tensor) -> int:
    """That of one tensor."""
    return int(sample_checksums([tensor], Transports())[0])


def _batches(tensors: Sequence[Tensor], numbers: Sequence[int]) -> Iterator[list[int]]:
    """The numbers cut into batches whose samples take a bounded memory, on the device and on the host."""
    batch: list[int] = []
    total = 0
    for number in numbers:
        tensor = tensors[number]
        size = tensor.nbytes if tensor.nbytes <= _SMALL_BYTES else (_PLACES + 1) * tensor.element_size()
        if batch and total + size > _BATCH_BYTES:
            yield batch
            batch, total = [], 0
        batch.append(number)
        total += size
    yield batch


def _gather(tensors: Sequence[Tensor]) -> tuple[Tensor, list[int], list[int]]:
    """The samples of tensors of one device, one after the other, as 1-d uint8 there.

    Returns them, the number of the tensor that each sample is of, and the bytes that it has.
    """
    parts: dict[torch.dtype, list[Tensor]] = {}  # torch.cat wants one element type
    owners: dict[torch.dtype, list[tuple[int, int]]] = {}
    for number, tensor in enumerate(tensors):
        sample = _sample(tensor)
        parts.setdefault(sample[0].dtype, []).extend(sample)
        owners.setdefault(sample[0].dtype, []).append((number, sum(part.nbytes for part in sample)))
    gathered = [torch.cat(parts[dtype]).view(torch.uint8) for dtype in parts]
    numbers, sizes = zip(*(owner for dtype in parts for owner in owners[dtype]), strict=True)
    return torch.cat(gathered) if len(gathered) > 1 else gathered[0], list(numbers), list(sizes)


def _sample(tensor: Tensor) -> list[Tensor]:
    """1-d views of a non-empty tensor where it is plain; nothing here waits for the device."""
    if tensor.nbytes <= _SMALL_BYTES:
        return [carrier(tensor).reshape(-1)]
    last = tensor.numel() - 1
    step = last // (_PLACES - 1)
    if is_plain(tensor):
        flat = carrier(tensor).view(-1)
        return [flat[: (_PLACES - 1) * step + 1 : step], flat[-1:]]
    rest = (torch.arange(_PLACES + 1, device=tensor.device) * step).clamp(max=last)
    index: list[Tensor] = []
    for n in reversed(tensor.shape):
        index.insert(0, rest % n)
        rest = rest // n
    return [carrier(movable(tensor)[tuple(index)])]


def byte_checksums(parts: Sequence[Buffer], item_bytes: Sequence[int]) -> npt.NDArray[np.uint32]:
    """The same of tensors whose elements, of item_bytes each, lie on the host in C order."""
    sums = np.empty(len(parts), np.uint32)
    _C.sample_checksums(parts, item_bytes, sums)
    return sums


def _host_checksums(tensors: Sequence[Tensor]) -> npt.NDArray[np.uint32]:
    """Of host tensors. Those that are plain are sampled where they lie, the others from a copy of their samples."""
    parts: list[Buffer] = []
    for tensor in tensors:
        plain = plain_bytes(tensor)
        parts.append(host_bytes(torch.cat(_sample(tensor))) if plain is None else plain)
    return byte_checksums(parts, [tensor.element_size() for tensor in tensors])
