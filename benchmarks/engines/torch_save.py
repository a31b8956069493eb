"""torch.save of each rank's tensors into a file of its own, with fsync; of data-parallel ranks the first saves."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from benchmarks.engines.port import Engine


class TorchSave(Engine):
    def save(self, step: int) -> None:
        if self.state.place.dp:
            return
        with self._file(step).open("wb") as file:
            torch.save(self.state.tensors(), file)
            file.flush()
            os.fsync(file.fileno())

    def load(self, step: int) -> None:
        loaded = torch.load(self._file(step), weights_only=True)
        for key, tensor in self.state.tensors().items():
            tensor.copy_(loaded[key])

    def _file(self, step: int) -> Path:
        place = self.state.place
        return self.make_path(step) / f"tp{place.tp}_pp{place.pp}.pt"
