"""What the process does in test_io_faults.py: every check_ function saves again and again, as system calls fail.

python io_fault_saves.py <directory>    below the library of io_faults.cc; prints [name, "ok" or a traceback] for each
check, and how many faults there were

Both ranks of each save are threads, so that a fault strikes the rank whose file it is about.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import threading
from contextlib import ExitStack
from pathlib import Path

from distckpt import Checkpointer, removing, writing
from distckpt.commit import iteration_directory
from distckpt.coordinator import Coordinator
from distckpt.errors import CheckpointError, DistributedError
from distckpt.storage import PosixStorage, Storage
from distckpt.storage.requests import Requests
from distckpt.testing import run_ranks
from tests.crash import failing_saves  # and not its functions: those of that name here are the checks to run
from tests.crash.failing_saves import NEW, NEXT, OLD, OPTIONS, Roots, save_versions
from tests.crash.io_faults import EVERY, KINDS, Calls, Fault, injected
from tests.crash.states import loaded, make_state
from tests.distributed.checks import run_checks

CODES = (errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT)
KINDS_OF_SHARD_FILES = ("open", "write", "truncate", "fsync", "fstat", "close")
SHARDS_OF_RANK_1 = "/shard-00001"
counts = {"faults": 0, "roots checked": 0}


def save_under(fault: Fault, storage: Storage) -> tuple[CheckpointError | None, Calls]:
    """The outcome of a save of NEW by a job that has loaded OLD, and saves NEXT later. Checks the root after each."""
    stack, calls = ExitStack(), list[Calls]()
    begin = threading.Barrier(2, lambda: calls.append(stack.enter_context(injected(fault))), timeout=30)
    end = threading.Barrier(2, stack.close, timeout=30)

    def run(coordinator: Coordinator) -> CheckpointError | None:
        error = None
        with Checkpointer(storage, coordinator=coordinator, timeout_s=20, **OPTIONS) as checkpointer:
            checkpointer.load(make_state(0, coordinator))
            begin.wait()
            try:
                checkpointer.save(make_state(NEW, coordinator), iteration=NEW)
            except CheckpointError as raised:
                error = raised
            checkpointer._after_commit.wait(20)  # The fault may be in what follows the commit.
            end.wait()
            if coordinator.rank == 0:
                failing_saves.check_root(storage, 2, error)
            checkpointer.iterations()  # The other rank waits for rank 0.
            checkpointer.save(make_state(NEXT, coordinator), iteration=NEXT)
        return error

    with stack:
        error, other = run_ranks(2, run)
    assert (type(error), str(error)) == (type(other), str(other))
    failing_saves.check_next_save(storage, 2)
    counts["faults"] += calls[0].failed
    counts["roots checked"] += 2
    return error, calls[0]


def check_each_call_that_fails_once(root: Path) -> None:
    """Whatever call it is, and whether the save fails by it or gets over it."""
    roots = Roots("posix", 2, root / "once")
    codes = itertools.cycle(CODES)
    for kind in KINDS:
        storage = roots.copy()
        _, calls = save_under(Fault(kind, storage.location, errno.EIO, first=EVERY), storage)
        assert calls.seen, kind
        for number in range(1, calls.seen + 1):
            storage = roots.copy()
            save_under(Fault(kind, storage.location, next(codes), first=number), storage)


def check_shard_file_whose_calls_fail_for_good_fails_the_save(root: Path) -> None:
    roots = Roots("posix", 2, root / "for good")
    for kind, code in itertools.product(KINDS_OF_SHARD_FILES, CODES):
        error, calls = save_under(Fault(kind, SHARDS_OF_RANK_1, code, count=EVERY), roots.copy())
        assert calls.failed, kind
        assert isinstance(error, DistributedError), (kind, code)
        assert list(error.failures) == [1]
        assert os.strerror(code) in error.failures[1]
        assert SHARDS_OF_RANK_1 in error.failures[1]
        assert error.committed == "no"


def check_directory_that_cannot_be_synced_fails_the_save(root: Path) -> None:
    roots = Roots("posix", 2, root / "directory")
    for code, count in itertools.product(CODES, (1, EVERY)):
        directory = f"/{iteration_directory(NEW)}$"
        error, calls = save_under(Fault("fsync", directory, code, count=count), roots.copy())
        assert calls.failed
        assert error is not None
        assert os.strerror(code) in str(error)


def check_index_that_cannot_be_written_fails_the_save(root: Path) -> None:
    roots = Roots("posix", 2, root / "index")
    for code in CODES:
        index = f"/{iteration_directory(NEW)}/index-"
        error, calls = save_under(Fault("link", index, code, count=EVERY), roots.copy())
        assert calls.failed
        assert isinstance(error, DistributedError)
        assert error.committed == "no"
        assert os.strerror(code) in str(error)


def check_call_whose_reply_is_lost(root: Path) -> None:
    """A link() is recognised by its effect; after other calls the save may fail, and then says so."""
    roots = Roots("posix", 2, root / "reply")
    for kind in ("open", "truncate", "link", "rename"):
        storage = roots.copy()
        _, calls = save_under(Fault(kind, storage.location, errno.EIO, first=EVERY), storage)
        for number in range(1, calls.seen + 1):
            storage = roots.copy()
            error, _ = save_under(Fault(kind, storage.location, errno.EIO, first=number, after=True), storage)
            assert error is None or kind != "link"


def check_writes_that_write_half_are_continued(root: Path) -> None:
    storage = PosixStorage(root / "short", io_backend="threads", writes=Requests(1 << 20, 2))
    columns = 1 << 17  # 2 MiB on each rank: several requests
    with injected(Fault("write", storage.location, 0, count=EVERY)) as calls:
        save_versions(storage, 2, (OLD, NEW), columns)
    assert calls.failed > 100
    assert loaded(storage, 2, columns) == {OLD: OLD, NEW: NEW, None: NEW}
    counts["faults"] += calls.failed
    counts["roots checked"] += 2


if __name__ == "__main__":
    removing.STALE_AFTER_S = 0.0  # What a failed save has left is old the moment it fails.
    writing.RETRY_AFTER_S = (0.0, 0.0)
    logging.getLogger("distckpt").setLevel(logging.CRITICAL)
    run_checks(globals(), 1)
    for name, count in counts.items():
        print(json.dumps([name, str(count)]))
