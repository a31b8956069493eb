"""Where and with what a run was made: plain facts for the JSON."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("distckpt", "torch", "numpy", "safetensors", "megatron-core", "torchsnapshot", "tensorstore")
TREE = Path(__file__).resolve().parent.parent


def describe_machine() -> dict[str, str | int]:
    fields = dict(_fields(Path("/proc/cpuinfo")))
    memory_kib = int(dict(_fields(Path("/proc/meminfo")))["MemTotal"].split()[0])
    return {
        "cpu": fields.get("model name", platform.machine()),
        "cores": core_count(),
        "memory_bytes": memory_kib << 10,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def core_count() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0))


def describe_file_system(directory: Path) -> dict[str, str | int]:
    """Of the deepest mount above the directory."""
    mounts = [line.split()[1:4] for line in Path("/proc/mounts").read_text().splitlines()]
    resolved = directory.resolve()
    above = [mount for mount in mounts if resolved.is_relative_to(mount[0])]
    _, kind, options = max(above, key=lambda mount: len(mount[0]))
    status = os.statvfs(resolved)
    return {"type": kind, "options": options, "free_bytes": status.f_bavail * status.f_frsize}


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of this tree, with "+" if tracked files differ from it; "" outside git."""
    try:
        name = _git("rev-parse", "HEAD")
        return name + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(TREE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _fields(path: Path) -> list[tuple[str, str]]:
    """The "name : value" lines of a file in /proc."""
    split = (line.partition(":") for line in path.read_text().splitlines())
    return [(name.strip(), value.strip()) for name, _, value in split]
