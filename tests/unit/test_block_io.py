"""BlockIO: one contract for every backend, direct and buffered."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distckpt import _C

BLOCK = 4096
REQUEST = 16 * BLOCK
PATTERN = np.random.default_rng(11).integers(1, 256, 1 << 20, dtype=np.uint8)  # No zeros: holes are told apart.

# Around one block, one request, a queue full of requests, and what is bounced as a whole.
SIZES = (
    0,
    1,
    511,
    BLOCK - 1,
    BLOCK,
    BLOCK + 1,
    REQUEST - 1,
    REQUEST,
    REQUEST + 1,
    5 * REQUEST + 777,
    9 * REQUEST,
)


def aligned(size: int, misaligned_by: int = 0) -> np.ndarray:
    """Bytes that begin that far behind a multiple of 4096."""
    raw = np.frombuffer(mmap.mmap(-1, size + BLOCK), np.uint8)
    return raw[misaligned_by : misaligned_by + size]


@pytest.fixture(params=_C.BLOCK_IO_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def io(backend: str) -> Iterator[_C.BlockIO]:
    io = _C.BlockIO(backend, request_size=REQUEST, queue_depth=3)
    yield io
    io.close()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "file")


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
class TestContract:
    """What every backend does, whether the page cache is used or not."""

    @pytest.mark.parametrize("size", SIZES)
    def test_what_is_written_is_read_back(self, io: _C.BlockIO, path: str, direct: bool, size: int) -> None:
        for misaligned_by in (0, 1, 512):
            data = aligned(size, misaligned_by)
            data[:] = PATTERN[misaligned_by : misaligned_by + size]
            file = _C.File.create(f"{path}-{misaligned_by}", direct=direct)
            io.write(file, 0, data)
            file.truncate(size)
            target = aligned(size + 10, misaligned_by)
            assert io.read(file, 0, target) == size
            assert target[:size].tobytes() == data.tobytes() == Path(file.path).read_bytes()

    @pytest.mark.parametrize("size", [0, 1, BLOCK, REQUEST, 6 * REQUEST + 13])
    def test_any_range_is_read_into_any_memory(self, io: _C.BlockIO, path: str, direct: bool, size: int) -> None:
        Path(path).write_bytes(PATTERN.tobytes())
        file = _C.File.open(path, direct=direct)
        for offset in (0, 1, 8, BLOCK - 1, BLOCK, 3 * BLOCK + 5, REQUEST, len(PATTERN) - 100):
            for misaligned_by in (0, 1, 8, 4095):
                memory = aligned(size + 2, misaligned_by)
                memory[:] = 0
                read = io.read(file, offset, memory[1:-1])
                expected = PATTERN[offset : offset + size]
                assert read == len(expected)
                assert memory[1 : 1 + read].tobytes() == expected.tobytes()
                assert (memory[0], memory[-1]) == (0, 0)

    @settings(
        database=None,
        deadline=None,
        max_examples=60,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(
        file_size=st.integers(0, 4 * REQUEST),
        offset=st.integers(0, 5 * REQUEST),
        size=st.integers(0, 5 * REQUEST),
        misaligned_by=st.sampled_from([0, 0, 1, 7, 512, 4095]),
        congruent=st.booleans(),
    )
    def test_read_equals_a_slice_of_the_file(
        self,
        io: _C.BlockIO,
        path: str,
        direct: bool,
        file_size: int,
        offset: int,
        size: int,
        misaligned_by: int,
        congruent: bool,
    ) -> None:
        Path(path).write_bytes(PATTERN[:file_size].tobytes())
        memory = aligned(size, offset % BLOCK if congruent else misaligned_by)
        read = io.read(_C.File.open(path, direct=direct), offset, memory)
        assert memory[:read].tobytes() == PATTERN[:file_size][offset : offset + size].tobytes()

    def test_pieces_written_one_after_the_other_make_the_file(self, io: _C.BlockIO, path: str, direct: bool) -> None:
        file = _C.File.create(path, direct=direct)
        cuts = [0, BLOCK, 3 * BLOCK, 3 * REQUEST, 3 * REQUEST + BLOCK, 400_000]
        for begin, end in pairwise(cuts):
            io.write(file, begin, PATTERN[begin:end])
        file.truncate(400_000)
        assert Path(path).read_bytes() == PATTERN[:400_000].tobytes()

    def test_overwriting_changes_those_bytes_only(self, io: _C.BlockIO, path: str, direct: bool) -> None:
        file = _C.File.create(path, direct=direct)
        io.write(file, 0, PATTERN)
        io.write(file, REQUEST, np.zeros(2 * BLOCK, np.uint8))
        expected = PATTERN.copy()
        expected[REQUEST : REQUEST + 2 * BLOCK] = 0
        assert Path(path).read_bytes() == expected.tobytes()

    def test_holes_are_read_as_zeros(self, io: _C.BlockIO, path: str, direct: bool) -> None:
        file = _C.File.create(path, direct=direct)
        io.write(file, 8 * REQUEST, PATTERN[:BLOCK])
        memory = aligned(8 * REQUEST + BLOCK)
        memory[:] = 1
        assert io.read(file, 0, memory) == len(memory)
        assert not memory[: 8 * REQUEST].any()
        assert memory[8 * REQUEST :].tobytes() == PATTERN[:BLOCK].tobytes()

    @pytest.mark.parametrize("size", [BLOCK, 8 * BLOCK, BLOCK + 1, 2 * REQUEST - 3])
    def test_reading_from_or_beyond_the_end_gives_nothing(
        self, io: _C.BlockIO, path: str, direct: bool, size: int
    ) -> None:
        Path(path).write_bytes(PATTERN[:size].tobytes())
        file = _C.File.open(path, direct=direct)
        for offset in (size, size + 1, size + 10 * REQUEST, 1 << 40):
            assert io.read(file, offset, aligned(4 * REQUEST)) == 0

    def test_empty_file_gives_nothing(self, io: _C.BlockIO, path: str, direct: bool) -> None:
        file = _C.File.create(path, direct=direct)
        assert io.read(file, 0, aligned(10 * REQUEST)) == 0

    def test_contiguous_buffers_of_any_type_are_bytes(self, io: _C.BlockIO, path: str, direct: bool) -> None:
        numbers = np.arange(1000, dtype=np.float64).reshape(10, 100)
        file = _C.File.create(path, direct=direct)
        io.write(file, 0, numbers)
        target = np.zeros((100, 10), dtype=np.float64)
        assert io.read(file, 0, target) == numbers.nbytes
        assert target.tobytes() == numbers.tobytes()
        io.write(file, 0, b"immutable")
        scalar = np.zeros((), np.uint64)
        assert io.read(file, 0, scalar) == 8
        assert scalar.tobytes() == b"immutabl"

    def test_memory_is_a_buffer(self, io: _C.BlockIO, path: str, direct: bool) -> None:
        memory = _C.Memory(len(PATTERN))
        memoryview(memory)[:] = PATTERN.tobytes()
        file = _C.File.create(path, direct=direct)
        io.write(file, 0, memory)
        target = _C.Memory(len(PATTERN))
        assert io.read(file, 0, target) == len(PATTERN)
        assert bytes(target) == PATTERN.tobytes()

    @pytest.mark.parametrize(
        "buffer",
        [PATTERN[::2], bytes(BLOCK), memoryview(bytearray(8))[::2]],
        ids=["strided", "read-only", "stepped"],
    )
    def test_reading_into_what_cannot_be_filled_is_refused(
        self, io: _C.BlockIO, path: str, direct: bool, buffer
    ) -> None:
        with pytest.raises(ValueError, match=r"contiguous|writable"):
            io.read(_C.File.create(path, direct=direct), 0, buffer)

    def test_closed_file_is_refused(self, io: _C.BlockIO, path: str, direct: bool) -> None:
        file = _C.File.create(path, direct=direct)
        file.close()
        for call in (io.read, io.write):
            with pytest.raises(ValueError, match="closed"):
                call(file, 0, aligned(BLOCK))

    @pytest.mark.parametrize("offset", [-1, -BLOCK, 1 << 63, (1 << 63) - BLOCK])
    def test_offset_out_of_range_is_refused(self, io: _C.BlockIO, path: str, direct: bool, offset: int) -> None:
        file = _C.File.create(path, direct=direct)
        for call in (io.read, io.write):
            with pytest.raises(ValueError, match=r"offset|overflow"):
                call(file, offset, aligned(BLOCK))
        assert file.size == 0

    @pytest.mark.parametrize("size", [BLOCK, 7 * REQUEST])
    def test_writing_a_file_opened_for_reading_fails(self, io: _C.BlockIO, path: str, direct: bool, size: int) -> None:
        Path(path).write_bytes(b"precious")
        with pytest.raises(OSError, match="write") as caught:
            io.write(_C.File.open(path, direct=direct), 0, PATTERN[:size])
        assert (caught.value.errno, caught.value.filename) == (errno.EBADF, path)
        assert Path(path).read_bytes() == b"precious"

    def test_error_leaves_the_queue_usable(self, io: _C.BlockIO, path: str, direct: bool) -> None:
        readable = Path(path)
        readable.write_bytes(PATTERN.tobytes())
        file = _C.File.open(path, direct=direct)
        for _ in range(5):
            with pytest.raises(OSError, match="write"):
                io.write(file, 0, PATTERN)
        memory = aligned(len(PATTERN))
        assert io.read(file, 0, memory) == len(PATTERN)
        assert memory.tobytes() == PATTERN.tobytes()

    def test_file_size_limit_is_an_error_with_errno_and_path(self, backend: str, path: str, direct: bool) -> None:
        limit = 5 * REQUEST + 1000
        program = f"""
