"""The host: which one this is, how much of its memory this process may still take, and how much it took at most.

Reads /proc and control groups.

Ranks that have the same host_id() share memory, page cache and disks.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

_UNBOUNDED = 1 << 62
_SPARE_FILES = 64  # of what else goes on in the process


def host_id() -> str:
    """The same for all processes of one running host, whatever containers they are in; another after a reboot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return socket.gethostname()


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident at any one time since it began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reserve_open_files(count: int) -> None:
    """Let this process have that many files open beside those that it has. Raises OSError if it may not."""
    count += len(os.listdir("/proc/self/fd")) + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or count <= soft:
        return
    if hard != resource.RLIM_INFINITY and count > hard:
        raise OSError(
            errno.EMFILE, f"{count} files are to be open at a time, the limit is {hard}: raise it (ulimit -n)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def available_memory_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """What can be taken before the kernel has to kill: of the host, and of every control group around this process.

    Page cache that can be dropped at once counts as available. 2**62 where nothing can be known.
    """
    return min((*_of_host(proc), *_of_groups(proc, cgroups)), default=_UNBOUNDED)


def _of_host(proc: Path) -> Iterator[int]:
    for line in _lines(proc / "meminfo"):
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            yield int(rest.split()[0]) * 1024


def _of_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            root, limit, usage, reclaimable = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            reclaimable = "total_inactive_file"
        else:
            continue
        # In a container the path may be that of the host, while the container's own group is mounted as the root.
        relative = Path(path.lstrip("/"))
        for group in {root / parent for parent in (relative, *relative.parents)}:
            found = [_number(group / name) for name in (limit, usage)]
            if found[0] is not None and found[1] is not None:
                yield max(0, found[0] - found[1] + _field(group / "memory.stat", reclaimable))


def _number(path: Path) -> int | None:
    text = next(iter(_lines(path)), "")
    return int(text) if text.isdigit() else None  # "max" is no limit


def _field(path: Path, name: str) -> int:
    return next((int(line.split()[1]) for line in _lines(path) if line.startswith(f"{name} ")), 0)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("ascii").splitlines()
    except OSError:
        return []
