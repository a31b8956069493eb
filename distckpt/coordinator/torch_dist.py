"""Coordinator of a torch.distributed job, over a TCPStore of its own that rank 0 hosts.

It never uses a process group, so it runs in any thread beside the training's collectives. The job's own store
serves once, in the constructor, to tell the others where rank 0 listens.

Keys: gathers are numbered; "7/3" is what rank 3 hands over to the 7th, "7" counts the ranks that have. A
scatter belongs to the gather before it: "7.1" says which payload is whose, "7.1/0", "7.1/1", ... are the
payloads, each different one once, and "7.1/taken" counts the ranks that have theirs. Rank 0 deletes the keys
of a gather when it has read them, and those of a scatter when all ranks have come to the next gather. Numbers
are never used twice, so what a rank left behind or comes late with meets nobody.

Rank 0, which has the store in its own process, polls it; the others wait in the store, which costs nobody
anything, in a thread that can be given up: a call does not return while rank 0's process is stopped.
"""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
import weakref
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from distckpt.coordinator.port import RankFailure
from distckpt.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

_JOINED = "joined"
_PIECE_BYTES = 4 << 20  # a TCPStore drops the connection of who sends a value of more than 8 MiB
_GRACE_S = 1.0  # what a store call may take beyond the bound that the store was given
_LINGER_S = 10.0  # how long close() waits for calls that are under way, here and on other ranks


class TorchDistCoordinator:
    """The ranks of torch.distributed's default group, or `ranks` of them in that order.

    Constructed on all these ranks, from the main thread, as often on one as on any other. Messages may be
    tens of MB large.
    """

    def __init__(self, ranks: Sequence[int] | None = None) -> None:
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise CheckpointError("torch.distributed is not initialised: call init_process_group() first")
        members = list(range(dist.get_world_size())) if ranks is None else list(ranks)
        if dist.get_rank() not in members:
            raise ValueError(f"rank {dist.get_rank()} makes a coordinator of ranks {members}, without itself")
        if len(set(members)) != len(members):
            raise ValueError(f"a coordinator of ranks {members}: some are named twice")
        self._rank = members.index(dist.get_rank())
        self._world_size = len(members)
        self._store: TCPStore | None = _open_store(members, self._rank)
        self._gathers = 0
        self._scatters = 0  # since the last gather
        self._silent: list[int] = []  # in the last gather
        self._late: list[tuple[int, int]] = []  # (gather, rank) given up; they may still come
        self._handed_out: list[str] = []
        # The counter of the last scatter: how many ranks should take it. Until the first one: how many connect.
        self._untaken = {_JOINED: self._world_size - 1} if self._rank == 0 else {}
        self._calls: list[threading.Thread] = []  # that may still wait for rank 0
        self._finish = weakref.finalize(self, _linger, self._store, self._untaken, self._calls, os.getpid())

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def gather(self, tag: str, payload: bytes, *, timeout_s: float) -> Sequence[bytes] | None:
        self._gathers, self._scatters = self._gathers + 1, 0
        number, store = self._gathers, self._connected()
        if self._rank != 0:
            self._ask(tag, timeout_s, lambda: _hand_over(store, number, self._rank, payload))
            return None
        return [payload, *self._collect(store, tag, timeout_s)]

    def scatter(self, tag: str, payloads: Sequence[bytes] | None, *, timeout_s: float) -> bytes:
        self._scatters += 1
        name, store = f"{self._gathers}.{self._scatters}", self._connected()
        if self._rank != 0:
            return self._ask(tag, timeout_s, lambda: _take_own(store, name, self._rank, timeout_s))
        if payloads is None or len(payloads) != self._world_size:
            raise ValueError(f"scatter {tag!r}: rank 0 must give {self._world_size} payloads")
        self._hand_out(store, name, payloads)
        return payloads[0]

    def close(self) -> None:
        """Rank 0 stays up, for a bounded time, until the living ranks have taken what it scattered last."""
        self._finish()
        self._store = None

    def _collect(self, store: TCPStore, tag: str, timeout_s: float) -> list[bytes]:
        self._late = [late for late in self._late if not _drop_late(store, *late)]
        number, others = self._gathers, range(1, self._world_size)
        all_here = _poll(lambda: store.add(f"{number}", 0) == len(others), timeout_s)
        silent = [] if all_here else [rank for rank in others if not store.check([f"{number}/{rank}"])]
        payloads = [_take(store, f"{number}/{rank}") for rank in others if rank not in silent]
        store.delete_key(f"{number}")
        self._silent = silent
        if silent:
            self._late += [(number, rank) for rank in silent]
            raise RankFailure(dict.fromkeys(silent, f"no answer to {tag!r} within {timeout_s:g} s"))
        _delete(store, self._handed_out)  # all are here, so nobody reads older scatters any more
        self._handed_out = []
        self._untaken.clear()
        return payloads

    def _hand_out(self, store: TCPStore, name: str, payloads: Sequence[bytes]) -> None:
        groups: dict[int, int] = {}  # id of a payload -> its number
        for payload in payloads[1:]:
            if id(payload) not in groups:
                groups[id(payload)] = len(groups)
                self._handed_out += _put(store, f"{name}/{groups[id(payload)]}", payload)
        # The directory last: who sees it may rely on all the rest.
        self._handed_out += _put(store, name, array("I", [groups[id(one)] for one in payloads[1:]]).tobytes())
        self._handed_out.append(f"{name}/taken")
        self._untaken.clear()
        self._untaken[f"{name}/taken"] = self._world_size - 1 - len(self._silent)

    def _connected(self) -> TCPStore:
        if self._store is None:
            raise ValueError("the coordinator is closed")
        return self._store

    def _ask(self, tag: str, timeout_s: float, call: Callable[[], T]) -> T:
        """Ask the store that rank 0 hosts."""
        import torch.distributed as dist

        self._calls[:] = [thread for thread in self._calls if thread.is_alive()]
        thread, outcome = _start(call)
        self._calls.append(thread)
        try:
            return outcome.result(timeout_s + _GRACE_S)
        except (FutureTimeoutError, dist.DistStoreError) as error:
            raise RankFailure({0: f"no answer to {tag!r} within {timeout_s:g} s"}) from error
        except dist.DistError as error:
            reason = str(error).partition("\n")[0]
            raise RankFailure({0: f"connection lost during {tag!r} ({reason})"}) from error


