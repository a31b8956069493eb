"""torch.distributed.checkpoint of DTensors; its async save with a stager that is kept between saves."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from benchmarks.engines.port import Engine
from benchmarks.state import RankState

CPU_STAGING = StagingOptions(
    use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
)


class Dcp(Engine):
    def __init__(self, root: Path, state: RankState, *, thread_count: int) -> None:
        super().__init__(root, state)
        self._thread_count = thread_count
        layout = state.layout
        sizes = (layout.pp, layout.dp, layout.tp)
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("pp", "dp", "tp"))["dp", "tp"]
        self._tensors = {
            key: DTensor.from_local(
                piece.data,
                mesh,
                [Replicate(), Replicate() if piece.axis is None else Shard(piece.axis)],
                run_check=False,
            )
            for key, piece in state.pieces.items()
        }
        self._stager: DefaultStager | None = None
        self._background_group = dist.new_group(backend="gloo")
        self._saving: Future[object] | None = None

    def save(self, step: int) -> None:
        dcp.save(self._tensors, storage_writer=self._writer(step))

    def load(self, step: int) -> None:
        dcp.load(self._tensors, storage_reader=dcp.FileSystemReader(self.path(step)))

    def async_save(self, step: int) -> None:
        if self._stager is None:
            self._stager = DefaultStager(CPU_STAGING)
        self._saving = dcp.async_save(
            self._tensors,
            storage_writer=self._writer(step),
            async_stager=self._stager,
            process_group=self._background_group,
        )

    def poll(self) -> bool:
        assert self._saving is not None
        return self._saving.done()

    def wait(self) -> None:
        assert self._saving is not None
        self._saving.result()

    def index_files(self, step: int) -> list[Path]:
        return [self.path(step) / ".metadata"]

    def open_index(self, step: int) -> None:
        dcp.FileSystemReader(self.path(step)).read_metadata()

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()

    def _writer(self, step: int) -> dcp.FileSystemWriter:
        return dcp.FileSystemWriter(self.path(step), thread_count=self._thread_count)
