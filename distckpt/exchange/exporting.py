"""Exporting: a checkpoint in a format of others: as a zarr group, or as safetensors files of whole tensors. No torch.

The target is made under a temporary name beside its own, and gets that when it is whole and durable: what has the name
is no half. Tensors are streamed through a fixed amount of memory, whatever the size of one.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np

from distckpt._C import Memory
from distckpt.checkpoint_files import OnBytes, read_per_rank
from distckpt.elements import Elements
from distckpt.errors import CheckpointError
from distckpt.exchange.export_source import ExportSource, Workers
from distckpt.exchange.safetensors_files import (
    INDEX_FILE,
    MAX_FILE_BYTES,
    FileOfTensors,
    NamedTensor,
    arrange_files,
    index_document,
    rename_keys,
)
from distckpt.exchange.zarr_group import (
    Compression,
    NewArray,
    NewGroup,
    UninterruptedCalls,
    import_zarr_library,
    sync_path,
)
from distckpt.exchange.zarr_layout import (
    LAYOUT_VERSION,
    GroupFacts,
    PerRankFacts,
    RankValues,
    cut_array,
    node_paths,
    stored_cell,
)
from distckpt.geometry import Box, bands
from distckpt.report import ExportReport
from distckpt.roots import root_above
from distckpt.selecting import Selector
from distckpt.shard_file import DTYPES
from distckpt.storage import PosixStorage, Storage, WriteFile, new_file
from distckpt.tensor_source import MEMORY_BYTES, TensorSource

_SHARD_COPIES = 12


def export_zarr(
    root: str | os.PathLike[str] | Storage,
    target: str | os.PathLike[str],
    iteration: Selector = None,
    *,
    select: Sequence[str] = (),
    drop: Sequence[str] = (),
    dtype: str | None = None,
    compression: Compression = "zstd",
    memory_bytes: int = MEMORY_BYTES,
    jobs: int | None = None,
    on_bytes: OnBytes = lambda _: None,
) -> ExportReport:
    """Make a zarr v3 group of a checkpoint: an array per tensor, cut as it is stored, and all else in its attributes.

    select, drop, dtype: as of ExportSource.open. jobs: shards that are made at a time; the processors if None.
    on_bytes: told how many bytes of tensors were written since it was told last, by one thread at a time; it may raise
    to give up. Raises CheckpointNotFoundError; FileExistsError if there is a target; CheckpointError without zarr or
    room; CorruptionError; ValueError; OSError.
    """
    source = ExportSource.open(root, iteration, select=select, drop=drop, dtype=dtype)
    return write_zarr(source, target, compression=compression, memory_bytes=memory_bytes, jobs=jobs, on_bytes=on_bytes)


def write_zarr(
    source: ExportSource,
    target: str | os.PathLike[str],
    *,
    compression: Compression = "zstd",
    memory_bytes: int = MEMORY_BYTES,
    jobs: int | None = None,
    on_bytes: OnBytes = lambda _: None,
) -> ExportReport:
    """The same of what was selected."""
    if compression not in ("zstd", "none"):
        raise ValueError(f"compression {compression!r}: expected zstd or none")
    import_zarr_library()
    started = time.perf_counter()
    workers = Workers(source, memory_bytes, jobs, on_bytes)
    paths = node_paths(source.keys)
    with UninterruptedCalls() as zarr, _new_directory(target, source.size_bytes) as directory:
        group = zarr.call(lambda: NewGroup.create(directory, _facts(source), compression))
        cells = {key: _stored_cell(source, key) for key in source.keys}
        arrays = {}
        for key in source.keys:
            spec = source.spec(key)
            # A part of the memory: zarr holds a shard several times while it puts it together.
            max_bytes = workers.memory_bytes // _SHARD_COPIES
            cut = cut_array(spec.global_shape, DTYPES[spec.dtype].item_bytes, cells[key], max_bytes)
            arrays[key] = zarr.call(partial(group.create_array, paths[key], key, spec, cut))

        def write_shard(tensors: TensorSource, step: tuple[str, NewArray, Box]) -> None:
            key, array, box = step
            (elements,) = source.read(tensors, [(key, box)])
            array.write(box, elements)
            workers.tell(elements.nbytes)

        workers.run(
            (
                (source.stored_bytes(key, box), (key, array, box))
                for key, array in arrays.items()
                for box in _by_cell(array.shards(), cells[key])
            ),
            write_shard,
        )
        zarr.call(group.finish)
    others = [*source.index.values, *source.index.per_rank]
    left_out = sum(not source.is_selected(key) for key in others)
    return _report(source, target, sum(array.shard_count for array in arrays.values()), left_out, started)


def _stored_cell(source: ExportSource, key: str) -> tuple[int, ...] | None:
    number = source.stored.number[key]
    for chunks in source.stored.chunks:
        row = int(np.searchsorted(chunks.tensors, number))
        if row < len(chunks.tensors) and chunks.tensors[row] == number:
            return stored_cell(chunks, row, source.index.tensors[key].global_shape)
    return None


def _by_cell(boxes: Iterator[Box], cell: tuple[int, ...] | None) -> Iterable[Box]:
    """Those of one stored chunk together: then it is read once, from its begin to its end."""
    if cell is None:
        return boxes
    return sorted(boxes, key=lambda box: tuple(o // size for o, size in zip(box.offset, cell, strict=True)))


def _facts(source: ExportSource) -> GroupFacts:
    index = source.index
    per_rank = {key: entry for key, entry in index.per_rank.items() if source.is_selected(key)}
    ranks = []
    for number in sorted({number for entry in per_rank.values() for _, number in entry.holders}):
        values = read_per_rank(source.storage, source.directory, index, number)
        own = {key: value for key, value in values.items() if key in per_rank}
        ranks.append(RankValues(index.files[number].rank, index.files[number].mesh, own))
    return GroupFacts(
        version=LAYOUT_VERSION,
        save_id=index.save_id,
        iteration=index.iteration,
        created_unix_s=index.created_unix_s,
        world_size=index.world_size,
        mesh=index.mesh,
        tensors={key: source.spec(key) for key in index.tensors if source.is_selected(key)},
        values={key: value for key, value in index.values.items() if source.is_selected(key)},
        metadata=index.metadata,
        metrics=index.metrics,
        per_rank={key: PerRankFacts(entry.axes, entry.on_change) for key, entry in per_rank.items()},
        ranks=tuple(ranks),
    )


def export_safetensors(
    root: str | os.PathLike[str] | Storage,
    target: str | os.PathLike[str],
    iteration: Selector = None,
    *,
    select: Sequence[str] = (),
    drop: Sequence[str] = (),
    dtype: str | None = None,
    strip: str = "",
    rename: Sequence[tuple[str, str]] = (),
    max_file_bytes: int = MAX_FILE_BYTES,
    memory_bytes: int = MEMORY_BYTES,
    jobs: int | None = None,
    on_bytes: OnBytes = lambda _: None,
) -> ExportReport:
    """Make a directory of safetensors files of a checkpoint's tensors, whole each, as Hugging Face's libraries read it:
    model.safetensors, or several files with an index where that would have more than max_file_bytes.

    Values, and what differs by rank, are left out. strip, rename: as of rename_keys. jobs: files that are written at a
    time. All else as of export_zarr.
    """
    source = ExportSource.open(root, iteration, select=select, drop=drop, dtype=dtype)
    return write_safetensors(
        source,
        target,
        strip=strip,
        rename=rename,
        max_file_bytes=max_file_bytes,
        memory_bytes=memory_bytes,
        jobs=jobs,
        on_bytes=on_bytes,
    )


def write_safetensors(
    source: ExportSource,
    target: str | os.PathLike[str],
    *,
    strip: str = "",
    rename: Sequence[tuple[str, str]] = (),
    max_file_bytes: int = MAX_FILE_BYTES,
    memory_bytes: int = MEMORY_BYTES,
    jobs: int | None = None,
    on_bytes: OnBytes = lambda _: None,
) -> ExportReport:
    """The same of what was selected."""
    if max_file_bytes < 1:
        raise ValueError(f"max_file_bytes={max_file_bytes}: expected at least 1")
    started = time.perf_counter()
    workers = Workers(source, memory_bytes, jobs, on_bytes)
    names = rename_keys(source.keys, strip, rename)
    files = arrange_files([NamedTensor(names[key], key, source.spec(key)) for key in source.keys], max_file_bytes)
    with _new_directory(target, source.size_bytes) as directory:
        storage = PosixStorage(directory)

        def write_file(tensors: TensorSource, file: FileOfTensors) -> None:
            header = file.header()
            with new_file(storage, file.name, len(header) + file.data_bytes) as out:
                window = _Window(out, workers.memory_bytes // 8)
                window.write(np.frombuffer(header, np.uint8))
                for parts in _batches(source, file, workers.memory_bytes // 8):
                    for elements in source.read(tensors, parts):
                        window.write(elements)
                        workers.tell(elements.nbytes)
                window.flush()

        workers.run(((max(1, file.data_bytes), file) for file in files), write_file)
        if len(files) > 1:
            storage.put_if_absent(INDEX_FILE, index_document(files))
        storage.sync_directory("")
    left_out = len(source.index.values) + len(source.index.per_rank)
    return _report(source, target, len(files), left_out, started)


def _batches(source: ExportSource, file: FileOfTensors, max_bytes: int) -> Iterator[list[tuple[str, Box]]]:
    """The tensors of a file in its order, in C order, as parts of which several are read together. max_bytes: of these,
    before and after they were converted."""
    batch: list[tuple[str, Box]] = []
    left = max_bytes
    for tensor in file.tensors:
        stored_bytes = DTYPES[source.index.tensors[tensor.key].dtype].item_bytes
        item_bytes = max(DTYPES[tensor.spec.dtype].item_bytes, stored_bytes)
        whole = Box.whole(tensor.spec.global_shape)
        for box in bands(whole, max_bytes // item_bytes) if whole.size else ():
            if batch and box.size * item_bytes > left:
                yield batch
                batch, left = [], max_bytes
            batch.append((tensor.key, box))
            left -= box.size * item_bytes
    if batch:
        yield batch


class _Window:
    """Bytes on their way into a file, which takes them at multiples of 4096."""

    def __init__(self, file: WriteFile, size_bytes: int) -> None:
        self._file = file
        self._memory = memoryview(Memory(max(1, size_bytes >> 20) << 20))
        self._position = self._filled = 0

    def write(self, elements: Elements) -> None:
        data = elements.reshape(-1).view(np.uint8).data
        while len(data):
            size = min(len(data), len(self._memory) - self._filled)
            self._memory[self._filled : self._filled + size] = data[:size]
            data, self._filled = data[size:], self._filled + size
            if self._filled == len(self._memory):
                self.flush()

    def flush(self) -> None:
        """Write what there is; the last time, any number of bytes."""
        if self._filled:
            self._file.write(self._position, self._memory[: self._filled])
            self._position, self._filled = self._position + self._filled, 0


@contextmanager
def _new_directory(target: str | os.PathLike[str], size_bytes: int) -> Iterator[str]:
    """A directory for the body to fill, which becomes the target if it succeeds, and goes if it does not. Raises
    FileExistsError; CheckpointError if there is no room for size_bytes; OSError."""
    path = os.path.abspath(os.fspath(target))
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "something is there already; give a path where nothing is", path)
    found = root_above(path)
    if found is not None:
        raise CheckpointError(
            f"{path} lies in iteration {found[1]} of {found[0]}, and would be taken for a part of it. Give another path"
        )
    above, name = os.path.split(path)
    parent = PosixStorage(above)
    parent.make_directory("")
    free = parent.free_space()
    if free is not None and size_bytes > free.size_bytes:
        raise CheckpointError(
            f"not enough space: the tensors take {size_bytes} bytes, and {above} has {free.size_bytes} bytes free"
        )
    # No target of another export, nor a name that a glob finds.
    temporary = os.path.join(above, f".{name[:50]}.tmp-{secrets.token_hex(8)}")
    try:
        os.mkdir(temporary)
        yield temporary
        try:
            os.rename(temporary, path)
        except OSError as error:
            if not os.path.lexists(path):
                raise
            raise FileExistsError(
                errno.EEXIST, "it has been made meanwhile, by another export perhaps", path
            ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_path(above)


def _report(
    source: ExportSource, target: str | os.PathLike[str], files: int, left_out: int, started: float
) -> ExportReport:
    return ExportReport(
        iteration=source.index.iteration,
        save_id=source.index.save_id,
        target=os.path.abspath(os.fspath(target)),
        tensors=len(source.keys),
        bytes=source.size_bytes,
        files=files,
        left_out=left_out,
        total_s=time.perf_counter() - started,
    )
