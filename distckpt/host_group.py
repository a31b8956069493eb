"""Ranks of one host: who they are, and the board in shared memory by which they work together. Reads no checkpoint.

All ranks of the job agree who is of which group. Then each rank has a Board of its own, over one piece of memory:

1. Every rank opens the memory under a name that belongs to this group and this load alone. Who cannot works alone.
2. When all have opened it, the door is closed and the group has met. If they have not within a bound, it is closed
   the other way, and all who are inside work alone. The door is one word, set once by compare-and-exchange, so that
   all inside see the same. Who comes later finds it closed, or a new memory with nobody else in it, and works alone.
3. With the door closed the name is removed: however the processes end, nothing is left behind. Only then does any
   rank take memory for data; where there is not enough for one, all work alone.
4. Who fails marks the board, and the others stop at their next wait. Every wait ends when no word of the board has
   changed for half of timeout_s: half, so that whoever waited can still tell rank 0, which waits for timeout_s.

A word has one writer, but for the door and the mark of failure, which are exchanged. Who loads a value sees what its
writer had written before it stored the value.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType

import msgspec

from distckpt._C import SharedMemory
from distckpt.host import host_id

DIRECTORY = "/dev/shm"
JOIN_TIMEOUT_S = 30.0
WINDOW_SIZES = (4 << 20, 2 << 20, 1 << 20)
SLOTS = 2  # of a rank's ring: one is filled while the other is taken from
RINGS_BYTES = 32 << 20  # of all ranks, unless the smallest windows take more: each page costs each rank a fault

_PAUSES_S = (0.0, 20e-6, 1e-3)  # first, second, longest
_PAGE = 4096
_DOOR, _FAILED, _COLUMNS = 0, 1, 2  # words; from _COLUMNS on three columns, each of one word a rank
_STAGE, _PUBLISHED, _TAKEN = 0, 1, 2  # columns
_OPEN, _MET, _REFUSED = 0, 1, 2  # values of the door
_INSIDE, _TOLD, _READY, _NO_ROOM = 1, 2, 3, 4  # values of a stage


class PeerFailed(Exception):
    """Another rank of the host has failed, and says itself why: this one only stopped."""


class Host(msgspec.Struct, frozen=True):
    """Where a rank runs: the machine, the memory file system that it sees there, and the room in that.

    obstacle: why it can make no file in that, if it cannot.
    """

    machine: str
    memory: str
    room_bytes: int
    obstacle: str | None = None


class HostGroup(msgspec.Struct, frozen=True):
    """Ranks of one host, in ascending order, that can share memory. window_bytes is 0 where there is no room.

    obstacle: what keeps ranks of this host from sharing, for people to read.
    """

    ranks: list[int]
    nonce: str
    window_bytes: int
    obstacle: str | None

    @classmethod
    def alone(cls) -> HostGroup:
        return cls([0], "", 0, None)


def this_host() -> Host:
    machine = host_id()
    try:
        os.close(os.open(DIRECTORY, os.O_TMPFILE | os.O_RDWR, 0o600))  # The others would wait for who cannot.
        status, room = os.stat(DIRECTORY), os.statvfs(DIRECTORY)
    except OSError as error:
        return Host(machine, "none", 0, f"no shared memory: {error}")
    # Containers of one machine usually have a memory file system each; a device number is unique while it lives.
    return Host(machine, f"{status.st_dev} of user {os.getuid()}", room.f_bavail * room.f_frsize)


def group_ranks(hosts: Sequence[Host], row_bytes: int) -> list[HostGroup]:
    """The group of each rank. row_bytes: what each will tell the others. Ranks of one group get the same object."""
    members: dict[tuple[str, str], list[int]] = {}
    of_machine: dict[str, int] = {}
    for rank, host in enumerate(hosts):
        members.setdefault((host.machine, host.memory), []).append(rank)
        of_machine[host.machine] = of_machine.get(host.machine, 0) + 1
    groups: list[HostGroup | None] = [None] * len(hosts)
    for (machine, _), ranks in members.items():
        room = min(hosts[rank].room_bytes for rank in ranks)
        sizes = {window: _Layout(len(ranks), row_bytes, window).total_bytes for window in WINDOW_SIZES}
        fitting = [w for w in WINDOW_SIZES if sizes[w] <= room // 2]  # Half of it: others use it too.
        window_bytes = next((w for w in fitting if len(ranks) * SLOTS * w <= RINGS_BYTES), min(fitting, default=0))
        obstacle = None
        if hosts[ranks[0]].obstacle is not None:
            obstacle = hosts[ranks[0]].obstacle
        elif len(ranks) < of_machine[machine]:
            obstacle = f"only {len(ranks)} of the {of_machine[machine]} ranks of this host share one {DIRECTORY}"
        elif not fitting and len(ranks) > 1:
            obstacle = f"{DIRECTORY} has room for {room} bytes, {2 * min(sizes.values())} are needed to share reads"
        group = HostGroup(ranks, secrets.token_hex(16), window_bytes, obstacle)
        for rank in ranks:
            groups[rank] = group
    return [group for group in groups if group is not None]


class _Layout:
    """Where things lie in the memory: words, a row of each rank, a ring of slots of each rank."""

    def __init__(self, size: int, row_bytes: int, window_bytes: int) -> None:
        self.words_bytes = 4 * (_COLUMNS + 3 * size)
        self.rows_start = -(-self.words_bytes // 64) * 64
        self.row_bytes = row_bytes
        self.rings_start = -(-(self.rows_start + size * row_bytes) // _PAGE) * _PAGE
        self.window_bytes = window_bytes
        self.total_bytes = self.rings_start + size * SLOTS * window_bytes

    def slot(self, position: int, number: int) -> int:
        return self.rings_start + (position * SLOTS + number) * self.window_bytes


class Board:
    """One rank's place in its group for one load. A context manager: an error that leaves it stops the others.

    timeout_s: as of the agreement that follows. Its methods raise PeerFailed, and TimeoutError, which names the
    rank that is silent.
    """

    def __init__(self, group: HostGroup, rank: int, row_bytes: int, timeout_s: float) -> None:
        self.ranks = group.ranks
        self.size = len(group.ranks)
        self.position = group.ranks.index(rank)
        self.window_bytes = group.window_bytes
        self.obstacle = group.obstacle
        self._path = f"{DIRECTORY}/distckpt-{group.nonce}"
        self._silence_s = timeout_s / 2
        self._layout = _Layout(self.size, row_bytes, group.window_bytes)
        self._memory: SharedMemory | None = None
        self._entered_s = time.monotonic()
        if self.size > 1 and group.window_bytes:
            self._enter()

    def _enter(self) -> None:
        try:
            memory = SharedMemory(self._path, self._layout.total_bytes)
            memory.reserve(0, self._layout.rings_start)
        except OSError as error:
            self.obstacle = f"no shared memory: {error}"
            self._remove_name()
            return
        self._memory = memory
        self._store(_STAGE, _INSIDE)

    def __enter__(self) -> Board:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        memory = self._memory
        if memory is None:
            return
        if error is not None:
            self.fail()
        if memory.load(_DOOR) == _OPEN:
            try:  # Who comes after the name is gone would wait for the others in vain.
                while memory.load(_DOOR) == _OPEN and not self._all_are(_INSIDE) and not self._is_late():
                    time.sleep(_PAUSES_S[-1])
            finally:
                self._remove_name()
        self._memory = None

    @property
    def is_entered(self) -> bool:
        """Whether this rank has the memory open."""
        return self._memory is not None

    def fail(self) -> None:
        """Stop the others, and this rank's own other threads, at their next wait."""
        if self._memory is not None:
            self._memory.exchange(_FAILED, 0, self.position + 1)

    def exchange(self, row: bytes) -> list[bytes] | None:
        """Tell the others row_bytes bytes; what all have told, by position. None, for all inside: work alone.

        Only where is_entered; see the module's steps 2 and 3.
        """
        memory = self._memory
        assert memory is not None
        start, size = self._layout.rows_start, self._layout.row_bytes
        view = memoryview(memory)
        view[start + self.position * size :][:size] = row
        self._store(_STAGE, _TOLD)
        self.wait(
            lambda: memory.load(_DOOR) != _OPEN or self._all_are(_INSIDE) or self._is_late(),
            self._whoever_is_not(_INSIDE, "say what it needs to read"),
        )
        memory.exchange(_DOOR, _OPEN, _MET if self._all_are(_INSIDE) else _REFUSED)
        self._remove_name()
        if memory.load(_DOOR) == _REFUSED:
            self._work_alone(f"not all ranks of this host opened the memory that they were to share in {DIRECTORY}")
            return None
        self.wait(lambda: self._all_are(_TOLD), self._whoever_is_not(_TOLD, "say what it needs to read"))
        return [bytes(view[start + p * size :][:size]) for p in range(self.size)]

    def take_room(self, rooms: Sequence[tuple[int, int]]) -> bool:
        """Take memory for the rings; False, for all, if one of the ranks gets none. rooms, the same on all ranks, has
        for each position how many slots are used, and how many bytes of each."""
        memory = self._memory
        assert memory is not None
        slots = [[self._layout.slot(p, i) for i in range(count)] for p, (count, _) in enumerate(rooms)]
        try:
            for start in slots[self.position]:
                memory.reserve(start, rooms[self.position][1])
            self._store(_STAGE, _READY)
        except OSError:
            self._store(_STAGE, _NO_ROOM)
        self.wait(lambda: self._all_are(_READY), self._whoever_is_not(_READY, "take memory for its ring"))
        if any(self._load(_STAGE, p) == _NO_ROOM for p in range(self.size)):
            self._work_alone(f"{DIRECTORY} is full")
            return False
        for position, (_, size_bytes) in enumerate(rooms):
            for start in slots[position]:
                memory.populate(start, size_bytes)
        return True

    def slot(self, position: int, number: int, size_bytes: int) -> memoryview:
        """The beginning of a slot in the ring of the rank at `position`. Only in room that was taken."""
        assert self._memory is not None
        return memoryview(self._memory)[self._layout.slot(position, number) :][:size_bytes]

    def published(self, position: int) -> int:
        """How far the rank has published; 0 before it has begun."""
        return self._load(_PUBLISHED, position)

    def taken(self, position: int) -> int:
        """How far the rank has taken what others publish."""
        return self._load(_TAKEN, position)

    def publish(self, value: int) -> None:
        self._store(_PUBLISHED, value)

    def take(self, value: int) -> None:
        self._store(_TAKEN, value)

    def wait(self, is_over: Callable[[], bool], find_culprit: Callable[[], tuple[int, str]]) -> None:
        """Until is_over(). After a silence of all, find_culprit says who is waited for (position) and what for."""
        assert self._memory is not None
        words = memoryview(self._memory)[: self._layout.words_bytes]
        seen, changed_s, pause_s = bytes(words), time.monotonic(), _PAUSES_S[0]
        while not is_over():
            failed = self._memory.load(_FAILED)
            if failed:
                raise PeerFailed(f"rank {self.ranks[failed - 1]} of this host has failed")
            time.sleep(pause_s)
            pause_s = min(max(1.25 * pause_s, _PAUSES_S[1]), _PAUSES_S[-1])
            if seen != words:
                seen, changed_s = bytes(words), time.monotonic()
            elif time.monotonic() - changed_s > self._silence_s:
                culprit, what = find_culprit()
                raise TimeoutError(
                    f"rank {self.ranks[culprit]} of this host has been silent for {self._silence_s:g} s; "
                    f"it was to {what}"
                )

    def _whoever_is_not(self, stage: int, what: str) -> Callable[[], tuple[int, str]]:
        def find() -> tuple[int, str]:
            absent = [p for p in range(self.size) if self._load(_STAGE, p) < stage]
            return (absent or [self.position])[0], what

        return find

    def _all_are(self, stage: int) -> bool:
        return all(self._load(_STAGE, p) >= stage for p in range(self.size))

    def _is_late(self) -> bool:
        return time.monotonic() - self._entered_s > min(JOIN_TIMEOUT_S, self._silence_s / 2)

    def _work_alone(self, obstacle: str) -> None:
        self.obstacle, self._memory = obstacle, None

    def _remove_name(self) -> None:
        with suppress(OSError):
            os.unlink(self._path)

    def _load(self, column: int, position: int) -> int:
        assert self._memory is not None
        return self._memory.load(_COLUMNS + column * self.size + position)

    def _store(self, column: int, value: int) -> None:
        assert self._memory is not None
        self._memory.store(_COLUMNS + column * self.size + self.position, value)
