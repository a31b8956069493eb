"""This package."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from benchmarks.engines.port import Engine
from benchmarks.state import Piece, RankState
from distckpt import Checkpointer, PendingSave, ShardedTensor
from distckpt.checkpoint_files import read_chunks
from distckpt.commit import list_commits, read_index
from distckpt.storage import PosixStorage


class Distckpt(Engine):
    is_durable = True
    has_prepare = True

    def __init__(
        self,
        root: Path,
        state: RankState,
        *,
        io_backend: str,
        snapshot: Literal["eager", "lazy"] = "eager",
        parity: bool = False,
        verify_after_save: bool = False,
    ) -> None:
        super().__init__(root, state)
        self.backend = io_backend
        self._snapshot = snapshot
        place, layout = state.place, state.layout
        mesh = {"tp": (place.tp, layout.tp), "pp": (place.pp, layout.pp), "dp": (place.dp, layout.dp)}
        self._checkpointer = Checkpointer(
            root, mesh=mesh, io_backend=io_backend, parity=parity, verify_after_save=verify_after_save
        )
        if snapshot == "lazy":
            self._checkpointer.guard(state.optimizer)
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
        self._pending = self._checkpointer.async_save(self._sharded, iteration=step, snapshot=self._snapshot)

    def poll(self) -> bool:
        assert self._pending is not None
        return self._pending.done()

    def wait(self) -> None:
        assert self._pending is not None
        self._pending.wait()

    def index_files(self, step: int) -> list[Path]:
        return [*self.path(step).glob("index-*.json"), *self.path(step).glob("chunks-*.bin")]

    def open_index(self, step: int) -> None:
        storage = PosixStorage(str(self.root))
        commit = next(commit for commit in list_commits(storage) if commit.iteration == step)
        index, _ = read_index(storage, commit)
        read_chunks(storage, commit.directory, index, sorted(index.tensors))

    def close(self) -> None:
        self._checkpointer.close()


def _sharded(piece: Piece) -> ShardedTensor:
    if piece.axis is None:
        return ShardedTensor.from_rank_offsets(piece.key, piece.data, replica_id=piece.replica, owner="pp")
    partition = tuple("tp" if d == piece.axis else None for d in range(len(piece.global_shape)))
    return ShardedTensor.from_rank_offsets(
        piece.key,
        piece.data,
        (piece.axis, piece.at, piece.parts),
        replica_id=piece.replica,
        partition=partition,
        owner="pp",
    )
