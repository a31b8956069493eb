"""CRC32C: the vectors of RFC 3720, all kernels against each other, checksums of blocks and of samples."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from distckpt import _C

PATTERN = np.random.default_rng(7).integers(0, 256, 1 << 17, dtype=np.uint8)

# The SCSI read command of RFC 3720 B.4.
SCSI_READ_10 = bytes.fromhex(
    "01c00000 00000000 00000000 00000000 14000000 0000040000000014 00000018 28000000 00000000 02000000 00000000"
)


@pytest.mark.parametrize("kernel", _C.CRC32C_KERNELS)
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
        (SCSI_READ_10, 0xD9963A56),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
    ids=["zeros", "ones", "rising", "falling", "scsi", "check", "empty"],
)
def test_known_vectors(kernel: str, data: bytes, expected: int) -> None:
    assert _C.crc32c_by(kernel, data) == expected


def test_kernels_end_with_the_portable_one_and_the_first_is_used() -> None:
    *fast, last = _C.CRC32C_KERNELS
    assert last == "portable"
    assert set(fast) <= {"avx512", "sse4.2", "armv8"}
    assert _C.crc32c(PATTERN) == _C.crc32c_by(_C.CRC32C_KERNELS[0], PATTERN)


def test_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="no kernel 'abacus' here"):
        _C.crc32c_by("abacus", b"")


@pytest.mark.parametrize("kernel", _C.CRC32C_KERNELS)
def test_kernels_agree_at_every_short_length_and_alignment(kernel: str) -> None:
    for offset in range(16):
        for length in range(601):
            data = PATTERN[offset : offset + length]
            assert _C.crc32c_by(kernel, data, 7) == _C.crc32c_by("portable", data, 7), (offset, length)


# Of the rounds of AVX-512, and of the long and short strides of three streams.
@pytest.mark.parametrize("edge", [256, 512, 1024, 3 * 256, 3 * 8192, 6 * 8192, 1 << 16])
@pytest.mark.parametrize("kernel", _C.CRC32C_KERNELS)
def test_kernels_agree_around_the_strides(kernel: str, edge: int) -> None:
    for length in range(edge - 65, edge + 66):
        data = PATTERN[3 : 3 + length]
        assert _C.crc32c_by(kernel, data) == _C.crc32c_by("portable", data), length


@pytest.mark.parametrize("kernel", _C.CRC32C_KERNELS)
@pytest.mark.parametrize("cut", [0, 1, 7, 8, 300, 24576, 100_000])
def test_continuing_from_a_value_equals_one_pass(kernel: str, cut: int) -> None:
    whole = _C.crc32c_by(kernel, PATTERN)
    assert _C.crc32c_by(kernel, PATTERN[cut:], _C.crc32c_by(kernel, PATTERN[:cut])) == whole
    assert _C.crc32c_by(kernel, PATTERN[cut:], value=_C.crc32c_by(kernel, PATTERN[:cut])) == whole


def test_going_on_from_a_value_is_the_default_of_zero() -> None:
    assert _C.crc32c(PATTERN[9:], _C.crc32c(PATTERN[:9])) == _C.crc32c(PATTERN, value=0) == _C.crc32c(PATTERN)


def test_one_flipped_bit_changes_the_checksum() -> None:
    data = PATTERN[:4096].copy()
    before = _C.crc32c(data)
    for bit in range(0, 4096 * 8, 911):
        data[bit // 8] ^= 1 << (bit % 8)
        assert _C.crc32c(data) != before
        data[bit // 8] ^= 1 << (bit % 8)


@pytest.mark.parametrize("data", [np.arange(6.0), np.float32(3), memoryview(b"abcd").cast("I"), np.zeros((0, 3))])
def test_any_contiguous_buffer_is_summed_as_bytes(data) -> None:
    assert _C.crc32c(data) == _C.crc32c(bytes(data))


@pytest.mark.parametrize("data", [PATTERN[::2], np.zeros((4, 4)).T[1:], memoryview(b"abcd")[::2]])
def test_buffer_that_is_not_contiguous_is_refused(data) -> None:
    with pytest.raises(ValueError, match="contiguous"):
        _C.crc32c(data)


def test_what_is_no_buffer_is_refused() -> None:
    with pytest.raises(TypeError):
        _C.crc32c("text")


@pytest.mark.parametrize("value", [-1, 1 << 32])
def test_value_that_is_no_checksum_is_refused(value: int) -> None:
    with pytest.raises(TypeError):
        _C.crc32c(b"", value)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 10_000, 65_536])
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_blocks_are_summed_one_by_one(size: int, threads: int) -> None:
    data = PATTERN[5 : 5 + size]
    out = np.full(-(-size // 4096), 0xDEADBEEF, dtype=np.uint32)
    _C.crc32c_blocks(data, 4096, out, threads=threads)
    assert out.tolist() == [_C.crc32c(data[i : i + 4096]) for i in range(0, size, 4096)]


def test_blocks_may_be_larger_than_the_data() -> None:
    out = np.zeros(1, dtype=np.uint32)
    _C.crc32c_blocks(PATTERN, (1 << 63) - 1, out)
    assert out[0] == _C.crc32c(PATTERN)


def test_block_checksums_go_to_memory_of_any_alignment() -> None:
    raw = bytearray(9)
    _C.crc32c_blocks(b"12345678", 4, memoryview(np.frombuffer(raw, "u4", 2, 1)))
    assert raw == b"\0" + struct.pack("<2I", _C.crc32c(b"1234"), _C.crc32c(b"5678"))


@pytest.mark.parametrize(
    "out",
    [
        np.zeros(2, np.uint32),
        np.zeros(4, np.uint32),
        np.zeros(3, np.uint64),
        np.zeros(3, np.uint8),
        np.zeros(3, "V0"),
        np.zeros(6, np.uint32)[::2],
        bytes(12),
    ],
    ids=["short", "long", "wide", "narrow", "empty items", "strided", "read-only"],
)
def test_blocks_into_anything_but_one_item_per_block_are_refused(out) -> None:
    with pytest.raises(ValueError, match=r"out must be|writable|contiguous"):
        _C.crc32c_blocks(PATTERN[:10_000], 4096, out)


@pytest.mark.parametrize(("block_size", "threads"), [(0, 1), (-1, 1), (1 << 63, 1), (4096, 0), (4096, -1)])
def test_blocks_of_no_size_or_on_no_thread_are_refused(block_size: int, threads: int) -> None:
    with pytest.raises(ValueError, match=r"block_size|threads|overflows"):
        _C.crc32c_blocks(PATTERN[:4096], block_size, np.zeros(1, np.uint32), threads=threads)


def sample_of(part: np.ndarray) -> int:
    """By definition."""
    if part.nbytes <= 65536:
        return _C.crc32c(part)
    step = (len(part) - 1) // 63
    return _C.crc32c(np.array([*(part[j * step] for j in range(64)), part[-1]], part.dtype))


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "c16", "V3"])
def test_sample_is_of_all_bytes_up_to_64_kib_and_else_of_65_items(dtype: str) -> None:
    size = np.dtype(dtype).itemsize
    parts = [PATTERN[1 : 1 + n * size].view(dtype) for n in (0, 1, 65536 // size, 65536 // size + 1, 100_000 // size)]
    sums = np.full(len(parts), 7, np.uint32)
    _C.sample_checksums(parts, [size] * len(parts), sums)
    assert sums.tolist() == [sample_of(part) for part in parts]
    _C.sample_checksums(parts, np.full(len(parts), size), sums)
    assert sums.tolist() == [sample_of(part) for part in parts]


def test_samples_of_items_of_several_sizes() -> None:
    sums = np.zeros(2, np.uint32)
    _C.sample_checksums((PATTERN, PATTERN), (1, 8), sums)
    assert sums.tolist() == [sample_of(PATTERN), sample_of(PATTERN.view("u8"))]
    _C.sample_checksums([], [], np.zeros(0, np.uint32))


@pytest.mark.parametrize("size", [0, -1, 3, 200, -(1 << 63)])
def test_items_that_do_not_make_up_their_part_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"100 bytes are no items of {size}"):
        _C.sample_checksums([PATTERN[:100]], [size], np.zeros(1, np.uint32))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_anything_but_one_item_size_and_one_place_a_part_is_refused(count: int) -> None:
    parts = [PATTERN[:4], PATTERN[:4]]
    with pytest.raises(ValueError, match=f"2 parts with {count} item sizes"):
        _C.sample_checksums(parts, [4] * count, np.zeros(2, np.uint32))
    with pytest.raises(ValueError, match="out must be 2 items of 4 bytes"):
        _C.sample_checksums(parts, [4, 4], np.zeros(count, np.uint32))


@pytest.mark.parametrize("cut", [0, 1, 7, 64, 99_999, 100_000])
def test_joined_sums_are_the_sum_of_both_one_after_the_other(cut: int) -> None:
    data = PATTERN[:100_000]
    first, second = _C.crc32c(data[:cut]), _C.crc32c(data[cut:])
    assert _C.join_crc32c(first, second, len(data) - cut) == _C.crc32c(data)
