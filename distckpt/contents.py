"""Contents: what one stored checkpoint holds, as far as its index tells. For who makes a state that fits it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from distckpt.index import Index
from distckpt.json_value import decode_value, is_container
from distckpt.leaf_value import decode_leaf
from distckpt.state_dict import unflatten


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """dtype: its name in torch. is_sharded: whether it was saved as parts of a global tensor, or as a whole."""

    dtype: str
    global_shape: tuple[int, ...]
    is_sharded: bool


class Contents:
    """What a checkpoint holds: tensors, values and what differs by rank. Reads no tensor."""

    def __init__(self, index: Index) -> None:
        self._index = index

    @property
    def iteration(self) -> int:
        return self._index.iteration

    @property
    def save_id(self) -> str:
        return self._index.save_id

    @property
    def world_size(self) -> int:
        return self._index.world_size

    @property
    def per_rank(self) -> frozenset[str]:
        """Keys of the PerRank values."""
        return frozenset(self._index.per_rank)

    @cached_property
    def metadata(self) -> object:
        """What was given to save as metadata."""
        return decode_value(bytes(self._index.metadata), "metadata")

    @cached_property
    def tree(self) -> dict[str, object]:
        """The nested state: a StoredTensor for each tensor, the values themselves; PerRank values are left out."""
        index = self._index
        values = {key: bytes(value) for key, value in index.values.items()}
        markers = {key: value for key, value in values.items() if is_container(value)}
        leaves: dict[str, object] = {
            key: StoredTensor(entry.dtype, entry.global_shape, entry.given_as == "sharded")
            for key, entry in index.tensors.items()
        }
        leaves |= {key: decode_leaf(value, key) for key, value in values.items() if key not in markers}
        return unflatten(leaves, {key: entry.container for key, entry in index.tensors.items()}, markers)

    @property
    def digest(self) -> str:
        """A digest of all checksums of this checkpoint's files: another one means that something else is stored."""
        files = sorted((file.name, file.size_bytes, file.header_crc, file.table_crc) for file in self._index.files)
        return hashlib.sha256(repr((self._index.save_id, files)).encode()).hexdigest()
