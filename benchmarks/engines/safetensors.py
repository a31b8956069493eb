"""A safetensors file per rank, with fsync."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.engines.port import Engine
from benchmarks.files import sync_files


class Safetensors(Engine):
    def save(self, step: int) -> None:
        path = self._file(step)
        save_file(self.state.tensors(), path)
        sync_files([path])

    def load(self, step: int) -> None:
        with safe_open(self._file(step), framework="pt") as file:
            for key, tensor in self.state.tensors().items():
                tensor.copy_(file.get_tensor(key))

    def _file(self, step: int) -> Path:
        return self.make_path(step) / f"rank_{self.state.rank}.safetensors"
