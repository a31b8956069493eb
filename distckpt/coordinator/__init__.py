"""How ranks find each other and agree. Importing it imports neither torch nor mpi4py."""

from __future__ import annotations

import os
import sys

from distckpt.coordinator.agreement import agree
from distckpt.coordinator.launched import launched_coordinator, mpi_coordinator
from distckpt.coordinator.mpi import MpiCoordinator
from distckpt.coordinator.port import Coordinator, RankFailure
from distckpt.coordinator.single import SingleProcess
from distckpt.coordinator.torch_dist import TorchDistCoordinator
from distckpt.errors import CheckpointError

__all__ = [
    "Coordinator",
    "MpiCoordinator",
    "RankFailure",
    "SingleProcess",
    "TorchDistCoordinator",
    "agree",
    "default_coordinator",
    "launched_coordinator",
]


def default_coordinator() -> Coordinator:
    """torch.distributed if it is initialised, else MPI if launched by mpirun, else a single process.

    Collective, and to be called from the main thread: all ranks of the job make the coordinator.
    """
    torch_distributed = sys.modules.get("torch.distributed")  # not imported: not initialised
    if torch_distributed and torch_distributed.is_available() and torch_distributed.is_initialized():
        return TorchDistCoordinator()
    coordinator = mpi_coordinator()
    if coordinator is None:
        _refuse_torchrun()
        return SingleProcess()
    return coordinator


def _refuse_torchrun() -> None:
    """Ranks of a torchrun job that do not know of each other would each write a checkpoint of their own."""
    world_size = os.environ.get("WORLD_SIZE", "")
    if world_size.isdecimal() and int(world_size) > 1:
        raise CheckpointError(
            f"WORLD_SIZE={world_size} says that this is one of several processes, but torch.distributed is not "
            "initialised, so it cannot reach the others. Call init_process_group() first; if this process is really "
            "on its own, pass coordinator=SingleProcess()"
        )
