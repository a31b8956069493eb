"""What one process writes of a reshard: its files, step by step, with a journal to go on from. No torch.

Each lot of tensors has a thread that reads and one that writes, and two windows of memory between them. Every few
seconds what was written is made durable and noted in the journal; who starts again begins there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import msgspec
import numpy as np

from distckpt._C import Memory
from distckpt.checked_json import checked_body, decode_body, encode_record
from distckpt.checkpoint_files import OnBytes
from distckpt.commit import read_file
from distckpt.elements import convert, overflows, view_elements
from distckpt.errors import CheckpointError, CorruptionError
from distckpt.index import Natural, ShardFile
from distckpt.reader import StoredTensors
from distckpt.resharding.plan_file import glob_of
from distckpt.resharding.shard_output import OutputState, ShardOutput
from distckpt.resharding.steps import Conversion, PlacedTensor, Step, Transfer, cut_steps, place_step
from distckpt.resharding.target_files import Lot, TargetFile
from distckpt.shard_file import BLOCK_BYTES, DTYPES, FORMAT, FORMAT_VERSION, FileLayout
from distckpt.storage import Storage
from distckpt.tensor_source import MEMORY_BYTES, TensorSource

JOURNAL_S = 5.0
CACHE_BYTES = 32 << 20  # of each lot at least, for blocks that are begun
RINGS_BYTES = 40 << 20  # of each lot, through which files are read and written
_MIN_WINDOW_BYTES = 4 << 20
_MAX_WINDOW_BYTES = 4 << 30  # More makes nothing faster.
_MAX_JOURNAL_BYTES = 1 << 30


class Journal(msgspec.Struct, frozen=True):
    """How far a part of a reshard is. digest: of what is written. parts: how many there are. outputs: one for each
    file of the part."""

    format: str
    version: int
    save_id: str
    digest: str
    part: Natural
    parts: Natural
    lots: tuple[Lot, ...]
    outputs: tuple[OutputState, ...]


def journal_name(directory: str, save_id: str, part: int) -> str:
    return f"{directory}/reshard-{part:05d}-{save_id}.json"


def read_journal(storage: Storage, name: str) -> Journal:
    """Raises CorruptionError, OSError; CheckpointError for one of another version."""
    body = checked_body(read_file(storage, name, _MAX_JOURNAL_BYTES), name=name)
    journal = decode_body(body, Journal, name=name)
    if journal.format != FORMAT or journal.version != FORMAT_VERSION:
        raise CheckpointError(f"{name}: {journal.format} version {journal.version}, which this package does not read")
    return journal


def check_journal(journal: Journal, name: str, tensors: Sequence[PlacedTensor], layouts: Sequence[FileLayout]) -> None:
    """That a journal can be of a part with these tensors and files. Raises CorruptionError."""
    is_sound = len(journal.outputs) == len(layouts) and all(
        output.fits(layout) for output, layout in zip(journal.outputs, layouts, strict=True)
    )
    for lot in journal.lots:
        at = lot.at
        is_sound &= at.tensor <= lot.end <= len(tensors)
        is_sound &= not at.element or (at.tensor < lot.end and at.element <= prod(tensors[at.tensor].shape))
    if not is_sound:
        raise CorruptionError(f"{name} speaks of other tensors or files than it is of: remove it to begin anew")


@dataclass(frozen=True, slots=True)
class LotMemory:
    """What a lot takes: for blocks that are begun, and for each of its windows."""

    cache_bytes: int
    window_bytes: int


def share_memory(memory_bytes: int, lots: int, *, converts: bool, begun_blocks: int) -> LotMemory:
    """If all lots together are to take memory_bytes. begun_blocks: as of reading_order; at most half of what the
    rings leave is for blocks of these. Raises CheckpointError for memory that is too little."""
    own = memory_bytes // max(1, lots) - RINGS_BYTES
    cache = max(CACHE_BYTES, min(_blocks_bytes(begun_blocks), own // 2))
    shares = 3 if converts else 2  # the third is what is read to be converted
    size = (own - cache) // shares
    if size < _MIN_WINDOW_BYTES:
        needed = lots * _least_memory(shares)
        raise CheckpointError(
            f"memory of {memory_bytes} bytes is too little for {lots} threads (--jobs): give at least {needed} bytes "
            f"({-(-needed >> 20)} MiB), or fewer threads"
        )
    return LotMemory(cache, min(size, _MAX_WINDOW_BYTES))


def default_memory(jobs: int) -> int:
    """What a process takes if nothing else is said: MEMORY_BYTES, or what so many threads need at least."""
    return max(MEMORY_BYTES, jobs * _least_memory(3))


def _least_memory(shares: int) -> int:
    """Of a lot. shares: windows and what is read to be converted."""
    return CACHE_BYTES + RINGS_BYTES + shares * _MIN_WINDOW_BYTES


def memory_to_read_once(lots: int, begun_blocks: int) -> int:
    """How much memory holds all blocks that are begun; 0 if any does."""
    needed = _blocks_bytes(begun_blocks)
    return 0 if needed <= CACHE_BYTES else lots * (RINGS_BYTES + 2 * needed)


def _blocks_bytes(begun_blocks: int) -> int:
    """Those that are begun, and two of what is being read."""
    return (begun_blocks + 2) * BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class PartPlan:
    """What a part is made of. tensors: of the part, whose outputs count in `files`, those of the whole target; own: the
    numbers of the part's files among them. journal: None begins anew."""

    part: int
    parts: int
    digest: str
    save_id: str
    directory: str
    tensors: Sequence[PlacedTensor]
    files: Sequence[TargetFile]
    own: Sequence[int]
    lots: Sequence[Lot]
    journal: Journal | None