import resource, sys
import numpy as np
io = _C.BlockIO({backend!r}, request_size={REQUEST}, queue_depth=3)
file = _C.File.create({path!r}, direct={direct})
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    io.write(file, 0, np.ones({9 * REQUEST}, np.uint8))
except OSError as error:
    print(error.errno, error.filename)
"""
        assert run_program(program).split() == [str(errno.EFBIG), path]
        assert os.path.getsize(path) <= limit

    def test_two_at_once_in_threads_do_not_mix(self, backend: str, path: str, direct: bool) -> None:
        failures: list[BaseException] = []

        def work(number: int) -> None:
            try:
                io = _C.BlockIO(backend, request_size=REQUEST, queue_depth=2)
                data = np.roll(PATTERN, number)
                file = _C.File.create(f"{path}-{number}", direct=direct)
                target = aligned(len(PATTERN))
                for _ in range(3):
                    io.write(file, 0, data)
                    assert io.read(file, 0, target) == len(PATTERN)
                    assert target.tobytes() == data.tobytes()
                    target[:] = 0
            except BaseException as error:
                failures.append(error)

        run_in_threads(work, 4)
        assert not failures

    def test_one_shared_by_threads_serves_them_in_turn(self, io: _C.BlockIO, path: str, direct: bool) -> None:
        Path(path).write_bytes(PATTERN.tobytes())
        file = _C.File.open(path, direct=direct)
        wrong: list[int] = []

        def work(number: int) -> None:
            memory = aligned(3 * REQUEST)
            for turn in range(10):
                offset = (number * 7 + turn) * BLOCK
                read = io.read(file, offset, memory)
                if memory[:read].tobytes() != PATTERN[offset : offset + read].tobytes():
                    wrong.append(offset)

        run_in_threads(work, 4)
        assert not wrong


def run_in_threads(work, count: int) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def run_program(program: str) -> str:
    """Run it in a process of its own that has the extension as _C; return what it printed."""
    load = f"import sys; sys.path.append({os.path.dirname(_C.__file__)!r}); import _C\n"
    run = subprocess.run([sys.executable, "-c", load + program], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


class TestDirect:
    """What the caller of a direct file relies on."""

    @pytest.fixture
    def file(self, path: str) -> _C.File:
        file = _C.File.create(path)
        if not file.direct:
            pytest.skip("this file system refuses O_DIRECT")
        return file

    @pytest.mark.parametrize("size", [1, BLOCK + 1, 5 * REQUEST - 1])
    def test_unaligned_tail_is_padded_with_zeros_to_the_block(self, io: _C.BlockIO, file: _C.File, size: int) -> None:
        padded = -(-size // BLOCK) * BLOCK
        io.write(file, 0, np.full(padded, 0xFF, np.uint8))  # What bounce buffers still hold must not leak.
        io.write(file, 0, aligned(size, 1))
        io.write(file, 0, PATTERN[:size])
        assert file.size == padded
        assert Path(file.path).read_bytes() == PATTERN[:size].tobytes() + bytes(padded - size)

    @pytest.mark.parametrize("offset", [1, 512, BLOCK - 1, BLOCK + 1])
    @pytest.mark.parametrize("size", [0, BLOCK])
    def test_unaligned_offset_is_refused(self, io: _C.BlockIO, file: _C.File, offset: int, size: int) -> None:
        with pytest.raises(ValueError, match="4096"):
            io.write(file, offset, bytes(size))
        assert file.size == 0

    def test_no_transfer_turns_direct_off(self, io: _C.BlockIO, file: _C.File) -> None:
        io.write(file, 0, PATTERN[: 3 * REQUEST + 5])
        io.read(file, 3, aligned(4 * REQUEST, 7))
        assert file.direct


@pytest.mark.parametrize("offset", [1, 512, BLOCK + 1])
def test_buffered_write_goes_to_any_offset(io: _C.BlockIO, path: str, offset: int) -> None:
    io.write(_C.File.create(path, direct=False), offset, PATTERN[:100_001])
    assert Path(path).read_bytes() == bytes(offset) + PATTERN[:100_001].tobytes()


def test_backends_end_with_the_one_that_always_works() -> None:
    assert _C.BLOCK_IO_BACKENDS in (("io_uring", "threads"), ("threads",))


def test_backend_of_no_name_is_the_best() -> None:
    assert _C.BlockIO().backend == _C.BLOCK_IO_BACKENDS[0]


def test_backend_is_the_one_asked_for(backend: str) -> None:
    assert _C.BlockIO(backend).backend == backend


@pytest.mark.parametrize("name", ["pigeon", "IO_URING", " "])
def test_unknown_backend_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="unknown backend"):
        _C.BlockIO(name)


@pytest.mark.parametrize("request_size", [0, -BLOCK, 1, BLOCK + 1, (1 << 30) + BLOCK, 1 << 63])
def test_request_size_out_of_range_is_refused(backend: str, request_size: int) -> None:
    with pytest.raises(ValueError, match=r"request_size|overflow"):
        _C.BlockIO(backend, request_size=request_size)


@pytest.mark.parametrize("queue_depth", [0, -1, 1025, 1 << 63])
def test_queue_depth_out_of_range_is_refused(backend: str, queue_depth: int) -> None:
    with pytest.raises(ValueError, match=r"queue_depth|overflow"):
        _C.BlockIO(backend, queue_depth=queue_depth)


@pytest.mark.parametrize(("request_size", "queue_depth"), [(BLOCK, 1), (BLOCK, 64), (1 << 22, 1), (5 * BLOCK, 5)])
def test_any_request_size_and_depth_transfers_the_same(
    backend: str, path: str, request_size: int, queue_depth: int
) -> None:
    io = _C.BlockIO(backend, request_size=request_size, queue_depth=queue_depth)
    file = _C.File.create(path)
    io.write(file, 0, PATTERN)
    memory = aligned(len(PATTERN))
    assert io.read(file, 0, memory) == len(PATTERN)
    assert memory.tobytes() == PATTERN.tobytes()


def test_closed_block_io_refuses_everything_but_close(io: _C.BlockIO, path: str) -> None:
    file = _C.File.create(path)
    io.close()
    io.close()
    for call in (io.read, io.write):
        with pytest.raises(ValueError, match="closed"):
            call(file, 0, bytearray(1))


def test_close_gives_back_descriptors_and_threads(backend: str, path: str) -> None:
    file = _C.File.create(path)

    descriptors = len(os.listdir("/proc/self/fd"))
    threads = len(os.listdir("/proc/self/task"))
    io = _C.BlockIO(backend)
    assert len(os.listdir("/proc/self/task")) == threads, "threads start with the first transfer"
    io.write(file, 0, PATTERN)
    io.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    if backend == "io_uring":
        return  # The kernel keeps worker threads of its own for a while.
    for _ in range(1000):  # A thread that was joined may be listed for a moment longer.
        if len(os.listdir("/proc/self/task")) == threads:
            return
        time.sleep(0.01)
    pytest.fail("threads are left")


def test_child_process_is_refused_and_leaves_the_parents_queue_alone(backend: str, path: str) -> None:
    program = f"""
