"""BlockIO.write_checked and read_checked: sums on the way out, checks on the way in, for every backend."""

from __future__ import annotations

import errno
import math
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distckpt import _C

PAGE = 4096
REQUEST = 8 * PAGE
BLOCK = 2 * PAGE
PATTERN = np.random.default_rng(12).integers(1, 256, 1 << 20, dtype=np.uint8)
BLOCK_SIZES = [512, PAGE, BLOCK, REQUEST]
# Around a page, a block, a request and a queue full of requests.
SIZES = [0, 1, 511, *(n + d for n in (PAGE, BLOCK, REQUEST, 2 * REQUEST, 7 * REQUEST) for d in (-1, 0, 1)), 200_001]

fast = settings(
    database=None, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
any_size = st.one_of(st.sampled_from(SIZES), st.integers(0, 5 * REQUEST))


def aligned(data: np.ndarray, misaligned_by: int = 0) -> np.ndarray:
    """A copy of data that begins that far behind a multiple of 4096."""
    raw = np.frombuffer(mmap.mmap(-1, len(data) + PAGE), np.uint8)
    copy = raw[misaligned_by : misaligned_by + len(data)]
    copy[:] = data
    return copy


def sums_of(data: np.ndarray, block_size: int) -> np.ndarray:
    """The checksum of each block, one call for each."""
    return np.array([_C.crc32c(data[at : at + block_size]) for at in range(0, len(data), block_size)], np.uint32)


def count_of(size: int, block_size: int) -> int:
    return -(-size // block_size)


def file_of(data: np.ndarray, sums: np.ndarray) -> bytes:
    return data.tobytes() + sums.tobytes()


def read_back(file: _C.File, size: int, direct: bool) -> bytes:
    """The first bytes of the file, which has no others but the zeros that pad it."""
    held = Path(file.path).read_bytes()
    padded = -(-size // PAGE) * PAGE if direct else size
    assert held[size:] == bytes(padded - size)
    return held[:size]


@pytest.fixture(params=_C.BLOCK_IO_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def direct(request: pytest.FixtureRequest, tmp_path: Path) -> bool:
    if request.param and not _C.File.create(str(tmp_path / "probe")).direct:
        pytest.skip("this file system refuses O_DIRECT")
    return request.param


@pytest.fixture
def io(backend: str) -> Iterator[_C.BlockIO]:
    io = _C.BlockIO(backend, request_size=REQUEST, queue_depth=3)
    yield io
    io.close()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "file")


def create(path: str, direct: bool) -> _C.File:
    Path(path).unlink(missing_ok=True)
    return _C.File.create(path, direct=direct)


class TestWrite:
    @pytest.mark.parametrize("misaligned_by", [0, 1, 512], ids=["aligned", "odd", "sector"])
    @pytest.mark.parametrize("size", SIZES)
    def test_one_part_is_followed_by_the_sums_of_its_blocks(
        self, io: _C.BlockIO, path: str, direct: bool, size: int, misaligned_by: int
    ) -> None:
        data = aligned(PATTERN[:size], misaligned_by)
        for block_size in BLOCK_SIZES:
            expected = sums_of(data, block_size)
            sums = np.full(len(expected), 7, np.uint32)
            file = create(path, direct)
            io.write_checked(file, [data], block_size, sums)
            assert sums.tolist() == expected.tolist()
            assert read_back(file, size + expected.nbytes, direct) == file_of(data, expected)

    @fast
    @given(
        sizes=st.lists(
            st.one_of(st.sampled_from([0, 1, PAGE, BLOCK, REQUEST]), st.integers(0, 2 * REQUEST)), max_size=9
        ),
        misaligned_by=st.sampled_from([0, 0, 1, 7, 4095]),
        block_size=st.sampled_from(BLOCK_SIZES),
    )
    def test_parts_make_the_file_their_concatenation_makes(
        self, io: _C.BlockIO, path: str, direct: bool, sizes: list[int], misaligned_by: int, block_size: int
    ) -> None:
        data = PATTERN[: sum(sizes)]
        cuts = np.cumsum([0, *sizes])
        parts = [aligned(data[cuts[i] : cuts[i + 1]], misaligned_by) for i in range(len(sizes))]
        expected = sums_of(data, block_size)
        sums = np.zeros(len(expected), np.uint32)
        file = create(path, direct)
        io.write_checked(file, parts, block_size, sums)
        assert sums.tolist() == expected.tolist()
        assert read_back(file, len(data) + expected.nbytes, direct) == file_of(data, expected)

    @fast
    @given(
        sizes=st.lists(st.integers(0, 4 * REQUEST), min_size=1, max_size=5),
        in_phase=st.lists(st.booleans(), min_size=5, max_size=5),
        block_size=st.sampled_from(BLOCK_SIZES),
    )
    def test_requests_that_are_gathered_and_requests_that_are_not_alternate(
        self, io: _C.BlockIO, path: str, direct: bool, sizes: list[int], in_phase: list[bool], block_size: int
    ) -> None:
        data = PATTERN[: sum(sizes)]
        cuts = np.cumsum([0, *sizes]).tolist()
        parts = [
            aligned(data[begin:end], begin % PAGE if phase else (begin + 64) % PAGE)
            for begin, end, phase in zip(cuts, cuts[1:], in_phase, strict=False)
        ]
        expected = sums_of(data, block_size)
        sums = np.zeros(len(expected), np.uint32)
        file = create(path, direct)
        io.write_checked(file, parts, block_size, sums)
        assert sums.tolist() == expected.tolist()
        assert read_back(file, len(data) + expected.nbytes, direct) == file_of(data, expected)

    def test_many_small_parts(self, io: _C.BlockIO, path: str, direct: bool) -> None:
        data = PATTERN[:150_000]
        sums = np.zeros(count_of(len(data), BLOCK), np.uint32)
        file = create(path, direct)
        io.write_checked(file, [data[at : at + 13] for at in range(0, len(data), 13)], BLOCK, sums)
        assert sums.tolist() == sums_of(data, BLOCK).tolist()
        assert read_back(file, len(data) + sums.nbytes, direct) == file_of(data, sums)

    def test_table_longer_than_many_requests(self, io: _C.BlockIO, path: str, direct: bool) -> None:
        data = PATTERN[:100_003]
        sums = np.zeros(count_of(len(data), 2), np.uint32)  # Twice the size of the data.
        file = create(path, direct)
        io.write_checked(file, [data], 2, sums)
        assert read_back(file, len(data) + sums.nbytes, direct) == file_of(data, sums_of(data, 2))

    @pytest.mark.parametrize("block_size", [1 << 20, 4 << 20])
    def test_blocks_larger_than_what_is_summed_at_once(
        self, backend: str, path: str, direct: bool, block_size: int
    ) -> None:
        io = _C.BlockIO(backend, request_size=4 << 20, queue_depth=2)
        data = np.tile(PATTERN, 10)[: (9 << 20) + 5]
        sums = np.zeros(count_of(len(data), block_size), np.uint32)
        file = create(path, direct)
        io.write_checked(file, [data[:77], data[77 : 5 << 20], data[5 << 20 :]], block_size, sums)
        assert sums.tolist() == sums_of(data, block_size).tolist()
        assert read_back(file, len(data) + sums.nbytes, direct) == file_of(data, sums)

    def test_sums_may_be_unaligned_and_nothing_beside_them_changes(
        self, io: _C.BlockIO, path: str, direct: bool
    ) -> None:
        memory = bytearray(b"\xaa" * 42)
        io.write_checked(create(path, direct), [PATTERN[: 10 * BLOCK]], BLOCK, memoryview(memory)[1:41])
        assert memory == b"\xaa" + sums_of(PATTERN[: 10 * BLOCK], BLOCK).tobytes() + b"\xaa"

    def test_parts_of_any_type_are_bytes(self, io: _C.BlockIO, path: str, direct: bool) -> None:
        parts = (
            b"bytes",
            np.arange(6, dtype=np.float64).reshape(2, 3),
            _C.Memory(3),
            bytearray(b"x"),
            np.zeros((), "c16"),
        )
        data = np.frombuffer(
            b"".join(bytes(memoryview(part).cast("B")) if np.ndim(part) else bytes(part) for part in parts), np.uint8
        )
        sums = np.zeros(1, np.uint32)
        file = create(path, direct)
        io.write_checked(file, parts, BLOCK, sums)
        assert read_back(file, len(data) + 4, direct) == file_of(data, sums_of(data, BLOCK))

    @pytest.mark.parametrize("parts", [1, 3])
    def test_rate_is_not_exceeded(self, backend: str, path: str, direct: bool, parts: int) -> None:
        io = _C.BlockIO(backend, request_size=1 << 20, queue_depth=2)
        data = np.tile(PATTERN, 8)
        sums = np.zeros(8, np.uint32)
        file = create(path, direct)
        begin = time.monotonic()
        io.write_checked(file, np.array_split(data, parts), 1 << 20, sums, max_bytes_per_s=32 * 2.0**20)
        assert time.monotonic() - begin >= 0.15
        assert read_back(file, len(data) + 32, direct) == file_of(data, sums_of(data, 1 << 20))

    @pytest.mark.parametrize("rate", [0, 1, 1e-300, 1e300, math.inf])
    def test_any_rate_writes_what_fits_one_request_at_once(
        self, io: _C.BlockIO, path: str, direct: bool, rate: float
    ) -> None:
        data, sums = PATTERN[:1000], np.zeros(1, np.uint32)
        file = create(path, direct)
        io.write_checked(file, [data], BLOCK, sums, max_bytes_per_s=rate)
        assert read_back(file, 1004, direct) == file_of(data, sums_of(data, BLOCK))

    @pytest.mark.parametrize("rate", [-1, -1e-300, -math.inf, math.nan])
    def test_rate_that_is_none_is_refused(self, io: _C.BlockIO, path: str, direct: bool, rate: float) -> None:
        file = create(path, direct)
        with pytest.raises(ValueError, match="per second"):
            io.write_checked(file, [PATTERN], REQUEST, np.zeros(32, np.uint32), max_bytes_per_s=rate)
        assert file.size == 0

    @pytest.mark.parametrize(
        ("size", "sums"),
        [
            (BLOCK, np.zeros(0, np.uint32)),
            (BLOCK, np.zeros(2, np.uint32)),
            (BLOCK + 1, np.zeros(1, np.uint32)),
            (0, np.zeros(1, np.uint32)),
            (BLOCK, np.zeros(5, np.uint8)),
            (2 * BLOCK, np.zeros(7, np.uint8)),
        ],
    )
    def test_wrong_number_of_sums_is_refused(
        self, io: _C.BlockIO, path: str, direct: bool, size: int, sums: np.ndarray
    ) -> None:
        file = create(path, direct)
        with pytest.raises(ValueError, match="checksums"):
            io.write_checked(file, [PATTERN[:size]], BLOCK, sums)
        assert file.size == 0

    @pytest.mark.parametrize("sums", [bytes(8), np.zeros(4, np.uint32)[::2]], ids=["read-only", "strided"])
    def test_sums_that_cannot_be_filled_are_refused(
        self, io: _C.BlockIO, path: str, direct: bool, sums: _C.Buffer
    ) -> None:
        file = create(path, direct)
        with pytest.raises(ValueError, match=r"writable|contiguous"):
            io.write_checked(file, [PATTERN[: 2 * BLOCK]], BLOCK, sums)
        assert file.size == 0

    @pytest.mark.parametrize("block_size", [0, -1, 3, REQUEST - 1, REQUEST + 1, 2 * REQUEST, 1 << 63])
    def test_block_size_that_does_not_divide_a_request_is_refused(
        self, io: _C.BlockIO, path: str, direct: bool, block_size: int
    ) -> None:
        file = create(path, direct)
        with pytest.raises(ValueError, match=r"block_size|overflow"):
            io.write_checked(file, [PATTERN], block_size, np.zeros(1, np.uint32))
        with pytest.raises(ValueError, match=r"block_size|overflow"):
            io.read_checked(file, [], block_size, 0, b"", [])
        assert file.size == 0

    @pytest.mark.parametrize("part", [PATTERN[::2], None, 5, "text"], ids=["strided", "none", "number", "text"])
    def test_part_that_is_no_memory_is_refused(self, io: _C.BlockIO, path: str, direct: bool, part: object) -> None:
        file = create(path, direct)
        with pytest.raises((ValueError, TypeError)):
            io.write_checked(file, [PATTERN[:10], part], BLOCK, np.zeros(1, np.uint32))  # type: ignore[list-item]
        assert file.size == 0

    @pytest.mark.parametrize("parts", [1, 3])
    def test_failure_is_an_os_error_and_leaves_the_queue_usable(
        self, io: _C.BlockIO, path: str, direct: bool, parts: int
    ) -> None:
        Path(path).write_bytes(b"precious")
        file = _C.File.open(path, direct=direct)
        data = aligned(PATTERN)
        sums = np.zeros(count_of(len(data), BLOCK), np.uint32)
        for _ in range(3):
            with pytest.raises(OSError, match="write") as caught:
                io.write_checked(file, np.array_split(data, parts), BLOCK, sums)
            assert (caught.value.errno, caught.value.filename) == (errno.EBADF, path)
        assert Path(path).read_bytes() == b"precious"
        again = create(path + "-again", direct)
        io.write_checked(again, np.array_split(data, parts), BLOCK, sums)
        assert read_back(again, len(data) + sums.nbytes, direct) == file_of(data, sums_of(data, BLOCK))

    def test_file_size_limit_is_an_os_error_and_nothing_is_written_after_it(
        self, backend: str, path: str, direct: bool
    ) -> None:
        limit = 5 * REQUEST + 1000
        program = f"""
import resource, sys, time
sys.path.append({os.path.dirname(_C.__file__)!r})
import _C
import numpy as np
def limit_to(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
io = _C.BlockIO({backend!r}, request_size={REQUEST}, queue_depth=3)
data, sums = np.ones({9 * REQUEST}, np.uint8), np.zeros({9 * REQUEST // BLOCK}, np.uint32)
for parts in 1, 3:
    file = _C.File.create(f"{path}-{{parts}}", direct={direct})
    limit_to({limit})
    try:
        io.write_checked(file, np.array_split(data, parts), {BLOCK}, sums)
    except OSError as error:
        print(error.errno, error.filename)
    assert file.size <= {limit}
    file.truncate(0)
    limit_to(resource.RLIM_INFINITY)
    time.sleep(0.05)  # What is still in flight would land now.
    assert file.size == 0
"""
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        assert (run.returncode, run.stderr) == (0, "")
        assert run.stdout.split() == [str(errno.EFBIG), f"{path}-1", str(errno.EFBIG), f"{path}-3"]

    def test_closed_file_and_closed_block_io_are_refused(self, io: _C.BlockIO, path: str, direct: bool) -> None:
        file = create(path, direct)
        table = np.zeros(1, np.uint32)
        for close in (file.close, io.close):
            close()
            with pytest.raises(ValueError, match="closed"):
                io.write_checked(file, [b"data"], BLOCK, table)
            with pytest.raises(ValueError, match="closed"):
                io.read_checked(file, [(0, 4)], BLOCK, 4, table, [])


def stored(path: str, data: np.ndarray, block_size: int, direct: bool) -> tuple[_C.File, np.ndarray]:
    """A file of data and its table, opened; and the table."""
    sums = sums_of(data, block_size)
    Path(path).write_bytes(file_of(data, sums))
    return _C.File.open(path, direct=direct), sums


Target = tuple[int, np.ndarray, int, tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


def whole(size: int) -> tuple[np.ndarray, Target]:
    """A target that takes every byte of a file."""
    memory = np.zeros(size, np.uint8)
    return memory, (0, memory, 0, (size,), (1,), (1,), 1)


def inside(ranges: Sequence[tuple[int, int]], size: int) -> np.ndarray:
    mask = np.zeros(size, bool)
    for begin, end in ranges:
        mask[begin:end] = True
    return mask


@st.composite
def block_ranges(draw: st.DrawFn, size: int, block_size: int) -> list[tuple[int, int]]:
    """Ascending ranges of whole blocks, some empty, some touching."""
    blocks = count_of(size, block_size)
    cuts = sorted(draw(st.lists(st.integers(0, blocks), max_size=8)))
    pairs = zip(cuts[::2], cuts[1::2], strict=False)
    return [(a * block_size, min(b * block_size, size)) for a, b in pairs if a < blocks]


LONGEST = 24  # Of a chunk's sides; such a cube is longer than a request.


@dataclass(frozen=True)
class Box:
    """A box of a C-ordered chunk of 4-byte items, and how an array of its shape lies in memory."""

    start: int  # Of the chunk in the file.
    shape: tuple[int, ...]  # Of the chunk.
    cuts: tuple[slice, ...]
    memory: np.ndarray
    view: np.ndarray  # Of the memory, with axes reversed or turned around.

    def target(self) -> Target:
        strides = tuple(4 * math.prod(self.shape[d + 1 :]) for d in range(len(self.shape)))
        first = self.start + sum(cut.start * stride for cut, stride in zip(self.cuts, strides, strict=True))
        origin = self.view.__array_interface__["data"][0] - self.memory.__array_interface__["data"][0]
        return first, self.memory, origin if self.view.size else 0, self.view.shape, strides, self.view.strides, 4

    def cut(self, file: np.ndarray) -> np.ndarray:
        """The box of the chunk that the file holds."""
        return file[self.start :][: 4 * math.prod(self.shape)].view("<u4").reshape(self.shape)[self.cuts]


@st.composite
def boxes(draw: st.DrawFn, size: int) -> Box:
    shape = tuple(draw(st.lists(st.integers(1, LONGEST), min_size=1, max_size=3)))
    start = 4 * draw(st.integers(0, size // 4 - math.prod(shape)))
    cuts = []
    for length in shape:
        begin = draw(st.integers(0, length))
        cuts.append(slice(begin, draw(st.integers(begin, length))))
    lengths = [cut.stop - cut.start for cut in cuts]
    turned = draw(st.booleans())
    memory = np.zeros(lengths[::-1] if turned else lengths, "<u4")
    reversals = [slice(None, None, draw(st.sampled_from([1, -1]))) for _ in shape]
    return Box(start, shape, tuple(cuts), memory, (memory.T if turned else memory)[tuple(reversals)])


class TestRead:
    @fast
    @given(data=st.data(), size=any_size, block_size=st.sampled_from(BLOCK_SIZES))
    def test_any_ranges_of_whole_blocks_are_copied_and_nothing_else(
        self, io: _C.BlockIO, path: str, direct: bool, data: st.DataObject, size: int, block_size: int
    ) -> None:
        content = PATTERN[:size]
        file, sums = stored(path, content, block_size, direct)
        ranges = data.draw(block_ranges(size, block_size))
        memory, target = whole(size)
        assert io.read_checked(file, ranges, block_size, size, sums, [target]) is None
        assert memory.tobytes() == np.where(inside(ranges, size), content, 0).astype(np.uint8).tobytes()

    @fast
    @given(data=st.data(), size=st.integers(4 * LONGEST**3, 4 * REQUEST), block_size=st.sampled_from(BLOCK_SIZES))
    def test_any_boxes_equal_slices_of_the_chunks(
        self, io: _C.BlockIO, path: str, direct: bool, data: st.DataObject, size: int, block_size: int
    ) -> None:
        content = PATTERN[:size]
        file, sums = stored(path, content, block_size, direct)
        ranges = data.draw(st.one_of(st.just([(0, size)]), block_ranges(size, block_size)))
        wanted = sorted(data.draw(st.lists(boxes(size), max_size=6)), key=lambda box: box.target()[0])
        targets = [box.target() for box in wanted]
        assert io.read_checked(file, ranges, block_size, size, sums, targets) is None
        read = np.where(inside(ranges, size), content, 0).astype(np.uint8)
        for box in wanted:
            assert (box.view == box.cut(read)).all()

    def test_targets_of_one_chunk_share_what_is_read(self, io: _C.BlockIO, path: str, direct: bool) -> None:
        content = PATTERN[: 5 * REQUEST + 100]
        file, sums = stored(path, content, BLOCK, direct)
        memories = [np.zeros(len(content), np.uint8) for _ in range(5)]
        targets = [(0, memory, 0, memory.shape, (1,), (1,), 1) for memory in memories]
        assert io.read_checked(file, [(0, len(content))], BLOCK, len(content), sums, targets) is None
        assert all((memory == content).all() for memory in memories)

    def test_long_target_is_followed_by_short_ones_inside_it(self, io: _C.BlockIO, path: str, direct: bool) -> None:
        content = PATTERN[: 9 * REQUEST]
        file, sums = stored(path, content, BLOCK, direct)
        memory, target = whole(len(content))
        short = [(at, np.zeros(100, np.uint8), 0, (100,), (1,), (1,), 1) for at in range(0, len(content) - 99, 3001)]
        assert io.read_checked(file, [(0, len(content))], BLOCK, len(content), sums, [target, *short]) is None
        assert (memory == content).all()
        assert all((target[1] == content[target[0] :][:100]).all() for target in short)

    def test_column_of_a_chunk_over_many_requests(self, io: _C.BlockIO, path: str, direct: bool) -> None:
        content = PATTERN[: 512 * 1024]
        file, sums = stored(path, content, PAGE, direct)
        column = np.zeros((512, 8), np.uint8)
        target = (16, column, 0, (512, 8), (1024, 1), (8, 1), 1)
        assert io.read_checked(file, [(0, len(content))], PAGE, len(content), sums, [target]) is None
        assert (column == content.reshape(512, 1024)[:, 16:24]).all()

    def test_blocks_are_checked_without_targets(self, io: _C.BlockIO, path: str, direct: bool) -> None:
        content = PATTERN[: 3 * REQUEST]
        file, sums = stored(path, content, BLOCK, direct)
        assert io.read_checked(file, [(0, len(content))], BLOCK, len(content), sums, []) is None
        sums[5] ^= 1
        found = io.read_checked(file, [(0, len(content))], BLOCK, len(content), sums, [])
        assert found == (5, int(sums[5]) ^ 1)
        assert io.read_checked(file, [(0, 5 * BLOCK)], BLOCK, len(content), sums, []) is None
        assert io.read_checked(file, [], BLOCK, len(content), sums, []) is None

    @pytest.mark.parametrize("block_size", BLOCK_SIZES)
    @pytest.mark.parametrize("size", [1, BLOCK, REQUEST, 3 * REQUEST + 777, 7 * REQUEST])
    def test_damaged_block_is_reported_and_not_copied(
        self, io: _C.BlockIO, path: str, direct: bool, size: int, block_size: int
    ) -> None:
        content = PATTERN[:size].copy()
        sums = sums_of(content, block_size)
        last = len(sums) - 1
        for block in sorted({0, last // 2, last}):
            begin, end = block * block_size, min((block + 1) * block_size, size)
            for at in {begin, end - 1}:
                content[at] ^= 0x10
                Path(path).write_bytes(file_of(content, sums))
                memory, target = whole(size)
                file = _C.File.open(path, direct=direct)
                found = io.read_checked(file, [(0, size)], block_size, size, sums, [target])
                assert found == (block, _C.crc32c(content[begin:end]))
                assert not memory[begin:end].any()
                assert ((memory == content) | (memory == 0)).all()
                content[at] ^= 0x10

    def test_reported_block_is_one_of_the_wrong_ones(self, io: _C.BlockIO, path: str, direct: bool) -> None:
        content = PATTERN[: 6 * REQUEST]
        file, sums = stored(path, content, BLOCK, direct)
        right = sums.copy()
        sums += 1
        for _ in range(20):
            memory, target = whole(len(content))
            found = io.read_checked(file, [(0, len(content))], BLOCK, len(content), sums, [target])
            assert found is not None
            assert found[1] == right[found[0]]
            assert not memory.any()

    @pytest.mark.parametrize("block_size", BLOCK_SIZES)
    @pytest.mark.parametrize("left", [0, 1, 511, PAGE, REQUEST, REQUEST + 1, 2 * REQUEST + BLOCK + 5, 4 * REQUEST + 76])
    def test_file_that_ends_too_early_is_reported_without_a_checksum(
        self, io: _C.BlockIO, path: str, direct: bool, left: int, block_size: int
    ) -> None:
        content = PATTERN[: 4 * REQUEST + 77]
        file, sums = stored(path, content, block_size, direct)
        os.truncate(path, left)
        block = left // block_size
        # Not even a table that says what is left of the block will do.
        sums[block] = _C.crc32c(content[block * block_size : left])
        memory, target = whole(len(content))
        assert io.read_checked(file, [(0, len(content))], block_size, len(content), sums, [target]) == (block, None)
        assert not memory[block * block_size :].any()

    def test_file_that_ends_before_a_range_is_reported_by_the_ranges_block(
        self, io: _C.BlockIO, path: str, direct: bool
    ) -> None:
        content = PATTERN[: 40 * 512]
        file, sums = stored(path, content, 512, direct)
        os.truncate(path, 3 * 512)
        ranges = [(0, 3 * 512), (9 * 512, 10 * 512), (39 * 512, 40 * 512)]
        assert io.read_checked(file, ranges, 512, len(content), sums, []) == (9, None)
        assert io.read_checked(file, ranges[1:], 512, len(content), sums, []) == (9, None)
        assert io.read_checked(file, [ranges[0], (len(content), len(content))], 512, len(content), sums, []) is None

    def test_damage_before_the_early_end_is_told_first(self, io: _C.BlockIO, path: str, direct: bool) -> None:
        content = PATTERN[:REQUEST]
        file, sums = stored(path, content, BLOCK, direct)
        os.truncate(path, REQUEST - 1)
        sums[1] += 1
        found = io.read_checked(file, [(0, REQUEST)], BLOCK, REQUEST, sums, [])
        assert found == (1, _C.crc32c(content[BLOCK : 2 * BLOCK]))

    def test_padding_and_table_behind_the_end_are_not_looked_at(self, io: _C.BlockIO, path: str, direct: bool) -> None:
        content, sums = PATTERN[: REQUEST + 100], np.zeros(5, np.uint32)
        file = create(path, direct)
        io.write_checked(file, [content], BLOCK, sums)
        memory, target = whole(len(content))
        assert io.read_checked(file, [(0, len(content))], BLOCK, len(content), sums, [target]) is None
        assert (memory == content).all()

    @pytest.mark.parametrize(
        "ranges",
        [
            [(1, BLOCK)],
            [(0, BLOCK - 1)],
            [(0, 10 * BLOCK)],
            [(9 * BLOCK, 10 * BLOCK + 5 + 1)],
            [(9 * BLOCK, 11 * BLOCK)],
            [(11 * BLOCK, 11 * BLOCK)],
            [(BLOCK, 0)],
            [(BLOCK, 2 * BLOCK), (0, BLOCK)],
            [(0, 2 * BLOCK), (BLOCK, 3 * BLOCK)],
            [(0, BLOCK), (0, BLOCK)],
            [(-BLOCK, BLOCK)],
            [(0, 1 << 63)],
            [(0, BLOCK, 2 * BLOCK)],
            [(0,)],
        ],
    )
    def test_ranges_that_are_not_ascending_whole_blocks_are_refused(
        self, io: _C.BlockIO, path: str, direct: bool, ranges: list[tuple[int, int]]
    ) -> None:
        content = PATTERN[: 9 * BLOCK + 5]
        file, sums = stored(path, content, BLOCK, direct)
        memory, target = whole(len(content))
        with pytest.raises(ValueError, match=r"range|overflow"):
            io.read_checked(file, ranges, BLOCK, len(content), sums, [target])
        assert not memory.any()

    @pytest.mark.parametrize("count", [0, 9, 11])
    def test_wrong_number_of_expected_sums_is_refused(
        self, io: _C.BlockIO, path: str, direct: bool, count: int
    ) -> None:
        file, _ = stored(path, PATTERN[: 10 * BLOCK], BLOCK, direct)
        with pytest.raises(ValueError, match="checksums"):
            io.read_checked(file, [(0, BLOCK)], BLOCK, 10 * BLOCK, np.zeros(count, np.uint32), [])

    @pytest.mark.parametrize("end", [1 << 62, (1 << 63) - 1, 1 << 63, -1])
    def test_end_for_which_no_table_is_large_enough_is_refused(
        self, io: _C.BlockIO, path: str, direct: bool, end: int
    ) -> None:
        file, _ = stored(path, PATTERN, BLOCK, direct)
        with pytest.raises(ValueError, match=r"checksums|overflow|end"):
            io.read_checked(file, [(0, 1)], 1, end, b"", [])

    @pytest.mark.parametrize(
        "target",
        [
            (0, np.zeros(9, np.uint8), 0, (10,), (1,), (1,), 1),
            (0, np.zeros(10, np.uint8), 1, (10,), (1,), (1,), 1),
            (0, np.zeros(10, np.uint8), 0, (10,), (1,), (-1,), 1),
            (0, np.zeros(10, np.uint8), 0, (10,), (0,), (1,), 1),
            (0, np.zeros(10, np.uint8), 0, (10,), (1, 1), (1,), 1),
            (-1, np.zeros(10, np.uint8), 0, (10,), (1,), (1,), 1),
            (0, np.zeros(10, np.uint8), 0, (10,), (1,), (1,), 0),
            ((1 << 63) - 5, np.zeros(10, np.uint8), 0, (10,), (1,), (1,), 1),
            (0, bytes(10), 0, (10,), (1,), (1,), 1),
            (0, np.zeros(10, np.uint8), 0, (10,), (1,), (1,)),
            (0, None, 0, (10,), (1,), (1,), 1),
            7,
        ],
    )
    def test_impossible_target_is_refused_before_anything_is_copied(
        self, io: _C.BlockIO, path: str, direct: bool, target: tuple[object, ...]
    ) -> None:
        file, sums = stored(path, PATTERN, BLOCK, direct)
        memory, good = whole(len(PATTERN))
        with pytest.raises((ValueError, TypeError)):
            io.read_checked(file, [(0, len(PATTERN))], BLOCK, len(PATTERN), sums, [good, target])  # type: ignore[list-item]
        assert not memory.any()

    def test_targets_out_of_order_are_refused(self, io: _C.BlockIO, path: str, direct: bool) -> None:
        file, sums = stored(path, PATTERN, BLOCK, direct)
        memory = np.zeros(20, np.uint8)
        targets = [(at, memory, 0, (10,), (1,), (1,), 1) for at in (50_000, 10)]
        with pytest.raises(ValueError, match="ascending"):
            io.read_checked(file, [(0, len(PATTERN))], BLOCK, len(PATTERN), sums, targets)
        assert not memory.any()

    def test_lists_do_as_well_as_tuples(self, io: _C.BlockIO, path: str, direct: bool) -> None:
        file, sums = stored(path, PATTERN, BLOCK, direct)
        memory, target = whole(len(PATTERN))
        arguments = ([[0, len(PATTERN)]], BLOCK, len(PATTERN), sums, [list(target)])
        assert io.read_checked(file, *arguments) is None  # type: ignore[arg-type]
        assert (memory == PATTERN).all()

    def test_empty_targets_take_nothing(self, io: _C.BlockIO, path: str, direct: bool) -> None:
        file, sums = stored(path, PATTERN, BLOCK, direct)
        memory = np.ones(4, np.uint8)
        targets = [(at, memory, 0, (0, 4), (4, 1), (4, 1), 1) for at in (0, BLOCK, 3 * REQUEST)]
        targets.append((4 * REQUEST, np.zeros(0, np.uint8), 0, (0,), (1,), (1,), 1))
        assert io.read_checked(file, [(0, len(PATTERN))], BLOCK, len(PATTERN), sums, targets) is None
        assert memory.all()


def test_two_at_once_in_threads_do_not_mix(backend: str, path: str, direct: bool) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            io = _C.BlockIO(backend, request_size=REQUEST, queue_depth=2)
            data = np.roll(PATTERN, number)
            expected = sums_of(data, BLOCK)
            for turn in range(5):
                file = create(f"{path}-{number}", direct)
                sums = np.zeros(len(expected), np.uint32)
                io.write_checked(file, np.array_split(data, 1 + turn), BLOCK, sums)
                assert (sums == expected).all()
                memory, target = whole(len(data))
                assert io.read_checked(file, [(0, len(data))], BLOCK, len(data), sums, [target]) is None
                assert (memory == data).all()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
