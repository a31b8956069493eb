"""Files that commands write where they are told to: whole, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from distckpt.cli.whole_file import whole_file


def write(path: Path, text: str, error: BaseException | None = None) -> None:
    with whole_file(path) as file:
        file.write_text(text)
        if error is not None:
            raise error


def test_file_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    for text in ("old", "new"):
        write(path, text)
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_file_that_is_not_finished_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "page.html"
    with pytest.raises(type(error)):
        write(path, "half", error)
    assert list(tmp_path.iterdir()) == []
    write(path, "old")
    with pytest.raises(type(error)):
        write(path, "half", error)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_link_stays_a_link(tmp_path: Path) -> None:
    path, target = tmp_path / "link", tmp_path / "elsewhere"
    path.symlink_to(target)
    write(path, "new")
    assert path.is_symlink()
    assert target.read_text() == "new"


def test_pipe_is_written_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(path.read_text()), daemon=True)
    reader.start()
    write(path, "text")
    reader.join(30)
    assert read == ["text"]
    assert path.is_fifo()


def test_standard_output_is_written_to_itself() -> None:
    script = (
        "from pathlib import Path; from tests.unit.test_whole_file import write; write(Path('/dev/stdout'), 'text')"
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert done.stdout == "text"


def test_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        write(tmp_path, "text")
