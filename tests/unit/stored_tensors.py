"""Checkpoints made of bytes: tensors of any dtype, cut in any way; and what is stored of one, to be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import msgspec
import numpy as np
from hypothesis import strategies as st

from distckpt.checkpoint_files import read_per_rank
from distckpt.commit import list_commits, read_index
from distckpt.exchange.export_source import ExportSource
from distckpt.exchange.import_commit import Incoming, IncomingTensor, commit_incoming
from distckpt.geometry import Box, bands
from distckpt.index import Index, Spec
from distckpt.shard_file import DTYPES
from distckpt.storage import Storage
from distckpt.tensor_source import TensorSource
from distckpt.testing import MemoryStorage


@dataclass(frozen=True)
class Tensor:
    """data: its elements in C order. boxes: the chunks that it is stored in."""

    spec: Spec
    data: bytes
    boxes: Sequence[Box]

    @classmethod
    def of(cls, dtype: str, shape: Sequence[int], *, seed: int = 0, boxes: Sequence[Box] | None = None) -> Tensor:
        """Of random bits: every NaN, every zero there is."""
        size = prod(shape) * DTYPES[dtype].item_bytes
        data = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
        if dtype == "bool":
            data &= 1
        whole = [Box.whole(shape)] if prod(shape) else []
        return cls(Spec(dtype=dtype, global_shape=tuple(shape)), data.tobytes(), whole if boxes is None else boxes)

    def incoming(self) -> IncomingTensor:
        item_bytes, shape = DTYPES[self.spec.dtype].item_bytes, self.spec.global_shape
        array = np.frombuffer(self.data, np.uint8).reshape(*shape, item_bytes)
        return IncomingTensor(
            self.spec,
            self.boxes,
            lambda box: [array[tuple(slice(o, e) for o, e in zip(box.offset, box.end, strict=True))].tobytes()],
        )


def stored(tensors: Mapping[str, Tensor], iteration: int = 5, **facts: object) -> MemoryStorage:
    """A root with one checkpoint."""
    storage = MemoryStorage()
    incoming = Incoming(tensors={key: tensor.incoming() for key, tensor in tensors.items()}, **facts)  # type: ignore[arg-type]
    commit_incoming(storage, incoming, iteration, source="a test", jobs=1)
    return storage


def read_all(storage: Storage) -> tuple[Index, dict[str, bytes], dict[str, dict[tuple[int, ...], bytes]]]:
    """The index of the newest checkpoint, the bytes of its tensors, and what differs by rank, by coordinates."""
    commit = list_commits(storage)[0]
    index, _ = read_index(storage, commit)
    source = ExportSource.open(storage)
    data = {}
    with TensorSource(storage, commit.directory, source.stored, cache_bytes=32 << 20) as tensors:
        for key, entry in index.tensors.items():
            whole = Box.whole(entry.global_shape)
            data[key] = source.read(tensors, [(key, whole)])[0].tobytes() if whole.size else b""
    per_rank = {
        key: {at: bytes(read_per_rank(storage, commit.directory, index, number)[key]) for at, number in entry.holders}
        for key, entry in index.per_rank.items()
    }
    return index, data, per_rank


def facts_of(index: Index) -> dict[str, object]:
    """What an index says of what is stored, without where it lies and when it was saved."""
    where = {"save_id", "epoch", "commit_seq", "created_unix_s", "parent", "files", "chunk_table"}
    facts: dict[str, object] = {name: getattr(index, name) for name in Index.__struct_fields__ if name not in where}
    facts["tensors"] = {
        key: {name: getattr(entry, name) for name in Spec.__struct_fields__} for key, entry in index.tensors.items()
    }
    facts["values"] = {key: bytes(value) for key, value in index.values.items()}
    facts["metadata"] = bytes(index.metadata)
    facts["per_rank"] = {key: (entry.axes, entry.on_change) for key, entry in index.per_rank.items()}
    return facts


def check_same(one: Storage, other: Storage) -> None:
    """That the newest checkpoints of two roots hold the same, bit by bit."""
    (index, data, per_rank), (other_index, other_data, other_per_rank) = read_all(one), read_all(other)
    assert facts_of(index) == facts_of(other_index)
    assert data == other_data
    assert per_rank == other_per_rank


HOSTILE_KEYS = (
    *(
        "a",
        "a/b",
        "a/b/c",
        "a%t",
        "..",
        ".",
        "../x",
        "%2e%2e",
        "%",
        "%25",
        "__init",
        "x/__y",
        "zarr.json",
        "c",
        "c/0",
        "/",
    ),
    *(
        "",
        "a//b",
        "x y",
        "Überraschung",
        "\n",
        ".zarray",
        "w@0",
        'q"',
        "back\\slash",
        "long" * 80,
        "%e",
        "%h",
        "A",
        "~-_.",
    ),
)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    """A few of any kinds under keys that are hard to name files after."""
    made = {}
    for key in draw(st.lists(st.sampled_from(HOSTILE_KEYS), min_size=1, max_size=4, unique=True)):
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        made[key] = Tensor.of(dtype, shape, seed=draw(st.integers(0, 99)), boxes=draw(tilings(shape)))
    return made


@st.composite
def tilings(draw: st.DrawFn, shape: Sequence[int]) -> list[Box]:
    """Boxes that tile a shape: a regular grid, or bands cut anywhere."""
    whole = Box.whole(shape)
    if not whole.size:
        return []
    if draw(st.booleans()):
        return list(bands(whole, draw(st.integers(1, max(1, whole.size)))))
    boxes = [whole]
    for d, extent in enumerate(shape):
        cuts = sorted({0, *draw(st.lists(st.integers(0, extent - 1), max_size=2))})
        ends = [*cuts[1:], extent]
        boxes = [
            Box((*box.offset[:d], low, *box.offset[d + 1 :]), (*box.shape[:d], high - low, *box.shape[d + 1 :]))
            for box in boxes
            for low, high in zip(cuts, ends, strict=True)
        ]
    return boxes


def raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