def _start(call: Callable[[], T]) -> tuple[threading.Thread, Future[T]]:
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="distckpt-store", daemon=True)
    thread.start()
    return thread, outcome


def _poll(done: Callable[[], bool], timeout_s: float) -> bool:
    deadline, pause_s = time.monotonic() + timeout_s, 2e-4
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, 0.02)
    return True


def _hand_over(store: TCPStore, number: int, rank: int, payload: bytes) -> None:
    _put(store, f"{number}/{rank}", payload)
    store.add(f"{number}", 1)


def _take_own(store: TCPStore, name: str, rank: int, timeout_s: float) -> bytes:
    from torch.distributed import DistError

    store.wait([name], timedelta(seconds=max(timeout_s, 1e-3)))  # 0 would be no bound
    group = array("I", _get(store, name)[0])[rank - 1]
    payload, _ = _get(store, f"{name}/{group}")
    with suppress(DistError):  # rank 0 may be gone: it need not wait for the last to say so
        store.add(f"{name}/taken", 1)
    return payload


def _take(store: TCPStore, key: str) -> bytes:
    """Read and delete."""
    payload, keys = _get(store, key)
    _delete(store, keys)
    return payload


def _drop_late(store: TCPStore, number: int, rank: int) -> bool:
    if not store.check([f"{number}/{rank}"]):
        return False
    _take(store, f"{number}/{rank}")
    store.delete_key(f"{number}")
    return True


