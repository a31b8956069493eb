"""Elements as bytes: what any transport moves. Decides how a tensor is viewed and cut, never where it goes.

Elements are moved as integers of their size, so that element types which have no arithmetic are copied too, and
every bit pattern comes out as it went in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def is_lazy(tensor: Tensor) -> bool:
    """Whether its memory holds the conjugates or negatives of its elements."""
    return tensor.is_conj() or tensor.is_neg()


def is_plain(tensor: Tensor) -> bool:
    """Whether its memory is its elements in C order."""
    return tensor.is_contiguous() and not is_lazy(tensor)


def carrier(tensor: Tensor) -> Tensor:
    """A view of the same elements as integers of their size (complex128 as it is); a copy if they are lazy."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.view(_CARRIERS[plain.element_size()])


def movable(tensor: Tensor) -> Tensor:
    """A view of the same elements in their own memory, that copy_() reads and writes bit by bit."""
    own = tensor.detach()
    return own if is_lazy(own) else own.view(_CARRIERS[own.element_size()])


def flat_bytes(tensor: Tensor) -> Tensor:
    """The elements in C order as 1-d uint8, where they are: a view of a contiguous tensor, else a copy."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # Not view(-1), which could leave a lone element with a stride other than 1.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)


def plain_bytes(source: Tensor) -> memoryview | None:
    """The bytes of a tensor that lies on the host in C order; None of one that does not."""
    if not source.is_contiguous() or source.device.type != "cpu" or is_lazy(source):
        return None
    return _memory(source, source.nbytes)


def writable_bytes(target: Tensor) -> memoryview:
    """The host memory from the first to the last element of a tensor, what lies between them included."""
    return _memory(target, span_bytes(target))


def span_bytes(tensor: Tensor) -> int:
    """From the first to the last element of a tensor, what lies between them included."""
    if tensor.is_contiguous():
        return tensor.nbytes
    if not tensor.numel():
        return 0
    return tensor.element_size() * (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)))


def _memory(tensor: Tensor, size_bytes: int) -> memoryview:
    """Bytes from the first element of a tensor on the host on, whose storage they hold.

    By address, because Tensor.numpy() makes the storage one that can never be resized again, and DLPack takes ten
    times as long. Raises RuntimeError for a storage that no longer has as many.
    """
    if not size_bytes:
        return memoryview(bytearray())
    storage = tensor.untyped_storage()
    first = tensor.storage_offset() * tensor.element_size()
    if first + size_bytes > storage.nbytes():
        raise RuntimeError(
            f"a {tuple(tensor.shape)} tensor takes {first + size_bytes} bytes of a storage that has {storage.nbytes()}"
        )
    memory = (ctypes.c_ubyte * size_bytes).from_address(tensor.data_ptr())
    memory.storage = storage  # type: ignore[attr-defined]
    return memoryview(memory).cast("B")


def host_bytes(source: Tensor) -> memoryview:
    """The elements of `source` in C order as bytes on the host: a view where they lie so, else a copy."""
    plain = plain_bytes(source)
    return writable_bytes(flat_bytes(source).cpu()) if plain is None else plain


def host_view(data: memoryview, dtype: torch.dtype) -> Tensor:
    """A 1-d tensor over bytes on the host."""
    return torch.frombuffer(data, dtype=dtype) if len(data) else torch.empty(0, dtype=dtype)


def pieces(tensor: Tensor, max_bytes: int, dim: int = 0) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Views that make up the tensor, in C order of its elements, each with the index of its first element.

    Each has at most max_bytes, unless that is less than one element. The dimensions before `dim` have size 1.
    """
    if tensor.nbytes <= max_bytes or dim == tensor.dim():
        yield (0,) * tensor.dim(), tensor
        return
    rows = max_bytes // (tensor.nbytes // tensor.shape[dim])
    for first in range(0, tensor.shape[dim], max(rows, 1)):
        part = tensor.narrow(dim, first, min(max(rows, 1), tensor.shape[dim] - first))
        for at, piece in pieces(part, max_bytes, dim + 1):
            yield (*at[:dim], first, *at[dim + 1 :]), piece
