"""TorchSnapshot, with each rank's tensors as its own: what several ranks hold is stored several times."""

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

    def poll(self) -> bool:
        assert self._pending is not None
        return self._pending.done()

    def wait(self) -> None:
        assert self._pending is not None
        self._pending.wait()

    def index_files(self, step: int) -> list[Path]:
        return [self.path(step) / ".snapshot_metadata"]

    def open_index(self, step: int) -> None:
        Snapshot(str(self.path(step))).get_manifest()
