"""A safetensors file per rank, with fsync; of data-parallel ranks the first saves."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.engines.port import Engine
from benchmarks.files import sync_files


class Safetensors(Engine):
    def save(self, step: int) -> None:
        if self.state.place.dp:
            return
        path = self._file(step)
        save_file(self.state.tensors(), path)
        sync_files([path])

    def load(self, step: int) -> None:
        with safe_open(self._file(step), framework="pt") as file:
            for key, tensor in self.state.tensors().items():
                tensor.copy_(file.get_tensor(key))

    def _file(self, step: int) -> Path:
        place = self.state.place
        return self.make_path(step) / f"tp{place.tp}_pp{place.pp}.safetensors"
