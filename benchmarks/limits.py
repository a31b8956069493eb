"""What the machine can do with the same bytes from as many processes: direct writes and reads, copies in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch.distributed as dist

from benchmarks.clock import slowest
from benchmarks.files import remove
from benchmarks.request import Answer
from distckpt._C import BlockIO, File, Memory

REQUESTS = ((4 << 20, 8), (4 << 20, 16), (16 << 20, 4))  # (bytes, in flight)


def measure_limits(root: Path, rank: int, size_bytes: int, repeats: int) -> Answer:
    """Collective. size_bytes: of this rank. The best request size and depth is chosen by its median."""
    source, target = _warm_memory(size_bytes), _warm_memory(size_bytes)
    answer = Answer(backend=BlockIO().backend)
    _fill(source)
    for _ in range(repeats):
        answer.add("copy", slowest(lambda: np.copyto(_items(target), _items(source))))

    measured: dict[str, dict[str, list[float]]] = {"write": {}, "read": {}}
    for request_size, queue_depth in REQUESTS:
        block_io = BlockIO(request_size=request_size, queue_depth=queue_depth)
        label = f"{request_size >> 20} MiB x {queue_depth}"
        for _ in range(repeats):
            write_s, read_s = _write_and_read(root, rank, block_io, source, target)
            measured["write"].setdefault(label, []).append(write_s)
            measured["read"].setdefault(label, []).append(read_s)
        block_io.close()
    for figure, by_label in measured.items():
        best = min(by_label, key=lambda label: float(np.median(by_label[label])))
        answer.seconds[figure] = by_label[best]
        answer.notes.append(f"{figure}: {best} in flight, O_DIRECT, {answer.backend}")
    if not source.huge_pages:
        answer.notes.append("huge pages were refused")
    return answer


def _write_and_read(root: Path, rank: int, block_io: BlockIO, source: Memory, target: Memory) -> tuple[float, float]:
    """Seconds of writing the source to a new file with fsync, and of reading it back."""
    directory = root / "limits"
    directory.mkdir(exist_ok=True)
    path = directory / f"rank_{rank}"
    file = File.create(str(path))
    _require(file.direct, f"{path}: the file system has no O_DIRECT; the limits would be those of the page cache")

    def write() -> None:
        block_io.write(file, 0, source)
        file.sync()

    def read() -> None:
        block_io.read(file, 0, target)

    write_s = slowest(write)
    _fill(target, 0)
    read_s = slowest(read)
    file.close()
    _require(np.array_equal(_items(source), _items(target)), f"{path}: what was read is not what was written")
    if rank == 0:
        remove(directory)
    dist.barrier()
    return write_s, read_s


def _warm_memory(size_bytes: int) -> Memory:
    memory = Memory(-(-size_bytes // 4096) * 4096)
    memory.populate()
    return memory


def _items(memory: Memory) -> np.ndarray:
    return np.frombuffer(memory, dtype=np.uint8)


def _fill(memory: Memory, value: int | None = None) -> None:
    items = _items(memory).view(np.uint32)
    items[:] = np.arange(items.size, dtype=np.uint32) if value is None else value


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(otherwise)
