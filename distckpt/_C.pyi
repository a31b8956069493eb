"""The C++ core. All buffers are anything with the buffer protocol, C-contiguous; offsets and sizes are bytes.

Failures of the operating system raise OSError with errno and file name. Every call that reads, writes,
copies or checksums releases the GIL. Using a closed File or BlockIO is a ValueError.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer as _Buffer

Buffer: TypeAlias = _Buffer | npt.NDArray[Any]  # NumPy declares its arrays as buffers from Python 3.12 on
_Int64s: TypeAlias = npt.NDArray[np.int64]  # C-contiguous, one dimension

BLOCK_IO_BACKENDS: tuple[str, ...]  # what this machine can do, best first: ("io_uring", "threads") or ("threads",)

CRC32C_KERNELS: tuple[str, ...]  # what this CPU has, fastest first, of "avx512", "sse4.2", "armv8"; last "portable"

def crc32c(data: Buffer, value: int = 0) -> int:
    """CRC32C (Castagnoli, RFC 3720) of data, continuing from `value`; by the fastest kernel of this CPU."""

def crc32c_by(kernel: str, data: Buffer, value: int = 0) -> int:
    """The same by one of CRC32C_KERNELS, for comparison; ValueError for another."""

def join_crc32c(first: int, second: int, size: int) -> int:
    """CRC32C of bytes whose own is `first`, followed by `size` bytes whose own is `second`."""

def crc32c_blocks(data: Buffer, block_size: int, out: Buffer, *, threads: int = 1) -> None:
    """CRC32C of each block_size bytes of data (the last block may be short) into `out`, uint32, one per block.

    ValueError if `out` has not exactly ceil(len(data) / block_size) items or is not writable.
    """

def sample_checksums(parts: Sequence[Buffer], item_bytes: Sequence[int] | _Int64s, out: Buffer) -> None:
    """A checksum of a few items of each part into `out`, uint32, one a part: equal memories have equal ones.

    CRC32C of all bytes of a part of up to 64 KiB, else of 65 of its n items of item_bytes[i] bytes: those numbered
    j * ((n - 1) // 63), j from 0 to 63, and the last. ValueError if an item size is less than 1 or does not divide its
    part, or if there is not one item size and one place in `out` a part. The parts before a wrong one may have been
    summed.
    """

def gather(parts: Sequence[Buffer], target: Buffer, offsets: Sequence[int] | _Int64s, *, threads: int = 1) -> None:
    """Copy parts[i] to target[offsets[i] :].

    ValueError, before anything is copied, when there is not one offset a part, a part would reach outside the target,
    or two memories overlap: two parts in the target, or a part and the target.
    """

class Memory:
    """Anonymous memory, 2 MiB aligned, on huge pages where the kernel gives them, not inherited by forks.

    Supports the (writable) buffer protocol; freed when the last buffer over it is gone. Touching it in a child
    process that was forked is a segmentation fault.
    """

    def __init__(self, size: int) -> None: ...
    def populate(self, *, threads: int = 1) -> None:
        """Touch every page now, so that later copies run at the speed of memory."""
    @property
    def huge_pages(self) -> bool:
        """Whether the kernel accepted the request for huge pages."""
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class SharedMemory:
    """A file's content as memory that several processes share; its first bytes are also words of 4 bytes.

    Supports the (writable) buffer protocol; unmapped when the last buffer over it is gone. Not inherited by forks:
    touching it in a child is a segmentation fault.
    """

    def __init__(self, path: str, size: int) -> None:
        """Open or make (for the owner alone) the file, of `size` bytes from then on. All who open it give one size.

        OSError ENODEV if it does not lie in memory. The path may be removed as soon as all have opened it.
        """
    def reserve(self, begin: int, size: int) -> None:
        """Take memory for these bytes, zero where they are new; OSError ENOSPC where there is none.

        Touching bytes that nobody has reserved can end the process (SIGBUS).
        """
    def populate(self, begin: int, size: int) -> None:
        """Map the pages of bytes that are reserved, all at once, where the kernel can."""
    def load(self, word: int) -> int:
        """A word; whoever reads a value also sees what was written before it was stored (acquire)."""
    def store(self, word: int, value: int) -> None:
        """Set a word (release)."""
    def exchange(self, word: int, expected: int, desired: int) -> int:
        """Set a word to `desired` if it is `expected`; returns what it was."""
    def __buffer__(self, flags: int, /) -> memoryview: ...

class File:
    """One file descriptor, owned. Closed by close() or with the object."""

    @staticmethod
    def create(path: str, *, direct: bool = True, mode: int = 0o666) -> File:
        """O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC. `direct` asks for O_DIRECT; refused (EINVAL), it is buffered."""
    @staticmethod
    def reopen(path: str, *, direct: bool = True) -> File:
        """An existing file, to be written on: O_RDWR | O_CLOEXEC, O_DIRECT as in create."""
    @staticmethod
    def open(path: str, *, direct: bool = False) -> File:
        """O_RDONLY | O_CLOEXEC, O_DIRECT as in create."""
    @property
    def path(self) -> str: ...
    @property
    def direct(self) -> bool:
        """Whether O_DIRECT is on."""
    @property
    def size(self) -> int: ...
    def truncate(self, size: int) -> None: ...
    def sync(self) -> None:
        """fsync."""
    def is_named(self, path: str) -> bool:
        """Whether `path` now leads to this very file (same device and inode)."""
    def set_access(self, mode: int, group: int) -> None:
        """fchown of the group, then fchmod; -1 leaves either as it is."""
    def close(self) -> None:
        """Close, and raise what close() reports; a second call does nothing."""

class BlockIO:
    """Reads and writes of any size and alignment with many requests in flight. One user at a time.

    A file opened with O_DIRECT is read and written directly where offset, size and memory are aligned to 4096
    bytes; unaligned edges go through an aligned bounce buffer. An unaligned tail that is written directly is
    padded with zeros to the next 4096 bytes: the caller truncates when the file is complete. EINVAL on a direct
    transfer turns O_DIRECT off for that file and goes on buffered. When a call raises, nothing is in flight any
    more. In a child process that inherited it by fork, every call but close() is a RuntimeError.
    """

    def __init__(self, backend: str = "", *, request_size: int = 4194304, queue_depth: int = 8) -> None:
        """backend "" is the best there is; ValueError for an unknown one, OSError for one this kernel refuses."""
    @property
    def backend(self) -> str: ...
    def write(self, file: File, offset: int, data: Buffer) -> None:
        """All of data at offset, which must be a multiple of 4096 if the file is direct (else ValueError)."""
    def read(self, file: File, offset: int, data: Buffer) -> int:
        """Fill data from offset; fewer bytes, returned, only at the end of the file."""
    def write_checked(
        self,
        file: File,
        parts: Sequence[Buffer],
        block_size: int,
        sums: Buffer,
        *,
        max_bytes_per_s: float = 0.0,
    ) -> None:
        """The parts, one after the other, from offset 0 on; after them `sums`, the CRC32C of each block of them.

        sums: writable, uint32, one per block_size bytes; filled on the way. request_size must be a multiple of
        block_size. A request of bytes of one part is written from where they are, if the file is buffered or their
        memory aligned: of a part whose address is its offset in the file modulo 4096, all but its first and last
        request. Other requests are gathered in a ring of queue_depth, copied and summed at once.
        max_bytes_per_s: 0 is no limit; ValueError if it is negative or not a number.
        """
    def read_checked(
        self,
        file: File,
        ranges: Sequence[tuple[int, int]],
        block_size: int,
        end: int,
        expected: Buffer,
        targets: Sequence[tuple[int, Buffer, int, tuple[int, ...], tuple[int, ...], tuple[int, ...], int]],
    ) -> tuple[int, int | None] | None:
        """Read the ranges, check every block, and copy what the targets want of it.

        ranges: (begin, end) ascending without overlap, of whole blocks (the last block of the file ends at `end`),
        else ValueError. expected: uint32, the CRC32C of every block of [0, end). targets: as Targets takes them,
        (chunk_start, target, target_start, shape, source_strides, target_strides, item_size), in ascending order of
        chunk_start, else ValueError; items must not lie across a block's end. Returns None, or the first wrong block
        that was met and its checksum (None where the file ends in it or before it); nothing of a wrong block has been
        copied, later blocks may not have been read.
        """
    def close(self) -> None: ...

def sync_directory(path: str) -> None:
    """fsync of a directory."""

class Targets:
    """Regions of a file that are wanted in memory, looked at once to be copied from many windows.

    Each is (chunk_start, target, target_start, shape, source_strides, target_strides, item_size): an array of `shape`
    items of item_size bytes. Item (i, ...) lies in the file at chunk_start + sum(i * source_strides), which must grow
    in C order (as it does for a box inside a C-ordered chunk; the innermost source stride is item_size), and goes to
    target_start + sum(i * target_strides) of `target`, whose strides may be any, negative ones included. Keeps the
    targets' buffers. Any thread may use it.
    """

    def __init__(
        self,
        targets: Sequence[tuple[int, Buffer, int, tuple[int, ...], tuple[int, ...], tuple[int, ...], int]],
    ) -> None:
        """In ascending order of chunk_start; see read_checked.

        ValueError when they are not, when any item would fall outside its target, the source strides do not grow or
        an argument overflows 63 bits.
        """
    def copy_from(self, source: Buffer, source_start: int) -> int:
        """Copy what `source`, bytes [source_start, source_start + len(source)) of the file, holds of each target.

        Items that lie partly or wholly outside it are left alone. The memories must not overlap. Returns the bytes
        copied. ValueError, before anything is copied, if no file has such bytes.
        """