import os
import numpy as np
data = np.arange(1 << 16)
io = _C.BlockIO({backend!r}, request_size=65536)
file = _C.File.create({path!r})
io.write(file, 0, data)
child = os.fork()
if child == 0:
    try:
        io.write(file, 0, bytes(4096))
    except RuntimeError:
        io.close()
        del io
        _C.BlockIO({backend!r}).write(file, 1 << 20, bytes(4096))
        os._exit(0)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
target = np.zeros_like(data)
assert io.read(file, 0, target) == data.nbytes and (target == data).all()
io.close()
"""
    run_program(program)


def test_signals_during_transfers_do_no_harm(io: _C.BlockIO, path: str) -> None:
    received = 0

    def count(number: int, frame: object) -> None:
        nonlocal received
        received += 1

    previous = signal.signal(signal.SIGALRM, count)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        file = _C.File.create(path)
        memory = aligned(len(PATTERN))
        rounds = 0
        while received < 20 or rounds < 3:
            io.write(file, 0, PATTERN)
            assert io.read(file, 0, memory) == len(PATTERN)
            rounds += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert memory.tobytes() == PATTERN.tobytes()


@pytest.mark.skipif("io_uring" not in _C.BLOCK_IO_BACKENDS, reason="this kernel refuses io_uring")
def test_ring_without_a_descriptor_left_is_an_os_error_and_the_best_backend_falls_back() -> None:
    program = """
import errno, os, resource
used = len(os.listdir("/proc/self/fd")) - 1
resource.setrlimit(resource.RLIMIT_NOFILE, (used, used))
try:
    _C.BlockIO("io_uring")
except OSError as error:
    assert error.errno == errno.EMFILE and error.filename is None
else:
    raise AssertionError
assert _C.BlockIO().backend == "threads"
"""
    run_program(program)


def test_import_starts_no_thread_and_keeps_no_descriptor() -> None:
    program = """
import os
assert len(os.listdir("/proc/self/task")) == 1
assert len(os.listdir("/proc/self/fd")) == 4  # The standard ones and this listing's.
"""
    run_program(program)
