"""What a benchmark does to checkpoint files: make them durable, drop them from the page cache, read them into it."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path

READ_BYTES = 8 << 20


def files_below(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def sync_files(paths: Sequence[Path]) -> None:
    for file in _opened(paths):
        os.fsync(file.fileno())


def sync_directories(directory: Path) -> None:
    """Every directory from the lowest up to the one that names `directory`."""
    below = sorted((path for path in directory.rglob("*") if path.is_dir()), reverse=True)
    for path in (*below, directory, directory.parent):
        _sync(path)


def remove(directory: Path) -> None:
    """Remove, and have the file system finish with it now rather than in the middle of what is timed next."""
    while directory.exists():
        try:
            shutil.rmtree(directory)
        except FileNotFoundError:  # An engine that cleans up in the background was faster with a file.
            continue
    _sync(directory.parent)


def _opened(paths: Sequence[Path]) -> Iterator[FileIO]:
    """One after the other, without what an engine that cleans up in the background has removed since it was listed."""
    for path in paths:
        with suppress(FileNotFoundError), path.open("rb", buffering=0) as file:
            yield file


def drop_from_page_cache(paths: Sequence[Path]) -> None:
    for file in _opened(paths):
        os.fsync(file.fileno())  # Dirty pages cannot be dropped.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_into_page_cache(paths: Sequence[Path]) -> None:
    for file in _opened(paths):
        while file.read(READ_BYTES):
            pass


def cached_fraction(paths: Sequence[Path]) -> float:
    """How much of the files lies in the page cache, by mincore(2)."""
    cached = total = 0
    for file in _opened(paths):
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            continue
        pages = -(-size // mmap.PAGESIZE)
        total += pages
        cached += _resident_pages(file, size, pages)
    return cached / max(1, total)


def _resident_pages(file: FileIO, size: int, pages: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    resident = (ctypes.c_ubyte * pages)()
    # A private writable map, because ctypes takes the address of writable buffers only.
    with mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE) as mapped:
        view = (ctypes.c_char * size).from_buffer(mapped)
        result = libc.mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(size), resident)
        error = ctypes.get_errno()
        del view
    if result:
        raise OSError(error, os.strerror(error), str(file.name))
    return sum(page & 1 for page in resident)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
