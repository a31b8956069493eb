"""TensorStore: a zarr3 array per tensor, a chunk per rank's part, the file driver, which fsyncs."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import tensorstore as ts
import torch

from benchmarks.engines.port import Engine
from benchmarks.state import Piece, RankState

ZARR_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class TensorStore(Engine):
    def __init__(self, root: Path, state: RankState) -> None:
        super().__init__(root, state)
        self._writes: list[ts.WriteFutures] = []

    def save(self, step: int) -> None:
        for write in self._start(step):
            write.commit.result()

    def load(self, step: int) -> None:
        path = self.path(step)
        opened = [ts.open(_place(path, piece), open=True) for piece in self.state.pieces.values()]
        reads = [
            store.result()[_part(piece)].read() for store, piece in zip(opened, self.state.pieces.values(), strict=True)
        ]
        for read, piece in zip(reads, self.state.pieces.values(), strict=True):
            _array(piece)[...] = read.result()

    def async_save(self, step: int) -> None:
        self._writes = self._start(step)
        for write in self._writes:
            write.copy.result()

    def poll(self) -> bool:
        return all(write.commit.done() for write in self._writes)

    def wait(self) -> None:
        for write in self._writes:
            write.commit.result()

    def _start(self, step: int) -> list[ts.WriteFutures]:
        """Whoever comes first makes an array; of equal pieces the first one writes."""
        path = self.path(step)
        own = [piece for piece in self.state.pieces.values() if piece.replica == 0]
        opened = [ts.open(_spec(path, piece), open=True, create=True) for piece in own]
        return [store.result()[_part(piece)].write(_array(piece)) for store, piece in zip(opened, own, strict=True)]


def _place(path: Path, piece: Piece) -> dict[str, object]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path / piece.key}/"}}


def _spec(path: Path, piece: Piece) -> dict[str, object]:
    return _place(path, piece) | {
        "metadata": {"shape": piece.global_shape, "data_type": ZARR_TYPES[piece.data.dtype]},
        "schema": {"chunk_layout": {"chunk": {"shape": piece.data.shape}}},
    }


def _part(piece: Piece) -> tuple[slice, ...]:
    sizes = piece.data.shape
    starts = [piece.at * size if d == piece.axis else 0 for d, size in enumerate(sizes)]
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


def _array(piece: Piece) -> npt.NDArray[np.generic]:
    """The piece's memory; NumPy has no bfloat16 of its own."""
    if piece.data.dtype == torch.bfloat16:
        return piece.bits.numpy().view(ml_dtypes.bfloat16)
    array: npt.NDArray[np.generic] = piece.data.numpy()
    return array
