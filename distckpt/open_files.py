"""Shard files, opened ahead of their reading. Decides when each is opened and closed; reads no tensor.

To open a file is to read its header and its checksum table. Behind the requests that keep a disk busy those few bytes
wait as long as all of them take, so a thread of its own asks for them while the files before are being read.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from typing_extensions import Self

from distckpt.checkpoint_files import CheckedFile
from distckpt.reader import FileReads

OpenFile = Callable[[FileReads], CheckedFile]

_AHEAD = 4  # files that are open, or being opened, beside the one that is asked for


class OpenFiles:
    """A context manager: whatever happens, what was opened is closed. Several threads may use it.

    reads: in order of file, one of each, all of which will be asked for in that order. open_file is called once for
    each.
    """

    def __init__(self, reads: Iterable[FileReads], open_file: OpenFile) -> None:
        self._to_open = deque(reads)
        self._open_file = open_file
        self._threads = ThreadPoolExecutor(1, "distckpt-open")
        self._lock = threading.Lock()  # of the files to open and those that are open
        self._open: dict[int, Future[CheckedFile]] = {}
        self.bytes_read = 0  # of the files that were closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._close(list(self._open))

    def file(self, number: int) -> CheckedFile:
        """The file of that number, which stays open until close_before. Raises what open_file raised."""
        with self._lock:
            while self._to_open and (number not in self._open or len(self._open) <= _AHEAD):
                reads = self._to_open.popleft()
                self._open[reads.file] = self._threads.submit(self._open_file, reads)
            opened = self._open[number]
        return opened.result()

    def close_before(self, number: int) -> None:
        """Close the files whose number is smaller: nobody will ask for them again."""
        with self._lock:
            self._close([file for file in self._open if file < number])

    def _close(self, files: Iterable[int]) -> None:
        for opened in [self._open.pop(file) for file in files]:
            if not opened.cancelled() and opened.exception() is None:
                opened.result().close()
                self.bytes_read += opened.result().bytes_read


def read_files(reads: Sequence[FileReads], open_file: OpenFile) -> int:
    """Fill the targets; returns the bytes read. Raises CorruptionError or OSError; the targets are then undefined."""
    with OpenFiles(reads, open_file) as files:
        for one in reads:
            files.file(one.file).copy(one.ranges, one.targets)
            files.close_before(one.file + 1)
    return files.bytes_read
