"""What the Storage port promises, as tests. A backend subclasses StorageContract; pytest does the rest.

Only what any backend can be asked is here. What survives a power cut cannot be seen through the port; it is
tested backend by backend.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typing_extensions import Buffer

from distckpt.storage.port import Storage

HOSTILE_NAMES = ["/", "/etc/passwd", "..", "../a", "a/../b", "a/..", ".", "./a", "a/./b", "a//b", "a/", "\0"]

NAMED_CALLS: list[Callable[[Storage, str], object]] = [
    lambda storage, name: storage.list(name),
    lambda storage, name: storage.make_directory(name),
    lambda storage, name: storage.sync_directory(name),
    lambda storage, name: storage.create(name),
    lambda storage, name: storage.reopen(name),
    lambda storage, name: storage.open(name),
    lambda storage, name: storage.put_if_absent(name, b"x"),
    lambda storage, name: storage.replace(name, b"x"),
    lambda storage, name: storage.append(name, b"x"),
    lambda storage, name: storage.move(name, "x"),
    lambda storage, name: storage.move("x", name),
    lambda storage, name: storage.remove(name),
    lambda storage, name: storage.remove_directory(name),
    lambda storage, name: storage.touch(name),
    lambda storage, name: storage.age_s(name),
]


def read_all(storage: Storage, name: str) -> bytes:
    """The content of a file."""
    file = storage.open(name)
    try:
        content = bytearray(file.size_bytes)
        file.read_into(0, content)
        return bytes(content)
    finally:
        file.close()


def write_all(storage: Storage, name: str, content: bytes) -> None:
    """Create a file with this content and finish it."""
    file = storage.create(name, size_hint=len(content))
    try:
        file.write(0, content)
        file.finish(len(content))
    finally:
        file.abandon()


def pattern(size_bytes: int, seed: int = 0) -> bytes:
    """Bytes of which no two stretches are alike."""
    return np.random.default_rng(seed).bytes(size_bytes)


class StorageContract:
    """Subclass it as `TestMyStorage` and override make_storage."""

    def make_storage(self, tmp_path: Path) -> Storage:
        """A storage whose root is empty or not there yet; tmp_path is a directory of this test's own."""
        raise NotImplementedError

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        storage = self.make_storage(tmp_path)
        storage.make_directory("")
        return storage

    def test_make_directory_makes_the_root(self, tmp_path: Path) -> None:
        storage = self.make_storage(tmp_path)
        assert storage.list("") == []
        storage.make_directory("")
        assert storage.put_if_absent("a", b"1")
        assert storage.list("") == ["a"]

    def test_make_directory_makes_root_and_parents(self, tmp_path: Path) -> None:
        storage = self.make_storage(tmp_path)
        storage.make_directory("a/b/c")
        assert storage.list("") == ["a"]
        assert storage.list("a") == ["b"]
        assert storage.list("a/b") == ["c"]
        assert storage.list("a/b/c") == []

    def test_make_directory_keeps_what_is_in_an_existing_one(self, storage: Storage) -> None:
        storage.make_directory("a")
        storage.put_if_absent("a/x", b"1")
        storage.make_directory("a")
        storage.make_directory("")
        assert storage.list("a") == ["x"]

    def test_location_is_something_to_show(self, storage: Storage) -> None:
        assert storage.location

    @pytest.mark.parametrize("name", HOSTILE_NAMES)
    def test_hostile_name_is_refused_by_every_call(self, storage: Storage, name: str) -> None:
        for call in NAMED_CALLS:
            with pytest.raises(ValueError, match="name"):
                call(storage, name)

    def test_empty_file_name_is_refused(self, storage: Storage) -> None:
        for call in NAMED_CALLS[3:]:
            with pytest.raises(ValueError, match="name"):
                call(storage, "")

    def test_list_is_sorted_and_not_recursive(self, storage: Storage) -> None:
        storage.make_directory("b/deep")
        for name in ("c", "a", "b/x", "b/deep/y", "B"):
            assert storage.put_if_absent(name, b"")
        assert list(storage.list("")) == sorted(["B", "a", "b", "c"])
        assert list(storage.list("b")) == ["deep", "x"]

    def test_list_of_a_missing_directory_is_empty(self, storage: Storage) -> None:
        assert list(storage.list("missing")) == []
        assert list(storage.list("missing/deeper")) == []

    def test_sync_directory_of_existing_ones(self, storage: Storage) -> None:
        storage.make_directory("a")
        storage.sync_directory("a")
        storage.sync_directory("")

    @pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 1 << 20, (9 << 20) + 17])
    def test_file_reads_back_as_written(self, storage: Storage, size: int) -> None:
        content = pattern(size)
        write_all(storage, "f", content)
        storage.sync_directory("")
        assert read_all(storage, "f") == content

    def test_file_may_be_written_in_pieces_and_in_any_order(self, storage: Storage) -> None:
        content = pattern(5 * 4096 + 5)
        file = storage.create("f")
        assert file.name == "f"
        for piece in (3, 0, 5, 1, 4, 2):
            file.write(piece * 4096, content[piece * 4096 : (piece + 1) * 4096])
        file.finish(len(content))
        assert read_all(storage, "f") == content

    def test_file_may_be_written_from_any_buffer(self, storage: Storage) -> None:
        content = pattern(8192)
        cube = np.frombuffer(content, np.float64).reshape(2, 4, 128).copy()
        buffers: list[Buffer] = [content, bytearray(content), memoryview(content), cube.data]
        for index, buffer in enumerate(buffers):
            file = storage.create(f"f{index}")
            file.write(0, buffer)
            file.finish(8192)
            assert read_all(storage, f"f{index}") == content

    def test_file_may_be_synced_while_it_is_written(self, storage: Storage) -> None:
        content = pattern(2 * 4096)
        file = storage.create("f")
        file.write(0, content[:4096])
        file.sync()
        file.write(4096, content[4096:])
        file.finish(len(content))
        assert read_all(storage, "f") == content

    def test_sync_after_finish_is_refused(self, storage: Storage) -> None:
        file = storage.create("f")
        file.finish(0)
        with pytest.raises(ValueError, match="finished"):
            file.sync()

    def test_what_was_synced_is_written_on_after_it_was_abandoned(self, storage: Storage) -> None:
        content = pattern(3 * 4096 + 5)
        file = storage.create("f")
        file.write(0, content[:5000])
        file.sync()
        file.abandon()
        file = storage.reopen("f")
        assert file.name == "f"
        file.write(4096, content[4096:])
        file.finish(len(content))
        assert read_all(storage, "f") == content

    def test_reopen_of_a_missing_file_names_it(self, storage: Storage) -> None:
        with pytest.raises(FileNotFoundError) as caught:
            storage.reopen("missing")
        assert "missing" in str(caught.value.filename)

    def test_reopen_of_a_directory_fails(self, storage: Storage) -> None:
        storage.make_directory("d")
        with pytest.raises(OSError, match="d"):
            storage.reopen("d")

    def test_finish_cuts_the_file(self, storage: Storage) -> None:
        content = pattern(8192)
        file = storage.create("f")
        file.write(0, content)
        file.finish(5000)
        assert read_all(storage, "f") == content[:5000]

    def test_finish_fills_the_file_with_zeros(self, storage: Storage) -> None:
        file = storage.create("f")
        file.write(0, b"1" * 4096)
        file.finish(10_000)
        assert read_all(storage, "f") == b"1" * 4096 + bytes(10_000 - 4096)

    def test_finish_fails_if_the_name_was_removed(self, storage: Storage) -> None:
        file = storage.create("f")
        file.write(0, b"1")
        storage.remove("f")
        with pytest.raises(OSError, match="no longer names"):
            file.finish(1)

    def test_finish_fails_if_the_name_leads_to_another_file(self, storage: Storage) -> None:
        file = storage.create("f")
        file.write(0, b"1")
        storage.replace("f", b"2")
        with pytest.raises(OSError, match="no longer names"):
            file.finish(1)
        assert read_all(storage, "f") == b"2"

    @pytest.mark.parametrize("offset", [-4096, -1, 1, 512, 4095, 4097])
    def test_write_at_an_unaligned_offset_is_refused(self, storage: Storage, offset: int) -> None:
        file = storage.create("f")
        with pytest.raises(ValueError, match="4096"):
            file.write(offset, b"1")
        file.abandon()

    def test_write_and_finish_after_finish_are_refused(self, storage: Storage) -> None:
        file = storage.create("f")
        file.finish(0)
        with pytest.raises(ValueError, match="finished"):
            file.write(0, b"1")
        with pytest.raises(ValueError, match="finished"):
            file.finish(0)
        assert read_all(storage, "f") == b""

    def test_write_and_finish_after_abandon_are_refused(self, storage: Storage) -> None:
        file = storage.create("f")
        file.abandon()
        with pytest.raises(ValueError, match="abandoned"):
            file.write(0, b"1")
        with pytest.raises(ValueError, match="abandoned"):
            file.finish(0)

    def test_abandon_may_be_called_at_any_time(self, storage: Storage) -> None:
        file = storage.create("f")
        file.abandon()
        file.abandon()
        file = storage.create("g")
        file.finish(0)
        file.abandon()

    def test_create_refuses_a_taken_name(self, storage: Storage) -> None:
        write_all(storage, "f", b"first")
        storage.make_directory("d")
        for name in ("f", "d"):
            with pytest.raises(FileExistsError) as caught:
                storage.create(name)
            assert name in str(caught.value.filename)
        assert read_all(storage, "f") == b"first"

    def test_open_of_a_missing_file_names_it(self, storage: Storage) -> None:
        with pytest.raises(FileNotFoundError) as caught:
            storage.open("missing")
        assert "missing" in str(caught.value.filename)

    def test_open_of_a_directory_fails(self, storage: Storage) -> None:
        storage.make_directory("d")
        with pytest.raises(OSError, match="d"):
            storage.open("d")

    def test_read_into_fills_the_buffer_from_any_offset(self, storage: Storage) -> None:
        content = pattern(70_000)
        write_all(storage, "f", content)
        file = storage.open("f")
        assert file.name == "f"
        assert file.size_bytes == len(content)
        for offset, size in ((0, 70_000), (0, 0), (70_000, 0), (1, 1), (4095, 4098), (69_999, 1)):
            buffer = np.zeros(size, np.uint8)
            file.read_into(offset, buffer.data)
            assert buffer.tobytes() == content[offset : offset + size]
        file.close()

    @pytest.mark.parametrize(("offset", "size"), [(0, 101), (100, 1), (99, 2), (1 << 40, 1)])
    def test_read_beyond_the_end_is_an_eof_error(self, storage: Storage, offset: int, size: int) -> None:
        write_all(storage, "f", bytes(100))
        file = storage.open("f")
        with pytest.raises(EOFError, match="f"):
            file.read_into(offset, bytearray(size))
        file.close()

    def test_read_at_a_negative_offset_is_refused(self, storage: Storage) -> None:
        write_all(storage, "f", bytes(100))
        file = storage.open("f")
        with pytest.raises(ValueError, match="offset"):
            file.read_into(-1, bytearray(1))
        file.close()

    def test_one_open_file_is_read_by_several_threads(self, storage: Storage) -> None:
        content = pattern(1 << 20)
        write_all(storage, "f", content)
        file = storage.open("f")
        wrong: list[int] = []

        def read(seed: int) -> None:
            for offset in np.random.default_rng(seed).integers(0, len(content) - 10_000, 50):
                buffer = bytearray(10_000)
                file.read_into(int(offset), buffer)
                if buffer != content[offset : offset + 10_000]:
                    wrong.append(int(offset))

        _run_in_threads(read, 4)
        file.close()
        assert wrong == []

    def test_put_if_absent_keeps_the_first_content(self, storage: Storage) -> None:
        assert storage.put_if_absent("a", b"first") is True
        assert storage.put_if_absent("a", b"second") is False
        assert read_all(storage, "a") == b"first"
        assert list(storage.list("")) == ["a"]

    def test_put_if_absent_respects_files_and_directories(self, storage: Storage) -> None:
        write_all(storage, "f", b"content")
        storage.make_directory("d")
        assert storage.put_if_absent("f", b"other") is False
        assert storage.put_if_absent("d", b"other") is False
        assert read_all(storage, "f") == b"content"
        assert list(storage.list("d")) == []

    @pytest.mark.parametrize("size", [0, 1, 5000, 3 << 20])
    def test_small_files_read_back_as_put(self, storage: Storage, size: int) -> None:
        content = pattern(size)
        storage.put_if_absent("a", content)
        storage.replace("b", content)
        assert read_all(storage, "a") == content
        assert read_all(storage, "b") == content

    def test_of_many_put_if_absent_exactly_one_wins(self, storage: Storage) -> None:
        for round_number in range(10):
            name = f"a{round_number}"
            winners: list[int] = []

            def put(thread: int, name: str = name, winners: list[int] = winners) -> None:
                if storage.put_if_absent(name, b"%d" % thread):
                    winners.append(thread)

            _run_in_threads(put, 8)
            assert len(winners) == 1
            assert read_all(storage, name) == b"%d" % winners[0]
        assert len(storage.list("")) == 10

    def test_replace_makes_or_overwrites(self, storage: Storage) -> None:
        storage.replace("a", b"old and long")
        storage.replace("a", b"new")
        assert read_all(storage, "a") == b"new"
        assert list(storage.list("")) == ["a"]

    def test_readers_of_a_replaced_file_see_old_or_new(self, storage: Storage) -> None:
        contents = [bytes([digit]) * (1000 + digit) for digit in range(30)]
        storage.replace("a", contents[0])
        seen: list[bytes] = []

        def replace_or_read(thread: int) -> None:
            for content in contents:
                if thread == 0:
                    storage.replace("a", content)
                else:
                    seen.append(read_all(storage, "a"))

        _run_in_threads(replace_or_read, 3)
        assert set(seen) <= set(contents)

    def test_replace_of_a_directory_fails_and_leaves_nothing_behind(self, storage: Storage) -> None:
        storage.make_directory("d")
        with pytest.raises(OSError, match="d"):
            storage.replace("d", b"x")
        assert list(storage.list("")) == ["d"]

    def test_append_makes_the_file_and_adds_to_its_end(self, storage: Storage) -> None:
        storage.make_directory("d")
        for line in (b"first\n", b"second\n", b"third\nfourth\n"):
            storage.append("d/log", line)
        assert read_all(storage, "d/log") == b"first\nsecond\nthird\nfourth\n"
        assert list(storage.list("d")) == ["log"]

    def test_append_begins_a_line_where_the_last_one_is_torn(self, storage: Storage) -> None:
        storage.replace("log", b"whole\nto")
        storage.append("log", b"new\n")
        assert read_all(storage, "log") == b"whole\nto\nnew\n"

    def test_append_where_no_file_can_be_fails(self, storage: Storage) -> None:
        storage.make_directory("d")
        with pytest.raises(OSError, match="d"):
            storage.append("d", b"x\n")
        with pytest.raises(FileNotFoundError):
            storage.append("missing/log", b"x\n")
        assert list(storage.list("")) == ["d"]

    def test_lines_of_several_threads_are_never_mixed(self, storage: Storage) -> None:
        def append(thread: int) -> None:
            for number in range(30):
                storage.append("log", b"%d %d " % (thread, number) + b"x" * 3000 + b"\n")

        _run_in_threads(append, 6)
        lines = read_all(storage, "log").splitlines()
        assert {len(line.rpartition(b" ")[2]) for line in lines if line} == {3000}
        found = [tuple(map(int, line.split(b" ")[:2])) for line in lines if line]
        assert sorted(found) == [(thread, number) for thread in range(6) for number in range(30)]
        for thread in range(6):
            assert [number for of, number in found if of == thread] == list(range(30))

    def test_remove_frees_the_name(self, storage: Storage) -> None:
        write_all(storage, "a", b"1")
        storage.remove("a")
        assert list(storage.list("")) == []
        assert storage.put_if_absent("a", b"2") is True
        storage.remove("a")
        write_all(storage, "a", b"3")
        assert read_all(storage, "a") == b"3"

    def test_move_gives_a_file_another_name_over_whatever_held_it(self, storage: Storage) -> None:
        storage.make_directory("d")
        write_all(storage, "d/new", b"2")
        storage.move("d/new", "d/other")
        assert list(storage.list("d")) == ["other"]
        write_all(storage, "d/new", b"3")
        opened = storage.open("d/other")
        storage.move("d/new", "d/other")
        assert read_all(storage, "d/other") == b"3"
        assert list(storage.list("d")) == ["other"]
        content = bytearray(1)
        opened.read_into(0, content)
        opened.close()
        assert content == b"2"

    def test_move_of_a_missing_file_is_an_error(self, storage: Storage) -> None:
        with pytest.raises(FileNotFoundError):
            storage.move("missing", "a")

    def test_remove_of_a_missing_file_is_fine(self, storage: Storage) -> None:
        storage.remove("missing")
        storage.remove("missing/deeper")

    def test_remove_directory_removes_an_empty_one(self, storage: Storage) -> None:
        storage.make_directory("a/b")
        storage.remove_directory("a/b")
        assert list(storage.list("a")) == []

    def test_remove_directory_leaves_one_that_is_missing_or_not_empty(self, storage: Storage) -> None:
        storage.make_directory("a/b")
        storage.remove_directory("missing")
        storage.remove_directory("a")
        assert list(storage.list("a")) == ["b"]

    def test_age_is_never_negative_and_touch_keeps_the_content(self, storage: Storage) -> None:
        write_all(storage, "a", b"1")
        assert storage.age_s("a") >= 0
        storage.touch("a")
        assert storage.age_s("a") >= 0
        assert read_all(storage, "a") == b"1"

    def test_touch_and_age_of_a_missing_file_raise(self, storage: Storage) -> None:
        with pytest.raises(FileNotFoundError):
            storage.touch("missing")
        with pytest.raises(FileNotFoundError):
            storage.age_s("missing")
        assert list(storage.list("")) == []

    def test_free_space_is_unknown_or_an_amount_of_a_file_system(self, tmp_path: Path) -> None:
        storage = self.make_storage(tmp_path)
        for _ in range(2):
            free = storage.free_space()
            assert free is None or (free.size_bytes >= 0 and free.filesystem_id)
            storage.make_directory("")


def _run_in_threads(work: Callable[[int], None], count: int) -> None:
    """Run work(0) to work(count - 1) at once; the first exception of a thread is raised here."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def run(index: int) -> None:
        try:
            barrier.wait()
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
