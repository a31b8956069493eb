"""A file system that is full, or gets full while it is written to."""

from __future__ import annotations

from pathlib import Path

import pytest

from distckpt.commit import iteration_directory
from distckpt.errors import DistributedError
from distckpt.storage import PosixStorage
from tests.crash.failing_saves import NEW, NEXT, OLD, check_only_old, save_and_recover
from tests.crash.loop_disk import LoopDisk
from tests.crash.states import loaded, unexplained
from tests.crash.storages import TrustingStorage
from tests.distributed.launch import launch

COLUMNS = 1 << 17  # 4 MiB, a half of it on each of two ranks
ROOM_BYTES = 3 << 20  # for one of the halves


def check_only_old_is_left(storage: PosixStorage) -> None:
    """At once, without waiting for anything to become stale."""
    check_only_old(storage, COLUMNS)
    assert unexplained(storage) == set()


def test_save_that_does_not_fit_is_refused_before_the_first_byte(disk: LoopDisk) -> None:
    storage = PosixStorage(disk.path / "root")
    free_bytes: list[int] = []

    def free_now() -> int:
        space = storage.free_space()
        assert space is not None
        return space.size_bytes

    def fill() -> None:
        disk.fill(leave_bytes=ROOM_BYTES)
        free_bytes.append(free_now())

    def look_and_make_room() -> None:
        assert free_now() == free_bytes[0]
        assert not (disk.path / "root" / iteration_directory(NEW)).exists()
        check_only_old_is_left(storage)
        (disk.path / "filler").unlink()

    error = save_and_recover(storage, harm=fill, heal=look_and_make_room, columns=COLUMNS)
    assert "not enough space: the checkpoint takes 419" in str(error)
    assert f"which has {free_bytes[0]} bytes free. Nothing was written." in str(error)


@pytest.mark.parametrize("io_backend", ["", "threads"])
def test_disk_that_fills_up_while_it_is_written_to_leaves_the_previous_checkpoint(
    disk: LoopDisk, io_backend: str
) -> None:
    storage = TrustingStorage(disk.path / "root", io_backend=io_backend)

    def look_and_make_room() -> None:
        check_only_old_is_left(storage)
        (disk.path / "filler").unlink()

    error = save_and_recover(
        storage, harm=lambda: disk.fill(leave_bytes=ROOM_BYTES), heal=look_and_make_room, columns=COLUMNS
    )
    assert isinstance(error, DistributedError)
    assert error.committed == "no"
    assert error.failures
    assert all("No space left on device" in why and "shard-0000" in why for why in error.failures.values())


JOB = f"""
import sys, time
from pathlib import Path
import torch.distributed as dist
from distckpt import Checkpointer, DistributedError
from tests.crash.failing_saves import NEW, NEXT, OLD
from tests.crash.loop_disk import LoopDisk
from tests.crash.states import make_state
from tests.crash.storages import TrustingStorage

dist.init_process_group("gloo")
rank, disk, scratch = dist.get_rank(), LoopDisk(Path(), Path(sys.argv[1])), Path(sys.argv[2])
victim = None

class LateStorage(TrustingStorage):
    # The victim writes its file when the other rank has written its own.
    def create(self, name, *, size_hint=0):
        file = super().create(name, size_hint=size_hint)
        if victim is None or "shard-" not in name:
            return file
        written = scratch / f"written before rank {{victim}}"
        if rank != victim:
            finish = file.finish
            file.finish = lambda size_bytes: (finish(size_bytes), written.touch())
            return file
        deadline = time.monotonic() + 20
        while not written.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        return file

def save(iteration):
    state = make_state(iteration, checkpointer._coordinator, {COLUMNS})
    checkpointer.async_save(state, iteration=iteration).wait(timeout_s=60)

with Checkpointer(LateStorage(disk.path / "root"), timeout_s=30) as checkpointer:
    save(OLD)
    if rank == 0:
        filler = disk.fill(leave_bytes={ROOM_BYTES})
    for victim in (1, 0):
        dist.barrier()
        try:
            save(NEW)
        except DistributedError as error:
            assert all("No space left on device" in why for why in error.failures.values()), error
            print("raised", sorted(error.failures), error.committed, checkpointer.iterations())
    victim = None
    if rank == 0:
        filler.unlink()
    dist.barrier()
    save(NEXT)
dist.destroy_process_group()
"""


def test_disk_that_fills_up_under_the_background_writer_of_one_rank_is_an_error_of_all(
    disk: LoopDisk, tmp_path: Path
) -> None:
    for result in launch(JOB, 2, args=[str(disk.path), str(tmp_path)], timeout_s=120):
        assert result.stdout == f"raised [1] no [{OLD}]\nraised [0] no [{OLD}]\n"
    storage = PosixStorage(disk.path / "root")
    assert loaded(storage, 2, COLUMNS) == {OLD: OLD, NEXT: NEXT, None: NEXT}
    assert unexplained(storage) == set()
