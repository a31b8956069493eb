"""Transport: bytes between tensors, wherever they live, and host memory. The one place that knows about devices.

Elements are moved as integers of their size, so that element types which have no arithmetic are copied too.
Copies to and from an accelerator go through torch and are complete on return.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distckpt._C import crc32c

_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
_SAMPLES = 64
_SMALL_BYTES = 64 << 10


def carrier(tensor: Tensor) -> Tensor:
    """A view of the same elements as integers of their size (complex128 as it is); lazy conjugation resolved."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.view(_CARRIERS[plain.element_size()])


def copy_to_host(source: Tensor, target: Tensor) -> None:
    """Write the elements of `source`, any strides and device, in C order into `target`, 1-d uint8 on the host."""
    elements = carrier(source)
    target.view(elements.dtype).view(elements.shape).copy_(elements)


def host_bytes(source: Tensor) -> memoryview:
    """The elements of `source` in C order as bytes on the host: a view where they lie so, else a copy."""
    elements = carrier(source).cpu().contiguous()
    if not elements.numel():
        return memoryview(b"")
    return elements.reshape(-1).numpy().view(np.uint8).data


def sample_checksum(tensor: Tensor) -> int:
    """CRC32C of all elements of a tensor of up to 64 KiB, else of 64 spread over it, the first and the last among them.

    Equal tensors have equal samples, whatever their strides and devices.
    """
    elements = carrier(tensor)
    count = elements.numel()
    if elements.nbytes > _SMALL_BYTES:
        places = torch.arange(_SAMPLES, device=elements.device) * (count - 1) // (_SAMPLES - 1)
        if elements.is_contiguous():
            elements = elements.view(-1)[places]
        else:
            elements = elements[torch.unravel_index(places, elements.shape)]
    return crc32c(elements.cpu().contiguous().reshape(-1).numpy()) if count else 0
