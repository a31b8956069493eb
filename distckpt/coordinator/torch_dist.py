"""Coordinators over a TCPStore of their own that rank 0 hosts: of a torch.distributed job, or of any ranks that reach a
store in common.

It never uses a process group, so it runs in any thread beside the training's collectives. The job's own store
serves once, in the constructor, to tell the others where rank 0 listens.

Keys: gathers are numbered; "7/3" is what rank 3 hands over to the 7th. A scatter belongs to the gather before
it: "7.1" is the payload that all ranks share, or, empty, says that each has its own, rank 3 that under "7.1/3";
"7.1/taken" grows by a byte for every rank that has its payload. Rank 0 deletes what is for all when all ranks have come
to the next gather. What is one rank's that rank deletes, while it waits for something else: with thousands
of ranks rank 0 could not do so in time. Numbers are never used twice, so what a rank left behind or comes
late with meets nobody.

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
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from datetime import timedelta
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar

from distckpt.coordinator.port import RankFailure
from distckpt.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

_JOINED = "joined"
_PIECE_BYTES = 4 << 20  # a TCPStore drops the connection of who sends a value of more than 8 MiB
_BATCH = 64  # ranks whose payloads are fetched at once
_GRACE_S = 1.0  # what a store call may take beyond the bound that the store was given
_LINGER_S = 10.0  # how long close() waits for calls that are under way, here and on other ranks


class StoreCoordinator:
    """Ranks that reach a store in common: `job`, which serves in the constructor only; name: of this group in it.

    Constructed on all these ranks, from the main thread, as often on one as on any other. Messages may be
    tens of MB large.
    """

    def __init__(self, job: Store, rank: int, world_size: int, *, name: str) -> None:
        self._rank = rank
        self._world_size = world_size
        self._store: TCPStore | None = _open_store(job, rank, name)
        self._gathers = 0
        self._scatters = 0  # since the last gather
        self._silent: list[int] = []  # in the last gather
        self._handed_out: list[str] = []  # keys that are for all ranks
        self._handed_over: list[str] = []  # keys of this rank that rank 0 may still have to read,
        self._over: list[str] = []  # and those that everybody is done with
        self._missed: list[str] = []  # where rank 0 may have put this rank's payload since it was given up
        # The counter of the last scatter: how many ranks should take it. Until the first one: how many connect.
        self._untaken = {_JOINED: self._world_size - 1} if self._rank == 0 else {}
        self._thread = None if self._rank == 0 else _StoreThread()
        self._finish = weakref.finalize(self, _linger, self._store, self._untaken, self._thread, os.getpid())

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def gather(self, tag: str, payload: bytes, *, timeout_s: float) -> Sequence[bytes] | None:
        self._gathers, self._scatters = self._gathers + 1, 0
        number, store = self._gathers, self._connected()
        if self._thread is None:
            return [payload, *self._collect(store, tag, timeout_s)]
        own = f"{number}/{self._rank}"
        self._handed_over += _keys(own, len(payload))
        self._ask(self._thread, tag, timeout_s, partial(_put, store, own, payload))
        self._thread.submit(partial(_delete, store, self._over))
        self._over = []
        return None

    def scatter(self, tag: str, payloads: Sequence[bytes] | None, *, timeout_s: float) -> bytes:
        self._scatters += 1
        name, store = f"{self._gathers}.{self._scatters}", self._connected()
        if self._thread is not None:
            return self._take_own(self._thread, store, name, tag, timeout_s)
        if payloads is None or len(payloads) != self._world_size:
            raise ValueError(f"scatter {tag!r}: rank 0 must give {self._world_size} payloads")
        self._hand_out(store, name, payloads)
        return payloads[0]

    def close(self) -> None:
        """Rank 0 stays up, for a bounded time, until the living ranks have taken what it scattered last."""
        self._finish()
        self._store = None

    def _collect(self, store: TCPStore, tag: str, timeout_s: float) -> list[bytes]:
        deadline = time.monotonic() + timeout_s
        payloads: list[bytes] = []
        self._silent = []
        for first in range(1, self._world_size, _BATCH):
            ranks = range(first, min(first + _BATCH, self._world_size))
            keys = [f"{self._gathers}/{rank}" for rank in ranks]
            if _poll(partial(store.check, keys), deadline):
                payloads += _get_all(store, keys)
            else:
                self._silent += [rank for rank, key in zip(ranks, keys, strict=True) if not store.check([key])]
        if self._silent:
            raise RankFailure(dict.fromkeys(self._silent, f"no answer to {tag!r} within {timeout_s:g} s"))
        _delete(store, self._handed_out)  # all are here, so nobody reads older scatters any more
        self._handed_out = []
        self._untaken.clear()
        return payloads

    def _hand_out(self, store: TCPStore, name: str, payloads: Sequence[bytes]) -> None:
        others = payloads[1:]
        if len(set(map(id, others))) == 1:
            _put(store, name, others[0])
            self._handed_out += _keys(name, len(others[0]))
        else:
            for rank, payload in enumerate(others, 1):
                _put(store, f"{name}/{rank}", payload)
            store.set(name, "")  # last: who sees it may rely on all the rest
            self._handed_out.append(name)
        self._handed_out.append(f"{name}/taken")
        self._untaken.clear()
        self._untaken[f"{name}/taken"] = len(others) - len(self._silent)

    def _take_own(self, thread: _StoreThread, store: TCPStore, name: str, tag: str, timeout_s: float) -> bytes:
        own = f"{name}/{self._rank}"
        try:
            payload, keys = self._ask(thread, tag, timeout_s, partial(_take, store, name, own, timeout_s))
        except BaseException:
            self._missed.append(own)
            raise
        # Rank 0 is past all calls before this one.
        self._over += self._handed_over + keys
        self._handed_over = []
        for missed in self._missed:
            thread.submit(partial(_drop, store, missed))
        self._missed = []
        return payload

    def _connected(self) -> TCPStore:
        if self._store is None:
            raise ValueError("the coordinator is closed")
        return self._store

    def _ask(self, thread: _StoreThread, tag: str, timeout_s: float, call: Callable[[], T]) -> T:
        """Ask the store that rank 0 hosts."""
        import torch.distributed as dist

        outcome = thread.submit(call)
        try:
            return outcome.result(timeout_s + _GRACE_S)
        except (FutureTimeoutError, dist.DistStoreError) as error:
            raise RankFailure({0: f"no answer to {tag!r} within {timeout_s:g} s"}) from error
        except dist.DistError as error:
            reason = str(error).partition("\n")[0]
            raise RankFailure({0: f"connection lost during {tag!r} ({reason})"}) from error
        finally:
            outcome.cancel()  # if it was given up before it began, behind another one


class TorchDistCoordinator(StoreCoordinator):
    """The ranks of torch.distributed's default group, or `ranks` of them in that order."""

    def __init__(self, ranks: Sequence[int] | None = None) -> None:
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise CheckpointError("torch.distributed is not initialised: call init_process_group() first")
        members = list(range(dist.get_world_size())) if ranks is None else list(ranks)
        if dist.get_rank() not in members:
            raise ValueError(f"rank {dist.get_rank()} makes a coordinator of ranks {members}, without itself")
        if len(set(members)) != len(members):
            raise ValueError(f"a coordinator of ranks {members}: some are named twice")
        group = hashlib.sha256(repr(members).encode()).hexdigest()[:16]
        super().__init__(_job_store(), members.index(dist.get_rank()), len(members), name=f"distckpt/{group}")


