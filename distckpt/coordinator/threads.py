"""Ranks that are threads of one process: for tests of what runs on many ranks, without launching any."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

from distckpt.coordinator.port import RankFailure

T = TypeVar("T")


class _Board:
    """What the ranks have handed over and not yet taken, and which of them have ended."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._items: dict[tuple[int, int, int], bytes] = {}
        self._ended: set[int] = set()

    def put(self, items: dict[tuple[int, int, int], bytes]) -> None:
        with self._changed:
            self._items.update(items)
            self._changed.notify_all()

    def end(self, rank: int) -> None:
        """A rank that returned or raised hands over nothing more: nobody needs to wait for it."""
        with self._changed:
            self._ended.add(rank)
            self._changed.notify_all()

    def take(self, wanted: dict[int, tuple[int, int, int]], tag: str, timeout_s: float) -> dict[int, bytes]:
        """wanted: rank that hands over -> item. Raises RankFailure naming all ranks that did not."""

        def settled() -> bool:
            return all(item in self._items or rank in self._ended for rank, item in wanted.items())

        with self._changed:
            self._changed.wait_for(settled, timeout_s)
            found = {rank: self._items.pop(item) for rank, item in wanted.items() if item in self._items}
            failures = {
                rank: f"ended before {tag!r}" if rank in self._ended else f"no answer to {tag!r} within {timeout_s:g} s"
                for rank in wanted
                if rank not in found
            }
        if failures:
            raise RankFailure(failures)
        return found


class ThreadCoordinator:
    """One rank of a group of threads; made by `run_ranks`."""

    def __init__(self, rank: int, world_size: int, board: _Board) -> None:
        self._rank = rank
        self._world_size = world_size
        self._board = board
        self._gathers = 0
        self._scatters = 0  # since the last gather

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def gather(self, tag: str, payload: bytes, *, timeout_s: float) -> Sequence[bytes] | None:
        self._gathers, self._scatters = self._gathers + 1, 0
        if self._rank != 0:
            self._board.put({(self._gathers, 0, self._rank): bytes(payload)})
            return None
        wanted = {rank: (self._gathers, 0, rank) for rank in range(1, self._world_size)}
        found = self._board.take(wanted, tag, timeout_s)
        return [payload, *(found[rank] for rank in wanted)]

    def scatter(self, tag: str, payloads: Sequence[bytes] | None, *, timeout_s: float) -> bytes:
        self._scatters += 1
        call = (self._gathers, self._scatters)
        if self._rank != 0:
            return self._board.take({0: (*call, self._rank)}, tag, timeout_s)[0]
        if payloads is None or len(payloads) != self._world_size:
            raise ValueError(f"scatter {tag!r}: rank 0 must give {self._world_size} payloads")
        self._board.put({(*call, rank): bytes(payload) for rank, payload in enumerate(payloads) if rank != 0})
        return payloads[0]

    def close(self) -> None:
        """Nothing is held."""


def run_ranks(world_size: int, fn: Callable[[ThreadCoordinator], T], timeout_s: float = 60) -> list[T]:
    """fn(coordinator) on `world_size` threads, each of them a rank; returns the results by rank.

    Raises the error that came first; those of other ranks are notes on it. A rank that has ended counts as
    dead to the others. Raises TimeoutError, with the stacks of the ranks still running, after `timeout_s`.
    """
    board = _Board()
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}  # in the order they came

    def run(rank: int) -> None:
        try:
            results[rank] = fn(ThreadCoordinator(rank, world_size, board))
        except BaseException as error:
            errors[rank] = error
        finally:
            board.end(rank)

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(world_size)
    ]
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    running = [thread for thread in threads if thread.is_alive()]
    if running:
        raise TimeoutError(f"still running after {timeout_s:g} s:\n" + "\n".join(map(_stack, running)))
    if errors:
        first, *others = errors
        notes = [f"raised on rank {first}"]
        notes += [f"also raised on rank {rank}: {errors[rank]!r}" for rank in others]
        # BaseException.add_note, which Python 3.10 has not; pytest shows them there too.
        errors[first].__notes__ = [*getattr(errors[first], "__notes__", []), *notes]
        raise errors[first]
    return [results[rank] for rank in range(world_size)]


def _stack(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    return f"{thread.name}:\n" + "".join(traceback.format_stack(frame)) if frame else thread.name
