"""This package."""

from __future__ import annotations

from pathlib import Path

from benchmarks.engines.port import Engine
from benchmarks.state import Piece, RankState
from distckpt import Checkpointer, PendingSave, ShardedTensor


class Distckpt(Engine):
    is_durable = True

    def __init__(self, root: Path, state: RankState, *, io_backend: str) -> None:
        super().__init__(root, state)
        self.backend = io_backend
        tp_rank, pp_rank = state.tp_rank, state.pp_rank
        mesh = {"tp": (tp_rank, state.layout.tp), "pp": (pp_rank, state.layout.pp)}
        self._checkpointer = Checkpointer(root, mesh=mesh, io_backend=io_backend)
        self._sharded: dict[str, object] = {"state": [_sharded(piece) for piece in state.pieces.values()]}
        self._pending: PendingSave | None = None

    def path(self, step: int) -> Path:
        return self.root / f"iter_{step:07d}"

    def save(self, step: int) -> None:
        self._checkpointer.save(self._sharded, iteration=step)

    def load(self, step: int) -> None:
        self._checkpointer.load(self._sharded, iteration=step)

    def prepare(self) -> None:
        self._checkpointer.prepare(self._sharded)

    def async_save(self, step: int) -> None:
        self._pending = self._checkpointer.async_save(self._sharded, iteration=step)

    def wait(self) -> None:
        assert self._pending is not None
        self._pending.wait()

    def close(self) -> None:
        self._checkpointer.close()


def _sharded(piece: Piece) -> ShardedTensor:
    if piece.axis is None:
        return ShardedTensor.from_rank_offsets(piece.key, piece.data, replica_id=piece.at, owner="pp")
    partition = tuple("tp" if d == piece.axis else None for d in range(len(piece.global_shape)))
    offset = (piece.axis, piece.at, piece.parts)
    return ShardedTensor.from_rank_offsets(piece.key, piece.data, offset, partition=partition, owner="pp")