class _StoreThread:
    """Makes calls one after another; the caller may give up a call that does not return."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=[self._calls], name="distckpt-store", daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        outcome: Future[T] = Future()
        self._calls.put(partial(_fulfil, outcome, call))
        return outcome

    def end(self, timeout_s: float) -> None:
        """After the calls that were submitted, if they return within the bound."""
        self._calls.put(None)
        self._thread.join(timeout_s)


def _serve(calls: SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := calls.get()) is not None:
        call()
        del call  # it may hold a large payload


def _fulfil(outcome: Future[T], call: Callable[[], T]) -> None:
    if outcome.set_running_or_notify_cancel():
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)


def _poll(done: Callable[[], bool], deadline: float) -> bool:
    """Whether it is done by then; it is looked at once in any case. The pauses cost a fiftieth of the time waited."""
    started = time.monotonic()
    while not done():
        now = time.monotonic()
        if now > deadline:
            return False
        time.sleep(min(max((now - started) / 50, 5e-5), 5e-3))
    return True


def _take(store: TCPStore, name: str, own: str, timeout_s: float) -> tuple[bytes, list[str]]:
    """This rank's payload, and the keys of it that are for no other."""
    from torch.distributed import DistError

    store.set_timeout(timedelta(seconds=max(timeout_s, 1e-3)))  # of get(); 0 would be no bound
    head = store.get(name)
    if shared := bool(head):
        payload = _complete(store, name, head)
    else:
        [payload] = _get_all(store, [own])
    with suppress(DistError):  # rank 0 may be gone: it need not wait for the last to say so
        store.append(f"{name}/taken", ".")  # type: ignore[attr-defined]
    return payload, [] if shared else _keys(own, len(payload))


