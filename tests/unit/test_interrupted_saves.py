"""A save that is interrupted, or whose wait is: the other ranks learn of it, and no memory is used twice."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch

from distckpt import Checkpointer, DistributedError, arena, async_save
from distckpt.coordinator import Coordinator
from distckpt.errors import UnsupportedTypeError
from distckpt.storage.memory import MemoryWriteFile
from distckpt.testing import MemoryStorage, run_ranks

BOUND_S = 20


class Held(MemoryStorage):
    """Takes no file of a shard before it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.let_go = threading.Event(), threading.Event()

    def create(self, name: str, *, size_hint: int = 0) -> MemoryWriteFile:
        self.asked.set()
        assert self.let_go.wait(BOUND_S)
        return super().create(name, size_hint=size_hint)


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("waiting", ["wait", "next save", "close"])
def test_save_whose_wait_is_interrupted_keeps_its_memory(waiting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Held()
    checkpointer = Checkpointer(storage)
    pending = checkpointer.async_save({"w": torch.full((1000,), 1.0)}, iteration=1)
    assert storage.asked.wait(BOUND_S)
    with monkeypatch.context() as patch:
        patch.setattr(pending._ended, "wait", interrupt)
        calls: dict[str, Callable[[], object]] = {
            "wait": pending.wait,
            "close": checkpointer.close,
            "next save": lambda: checkpointer.async_save({"w": torch.full((1000,), 2.0)}, iteration=2),
        }
        with pytest.raises(KeyboardInterrupt):
            calls[waiting]()
    assert not pending.done()
    threading.Timer(0.2, storage.let_go.set).start()
    # The next save waits for the first, from whose memory it would otherwise take its own.
    checkpointer.async_save({"w": torch.full((1000,), 3.0)}, iteration=3).wait(BOUND_S)
    for iteration in (1, 3):
        found = checkpointer.read(iteration)["w"]
        assert torch.equal(found, torch.full((1000,), float(iteration)))  # type: ignore[arg-type]
    checkpointer.close()


@pytest.mark.parametrize("where", ["Memory", "available_memory_bytes"])
def test_interrupt_while_memory_is_taken_is_raised_there_and_told_to_the_others(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(coordinator: Coordinator) -> object:
        with Checkpointer(storage, coordinator=coordinator, timeout_s=BOUND_S) as checkpointer:
            checkpointer.save({"w": torch.ones(3)}, iteration=1)
            try:
                pending = checkpointer.async_save({"w": torch.ones(3)}, iteration=2)
            except KeyboardInterrupt as error:
                checkpointer.latest_iteration()  # Known by now, and not raised again.
                return error
            with pytest.raises(DistributedError, match="KeyboardInterrupt") as caught:
                pending.wait()
            checkpointer.latest_iteration()
            return caught.value

    storage, real = MemoryStorage(), getattr(arena, where)

    def interrupt_rank_1(*arguments: object) -> object:
        if threading.current_thread().name == "rank 1":
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(arena, where, interrupt_rank_1)
    results = run_ranks(2, run)
    assert isinstance(results[0], DistributedError)
    assert 1 in results[0].failures
    assert isinstance(results[1], KeyboardInterrupt)
    with Checkpointer(storage) as checkpointer:
        assert checkpointer.iterations() == [1]


def test_host_that_gives_no_thread_saves_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with Checkpointer(MemoryStorage()) as checkpointer:
        checkpointer.save({"w": torch.ones(3)}, iteration=1)
        with monkeypatch.context() as patch:
            pending = None
            start = threading.Thread.start
            patch.setattr(threading.Thread, "start", lambda t: refuse() if t.name == "distckpt-save" else start(t))
            pending = checkpointer.async_save({"w": torch.ones(3)}, iteration=2)
        assert pending.done()
        assert pending.wait().iteration == 2


def test_callbacks_find_the_save_ended() -> None:
    seen = []
    with Checkpointer(MemoryStorage()) as checkpointer:
        pending = checkpointer.async_save({"w": torch.ones(3)}, iteration=1)
        pending.add_done_callback(lambda: seen.append((pending.done(), pending.wait().iteration)))
    assert seen == [(True, 1)]


@pytest.mark.parametrize("max_staging_bytes", [None, 0])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_state_is_kept_once_the_save_has_ended(fails: bool, max_staging_bytes: int | None) -> None:
    class Failing(MemoryStorage):
        def create(self, name: str, *, size_hint: int = 0) -> MemoryWriteFile:
            raise OSError(28, "no room")

    checkpointer = Checkpointer(Failing() if fails else MemoryStorage(), max_staging_bytes=max_staging_bytes)
    tensor = torch.ones(1000)
    kept = weakref.ref(tensor)
    pending = checkpointer.async_save({"w": tensor.t(), "v": tensor}, iteration=1)
    assert pending._ended.wait(BOUND_S)
    del tensor
    gc.collect()
    assert kept() is None
    if fails:
        with pytest.raises(OSError, match="no room"):
            pending.wait()
    checkpointer.close()


def test_save_into_one_directory_that_fails_at_once_leaves_nothing_open(tmp_path: object) -> None:
    before = threading.active_count()
    for _ in range(3):
        with pytest.raises(UnsupportedTypeError):
            async_save({"bad": object()}, str(tmp_path))
    assert threading.active_count() == before
