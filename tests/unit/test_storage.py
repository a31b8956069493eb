"""The storage backends: the contract over all of them, then what each promises beyond it."""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path

import pytest

from distckpt import _C
from distckpt.storage import PosixStorage, Storage, posix
from distckpt.storage.contract import pattern, read_all, write_all
from distckpt.storage.posix import PosixWriteFile
from distckpt.storage.requests import Requests
from distckpt.testing import Crash, CrashingStorage, MemoryStorage, StorageContract


class TestPosixStorageOnThreads(StorageContract):
    def make_storage(self, tmp_path: Path) -> Storage:
        return PosixStorage(tmp_path / "parent" / "root", io_backend="threads")


@pytest.mark.skipif("io_uring" not in _C.BLOCK_IO_BACKENDS, reason="this kernel refuses io_uring")
class TestPosixStorageOnIoUring(StorageContract):
    def make_storage(self, tmp_path: Path) -> Storage:
        requests = Requests(64 << 10, 3)
        return PosixStorage(tmp_path / "root", io_backend="io_uring", writes=requests, reads=requests)


class TestMemoryStorage(StorageContract):
    def make_storage(self, tmp_path: Path) -> Storage:
        return MemoryStorage()


class TestCrashingStorageThatDoesNotFail(StorageContract):
    def make_storage(self, tmp_path: Path) -> Storage:
        return CrashingStorage(MemoryStorage())


# PosixStorage


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def posix_storage(root: Path) -> PosixStorage:
    storage = PosixStorage(root)
    storage.make_directory("")
    return storage


def fail_with(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def test_unknown_io_backend_is_refused_at_once(root: Path) -> None:
    with pytest.raises(ValueError, match="pigeon"):
        PosixStorage(root, io_backend="pigeon")


def test_location_is_the_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert PosixStorage("some/root").location == str(tmp_path / "some" / "root")


def test_io_backend_is_the_best_there_is(posix_storage: PosixStorage) -> None:
    assert posix_storage.io_backend == _C.BLOCK_IO_BACKENDS[0]


def test_make_directory_over_a_file_fails(posix_storage: PosixStorage) -> None:
    posix_storage.put_if_absent("a", b"1")
    for name in ("a", "a/b"):
        with pytest.raises(OSError, match="a"):
            posix_storage.make_directory(name)


def test_root_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for root in (tmp_path / "file", tmp_path / "file" / "root"):
        with pytest.raises(OSError, match="file"):
            PosixStorage(root).make_directory("")


def test_files_get_the_permissions_of_the_umask(posix_storage: PosixStorage, root: Path) -> None:
    before = os.umask(0o027)
    try:
        write_all(posix_storage, "created", b"1")
        posix_storage.put_if_absent("put", b"1")
        posix_storage.replace("replaced", b"1")
    finally:
        os.umask(before)
    for name in ("created", "put", "replaced"):
        assert stat.S_IMODE((root / name).stat().st_mode) == 0o640


def test_calls_below_a_missing_directory_say_so(posix_storage: PosixStorage) -> None:
    for call in (
        lambda: posix_storage.create("missing/a"),
        lambda: posix_storage.put_if_absent("missing/a", b"1"),
        lambda: posix_storage.replace("missing/a", b"1"),
        lambda: posix_storage.sync_directory("missing"),
    ):
        with pytest.raises(FileNotFoundError) as caught:
            call()
        assert "missing" in str(caught.value.filename)


def test_open_refuses_a_named_pipe_instead_of_waiting(posix_storage: PosixStorage, root: Path) -> None:
    os.mkfifo(root / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        posix_storage.open("pipe")


def test_open_file_stays_readable_when_its_name_is_removed(posix_storage: PosixStorage) -> None:
    write_all(posix_storage, "a", b"content")
    file = posix_storage.open("a")
    posix_storage.remove("a")
    buffer = bytearray(7)
    file.read_into(0, buffer)
    file.close()
    assert buffer == b"content"


def test_list_shows_temporary_files_that_a_crash_left(posix_storage: PosixStorage, root: Path) -> None:
    (root / ".tmp-0123").write_bytes(b"half")
    assert posix_storage.list("") == [".tmp-0123"]
    posix_storage.remove(".tmp-0123")
    assert posix_storage.list("") == []


def test_age_is_counted_from_the_modification_time(posix_storage: PosixStorage, root: Path) -> None:
    write_all(posix_storage, "a", b"1")
    os.utime(root / "a", (time.time() - 5000, time.time() - 5000))
    old = posix_storage.age_s("a")
    assert old >= 5000
    posix_storage.touch("a")
    assert posix_storage.age_s("a") < old
    os.utime(root / "a", (time.time() + 5000, time.time() + 5000))
    assert posix_storage.age_s("a") == 0


def test_free_space_is_that_of_the_file_system(root: Path, tmp_path: Path) -> None:
    free = PosixStorage(root / "not" / "yet" / "there").free_space()
    status = os.statvfs(tmp_path)
    assert free is not None
    assert 0 < free.size_bytes <= status.f_blocks * status.f_frsize
    other = PosixStorage(tmp_path).free_space()
    assert other is not None
    assert other.filesystem_id == free.filesystem_id


def test_free_space_is_unknown_where_the_file_system_does_not_say(
    posix_storage: PosixStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((4096, 4096, *[0] * 9)))
    assert posix_storage.free_space() is None


@pytest.mark.parametrize(
    ("call", "step"),
    [
        *(("put_if_absent", step) for step in ("write", "fsync", "close", "link")),
        *(("replace", step) for step in ("write", "fsync", "close", "rename")),
    ],
)
def test_failed_small_write_leaves_neither_name_nor_temporary_file(
    posix_storage: PosixStorage, monkeypatch: pytest.MonkeyPatch, call: str, step: str
) -> None:
    real_close = os.close

    def fail(*arguments: object, **options: object) -> None:
        if step == "close":
            real_close(arguments[0])  # type: ignore[arg-type]
        raise fail_with(errno.EIO)

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="Input/output error"):
            getattr(posix_storage, call)("a", b"content")
    assert posix_storage.list("") == []


def test_failed_replace_keeps_the_old_content(posix_storage: PosixStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    posix_storage.replace("a", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(fail_with(errno.ENOSPC)))
        with pytest.raises(OSError, match="No space") as caught:
            posix_storage.replace("a", b"new")
    assert str(caught.value.filename).endswith("/root/a")
    assert read_all(posix_storage, "a") == b"old"
    assert posix_storage.list("") == ["a"]


def test_short_writes_of_small_files_are_continued(
    posix_storage: PosixStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:7]))
        assert posix_storage.put_if_absent("a", b"more than seven bytes")
    assert read_all(posix_storage, "a") == b"more than seven bytes"


