"""Elements as bytes: what any transport moves. Decides how a tensor is viewed and cut, never where it goes.

Elements are moved as integers of their size, so that element types which have no arithmetic are copied too, and
every bit pattern comes out as it went in.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
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
    return _as_bytes(tensor.detach().resolve_conj().resolve_neg().contiguous())


def _as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor as 1-d uint8. view(-1) could leave a lone element with a stride other than 1."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def plain_bytes(source: Tensor) -> memoryview | None:
    """The bytes of a tensor that lies on the host in C order; None of one that does not.

    Through DLPack, because Tensor.numpy() makes the storage one that can never be resized again. Where NumPy is older
    than 2.1 the view is read-only.
    """
    if source.device.type != "cpu" or not source.is_contiguous() or is_lazy(source):
        return None
    if not source.numel():
        return memoryview(b"")
    return np.from_dlpack(_as_bytes(source.detach() if source.requires_grad else source)).data


def writable_bytes(target: Tensor) -> memoryview:
    """The host memory from the first to the last element of a tensor, what lies between them included."""
    if not target.numel():
        return memoryview(bytearray())
    span = 1 + sum((n - 1) * stride for n, stride in zip(target.shape, target.stride(), strict=True))
    memory = target.detach().as_strided((span,), (1,)).view(torch.uint8)
    array = np.from_dlpack(memory)
    # Older NumPy takes no writable memory through DLPack; Tensor.numpy() costs the storage its way to be resized.
    return array.data if array.flags.writeable else memory.numpy().data


def host_bytes(source: Tensor) -> memoryview:
    """The elements of `source` in C order as bytes on the host: a view where they lie so, else a copy."""
    plain = plain_bytes(source)
    return np.from_dlpack(flat_bytes(source).cpu()).data if plain is None else plain


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