def _put(store: TCPStore, key: str, payload: bytes) -> list[str]:
    """Store a payload of any size; returns its keys. The first piece says how many follow, and comes last."""
    starts = range(0, len(payload), _PIECE_BYTES)[1:]
    parts = [f"{key}+{number}" for number in range(1, len(starts) + 1)]
    for part, start in zip(parts, starts, strict=True):
        store.set(part, payload[start : start + _PIECE_BYTES])  # type: ignore[arg-type]  # bytes are taken
    head = len(parts).to_bytes(4, "little") + payload[:_PIECE_BYTES]
    store.set(key, head)  # type: ignore[arg-type]
    return [key, *parts]


def _get(store: TCPStore, key: str) -> tuple[bytes, list[str]]:
    """A payload that is there, and its keys."""
    head = store.get(key)
    parts = [f"{key}+{number}" for number in range(1, int.from_bytes(head[:4], "little") + 1)]
    return b"".join([head[4:], *(store.get(part) for part in parts)]), [key, *parts]


def _delete(store: TCPStore, keys: list[str]) -> None:
    for key in keys:
        store.delete_key(key)


def _linger(store: TCPStore, untaken: dict[str, int], calls: list[threading.Thread], pid: int) -> None:
    """Runs at close() or at the end of the process."""
    if os.getpid() != pid:
        return  # a forked child shares the connection and must not talk on it
    # The store ends with rank 0's process. Ranks that have not read its last word would take it for dead.
    for counter, ranks in untaken.items():
        _poll(partial(_reached, store, counter, ranks), _LINGER_S)
    # A thread that comes back from C++ while the interpreter is being torn down aborts the process.
    deadline = time.monotonic() + _LINGER_S
    for thread in calls:
        thread.join(max(0.0, deadline - time.monotonic()))


def _reached(store: TCPStore, counter: str, count: int) -> bool:
    return store.add(counter, 0) >= count


def _open_store(members: list[int], rank: int) -> TCPStore:
    """Rank 0 hosts a store on a free port and leaves its address in the job's store for the others."""
    from torch.distributed import DistError
    from torch.distributed.distributed_c10d import PrefixStore

    group = hashlib.sha256(repr(members).encode()).hexdigest()[:16]
    job = PrefixStore(f"distckpt/{group}", _job_store())
    number = job.add(f"opened by {rank}", 1)  # several coordinators of the same ranks have a number each
    if rank == 0:
        try:
            store = _tcp_store("localhost", 0, is_master=True)
            address = f"{_own_host()} {store.port}"
        except (DistError, OSError) as error:
            job.set(f"address {number}", f"! {error}")
            raise CheckpointError(f"rank 0 cannot host a store for its coordinator: {error}") from error
        job.set(f"address {number}", address)
        return store
    host, _, port = job.get(f"address {number}").decode().partition(" ")
    if host == "!":
        raise CheckpointError(f"rank 0 cannot host a store for its coordinator: {port}")
    store = _tcp_store(host, int(port), is_master=False)
    store.add(_JOINED, 1)
    return store


def _job_store() -> Store:
    try:
        from torch.distributed.distributed_c10d import _get_default_store
    except ImportError:  # it is private; env:// jobs have their store at this address
        return _tcp_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return _get_default_store()


def _tcp_store(host: str, port: int, *, is_master: bool) -> TCPStore:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(host, port, is_master=is_master, wait_for_workers=False)


def _own_host() -> str:
    """A name or address by which the other ranks reach this host.

    MASTER_ADDR when it is this host: all ranks can resolve it. Else (rank 0 runs elsewhere, or MASTER_ADDR is
    a service's address) the local address that routes there; without MASTER_ADDR the host's name.
    """
    master = os.environ.get("MASTER_ADDR")
    try:
        if master is not None:
            return master if _is_local(master) else _address_towards(master)
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:  # no route, or a host name that resolves nowhere: all ranks must be on this host
        return "localhost"
    return socket.gethostname()


def _is_local(host: str) -> bool:
    for family, kind, protocol, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM):
        with socket.socket(family, kind, protocol) as probe, suppress(OSError):
            probe.bind(address)  # only a local address can be bound to
            return True
    return False


def _address_towards(host: str) -> str:
    family, kind, protocol, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # a datagram socket: this looks up the route and sends nothing
        return str(probe.getsockname()[0])
