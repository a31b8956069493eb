"""Reading by all ranks of a host: what several need is read from the storage, and checked, by one of them.

The protocol, over the board of distckpt.host_group:

1. Each rank tells the group, as a bitmap, which blocks it needs. All compute from that the same list of shared
   windows: what several need of an aligned piece of a file, in order of file and position; and who publishes each, one
   of those who need it.
2. A thread of each rank reads the windows that it is to publish in the order of the list, checks them, and lays the
   k-th into slot k % SLOTS of its ring. After each it stores how far in the list it has published.
3. Another takes what it needs from the windows in the order of the list, its own ones included, as soon as their
   publishers have stored a number beyond theirs. After each it stores how far in the list it has taken.
4. A slot is filled anew when all who need the window in it have stored that they have taken it.
5. What one rank alone needs it reads for itself after all that, straight into its targets.

Nobody waits for ever. Look at the first window of the list that not everybody who needs it has taken. If it is not
published, its publisher has published its earlier ones, and they are taken, so the slot is free: it can go on. If it
is published, whoever has not taken it has taken all before, and can go on. So some thread can always do something,
each of these things ends, and there are finitely many. A rank that stops or dies is found by the same look.

Nothing unchecked is taken: a slot has what passed the checksums, and who meets damage, or fails in any other way,
marks the board instead of publishing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from distckpt._C import Targets
from distckpt.host_group import SLOTS, Board, PeerFailed
from distckpt.index import Index
from distckpt.open_files import OpenFile, OpenFiles, read_files
from distckpt.reader import FileReads
from distckpt.shard_file import BLOCK_BYTES

_NOT_WORTH_SHARING = 0.04  # of the bytes that are needed: as much may be read twice

Bits = npt.NDArray[np.bool_]
Int64s = npt.NDArray[np.int64]


def row_bytes(index: Index) -> int:
    """The length of a bitmap over the blocks of all files, each file from a byte of its own on."""
    return sum(-(-_block_count(index, file) // 8) for file in range(len(index.files)))


def read_together(reads: Sequence[FileReads], open_file: OpenFile, index: Index, board: Board) -> int:
    """Fill the targets of the reads, which are in order of file; returns the bytes read. All of the group call it.

    open_file opens the file of a FileReads, checked; it is called at most twice for each. Raises CorruptionError or
    OSError, and what the board raises; the targets are then undefined.
    """
    bytes_read = 0
    # A rank that works alone makes no bitmap: its length is what the index says, and was checked against the room.
    rows = board.exchange(_encode_row(reads, index)) if board.is_entered else None
    if rows is not None:
        windows = list_windows(rows, index, board.window_bytes // BLOCK_BYTES)
        if len(windows.file) and board.take_room([windows.room(p) for p in range(board.size)]):
            used = set(windows.file[windows.needs[:, board.position].any(axis=1)].tolist())
            shared = [one for one in reads if one.file in used]
            with OpenFiles(shared, open_file) as files:
                _SharedPass(windows, shared, files, index, board).run()
            bytes_read += files.bytes_read
            reads = _without(reads, windows, index)
    return bytes_read + read_files(reads, open_file)


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows that several ranks of a group need, in the order in which all go through them, as columns.

    needs is (n, ranks, blocks of a window), of the blocks that several need; the rest are (n,). file; first: the
    number of the window's first block; low, high: of its blocks, the shared ones lie in between; publisher: position
    of a rank; slot: of the publisher's ring.
    """

    file: Int64s
    first: Int64s
    low: Int64s
    high: Int64s
    needs: Bits
    publisher: Int64s
    slot: Int64s

    def users(self, window: int) -> list[int]:
        """Positions of the ranks that need it."""
        return [p for p, needs in enumerate(self.needs[window].any(axis=1).tolist()) if needs]

    def begin(self, window: int) -> int:
        return int(self.first[window] + self.low[window]) * BLOCK_BYTES

    def end(self, window: int, index: Index) -> int:
        end = int(self.first[window] + self.high[window]) * BLOCK_BYTES
        return min(end, index.files[int(self.file[window])].checksum_start)

    def ranges(self, window: int, index: Index, position: int | None = None) -> list[tuple[int, int]]:
        """The blocks that the rank at `position` needs, or any rank, as ranges of bytes of the file."""
        needs = self.needs[window].any(axis=0) if position is None else self.needs[window, position]
        return _byte_ranges(needs, int(self.first[window]), index.files[int(self.file[window])].checksum_start)

    def room(self, position: int) -> tuple[int, int]:
        """What the ring of a rank needs: a number of slots, and how much of each."""
        own = self.publisher == position
        blocks = int((self.high - self.low)[own].max(initial=0))
        return min(SLOTS, int(own.sum())), blocks * BLOCK_BYTES


