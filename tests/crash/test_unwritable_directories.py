"""Directories that cannot be written to, lose their files, or vanish during a save; a file system that stops."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from distckpt.commit import iteration_directory
from distckpt.errors import DistributedError
from distckpt.storage import PosixStorage
from tests.crash.failing_saves import NEW, OLD, check_only_old, check_root, save_and_recover, save_versions
from tests.crash.loop_disk import LoopDisk
from tests.crash.storages import InterferedStorage

pytestmark = pytest.mark.usefixtures("everything_is_stale")
DIRECTORY = iteration_directory(NEW)
MOMENTS = (
    ("write", f"{DIRECTORY}/shard-00000"),
    ("finish", f"{DIRECTORY}/shard-00001"),
    ("create", f"{DIRECTORY}/chunks-"),
    ("finish", f"{DIRECTORY}/chunks-"),
    ("sync_directory", DIRECTORY),
    ("put_if_absent", f"{DIRECTORY}/index-"),
)
moments = pytest.mark.parametrize(("method", "text"), MOMENTS, ids=[" ".join(moment) for moment in MOMENTS])


def test_read_only_file_system_is_named_on_every_rank(disk: LoopDisk) -> None:
    storage = PosixStorage(disk.path / "root")

    def look_and_make_writable() -> None:
        check_only_old(storage)
        disk.remount("rw")

    error = save_and_recover(storage, harm=lambda: disk.remount("ro"), heal=look_and_make_writable)
    assert isinstance(error, DistributedError)
    assert error.committed == "no"
    assert re.search(f"Read-only file system: '{disk.path}/root/", str(error))


def test_root_without_write_permission_is_named_on_every_rank(disk: LoopDisk) -> None:
    """Root, who passes all permissions, is kept out by the immutable flag."""
    root = disk.path / "root"
    storage = PosixStorage(root)

    def look_and_allow() -> None:
        check_only_old(storage)
        disk.make_immutable(root, immutable=False)

    error = save_and_recover(storage, harm=lambda: disk.make_immutable(root, immutable=True), heal=look_and_allow)
    assert isinstance(error, DistributedError)
    assert error.committed == "no"
    assert f"Operation not permitted: '{root}/{DIRECTORY}'" in str(error)


def remove(directory: Path) -> None:
    """With all in it, though the other rank may still be making files there."""
    for _ in range(1000):
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return
    raise AssertionError(f"{directory} cannot be removed")


@moments
def test_directory_deleted_under_the_writers_is_an_error_of_all_ranks(tmp_path: Path, method: str, text: str) -> None:
    directory = tmp_path / DIRECTORY
    storage = InterferedStorage(PosixStorage(tmp_path), method, text, lambda: remove(directory))
    error = save_and_recover(storage)
    assert storage.interfered
    assert isinstance(error, DistributedError)
    assert error.committed == "no"
    assert re.search(f"(No such file or directory|no longer names the file that was written): '{directory}", str(error))


@pytest.mark.parametrize("other", ["no file", "another file"])
@pytest.mark.parametrize("file", ["shard-00001", "chunks-"])
def test_file_deleted_or_replaced_under_its_writer_is_in_no_checkpoint(tmp_path: Path, file: str, other: str) -> None:
    def replace() -> None:
        (path,) = (tmp_path / DIRECTORY).glob(f"{file}*")
        path.unlink()
        if other == "another file":
            path.touch()

    storage = InterferedStorage(PosixStorage(tmp_path), "finish", f"{DIRECTORY}/{file}", replace)
    error = save_and_recover(storage)
    assert storage.interfered
    assert error is None or "path no longer names the file that was written" in str(error)


@moments
def test_file_system_that_stops_during_a_save_keeps_the_previous_checkpoint(
    disk: LoopDisk, method: str, text: str
) -> None:
    """As when its device fails, or its journal is aborted. It is mounted again afterwards."""

    def mount_again() -> None:
        disk.unmount()
        disk.mount()

    storage = InterferedStorage(PosixStorage(disk.path / "root"), method, text, disk.stop)
    error = save_and_recover(storage, heal=mount_again)
    assert storage.interfered
    assert isinstance(error, DistributedError)


def test_save_that_has_returned_survives_a_file_system_that_stops(disk: LoopDisk) -> None:
    """Nothing is flushed when it stops: what is there afterwards is what was synced."""
    storage = PosixStorage(disk.path / "root")
    save_versions(storage, 2, (OLD, NEW))
    disk.stop()
    disk.unmount()
    disk.mount()
    check_root(storage, 2, None)
