"""A small ext4 file system in a file: one that can be filled up, made read-only, or stopped.

    with mounted(directory, size_mib=48) as disk:
        disk.fill(leave_bytes=1 << 20)

It takes root, a loop device and the ext4 tools. Whatever happens, nothing stays mounted.
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
_WITHOUT_FLUSHING_THE_LOG = 2


class MountRefused(Exception):
    """This process may not mount, or has no tools to make a file system; says why."""


@dataclass(frozen=True)
class LoopDisk:
    """image: the file. path: where it is mounted, an empty directory but for lost+found."""

    image: Path
    path: Path

    def mount(self) -> None:
        _run("mount", "-o", "loop", str(self.image), str(self.path))

    def unmount(self) -> None:
        _run("umount", str(self.path))

    def remount(self, mode: Literal["ro", "rw"]) -> None:
        _run("mount", "-o", f"remount,{mode}", str(self.path))

    def fill(self, *, leave_bytes: int) -> Path:
        """A file that takes all space but about so many bytes."""
        filler = self.path / "filler"
        status = os.statvfs(self.path)
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - leave_bytes)
            os.fsync(file.fileno())
        return filler

    def stop(self) -> None:
        """Every later call fails, and only what was made durable is there after unmount() and mount()."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", _WITHOUT_FLUSHING_THE_LOG))
        finally:
            os.close(descriptor)

    def make_immutable(self, directory: Path, *, immutable: bool) -> None:
        """Nobody, root included, can change the names in the directory."""
        _run("chattr", "+i" if immutable else "-i", str(directory))


@contextmanager
def mounted(directory: Path, *, size_mib: int) -> Iterator[LoopDisk]:
    """A new one, mounted below `directory` while the body runs. Raises MountRefused."""
    disk = LoopDisk(directory / "disk.image", directory / "disk")
    disk.path.mkdir()
    with disk.image.open("wb") as image:
        image.truncate(size_mib << 20)
    try:
        _run("mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-N", "512", str(disk.image))
        disk.mount()
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise MountRefused(f"no file system can be made and mounted here: {said.strip()}") from error
    try:
        yield disk
    finally:
        try:
            disk.unmount()
        except subprocess.CalledProcessError:  # A failed test holds a file open.
            with suppress(subprocess.CalledProcessError):
                _run("umount", "--lazy", str(disk.path))
        disk.image.unlink()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
