"""Short hashes of batches and datasets, by which a resume tells whether it sees the data that it should.

Two different batches that have one hash are an accident of about 2**-32. Nothing here is safe against forgery.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import random
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Protocol, cast

import numpy as np
import torch

from distckpt._C import crc32c

ITEMS = 8  # of a dataset that a fingerprint reads
_DIGEST_BYTES = 8
_SUMMED_FROM_BYTES = 4096  # larger buffers go into a hash by their CRC32C, which runs at memory speed
_MAX_DEPTH = 16  # of what contains itself twice, 65,536 pieces


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


def hash_batch(batch: object) -> str:
    """16 hexadecimal digits: equal for equal batches, on any machine and after any restart.

    Tensors, arrays, numbers, strings, bytes, and mappings, sequences, sets and dataclasses of them; of anything else
    only the type counts. A tensor of an accelerator is copied to the host, which waits for it.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    _add(digest, batch, 0)
    return digest.hexdigest()


def fingerprint_of(dataset: object) -> str:
    """Type, length and a hash of a few items spread over the dataset; that of a Hugging Face dataset is its own.

    The items are read twice, and the states of the random-number generators of python, numpy and torch put back
    afterwards. If they differ (augmentation), or cannot be read here, the content is left out, and the text says
    so. They are read from a shallow copy: files that the dataset opens at its first read are opened by the copy, and
    not shared with workers that are forked later. A dataset that must not be read here at all needs a name of yours
    in place of this.
    """
    own = getattr(dataset, "_fingerprint", None)
    if isinstance(own, str) and own:
        return f"datasets:{own}"
    kind = type(dataset).__qualname__
    try:
        length = len(dataset)  # type: ignore[arg-type]  # What has none raises TypeError.
    except TypeError:
        return f"{kind}, of no known length, content left out"
    return f"{kind}, {length} items, {_content_of(dataset, length)}"


def _content_of(dataset: object, length: int) -> str:
    indices = sorted({round(place * (length - 1) / (ITEMS - 1)) for place in range(ITEMS)}) if length > 0 else []
    with _random_states_put_back():
        try:
            items = cast("Mapping[int, object]", _shallow_copy(dataset))
            first, second = (hash_batch([items[index] for index in indices]) for _ in range(2))
        except Exception as error:
            return f"content left out: reading an item raises {type(error).__name__}"
    return f"content {first}" if first == second else "content left out: items differ from read to read"


def _shallow_copy(dataset: object) -> object:
    try:
        return copy.copy(dataset)
    except Exception:
        return dataset


@contextmanager
def _random_states_put_back() -> Iterator[None]:
    of_python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    of_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]  # torch's
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        if of_cuda is not None:
            torch.cuda.set_rng_state_all(of_cuda)


def _add(digest: _Digest, value: object, depth: int) -> None:
    """Every value is told with its kind and size, so that no two different ones are the same bytes."""
    if isinstance(value, torch.Tensor):
        _add_tensor(digest, value)
    elif isinstance(value, np.ndarray | np.generic):
        _add_array(digest, np.asarray(value), depth)
    elif value is None or isinstance(value, bool | int | float | complex):
        digest.update(f"{value!r};".encode())
    elif isinstance(value, str):
        _add_bytes(digest, "str", value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, bytes | bytearray | memoryview):
        _add_bytes(digest, "bytes", bytes(value))
    elif depth > _MAX_DEPTH:
        digest.update(b"deep;")
    else:
        _add_container(digest, value, depth + 1)


def _add_container(digest: _Digest, value: object, depth: int) -> None:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        digest.update(f"mapping {len(value)};".encode())
        for key in sorted(value, key=repr):
            _add(digest, key, depth)
            _add(digest, value[key], depth)
    elif isinstance(value, list | tuple):
        digest.update(f"sequence {len(value)};".encode())
        for one in value:
            _add(digest, one, depth)
    elif isinstance(value, Set):
        _add(digest, sorted(hash_batch(one) for one in value), depth)
    elif hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
        _add_array(digest, np.asarray(value), depth)
    else:
        _add_bytes(digest, "object", type(value).__qualname__.encode())


def _add_tensor(digest: _Digest, tensor: torch.Tensor) -> None:
    kind = f"array {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
    try:
        dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
        dense = dense.cpu().resolve_conj().resolve_neg().contiguous()
        data = dense.reshape(-1).view(torch.uint8).numpy()
    except (RuntimeError, NotImplementedError, TypeError):  # on the meta device, quantised, nested
        data = np.empty(0, np.uint8)
    _add_bytes(digest, kind, data)


def _add_array(digest: _Digest, array: np.ndarray, depth: int) -> None:
    if array.dtype.hasobject:
        _add(digest, array.tolist() if depth < _MAX_DEPTH else None, depth + 1)
    else:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        _add_bytes(digest, f"array {array.dtype.name} {array.shape}", data)


def _add_bytes(digest: _Digest, kind: str, data: bytes | np.ndarray) -> None:
    digest.update(f"{kind} {len(data)};".encode())
    summed = len(data) >= _SUMMED_FROM_BYTES
    digest.update(crc32c(data).to_bytes(4, "little") if summed else bytes(data))
