"""save, async_save, load and read for one checkpoint directory that is no series of iterations.

The directory is a root with the one iteration 0; saving again replaces it, and readers never see a mixture.
"""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike

import torch

from distckpt.checkpointer import TIMEOUT_S, Checkpointer
from distckpt.coordinator import Coordinator
from distckpt.index import Mesh
from distckpt.loading import State
from distckpt.pending import PendingSave
from distckpt.report import LoadReport, SaveReport

Path = str | PathLike[str]


def save(
    state: State,
    directory: Path,
    *,
    mesh: Mesh | None = None,
    coordinator: Coordinator | None = None,
    timeout_s: float = TIMEOUT_S,
) -> SaveReport:
    """Checkpointer.save into a directory of its own. Collective."""
    with Checkpointer(directory, mesh=mesh, coordinator=coordinator, timeout_s=timeout_s) as checkpointer:
        return checkpointer.save(state, iteration=0)


def async_save(
    state: State,
    directory: Path,
    *,
    mesh: Mesh | None = None,
    coordinator: Coordinator | None = None,
    timeout_s: float = TIMEOUT_S,
) -> PendingSave:
    """Checkpointer.async_save into a directory of its own. Collective; its failure is raised by wait() only."""
    checkpointer = Checkpointer(directory, mesh=mesh, coordinator=coordinator, timeout_s=timeout_s)
    try:
        pending = checkpointer.async_save(state, iteration=0)
    except BaseException:
        checkpointer.close()
        raise
    pending.add_done_callback(checkpointer.release)
    return pending


def load(
    state: State,
    directory: Path,
    *,
    strict: bool = True,
    device: torch.device | str = "cpu",
    mesh: Mesh | None = None,
    coordinator: Coordinator | None = None,
    timeout_s: float = TIMEOUT_S,
) -> LoadReport:
    """Checkpointer.load from a directory that save wrote. Collective."""
    with Checkpointer(directory, mesh=mesh, coordinator=coordinator, timeout_s=timeout_s) as checkpointer:
        return checkpointer.load(state, strict=strict, device=device)


def read(
    directory: Path,
    *,
    keys: Iterable[str] | None = None,
    coordinator: Coordinator | None = None,
    timeout_s: float = TIMEOUT_S,
) -> State:
    """Checkpointer.read from a directory that save wrote. Collective."""
    with Checkpointer(directory, coordinator=coordinator, timeout_s=timeout_s) as checkpointer:
        return checkpointer.read(keys=keys)
