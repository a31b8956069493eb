"""Shard files are opened ahead, a few at a time, and closed whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import pytest

from distckpt.checkpoint_files import CheckedFile
from distckpt.errors import CorruptionError
from distckpt.open_files import OpenFiles, read_files
from distckpt.reader import FileReads

TIMEOUT_S = 30.0


class CountedFile:
    """Stands in for a CheckedFile."""

    bytes_read = 10

    def __init__(self, files: CountedFiles, number: int) -> None:
        self._files, self._number = files, number

    def copy(self, ranges: Sequence[tuple[int, int]], targets: Sequence[object]) -> None:
        self._files.copy(self._number)

    def close(self) -> None:
        assert self._number in self._files.open_now
        self._files.open_now.remove(self._number)


class CountedFiles:
    """Opens files and knows which are open. damaged: numbers whose opening fails."""

    def __init__(self, damaged: Sequence[int] = ()) -> None:
        self.opened: list[int] = []
        self.copied: list[int] = []
        self.open_now: set[int] = set()
        self.most_open = 0
        self.changed = threading.Condition()
        self._damaged = damaged

    def open(self, reads: FileReads) -> CheckedFile:
        with self.changed:
            self.opened.append(reads.file)
            self.changed.notify_all()
        if reads.file in self._damaged:
            raise CorruptionError(f"file {reads.file} is damaged")
        self.open_now.add(reads.file)
        self.most_open = max(self.most_open, len(self.open_now))
        return cast(CheckedFile, CountedFile(self, reads.file))

    def copy(self, number: int) -> None:
        self.copied.append(number)

    def wait_until_opened(self, number: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: number in self.opened, TIMEOUT_S), self.opened


@pytest.fixture
def files() -> Iterator[CountedFiles]:
    files = CountedFiles()
    yield files
    assert not files.open_now


def reads_of(numbers: Sequence[int]) -> list[FileReads]:
    none = np.zeros(0, np.int64)
    return [FileReads(number, [(0, 1)], none, none, [], []) for number in numbers]


def test_every_file_is_read_once_in_order_and_counted(files: CountedFiles) -> None:
    numbers = list(range(0, 100, 3))
    assert read_files(reads_of(numbers), files.open) == 10 * len(numbers)
    assert files.opened == files.copied == numbers
    assert files.most_open <= 6


def test_files_are_opened_while_the_first_is_being_read(files: CountedFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "copy", lambda number: files.wait_until_opened(min(number + 4, 9)))
    read_files(reads_of(range(10)), files.open)


def test_no_reads_open_nothing(files: CountedFiles) -> None:
    assert read_files([], files.open) == 0
    assert files.opened == []


def test_error_of_opening_ahead_is_raised_when_the_file_is_asked_for() -> None:
    files = CountedFiles(damaged=[3])
    with pytest.raises(CorruptionError, match="file 3 is damaged"):
        read_files(reads_of(range(10)), files.open)
    assert files.copied == [0, 1, 2]
    assert not files.open_now


def test_failed_read_closes_what_was_opened_ahead(files: CountedFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int) -> None:
        files.wait_until_opened(4)
        raise OSError("unreadable")

    monkeypatch.setattr(files, "copy", fail)
    with pytest.raises(OSError, match="unreadable"):
        read_files(reads_of(range(10)), files.open)
    assert len(files.opened) < 10


def test_two_threads_at_different_files_keep_both_open(files: CountedFiles) -> None:
    with OpenFiles(reads_of(range(20)), files.open) as open_files:
        behind = open_files.file(0)
        ahead = open_files.file(10)
        open_files.close_before(0)
        assert open_files.file(0) is behind
        open_files.close_before(10)
        assert open_files.file(10) is ahead
        assert min(files.open_now) == 10
    assert open_files.bytes_read == 10 * len(files.opened)
