"""TorchSnapshot, with each rank's tensors as its own."""

from __future__ import annotations

from pathlib import Path

from torchsnapshot import Snapshot, StateDict
from torchsnapshot.snapshot import PendingSnapshot

from benchmarks.engines.port import Engine
from benchmarks.state import RankState


class TorchSnapshot(Engine):
    def __init__(self, root: Path, state: RankState) -> None:
        super().__init__(root, state)
        self._app_state = {"state": StateDict(**state.tensors())}
        self._pending: PendingSnapshot | None = None

    def save(self, step: int) -> None:
        Snapshot.take(str(self.path(step)), self._app_state)

    def load(self, step: int) -> None:
        Snapshot(str(self.path(step))).restore(self._app_state)
        for key, tensor in self.state.tensors().items():
            loaded = self._app_state["state"][key]
            if loaded is not tensor:
                tensor.copy_(loaded)

    def async_save(self, step: int) -> None:
        self._pending = Snapshot.async_take(str(self.path(step)), self._app_state)

    def wait(self) -> None:
        assert self._pending is not None
        self._pending.wait()
