"""Storage on a mounted file system. It decides the order of system calls, and never what the files mean.

The protocol. A power cut may come between any two steps; POSIX then promises only what fsync returned for.

1. A directory is made with mkdir, then its *parent* is fsynced, top down from the root's own parent. An
   existing one is treated alike: another rank may have made it a moment ago, and not have got to its fsync
   yet.
2. A large file is opened with O_EXCL: no two writers ever share a file, so nothing written can be mixed. It
   is written with O_DIRECT where the file system allows it, zero-padded to 4096 bytes, and cut to its true
   length with ftruncate before the fsync, because the length is part of what fsync makes durable.
3. After the fsync the path is compared with the open file (device and inode). If somebody removed or
   replaced it in the meantime, the bytes are safe in a file that has no name, and the caller must not
   commit that name.
4. close() is looked at, because network file systems may report a failed write as late as that. Whatever
   fails in 1 to 4, the file is abandoned and never synced again: after one failed fsync the kernel may drop
   the dirty pages and report success to the next (Rebello et al., "Can Applications Recover from fsync
   Failures?", USENIX ATC 2020).
5. A small file never appears under its name before it is whole: it is written under an unguessable
   temporary name in the same directory (one file system, so no copy) and fsynced. Content first, name
   second.
   a. put_if_absent then gives it its name with link(), which fails if the name is taken, on NFS too. Of two
      writers one wins. The reply to link() can get lost on a network; so on failure the name is compared
      with the temporary file, and if both are one file, the call did succeed.
   b. replace then uses rename(), which is atomic: readers open the old file or the new one.
6. The temporary name is unlinked *before* the directory is fsynced, so one fsync makes both changes durable
   and a crash after success leaves no litter. A crash before it may leave `.tmp-*` names; `list` shows
   them, so that they can be swept.
7. append is one write() to a file opened with O_APPEND, which the kernel places at the end as of that moment. It is
   not fsynced: a line of a log is not worth what that costs. (NFS has no such write; there, of two clients that
   append at once, one may overwrite the other's line.)
8. Only the fsync of the directory makes a name, or its absence, durable. Therefore it comes last, and
   success is reported after it. A failure there means that it is unknown whether the name will survive.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from typing_extensions import Buffer

from distckpt import _C
from distckpt.host import host_id
from distckpt.storage.access import Access, known_access
from distckpt.storage.checked import Target
from distckpt.storage.names import split_name
from distckpt.storage.port import FreeSpace
from distckpt.storage.requests import CACHED_READS, READS, WRITES, BlockIOPool, Requests

WRITE_ALIGNMENT = 4096
_PROBES = 8
TEMPORARY_PREFIX = ".tmp-"


class PosixStorage:
    """Files below `root`, which need not exist yet. Safe to use from several threads, and after a fork.

    io_backend: "io_uring", "threads", or "" for the better one that there is. writes, reads: how large transfers are
    cut. file_mode: permission bits of new files, whatever the umask says; who may read them may enter new directories.
    group: name or number of the group of both. Raises ValueError for what cannot be given.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        io_backend: str = "",
        writes: Requests = WRITES,
        reads: Requests = READS,
        file_mode: int | None = None,
        group: str | int | None = None,
    ) -> None:
        self._access = known_access(file_mode, group)
        self._root = os.path.abspath(os.fspath(root))
        self._writes = BlockIOPool(io_backend, writes)
        self._reads = BlockIOPool(io_backend, reads)
        self._cached_reads = BlockIOPool(io_backend, CACHED_READS)
        self._asked_for = io_backend
        self._is_buffered = threading.Event()

    @property
    def location(self) -> str:
        return self._root

    @property
    def io_backend(self) -> str:
        """The backend that moves the bytes: "io_uring" or "threads"."""
        with self._writes.borrow() as block_io:
            return block_io.backend

    @property
    def degraded(self) -> tuple[str, ...]:
        """What this host or file system refused, so that it is slower than it could be."""
        refused = []
        if not self._asked_for and "io_uring" not in _C.BLOCK_IO_BACKENDS:
            refused.append("io_uring is refused here: threads move the bytes")
        if self._is_buffered.is_set():
            refused.append(f"{self._root}: its file system refused O_DIRECT: files were written through the page cache")
        return tuple(refused)

    def list(self, directory: str) -> Sequence[str]:
        try:
            return sorted(os.listdir(self._directory_path(directory)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def make_directory(self, directory: str) -> None:
        self._make_root()
        path = self._root
        for segment in split_name(directory) if directory else ():
            parent, path = path, os.path.join(path, segment)
            self._make_one_directory(path)
            _sync_directory(parent)

    def sync_directory(self, directory: str) -> None:
        _sync_directory(self._directory_path(directory))

    def create(self, name: str, *, size_hint: int = 0) -> PosixWriteFile:
        """As in the port. size_hint is not used: preallocation was measured not to make writing faster."""
        file = _C.File.create(self._path(name), direct=True)
        if self._access.is_given:
            try:
                file.set_access(self._access.file_mode, self._access.group)
            except BaseException:
                file.close()
                raise
        return PosixWriteFile(name, file, self._writes, self._is_buffered)

    def reopen(self, name: str) -> PosixWriteFile:
        path = self._path(name)
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        return PosixWriteFile(name, _C.File.reopen(path), self._writes, self._is_buffered)

    def open(self, name: str) -> PosixReadFile:
        path = self._path(name)
        # Look first: a directory opens fine and fails later, a named pipe waits for a writer for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        return PosixReadFile(name, _C.File.open(path), self._reads, self._cached_reads)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        path = self._path(name)
        temporary, written = _write_temporary(path, data, self._access)
        try:
            linked = _link_if_absent(temporary, written, path)
        finally:
            _remove_temporary(temporary)
        if linked:
            _sync_directory(os.path.dirname(path))
        return linked

    def replace(self, name: str, data: bytes) -> None:
        path = self._path(name)
        temporary, _ = _write_temporary(path, data, self._access)
        try:
            os.rename(temporary, path)
        except BaseException:
            _remove_temporary(temporary)
            raise
        _sync_directory(os.path.dirname(path))

    def append(self, name: str, data: bytes) -> None:
        path = self._path(name)
        # O_NONBLOCK and O_RDWR: opening a named pipe must not wait for a reader.
        flags = os.O_RDWR | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC
        is_new = False
        try:
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            descriptor, is_new = os.open(path, flags | os.O_CREAT, 0o666), True
        try:
            if is_new:
                self._access.apply(descriptor)
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
            is_torn = status.st_size > 0 and os.pread(descriptor, 1, status.st_size - 1) != b"\n"
            line = b"\n" + data if is_torn else data
            # Not in a loop: a second write might land behind another's line.
            written = os.write(descriptor, line)
            if written != len(line):
                raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes were written", path)
        except OSError as error:
            if error.filename is None:
                raise OSError(error.errno, error.strerror, path) from error
            raise
        finally:
            os.close(descriptor)

    def move(self, name: str, new_name: str) -> None:
        os.rename(self._path(name), self._path(new_name))

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._path(name))

    def remove_directory(self, directory: str) -> None:
        try:
            os.rmdir(self._path(directory))
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise

    def touch(self, name: str) -> None:
        os.utime(self._path(name))

    def age_s(self, name: str) -> float:
        """As in the port, by this host's clock; never negative."""
        return max(0.0, time.time() - os.stat(self._path(name)).st_mtime)

    def free_space(self) -> FreeSpace | None:
        """What an unprivileged user may still write. Hosts that share a file system give it different ids."""
        path = self._root
        while not os.path.exists(path):
            path = os.path.dirname(path)
        status = os.statvfs(path)
        if status.f_blocks == 0:  # Some network and FUSE file systems do not say.
            return None
        filesystem_id = f"{host_id()}:{os.stat(path).st_dev}"
        return FreeSpace(filesystem_id, status.f_bavail * status.f_frsize)

    def _path(self, name: str) -> str:
        return os.path.join(self._root, *split_name(name))

    def _directory_path(self, directory: str) -> str:
        return self._path(directory) if directory else self._root

    def _make_root(self) -> None:
        missing = []
        path = self._root
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        # Another rank may just have made this one. Who may not read its parent did not make it either.
        with suppress(PermissionError):
            _sync_directory(os.path.dirname(path))
        for path in reversed(missing):
            self._make_one_directory(path)
            _sync_directory(os.path.dirname(path))

    def _make_one_directory(self, path: str) -> None:
        try:
            os.mkdir(path)
        except FileExistsError:
            if not os.path.isdir(path):
                raise
            return
        if self._access.is_given:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                self._access.apply(descriptor, is_directory=True)
            finally:
                os.close(descriptor)


class PosixWriteFile:
    """One new file, open for writing. Not thread-safe; owns its file descriptor."""

    def __init__(self, name: str, file: _C.File, pool: BlockIOPool, is_buffered: threading.Event) -> None:
        """is_buffered: set if O_DIRECT turns out to be refused."""
        self._name = name
        self._file: _C.File | None = file
        self._pool = pool
        self._is_buffered = is_buffered

    @property
    def name(self) -> str:
        return self._name

    def write(self, offset: int, buffer: Buffer) -> None:
        """As in the port. Offsets are multiples of 4096; only the end of the file may be unaligned."""
        file = self._open_file()
        if offset < 0 or offset % WRITE_ALIGNMENT:
            raise ValueError(f"{file.path}: write offset {offset} is not a multiple of {WRITE_ALIGNMENT}")
        try:
            with self._pool.borrow() as block_io:
                block_io.write(file, offset, buffer)
        except BaseException:
            self.abandon()
            raise

    def write_checked(
        self, parts: Sequence[Buffer], block_bytes: int, sums: Buffer, *, max_bytes_per_s: float = 0.0
    ) -> None:
        """As `checked.write_checked`: gathered, summed and written in one pass, without the GIL."""
        file = self._open_file()
        try:
            with self._pool.borrow() as block_io:
                block_io.write_checked(file, parts, block_bytes, sums, max_bytes_per_s=max_bytes_per_s)
        except BaseException:
            self.abandon()
            raise

    def sync(self) -> None:
        try:
            self._open_file().sync()
        except BaseException:
            self.abandon()
            raise

    def finish(self, size_bytes: int) -> None:
        file = self._open_file()
        if not file.direct:
            self._is_buffered.set()
        try:
            file.truncate(size_bytes)
            file.sync()
            if not file.is_named(file.path):
                raise OSError(errno.ESTALE, "path no longer names the file that was written", file.path)
            self._file = None
            file.close()
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()

    def _open_file(self) -> _C.File:
        if self._file is None:
            raise ValueError(f"{self._name}: already finished or abandoned")
        return self._file


class PosixReadFile:
    """One open file: small reads go through the page cache, checked ones around it unless the file lies in it."""

    def __init__(self, name: str, file: _C.File, pool: BlockIOPool, cached_pool: BlockIOPool) -> None:
        self._name = name
        self._file = file
        self._lock = threading.Lock()  # of the next one
        self._direct: _C.File | None = None  # the same file, opened again when first read around the page cache
        self._size_bytes = file.size
        self._pool = pool
        self._cached_pool = cached_pool

    @property
    def name(self) -> str:
        return self._name

    @property
    def size_bytes(self) -> int:
        """The length when the file was opened."""
        return self._size_bytes

    def read_into(self, offset: int, buffer: Buffer) -> None:
        if offset < 0:
            raise ValueError(f"{self._file.path}: read offset {offset} is negative")
        wanted = memoryview(buffer).nbytes
        with self._cached_pool.borrow() as block_io:
            count = block_io.read(self._file, offset, buffer)
        if count != wanted:
            raise EOFError(
                f"{self._file.path}: {wanted} bytes wanted at offset {offset}, "
                f"but only {count} are there: the file is shorter than expected"
            )

    def read_checked(
        self,
        ranges: Sequence[tuple[int, int]],
        block_bytes: int,
        end: int,
        expected: Buffer,
        targets: Sequence[Target],
    ) -> tuple[int, int | None] | None:
        """As `checked.read_checked`: read, checked and copied in one pass, without the GIL."""
        file, pool = self._file, self._cached_pool
        if not _is_cached(file.path, ranges):
            file, pool = self._opened_direct() or file, self._pool
        with pool.borrow() as block_io:
            return block_io.read_checked(file, ranges, block_bytes, end, expected, targets)

    def _opened_direct(self) -> _C.File | None:
        """The same file, to be read around the page cache; None if its name leads elsewhere by now."""
        with self._lock:
            if self._direct is None:
                path = self._file.path
                try:
                    direct = _C.File.open(path, direct=True)
                except FileNotFoundError:
                    return None
                if not self._file.is_named(path):
                    direct.close()
                    return None
                self._direct = direct
            return self._direct

    def drop_cache(self) -> None:
        """As `checked.drop_cache`. The kernel keeps what is not written back yet, or mapped by somebody."""
        descriptor = os.open(self._file.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        if self._direct is not None:
            self._direct.close()
        self._file.close()


def _is_cached(path: str, ranges: Sequence[tuple[int, int]]) -> bool:
    """Whether a few places of the ranges lie in the page cache: then reading there is faster than from the disk."""
    places = [begin + (end - begin) * i // _PROBES for begin, end in ranges[:_PROBES] for i in range(_PROBES)]
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return all(os.preadv(descriptor, [bytearray(1)], at, os.RWF_NOWAIT) == 1 for at in places)
    except OSError:  # EAGAIN: not cached; EOPNOTSUPP: the file system does not say.
        return False
    finally:
        os.close(descriptor)


def _sync_directory(path: str) -> None:
    try:
        _C.sync_directory(path)
    except OSError as error:
        # EINVAL: the file system has no such operation (some FUSE, CIFS), and keeps names in its own way.
        if error.errno != errno.EINVAL:
            raise


def _write_temporary(path: str, data: bytes, access: Access) -> tuple[str, os.stat_result]:
    """A durable file with `data` under a new name beside `path`; its content is durable, its name is not."""
    temporary = os.path.join(os.path.dirname(path), TEMPORARY_PREFIX + secrets.token_hex(16))
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    try:
        try:
            access.apply(descriptor)
            _write_all(descriptor, data)
            os.fsync(descriptor)
            written = os.fstat(descriptor)
        finally:
            os.close(descriptor)
    except BaseException as error:
        _remove_temporary(temporary)
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, path) from error
        raise
    return temporary, written


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _link_if_absent(temporary: str, written: os.stat_result, path: str) -> bool:
    try:
        os.link(temporary, path, follow_symlinks=False)
    except OSError as error:
        with suppress(OSError):
            if os.path.samestat(written, os.lstat(path)):
                return True
        if isinstance(error, FileExistsError):
            return False
        raise
    return True


def _remove_temporary(temporary: str) -> None:
    with suppress(OSError):
        os.unlink(temporary)