class PartWriter:
    """Writes one part. run() in one thread; note() and stop() from another.

    memory: of each lot. on_bytes: told how many bytes of tensors were written. check_fence: raises FencedError once
    somebody else goes on with these very files; from then on they are neither made anew nor ended, and the journal is
    theirs. What else may still be written to them is what they have there, too.
    """

    def __init__(
        self,
        source: Storage,
        source_directory: str,
        stored: StoredTensors,
        target: Storage,
        plan: PartPlan,
        *,
        memory: LotMemory,
        on_bytes: OnBytes,
        check_fence: Callable[[], None],
    ) -> None:
        check_fence()
        self._check_fence = check_fence
        self._source, self._source_directory, self._stored = source, source_directory, stored
        self._target = target
        self._plan = plan
        self._memory = memory
        self._on_bytes = on_bytes
        self._stopped = threading.Event()
        self._gate = _Gate()
        lots = plan.lots if plan.journal is None else plan.journal.lots
        self._lots = list(lots)
        self._bytes_read = [0] * len(lots)
        states = dict(zip(plan.own, plan.journal.outputs, strict=True)) if plan.journal else {}
        self._outputs = {
            number: ShardOutput(
                target,
                f"{plan.directory}/{plan.files[number].name}",
                plan.files[number].layout,
                states.get(number),
                rank=plan.files[number].planned.rank,
                mesh=plan.files[number].mesh,
            )
            for number in plan.own
        }

    @property
    def bytes_read(self) -> int:
        return sum(self._bytes_read)

    def stop(self) -> None:
        """Have run() end soon, at a position that the journal can have."""
        self._stopped.set()

    def run(self, jobs: int) -> list[ShardFile] | None:
        """Write the rest; the files, in order, or None if it was stopped. Raises CorruptionError or OSError."""
        try:
            self.note()
            with ThreadPoolExecutor(jobs, "distckpt-reshard") as threads:
                running = [threads.submit(self._run_lot, number) for number in range(len(self._lots))]
                try:
                    for lot in running:
                        lot.result()
                except BaseException:
                    self._stopped.set()
                    raise
            if self._stopped.is_set():
                self.note()
                return None
            self.note()
            return [output.finished or output.finish() for output in self._outputs.values()]
        except BaseException:
            for output in self._outputs.values():
                output.abandon()
            raise

    def note(self) -> None:
        """Make durable what was written, and note it in the journal. Raises FencedError, OSError."""
        with self._gate.closed():
            self._check_fence()
            states = []
            for output in self._outputs.values():
                if output.finished is None and output.is_filled:
                    output.finish()
                states.append(output.sync())
            lots = tuple(self._lots)
            plan = self._plan
            # Names first: the journal must not speak of a file that a crash can lose.
            self._target.sync_directory(plan.directory)
            journal = Journal(
                FORMAT, FORMAT_VERSION, plan.save_id, plan.digest, plan.part, plan.parts, lots, tuple(states)
            )
            self._target.replace(journal_name(plan.directory, plan.save_id, plan.part), encode_record(journal))

    def _run_lot(self, number: int) -> None:
        plan, lot = self._plan, self._lots[number]
        steps = cut_steps(plan.tensors, lot.at, lot.end, self._memory.window_bytes)
        windows = [memoryview(Memory(self._memory.window_bytes + 4096)) for _ in range(2)]
        converts = any(tensor.source_dtype != tensor.dtype for tensor in plan.tensors)
        scratch = memoryview(Memory(self._memory.window_bytes + 4096)) if converts else windows[0][:0]
        writing: Future[None] | None = None
        keys = [tensor.key for tensor in plan.tensors[lot.at.tensor : lot.end]]
        memory = self._memory
        source = TensorSource(self._source, self._source_directory, self._stored, keys, cache_bytes=memory.cache_bytes)
        with ThreadPoolExecutor(1, "distckpt-write") as writer, source:
            for count, step in enumerate(steps):
                if self._stopped.is_set():
                    break
                window = windows[count % 2]
                transfer = place_step(plan.tensors, step, window, scratch)
                self._fill(source, transfer, window, scratch)
                self._bytes_read[number] = source.bytes_read
                if writing is not None:
                    writing.result()
                writing = writer.submit(self._write, number, step, transfer, window)
            if writing is not None:
                writing.result()

    def _fill(self, source: TensorSource, transfer: Transfer, window: memoryview, scratch: memoryview) -> None:
        for memory, begin, size in transfer.blank:
            np.frombuffer(memory[begin : begin + size], np.uint8)[:] = 0
        source.fill(transfer.wanted)
        for conversion in transfer.conversions:
            _convert(conversion, window, scratch)

    def _write(self, number: int, step: Step, transfer: Transfer, window: memoryview) -> None:
        with self._gate.open():
            for run in transfer.runs:
                self._outputs[run.output].put(run.offset, window[run.begin : run.begin + run.size_bytes])
            self._lots[number] = Lot(step.after, self._lots[number].end)
        self._on_bytes(sum(run.size_bytes for run in transfer.runs))