def list_windows(rows: Sequence[bytes], index: Index, window_blocks: int) -> Windows:
    """The shared windows of the bitmaps of all ranks of a group; none if sharing saves too little to be worth it.

    Pure: each rank computes the same.
    """
    bits = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1)
    files: list[Int64s] = [np.zeros(0, np.int64)]
    firsts: list[Int64s] = [np.zeros(0, np.int64)]
    needs: list[Bits] = [np.zeros((0, len(rows), window_blocks), bool)]
    start = reads = different = 0
    for number in range(len(index.files)):
        blocks = _block_count(index, number)
        row = bits[:, start : start + -(-blocks // 8)]
        start += row.shape[1]
        users = np.zeros((len(rows), -(-blocks // window_blocks) * window_blocks), bool)
        users[:, :blocks] = np.unpackbits(row, axis=1, count=blocks)
        counts = users.sum(axis=0)
        reads, different = reads + int(counts.sum()), different + int((counts > 0).sum())
        shared = (users & (counts > 1)).reshape(len(rows), -1, window_blocks).transpose(1, 0, 2)
        chosen = np.flatnonzero(shared.any(axis=(1, 2)))
        files.append(np.full(len(chosen), number, np.int64))
        firsts.append(chosen * window_blocks)
        needs.append(shared[chosen])
    if reads <= (1 + _NOT_WORTH_SHARING) * different:
        files, firsts, needs = files[:1], firsts[:1], needs[:1]
    need = np.concatenate(needs)
    is_needed: Bits = np.logical_or.reduce(need, axis=1)
    low, high = is_needed.argmax(axis=1), window_blocks - is_needed[:, ::-1].argmax(axis=1)
    return Windows(np.concatenate(files), np.concatenate(firsts), low, high, need, *_choose_publishers(need))


def _choose_publishers(needs: Bits) -> tuple[Int64s, Int64s]:
    """Of each window the publisher, of those who need it the one with the fewest so far, and the slot."""
    counts = [0] * needs.shape[1]
    publisher, slot = np.zeros(len(needs), np.int64), np.zeros(len(needs), np.int64)
    is_user: Bits = np.logical_or.reduce(needs, axis=2)
    for window in range(len(needs)):
        chosen = min(np.flatnonzero(is_user[window]).tolist(), key=counts.__getitem__)
        publisher[window], slot[window] = chosen, counts[chosen] % SLOTS
        counts[chosen] += 1
    return publisher, slot


class _SharedPass:
    """One rank's way through the shared windows: steps 2 to 5. reads, files: those that this rank needs in them."""

    def __init__(
        self, windows: Windows, reads: Sequence[FileReads], files: OpenFiles, index: Index, board: Board
    ) -> None:
        self._windows, self._index, self._board = windows, index, board
        self._files = files
        self._targets = {one.file: one.targets for one in reads}
        self._to_publish: list[int] = np.flatnonzero(windows.publisher == board.position).tolist()
        self._to_take: list[int] = np.flatnonzero(windows.needs[:, board.position].any(axis=1)).tolist()
        self._published = self._taken = 0  # of these lists

    def run(self) -> None:
        """Publish in a thread of its own, and take in this one."""
        with ThreadPoolExecutor(1, "distckpt-publish") as threads:
            publishing = threads.submit(self._stop_all_on_error, self._publish_all)
            try:
                self._stop_all_on_error(self._take_all)
            except PeerFailed:
                publishing.result()  # If it was this rank's own thread that failed, its error is the one to raise.
                raise
            publishing.result()

    def _stop_all_on_error(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException:
            self._board.fail()
            raise

    def _publish_all(self) -> None:
        for number, window in enumerate(self._to_publish):
            if number >= SLOTS:
                previous = self._to_publish[number - SLOTS]
                self._board.wait(
                    partial(self._all_have_taken, previous, self._windows.users(previous)), self._find_culprit
                )
            begin, size = self._windows.begin(window), self._size(window)
            slot = self._board.slot(self._board.position, int(self._windows.slot[window]), size)
            ranges = self._windows.ranges(window, self._index)
            file = self._files.file(int(self._windows.file[window]))
            file.copy(ranges, [(begin, slot, 0, (size,), (1,), (1,), 1)])
            self._board.publish(window + 1)
            self._published += 1

    def _all_have_taken(self, window: int, users: Sequence[int]) -> bool:
        return all(self._board.taken(user) > window for user in users)

    def _take_all(self) -> None:
        number, targets = -1, Targets([])
        for window in self._to_take:
            publisher = int(self._windows.publisher[window])
            self._board.wait(partial(self._is_published, window, publisher), self._find_culprit)
            if number != int(self._windows.file[window]):
                number = int(self._windows.file[window])
                self._files.file(number)  # Nothing is filled from a file that is not what the index says.
                targets = Targets(self._targets[number])
            data = self._board.slot(publisher, int(self._windows.slot[window]), self._size(window))
            begin = self._windows.begin(window)
            for low, high in self._windows.ranges(window, self._index, self._board.position):
                targets.copy_from(data[low - begin : high - begin], low)
            self._board.take(window + 1)
            self._taken += 1
            self._files.close_before(self._next_file())

    def _is_published(self, window: int, publisher: int) -> bool:
        return self._board.published(publisher) > window

    def _size(self, window: int) -> int:
        return self._windows.end(window, self._index) - self._windows.begin(window)

    def _next_file(self) -> int:
        """The first file that either thread still needs."""
        rest = self._to_publish[self._published :][:1] + self._to_take[self._taken :][:1]
        return min((int(self._windows.file[window]) for window in rest), default=len(self._index.files))

    def _find_culprit(self) -> tuple[int, str]:
        """Who holds up the first window that not all have taken, and what it was to do."""
        taken = np.array([self._board.taken(p) for p in range(self._board.size)])
        late = self._windows.needs.any(axis=2) & (taken <= np.arange(len(self._windows.file))[:, None])
        window = int(np.flatnonzero(late.any(axis=1))[0])
        where = f"bytes {self._windows.begin(window)}-{self._windows.end(window, self._index) - 1} of "
        where += self._index.files[int(self._windows.file[window])].name
        publisher = int(self._windows.publisher[window])
        if self._board.published(publisher) <= window:
            return publisher, f"read {where}"
        return int(np.flatnonzero(late[window])[0]), f"take {where}"


def _without(reads: Sequence[FileReads], windows: Windows, index: Index) -> list[FileReads]:
    """The reads without the blocks in shared windows."""
    rest = []
    for one in reads:
        needed = _needed_blocks(one, index)
        begin, end = np.searchsorted(windows.file, (one.file, one.file + 1))
        for window in range(begin, end):
            blocks = needed[windows.first[window] :][: windows.needs.shape[2]]
            blocks &= ~windows.needs[window].any(axis=0)[: len(blocks)]
        ranges = _byte_ranges(needed, 0, index.files[one.file].checksum_start)
        if ranges:
            rest.append(replace(one, ranges=ranges))
    return rest


def _encode_row(reads: Sequence[FileReads], index: Index) -> bytes:
    needed = {one.file: one for one in reads}
    none = [bytes(-(-_block_count(index, number) // 8)) for number in range(len(index.files))]
    return b"".join(
        np.packbits(_needed_blocks(needed[number], index)).tobytes() if number in needed else empty
        for number, empty in enumerate(none)
    )


def _needed_blocks(reads: FileReads, index: Index) -> Bits:
    needed = np.zeros(_block_count(index, reads.file), bool)
    for begin, end in reads.ranges:
        needed[begin // BLOCK_BYTES : -(-end // BLOCK_BYTES)] = True
    return needed


def _byte_ranges(blocks: Bits, first: int, end: int) -> list[tuple[int, int]]:
    """The runs of blocks that are set, the first of which is the file's `first`, as ranges of bytes before `end`."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], blocks, [False])))) + first
    return [(a * BLOCK_BYTES, min(b * BLOCK_BYTES, end)) for a, b in edges.reshape(-1, 2).tolist()]


def _block_count(index: Index, file: int) -> int:
    return -(-index.files[file].checksum_start // BLOCK_BYTES)
