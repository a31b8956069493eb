"""The coordinator of a command-line process, by what launched it: mpirun, torchrun, or nobody.

No process group is initialised. Where torchrun launched the ranks they find each other through its agent's store;
where something else set the same variables rank 0 hosts one, as init_process_group() would have it. In the store
everything has names of its own, so that a training job that uses it too is not disturbed.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from distckpt.coordinator.agreement import agree
from distckpt.coordinator.mpi import MpiCoordinator
from distckpt.coordinator.port import Coordinator
from distckpt.coordinator.single import SingleProcess
from distckpt.coordinator.torch_dist import StoreCoordinator, tcp_store
from distckpt.errors import CheckpointError, DistributedError

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not list it.

# Open MPI; MPICH and Intel MPI (and Slurm's PMI-2). PMIx itself puts no size into the environment.
_MPI_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE")
_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_READY = "ready"  # the key that says that rank 0 has told where it listens
_PAUSE_S = 0.05
_ADVICE = "All ranks must run the same command; for one process alone, unset WORLD_SIZE."


def launched_coordinator(*, timeout_s: float = 300.0) -> Coordinator:
    """MPI if launched by mpirun with more than one process, a store if by torchrun, else a single process.

    Collective, from the main thread: all ranks call it, and none returns before all are there. The caller closes it.
    Raises DistributedError if ranks do not come within the bound, and names them; CheckpointError.
    """
    coordinator = mpi_coordinator()
    if coordinator is not None:
        _meet(coordinator, timeout_s)
        return coordinator
    world_size = os.environ.get("WORLD_SIZE", "")
    if not world_size.isdecimal() or int(world_size) < 2:
        return SingleProcess()
    return _torchrun_coordinator(timeout_s)


def mpi_coordinator() -> MpiCoordinator | None:
    """None if this process was not launched by mpirun with others. Raises CheckpointError without mpi4py."""
    sizes = {name: os.environ[name] for name in _MPI_SIZE_VARIABLES if name in os.environ}
    if not any(size.isdecimal() and int(size) > 1 for size in sizes.values()):
        return None
    if find_spec("mpi4py") is None:
        launched = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise CheckpointError(
            f"this process is one of several launched by mpirun ({launched}), but mpi4py, through which it "
            "would reach the others, is not installed: install distckpt[mpi], or initialise torch.distributed"
        )
    return MpiCoordinator()


def _torchrun_coordinator(timeout_s: float) -> Coordinator:
    address = _Address.of_environment()
    import torch.distributed  # noqa: F401  # Here, as it takes seconds: they are not of the bound.

    deadline = time.monotonic() + timeout_s
    try:
        job = _job_store(address, timeout_s)
        name = f"distckpt-command/{address.run}"
        if address.rank != 0:
            ready = f"{name}/{_READY}"
            # The store would wait itself, but then no signal would be heard meanwhile.
            while not job.check([ready]):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"it has not come within {timeout_s:g} s")
                time.sleep(_PAUSE_S)
        try:
            coordinator = StoreCoordinator(job, address.rank, address.world_size, name=name)
        finally:
            if address.rank == 0:  # Also if it cannot listen: then the others are told that.
                job.set(f"{name}/{_READY}", "")
    except (OSError, RuntimeError) as error:  # Errors of the store are RuntimeErrors.
        reason = str(error).partition("\n")[0]
        raise DistributedError(
            f"rank {address.rank} of {address.world_size} does not reach rank 0 through "
            f"{address.host}:{address.port}: {reason}. {_ADVICE}",
            failures={0: reason},
        ) from error
    _meet(coordinator, timeout_s)
    return coordinator


@dataclass(frozen=True, slots=True)
class _Address:
    """What torchrun tells a rank. run: names this start of its ranks: they may have been started before, and died."""

    rank: int
    world_size: int
    host: str
    port: int
    run: str
    has_agent_store: bool

    @classmethod
    def of_environment(cls) -> _Address:
        """Raises CheckpointError."""
        given = {name: os.environ.get(name, "") for name in _TORCHRUN_VARIABLES}
        numbers = {name: int(text) for name, text in given.items() if text.isdecimal() and len(text) < 10}
        wrong = [name for name in ("RANK", "WORLD_SIZE", "MASTER_PORT") if name not in numbers]
        wrong += [] if given["MASTER_ADDR"] else ["MASTER_ADDR"]
        if not wrong and numbers["RANK"] >= numbers["WORLD_SIZE"]:
            wrong = ["RANK"]
        if wrong:
            said = ", ".join(f"{name}={text}" if text else f"no {name}" for name, text in given.items())
            raise CheckpointError(
                f"this process is one of several by its environment, but {', '.join(wrong)} cannot be right: {said}. "
                f"Launch it by torchrun or mpirun. {_ADVICE}"
            )
        return cls(
            rank=numbers["RANK"],
            world_size=numbers["WORLD_SIZE"],
            host=given["MASTER_ADDR"],
            port=numbers["MASTER_PORT"],
            run=f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}",
            has_agent_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )


def _job_store(address: _Address, timeout_s: float) -> TCPStore:
    """Raises OSError or RuntimeError."""
    if address.rank == 0 and not address.has_agent_store:
        return tcp_store(address.host, address.port, is_master=True)
    deadline = time.monotonic() + timeout_s
    while True:  # As above: the store's own attempts would hear no signal.
        try:
            socket.create_connection((address.host, address.port), timeout=timeout_s).close()
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE_S)
    return tcp_store(address.host, address.port, is_master=False)


def _meet(coordinator: Coordinator, timeout_s: float) -> None:
    """That all are there. Raises DistributedError, which names who is missing."""

    def decide(ranks: Sequence[int]) -> list[int]:
        return [len(ranks)] * len(ranks)

    try:
        agree(coordinator, "launch", lambda: coordinator.rank, decide, message=int, decision=int, timeout_s=timeout_s)
    except BaseException as error:
        if coordinator.rank == 0:
            coordinator.close()  # It hosts the store from which the others learn who is not there.
        if isinstance(error, DistributedError):
            raise DistributedError(f"{error}\n  {_ADVICE}", failures=error.failures) from error
        raise
