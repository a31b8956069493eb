"""Megatron-core's dist_checkpointing: torch_dist format, a forked writer process for its async save."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor, load, load_common_state_dict, load_tensors_metadata, save
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from benchmarks.engines.port import Engine
from benchmarks.state import Piece, RankState


class MegatronCore(Engine):
    def __init__(self, root: Path, state: RankState) -> None:
        super().__init__(root, state)
        if not torch.cuda.is_available():
            # It asks for a CUDA device even for tensors on the CPU; these two answers let it run without.
            torch.cuda.synchronize = lambda device=None: None
            torch.cuda.current_device = lambda: torch.device("cpu")
        self._calls = AsyncCallsQueue()

    def save(self, step: int) -> None:
        save(self._sharded(), str(self.make_path(step)))

    def load(self, step: int) -> None:
        loaded = load(self._sharded(), str(self.path(step)))
        for key, tensor in self.state.tensors().items():
            if loaded[key].data_ptr() != tensor.data_ptr():
                tensor.copy_(loaded[key])

    def async_save(self, step: int) -> None:
        request = save(self._sharded(), str(self.make_path(step)), async_sharded_save=True)
        self._calls.schedule_async_request(request)

    def poll(self) -> bool:
        """Collective, as in Megatron's training loop: the save is finished by the call that finds all ranks done."""
        self._calls.maybe_finalize_async_calls(blocking=False)
        return self._calls.get_num_unfinalized_calls() == 0

    def wait(self) -> None:
        self._calls.maybe_finalize_async_calls(blocking=True)

    def index_files(self, step: int) -> list[Path]:
        return [self.path(step) / ".metadata", self.path(step) / "common.pt", self.path(step) / "metadata.json"]

    def open_index(self, step: int) -> None:
        load_common_state_dict(str(self.path(step)))
        load_tensors_metadata(str(self.path(step)))

    def close(self) -> None:
        self._calls.close()

    def _sharded(self) -> dict[str, ShardedTensor]:
        """Anew for each call, because save and load take the dictionary apart."""
        return {key: _sharded(piece) for key, piece in self.state.pieces.items()}


def _sharded(piece: Piece) -> ShardedTensor:
    offsets = [] if piece.axis is None else [(piece.axis, piece.at, piece.parts)]
    return ShardedTensor.from_rank_offsets(piece.key, piece.data, *offsets, replica_id=piece.replica)
