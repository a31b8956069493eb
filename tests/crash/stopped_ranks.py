"""What the ranks of a job do, of which one stops itself (SIGSTOP) while iteration 2 is saved: once for every case.

python stopped_ranks.py <directory>    each case has a root of its own below it

Prints "<case>: stops" on the rank that does, and on every rank, when its save has ended, "<case>: <error> <committed>
<failed ranks>".
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, TypeVar

import torch.distributed as dist

from distckpt import Checkpointer, CheckpointError, DistributedError
from distckpt.coordinator import TorchDistCoordinator
from distckpt.storage import PosixStorage, Storage
from distckpt.testing import CrashingStorage
from tests.crash.states import make_state
from tests.distributed.launch import say

T = TypeVar("T")
WORLD_SIZE = 3
TIMEOUT_S = 2.0
BOUND_S = 60.0


@dataclass(frozen=True)
class Case:
    """`rank` stops before, or after, the first call to its storage that begins with `call`."""

    name: str
    rank: int
    moment: Literal["before", "after"]
    call: str
    is_async: bool = False


CASES = (
    Case("rank 0 before its file is durable", 0, "before", "finish iter_0000002/shard-", is_async=True),
    Case("rank 0 before it looks at the fence", 0, "before", "sync_directory iter_0000002"),
    Case("rank 0 between the fence and the index", 0, "before", "put_if_absent iter_0000002/index-"),
    Case("rank 0 behind the index", 0, "after", "put_if_absent iter_0000002/index-", is_async=True),
    Case("rank 1 before it has a file", 1, "before", "create iter_0000002/shard-"),
    Case("rank 1 before its file is durable", 1, "before", "finish iter_0000002/shard-", is_async=True),
)


class StoppingStorage(CrashingStorage):
    """The process stops itself at the call that the case names, and goes on with it when it is woken."""

    def __init__(self, inner: Storage, case: Case) -> None:
        super().__init__(inner)
        self._case = case
        self._is_over = False

    def run(self, method: str, name: str, call: Callable[[], T], half: Callable[[], None] | None = None) -> T:
        is_here = not self._is_over and f"{method} {name}".startswith(self._case.call)
        if is_here and self._case.moment == "before":
            self._stop()
        result = super().run(method, name, call, half)
        if is_here and self._case.moment == "after":
            self._stop()
        return result

    def _stop(self) -> None:
        self._is_over = True
        say(f"{self._case.name}: stops")
        # To this thread: sent to the process, another thread might take it, and this one go on meanwhile.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def run(case: Case, root: Path) -> Checkpointer:
    dist.barrier()  # The one that was stopped has been woken.
    coordinator = TorchDistCoordinator()
    storage: Storage = PosixStorage(root, io_backend="threads")
    if coordinator.rank == case.rank:
        storage = StoppingStorage(storage, case)
    checkpointer = Checkpointer(storage, coordinator=coordinator, timeout_s=TIMEOUT_S)
    checkpointer.save(make_state(1, coordinator), iteration=1)
    state = make_state(2, coordinator)
    try:
        if case.is_async:
            checkpointer.async_save(state, iteration=2).wait(timeout_s=BOUND_S)
        else:
            checkpointer.save(state, iteration=2)
        say(f"{case.name}: saved")
    except CheckpointError as error:
        told = (error.committed, *sorted(error.failures)) if isinstance(error, DistributedError) else ()
        say(f"{case.name}:", type(error).__name__, *told)
    return checkpointer


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=BOUND_S))
    # Held to the end, and not closed: rank 0 would wait, in vain, for ranks that have given it up.
    held = [run(case, Path(sys.argv[1], case.name)) for case in CASES]
    os._exit(0)
