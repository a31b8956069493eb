"""How ranks find each other and agree. Importing it imports neither torch nor mpi4py."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

from distckpt.coordinator.agreement import agree
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
]

# Open MPI; MPICH and Intel MPI (and Slurm's PMI-2). PMIx itself puts no size into the environment.
_MPI_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE")


def default_coordinator() -> Coordinator:
    """torch.distributed if it is initialised, else MPI if launched by mpirun, else a single process.

    Collective, and to be called from the main thread: all ranks of the job make the coordinator.
    """
    torch_distributed = sys.modules.get("torch.distributed")  # not imported: not initialised
    if torch_distributed and torch_distributed.is_available() and torch_distributed.is_initialized():
        return TorchDistCoordinator()
    sizes = {name: os.environ[name] for name in _MPI_SIZE_VARIABLES if name in os.environ}
    if not any(size.isdecimal() and int(size) > 1 for size in sizes.values()):
        _refuse_torchrun()
        return SingleProcess()
    if find_spec("mpi4py") is None:
        launched = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise CheckpointError(
            f"this process is one of several launched by mpirun ({launched}), but mpi4py, through which it "
            "would reach the others, is not installed: install distckpt[mpi], or initialise torch.distributed"
        )
    return MpiCoordinator()


def _refuse_torchrun() -> None:
    """Ranks of a torchrun job that do not know of each other would each write a checkpoint of their own."""
    world_size = os.environ.get("WORLD_SIZE", "")
    if world_size.isdecimal() and int(world_size) > 1:
        raise CheckpointError(
            f"WORLD_SIZE={world_size} says that this is one of several processes, but torch.distributed is not "
            "initialised, so it cannot reach the others. Call init_process_group() first; if this process is really "
            "on its own, pass coordinator=SingleProcess()"
        )
