"""What the machine can do with the same bytes from as many processes: direct writes and reads, copies in memory.

Writes and reads also with the CRC32C of every MiB. A checked read copies what it has checked to where it is wanted, as
a load must: tensors do not lie as a disk wants memory to lie. So what checking costs shows beside a read that copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from typing_extensions import Buffer

from benchmarks.clock import slowest, total
from benchmarks.files import remove
from benchmarks.request import Answer, Request
from distckpt._C import BlockIO, File, Memory

REQUESTS = ((2 << 20, 16), (4 << 20, 8), (16 << 20, 4))  # (bytes, in flight)
TRANSFERS = ("write", "write_checked", "read", "read_copied", "read_checked")
BLOCK_BYTES = 1 << 20
ASIDE = 64  # bytes by which memory is not aligned as O_DIRECT wants it
Items = npt.NDArray[np.uint32]


class Transfers:
    """One file per rank, written from warm memory and read into other warm memory. Collective."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        self._size = -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
        self.source, target = _warm_memory(self._size), _warm_memory(self._size + ASIDE)
        self._target, self._aside = memoryview(target)[: self._size], memoryview(target)[ASIDE:]
        self._sums = np.zeros(self._size // BLOCK_BYTES, dtype=np.uint32)
        _items(self.source)[:] = np.arange(self._size // 4, dtype=np.uint32)

    def copy(self) -> float:
        return slowest(lambda: np.copyto(_items(self._target), _items(self.source)))

    def run(self, block_io: BlockIO) -> dict[str, float]:
        """Seconds of each of TRANSFERS: two new files with fsync, and reads of each."""

        def write(file: File) -> None:
            block_io.write(file, 0, self.source)

        def write_checked(file: File) -> None:
            block_io.write_checked(file, [self.source], BLOCK_BYTES, self._sums)

        def read(file: File, target: memoryview) -> None:
            block_io.read(file, 0, target)

        def read_checked(file: File, target: memoryview) -> None:
            whole = (0, target, 0, (self._size,), (1,), (1,), 1)
            wrong = block_io.read_checked(file, [(0, self._size)], BLOCK_BYTES, self._size, self._sums, [whole])
            _require(wrong is None, f"{file.path}: block {wrong} is not what was written")

        write_s, [read_s] = self._write_and_read(write, [(read, self._target)])
        write_checked_s, reads_s = self._write_and_read(
            write_checked, [(read, self._aside), (read_checked, self._aside)]
        )
        return dict(zip(TRANSFERS, (write_s, write_checked_s, read_s, *reads_s), strict=True))

    def _write_and_read(
        self, write: Callable[[File], None], reads: Sequence[tuple[Callable[[File, memoryview], None], memoryview]]
    ) -> tuple[float, list[float]]:
        directory = self._path.parent
        directory.mkdir(exist_ok=True)
        file = File.create(str(self._path))
        _require(file.direct, f"{self._path}: no O_DIRECT here; the limits would be those of the page cache")

        def write_durably() -> None:
            write(file)
            file.sync()

        write_s = slowest(write_durably)
        reads_s = []
        for read, target in reads:
            _items(target)[:] = 0
            reads_s.append(slowest(partial(read, file, target)))
            _require(np.array_equal(_items(self.source), _items(target)), f"{self._path}: read other than written")
        file.close()
        dist.barrier()
        if dist.get_rank() == 0:
            remove(directory)
        dist.barrier()
        return write_s, reads_s


def measure_limits(request: Request) -> Answer:
    """Collective. The ranks share size_bytes. The best request size and depth of each is chosen by its median."""
    share = request.model.size_bytes // dist.get_world_size()
    transfers = Transfers(Path(request.root) / "limits" / f"rank_{dist.get_rank()}", share)
    answer = Answer(backend=BlockIO().backend, state_bytes=total(len(transfers.source)))
    for _ in range(request.repeats):
        answer.add("copy", transfers.copy())
    measured: dict[str, dict[str, list[float]]] = {name: {} for name in TRANSFERS}
    for request_size, queue_depth in REQUESTS:
        block_io = BlockIO(request_size=request_size, queue_depth=queue_depth)
        transfers.run(block_io)  # Its buffers are memory that is touched for the first time.
        for _ in range(request.repeats):
            for name, seconds in transfers.run(block_io).items():
                measured[name].setdefault(f"{request_size >> 20} MiB x {queue_depth}", []).append(seconds)
        block_io.close()
    for name, by_label in measured.items():
        best = min(by_label, key=lambda label: median(by_label[label]))
        answer.samples[name] = by_label[best]
        answer.notes.append(f"{name}: {best} in flight, O_DIRECT, {answer.backend}")
    if not transfers.source.huge_pages:
        answer.notes.append("huge pages were refused")
    return answer


def _warm_memory(size_bytes: int) -> Memory:
    memory = Memory(size_bytes)
    memory.populate()
    return memory


def _items(memory: Buffer) -> Items:
    return np.frombuffer(memory, dtype=np.uint32)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(otherwise)