def _drop(store: TCPStore, key: str) -> None:
    if store.check([key]):
        [payload] = _get_all(store, [key])
        _delete(store, _keys(key, len(payload)))


def _keys(key: str, size: int) -> list[str]:
    """Those of a payload: of its first piece and of the others."""
    return [key, *(f"{key}+{start // _PIECE_BYTES}" for start in range(_PIECE_BYTES, size, _PIECE_BYTES))]


def _put(store: TCPStore, key: str, payload: bytes) -> None:
    """Store a payload of any size. The first piece begins with the size of all, and comes last."""
    for number, part in reversed(list(enumerate(_keys(key, len(payload))))):
        piece = payload[number * _PIECE_BYTES : (number + 1) * _PIECE_BYTES]
        store.set(part, piece if number else len(payload).to_bytes(8, "little") + piece)  # type: ignore[arg-type]


def _get_all(store: TCPStore, keys: list[str]) -> list[bytes]:
    """Payloads that are there."""
    return [_complete(store, key, head) for key, head in zip(keys, store.multi_get(keys), strict=True)]


def _complete(store: TCPStore, key: str, head: bytes) -> bytes:
    _, *others = _keys(key, int.from_bytes(head[:8], "little"))
    return b"".join([head[8:], *(store.get(part) for part in others)])


def _delete(store: TCPStore, keys: list[str]) -> None:
    for key in keys:
        store.delete_key(key)


def _linger(store: TCPStore, untaken: dict[str, int], thread: _StoreThread | None, pid: int) -> None:
    """Runs at close() or at the end of the process."""
    if os.getpid() != pid:
        return  # a forked child shares the connection and must not talk on it
    # The store ends with rank 0's process. Ranks that have not read its last word would take it for dead.
    for key, ranks in untaken.items():
        _poll(partial(_reached, store, key, ranks), time.monotonic() + _LINGER_S)
    # A thread that comes back from C++ while the interpreter is being torn down aborts the process.
    if thread is not None:
        thread.end(_LINGER_S)


def _reached(store: TCPStore, key: str, count: int) -> bool:
    return count == 0 or (store.check([key]) and len(store.get(key)) >= count)


def _open_store(job: Store, rank: int, name: str) -> TCPStore:
    """Rank 0 hosts a store on a free port and leaves its address in the job's store for the others."""
    from torch.distributed import DistError
    from torch.distributed.distributed_c10d import PrefixStore

    job = PrefixStore(name, job)
    number = job.add(f"opened by {rank}", 1)  # several coordinators of the same ranks have a number each
    if rank == 0:
        try:
            store = tcp_store("localhost", 0, is_master=True)
            address = f"{_own_host()} {store.port}"
        except (DistError, OSError) as error:
            job.set(f"address {number}", f"! {error}")
            raise CheckpointError(f"rank 0 cannot host a store for its coordinator: {error}") from error
        job.set(f"address {number}", address)
        return store
    host, _, port = job.get(f"address {number}").decode().partition(" ")
    if host == "!":
        raise CheckpointError(f"rank 0 cannot host a store for its coordinator: {port}")
    store = tcp_store(host, int(port), is_master=False)
    store.append(_JOINED, ".")  # type: ignore[attr-defined]
    return store


def _job_store() -> Store:
    try:
        from torch.distributed.distributed_c10d import _get_default_store
    except ImportError:  # it is private; env:// jobs have their store at this address
        return tcp_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return _get_default_store()


def tcp_store(host: str, port: int, *, is_master: bool) -> TCPStore:
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
