"""Contents: what one stored checkpoint holds, as far as its index tells. For who makes a state that fits it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from distckpt.index import Index, Spec
from distckpt.json_value import decode_value, is_container
from distckpt.leaf_value import decode_leaf


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """dtype: its name in torch. is_sharded: whether it was saved as a part of a global tensor, or as a whole."""

    dtype: str
    global_shape: tuple[int, ...]
    is_sharded: bool


class Contents:
    """What a checkpoint holds: keys of tensors, of values and of what differs by rank. Reads no tensor."""

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

    @cached_property
    def metadata(self) -> object:
        """What was given to save as metadata."""
        return decode_value(bytes(self._index.metadata), "metadata")

    def tensor(self, key: str) -> StoredTensor | None:
        entry: Spec | None = self._index.tensors.get(key)
        if entry is None:
            return None
        return StoredTensor(entry.dtype, entry.global_shape, entry.given_as == "sharded")

    def value(self, key: str, default: object = None) -> object:
        """The JSON value under a key, decoded; the default if there is none."""
        stored = self._index.values.get(key)
        return default if stored is None or is_container(bytes(stored)) else decode_leaf(bytes(stored), key)

    def keys(self, path: str = "") -> Iterator[str]:
        """All keys, or those below a container: a key of its own counts where its tensor stood."""
        index = self._index
        for key in (*index.tensors, *index.values, *index.per_rank):
            home = index.tensors[key].container if key in index.tensors else None
            place = key if home is None else f"{home}/{key}"
            if not path or place.startswith(f"{path}/"):
                yield key

    def has(self, path: str) -> bool:
        """Whether anything is stored under a key, or below a container; an empty container counts."""
        index = self._index
        return path in index.values or path in index.tensors or path in index.per_rank or any(self.keys(path))