def test_append_that_is_cut_short_fails_and_the_next_begins_a_line(
    posix_storage: PosixStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:7]))
        with pytest.raises(OSError, match="only 7 of 13 bytes were written") as caught:
            posix_storage.append("log", b"a whole line\n")
    assert str(caught.value.filename).endswith("/root/log")
    posix_storage.append("log", b"another\n")
    assert read_all(posix_storage, "log") == b"a whole\nanother\n"


def test_append_to_a_named_pipe_fails_and_does_not_wait(posix_storage: PosixStorage, tmp_path: Path) -> None:
    os.mkfifo(os.path.join(posix_storage.location, "log"))
    with pytest.raises(OSError, match="not a regular file"):
        posix_storage.append("log", b"line\n")


def test_put_if_absent_succeeds_when_only_the_reply_to_link_was_lost(
    posix_storage: PosixStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_link = os.link

    def link_twice(source: str, target: str, *, follow_symlinks: bool) -> None:
        real_link(source, target, follow_symlinks=follow_symlinks)
        real_link(source, target, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(os, "link", link_twice)
    assert posix_storage.put_if_absent("a", b"1") is True
    assert posix_storage.list("") == ["a"]


def test_failed_directory_sync_is_reported_by_every_call_that_needs_it(
    posix_storage: PosixStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    monkeypatch.setattr(_C, "sync_directory", fail)
    for call in (
        lambda: posix_storage.make_directory("d"),
        lambda: posix_storage.sync_directory(""),
        lambda: posix_storage.put_if_absent("a", b"1"),
        lambda: posix_storage.replace("b", b"1"),
    ):
        with pytest.raises(OSError, match="Input/output error"):
            call()


def test_directory_sync_may_be_an_operation_that_the_file_system_does_not_have(
    posix_storage: PosixStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)

    monkeypatch.setattr(_C, "sync_directory", refuse)
    posix_storage.make_directory("d")
    assert posix_storage.put_if_absent("d/a", b"1")


class FailingFile:
    """A _C.File of which one method fails."""

    def __init__(self, file: _C.File, method: str) -> None:
        self._file = file
        self._method = method

    def __getattr__(self, name: str) -> object:
        if name == self._method:

            def fail(*arguments: object) -> None:
                if name == "close":
                    self._file.close()
                raise fail_with(errno.EIO)

            return fail
        return getattr(self._file, name)


@pytest.mark.parametrize("step", ["truncate", "sync", "is_named", "close"])
def test_failed_finish_abandons_the_file_for_good(posix_storage: PosixStorage, root: Path, step: str) -> None:
    inner = _C.File.create(str(root / "a"))
    file = posix.PosixWriteFile("a", FailingFile(inner, step), posix_storage._writes, posix_storage._is_buffered)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="Input/output error"):
        file.finish(0)
    with pytest.raises(ValueError, match="abandoned"):
        file.finish(0)
    with pytest.raises(ValueError, match="abandoned"):
        file.write(0, b"1")
    file.abandon()


def test_failed_write_abandons_the_file_for_good(posix_storage: PosixStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    class FailingBlockIO:
        def write(self, file: _C.File, offset: int, data: bytes) -> None:
            raise fail_with(errno.ENOSPC)

    file = posix_storage.create("a")
    monkeypatch.setattr(posix_storage._writes, "_idle", [FailingBlockIO()])
    with pytest.raises(OSError, match="No space"):
        file.write(0, b"1")
    with pytest.raises(ValueError, match="abandoned"):
        file.finish(1)
    # The BlockIO that failed is not used again either.
    write_all(posix_storage, "b", b"1")
    assert read_all(posix_storage, "b") == b"1"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_storage_works_in_a_forked_child(posix_storage: PosixStorage) -> None:
    write_all(posix_storage, "parent", pattern(100_000))
    child = os.fork()
    if child == 0:
        try:
            write_all(posix_storage, "child", read_all(posix_storage, "parent"))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert read_all(posix_storage, "child") == pattern(100_000)


# MemoryStorage


def memory_storage() -> MemoryStorage:
    storage = MemoryStorage()
    storage.make_directory("d")
    return storage


def every_power_cut(storage: MemoryStorage) -> list[MemoryStorage]:
    return [storage.power_cut(), *(storage.power_cut(seed) for seed in range(100))]


def content_or_none(storage: MemoryStorage, name: str) -> bytes | None:
    try:
        return read_all(storage, name)
    except FileNotFoundError:
        return None


def test_power_cut_keeps_what_is_durable() -> None:
    storage = memory_storage()
    write_all(storage, "d/synced", pattern(10_000))
    storage.sync_directory("d")
    storage.put_if_absent("d/put", b"1")
    storage.replace("d/replaced", b"2")
    for after in every_power_cut(storage):
        assert after.list("d") == ["put", "replaced", "synced"]
        assert read_all(after, "d/synced") == pattern(10_000)
        assert read_all(after, "d/put") == b"1"
        assert read_all(after, "d/replaced") == b"2"


def test_power_cut_loses_a_name_without_directory_sync() -> None:
    storage = memory_storage()
    write_all(storage, "d/a", b"1")
    assert storage.power_cut().list("d") == []
    seen = {content_or_none(after, "d/a") for after in every_power_cut(storage)}
    assert seen == {None, b"1"}
    assert storage.list("d") == ["a"]


def test_power_cut_does_not_take_a_neighbours_put_for_a_directory_sync() -> None:
    storage = memory_storage()
    write_all(storage, "d/a", b"1")
    storage.put_if_absent("d/put", b"2")
    assert storage.power_cut().list("d") == ["put"]


def test_power_cut_tears_content_that_was_not_finished() -> None:
    storage = memory_storage()
    content = pattern(16_384)
    file = storage.create("d/a")
    file.write(0, content[:8192])
    file.write(8192, content[8192:])
    storage.sync_directory("d")
    assert read_all(storage.power_cut(), "d/a") == b""
    seen = {read_all(after, "d/a") for after in every_power_cut(storage)}
    assert {b"", content} < seen
    assert any(len(torn) == 16_384 and torn != content for torn in seen)


def test_power_cut_may_lose_or_tear_what_was_appended() -> None:
    storage = memory_storage()
    storage.append("d/log", b"1" * 2000 + b"\n")
    assert storage.power_cut().list("d") == []
    storage.sync_directory("d")
    assert read_all(storage.power_cut(), "d/log") == b""
    seen = {len(read_all(after, "d/log")) for after in every_power_cut(storage)}
    assert {0, 2001} < seen


def test_power_cut_may_bring_back_a_removed_file() -> None:
    storage = memory_storage()
    storage.put_if_absent("d/a", b"1")
    storage.remove("d/a")
    assert read_all(storage.power_cut(), "d/a") == b"1"
    assert {content_or_none(after, "d/a") for after in every_power_cut(storage)} == {None, b"1"}
    storage.sync_directory("d")
    assert {content_or_none(after, "d/a") for after in every_power_cut(storage)} == {None}


def test_power_cut_may_bring_back_a_removed_directory() -> None:
    storage = memory_storage()
    storage.remove_directory("d")
    assert {tuple(after.list("")) for after in every_power_cut(storage)} == {(), ("d",)}
    storage.sync_directory("")
    assert {tuple(after.list("")) for after in every_power_cut(storage)} == {()}


def test_power_cut_does_not_fill_a_directory_that_was_made_again() -> None:
    storage = memory_storage()
    storage.put_if_absent("d/a", b"1")
    storage.remove("d/a")
    storage.remove_directory("d")
    storage.make_directory("d")
    for after in every_power_cut(storage):
        assert after.list("") == ["d"]
        assert after.list("d") == []


def test_capacity_bounds_what_can_be_written() -> None:
    storage = MemoryStorage(capacity_bytes=10_000)
    storage.make_directory("")
    write_all(storage, "a", bytes(8192))
    free = storage.free_space()
    assert free is not None
    assert free.size_bytes == 10_000 - 8192
    with pytest.raises(OSError, match="No space"):
        write_all(storage, "b", bytes(8192))
    with pytest.raises(OSError, match="No space"):
        storage.put_if_absent("c", bytes(1900))
    assert "c" not in storage.list("")


def test_ages_go_by_the_given_clock() -> None:
    now_s = 1000.0
    storage = MemoryStorage(clock=lambda: now_s)
    storage.make_directory("")
    storage.replace("a", b"")
    now_s += 60
    assert storage.age_s("a") == 60
    storage.touch("a")
    assert storage.age_s("a") == 0


# CrashingStorage


def save_two_files(storage: Storage) -> None:
    storage.make_directory("d")
    write_all(storage, "d/a", b"1" * 8192)
    storage.sync_directory("d")
    storage.put_if_absent("d/index", b"2")
    storage.open("d/a").read_into(0, bytearray(1))


def test_crashing_storage_counts_every_call() -> None:
    storage = CrashingStorage(MemoryStorage())
    save_two_files(storage)
    assert storage.calls == (
        "make_directory d",
        "create d/a",
        "write d/a",
        "finish d/a",
        "sync_directory d",
        "put_if_absent d/index",
        "open d/a",
        "read_into d/a",
    )
    assert not storage.failed


@pytest.mark.parametrize("moment", ["before", "half", "after"])
@pytest.mark.parametrize("call", range(1, 9))
def test_crashing_storage_fails_the_nth_call(call: int, moment: str) -> None:
    storage = CrashingStorage(MemoryStorage(), fail_at=call, moment=moment)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="injected"):
        save_two_files(storage)
    assert storage.failed
    assert len(storage.calls) == call
    assert storage.list("") in (["d"], [])


def test_after_a_crash_every_call_fails_and_does_nothing() -> None:
    memory = MemoryStorage()
    storage = CrashingStorage(memory, fail_at=5, error=Crash("killed"))
    with pytest.raises(Crash):
        save_two_files(storage)
    with pytest.raises(Crash):
        storage.put_if_absent("d/late", b"1")
    assert memory.list("d") == ["a"]
    assert memory.power_cut().list("d") == []
    assert len(storage.calls) == 5


def test_failure_after_the_call_has_its_effect() -> None:
    memory = memory_storage()
    storage = CrashingStorage(memory, fail_at=1, moment="after")
    with pytest.raises(OSError, match="injected"):
        storage.put_if_absent("d/index", b"1")
    assert read_all(memory, "d/index") == b"1"


def test_failure_in_the_middle_of_a_write_leaves_half() -> None:
    memory = memory_storage()
    storage = CrashingStorage(memory, fail_at=2, moment="half", error=fail_with(errno.ENOSPC))
    file = storage.create("d/a")
    with pytest.raises(OSError, match="No space"):
        file.write(0, b"1" * 16_384)
    with pytest.raises(ValueError, match="abandoned"):
        file.finish(16_384)
    assert read_all(memory, "d/a") == b"1" * 8192


def test_storage_says_when_o_direct_was_refused(root: Path) -> None:
    storage = PosixStorage(root)
    storage.make_directory("")
    assert storage.degraded == ()
    file = _C.File.create(str(root / "f"), direct=False)
    PosixWriteFile("f", file, storage._writes, storage._is_buffered).finish(0)
    assert "O_DIRECT" in storage.degraded[0]
    assert str(root) in storage.degraded[0]


def test_storage_says_when_io_uring_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_C, "BLOCK_IO_BACKENDS", ("threads",))
    assert "io_uring" in PosixStorage(root).degraded[0]
    assert PosixStorage(root, io_backend="threads").degraded == ()