def _convert(conversion: Conversion, window: memoryview, scratch: memoryview) -> None:
    shape = (conversion.count,)
    before_bytes, after_bytes = (
        conversion.count * DTYPES[dtype].item_bytes for dtype in (conversion.source_dtype, conversion.target_dtype)
    )
    before = view_elements(
        scratch[conversion.source : conversion.source + before_bytes], conversion.source_dtype, shape
    )
    after = convert(before, conversion.target_dtype)
    if overflows(before, after):
        match = msgspec.json.encode(glob_of(conversion.key)).decode()
        raise CheckpointError(
            f"{conversion.key!r} has numbers of {conversion.source_dtype} that {conversion.target_dtype} cannot hold. "
            f'Keep its type by a rule in a plan: {{"match": {match}, "dtype": "{conversion.source_dtype}"}}'
        )
    view_elements(window[conversion.target : conversion.target + after_bytes], conversion.target_dtype, shape)[:] = (
        after
    )


class _Gate:
    """Many may write at a time; none while the journal is written."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._is_closed = False

    @contextmanager
    def open(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_closed)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def closed(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_closed)
            self._is_closed = True
            self._changed.wait_for(lambda: not self._inside)
        try:
            yield
        finally:
            with self._changed:
                self._is_closed = False
                self._changed.notify_all()
