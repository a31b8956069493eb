"""File: created once, named or not, closed once; every failure is an OSError with its path."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from distckpt import _C


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "file")


@pytest.mark.parametrize("direct", [True, False])
def test_created_file_is_empty_and_named(path: str, direct: bool) -> None:
    file = _C.File.create(path, direct=direct)
    assert (file.path, file.size, file.is_named(path)) == (path, 0, True)
    assert os.stat(path).st_size == 0
    assert direct or not file.direct


def test_mode_is_applied_under_the_umask(path: str) -> None:
    before = os.umask(0o027)
    try:
        _C.File.create(path, mode=0o666)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o640


def test_creating_over_a_file_fails_and_leaves_it(path: str) -> None:
    Path(path).write_bytes(b"precious")
    with pytest.raises(FileExistsError) as caught:
        _C.File.create(path)
    assert (caught.value.errno, caught.value.filename) == (errno.EEXIST, path)
    assert Path(path).read_bytes() == b"precious"


def test_creating_through_a_dangling_link_fails(path: str) -> None:
    os.symlink(path + "-elsewhere", path)
    with pytest.raises(FileExistsError):
        _C.File.create(path)
    assert not os.path.exists(path + "-elsewhere")


def test_opening_what_is_not_there_names_it(path: str) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        _C.File.open(path)
    assert caught.value.filename == path
    assert os.strerror(errno.ENOENT) in str(caught.value)


def test_file_system_that_refuses_o_direct_is_read_buffered() -> None:
    file = _C.File.open("/proc/self/status", direct=True)
    assert not file.direct


def test_descriptor_is_not_inherited_by_other_programs(path: str) -> None:
    file = _C.File.create(path)
    links = {fd: os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
    (ours,) = [fd for fd, target in links.items() if target == path]
    assert not os.get_inheritable(int(ours))
    file.close()


def test_truncate_grows_and_shrinks(path: str) -> None:
    file = _C.File.create(path)
    file.truncate(10_001)
    assert file.size == os.stat(path).st_size == 10_001
    file.truncate(5)
    assert file.size == os.stat(path).st_size == 5


@pytest.mark.parametrize("size", [-1, 1 << 63])
def test_truncating_to_no_size_is_refused(path: str, size: int) -> None:
    with pytest.raises(ValueError, match=r"size|overflow"):
        _C.File.create(path).truncate(size)


def test_file_opened_for_reading_cannot_be_truncated(path: str) -> None:
    Path(path).write_bytes(b"precious")
    with pytest.raises(OSError, match="ftruncate") as caught:
        _C.File.open(path).truncate(0)
    assert caught.value.errno in (errno.EINVAL, errno.EBADF)
    assert Path(path).read_bytes() == b"precious"


def test_sync_succeeds_on_a_file_and_on_a_directory(path: str, tmp_path: Path) -> None:
    _C.File.create(path).sync()
    _C.sync_directory(str(tmp_path))


@pytest.mark.parametrize(("name", "code"), [("absent", errno.ENOENT), ("file", errno.ENOTDIR)])
def test_syncing_what_is_no_directory_fails(path: str, tmp_path: Path, name: str, code: int) -> None:
    Path(path).touch()
    with pytest.raises(OSError, match="open") as caught:
        _C.sync_directory(str(tmp_path / name))
    assert (caught.value.errno, caught.value.filename) == (code, str(tmp_path / name))


def test_is_named_follows_the_inode_not_the_name(path: str) -> None:
    file = _C.File.create(path)
    os.link(path, path + "-link")
    os.symlink(path, path + "-symlink")
    os.rename(path, path + "-moved")
    assert not file.is_named(path)
    assert file.is_named(path + "-moved")
    assert file.is_named(path + "-link")
    assert not file.is_named(path + "-symlink")
    Path(path).touch()
    assert not file.is_named(path)
    assert not file.is_named(path + "-symlink")
    os.unlink(path)
    assert not file.is_named(path + "/below")


def test_is_named_fails_where_it_cannot_know(path: str) -> None:
    file = _C.File.create(path)
    os.symlink(path + "-loop", path + "-loop")
    with pytest.raises(OSError, match="stat") as caught:
        file.is_named(path + "-loop")
    assert (caught.value.errno, caught.value.filename) == (errno.ELOOP, path + "-loop")


def test_closed_file_refuses_everything_but_close(path: str) -> None:
    file = _C.File.create(path)
    file.close()
    file.close()
    assert file.path == path
    for call in (lambda: file.size, lambda: file.truncate(1), file.sync, lambda: file.is_named(path)):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_dropping_the_object_closes_the_descriptor(path: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    file = _C.File.create(path)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del file
    assert len(os.listdir("/proc/self/fd")) == before


def test_concurrent_use_and_close_end_in_a_result_or_a_closed_file(path: str) -> None:
    file = _C.File.create(path)
    unexpected: list[BaseException] = []

    def use() -> None:
        try:
            while True:
                assert file.size == 0
        except ValueError:
            pass
        except BaseException as error:
            unexpected.append(error)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    file.close()
    for thread in threads:
        thread.join()
    assert not unexpected


@pytest.mark.parametrize("name", ["file with spaces", "файл", os.fsdecode(b"not-utf8-\xff")])
def test_path_of_any_bytes_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / name)
    try:
        file = _C.File.create(path)
    except OSError:
        pytest.skip("this file system refuses the name")
    assert file.path == path
    assert file.is_named(path)
    assert os.listdir(tmp_path) == [name]


def test_path_objects_are_paths(tmp_path: Path) -> None:
    file = _C.File.create(tmp_path / "file")
    assert file.path == str(tmp_path / "file")
    _C.sync_directory(tmp_path)


def test_path_with_a_null_character_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="null"):
        _C.File.create(path + "\0tail")
    assert not os.path.exists(path)
