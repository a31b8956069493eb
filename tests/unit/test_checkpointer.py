"""The Checkpointer between saves: async failures, the end of the program, closing, options and reports."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import distckpt
from distckpt import Checkpointer, CheckpointError, MismatchError, PendingSave, heartbeat
from distckpt.coordinator import Coordinator
from distckpt.storage import PosixStorage
from distckpt.storage.memory import MemoryWriteFile
from distckpt.testing import MemoryStorage, ThreadCoordinator, run_ranks
from tests.unit.protocol import io_error

State = dict[str, object]


def make_state(value: float = 1.0) -> State:
    return {"model": {"w": torch.full((1000,), value)}, "step": 5}


class Full(MemoryStorage):
    """Takes no file while `is_full`."""

    is_full = True

    def create(self, name: str, *, size_hint: int = 0) -> MemoryWriteFile:
        if self.is_full:
            raise io_error(errno.ENOSPC)
        return super().create(name, size_hint=size_hint)


# The failure of an async save

FAILING_JOB = """
import errno
import torch
from distckpt import Checkpointer
from distckpt.storage.memory import MemoryStorage

class Full(MemoryStorage):
    def create(self, name, *, size_hint=0):
        raise OSError(errno.ENOSPC, "no room", name)

checkpointer = Checkpointer(Full())
pending = checkpointer.async_save({"w": torch.ones(4)}, iteration=1)
"""


def run_program(text: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stderr


def test_failed_save_that_nobody_waited_for_is_an_error_line_at_the_end_of_the_program() -> None:
    code, lines = run_program(FAILING_JOB)
    assert "an async save failed, and nothing waited for it" in lines
    assert "no room" in lines
    assert code == 0  # What it means for the job is for the program to say; close() or wait() would raise it.


@pytest.mark.parametrize(
    "meet",
    [
        "try:\n    pending.wait()\nexcept OSError: pass",
        "try:\n    checkpointer.latest_iteration()\nexcept OSError: pass",
        "try:\n    checkpointer.close()\nexcept OSError: pass",
    ],
    ids=["wait", "next call", "close"],
)
def test_failed_save_that_was_raised_is_not_logged_again(meet: str) -> None:
    code, lines = run_program(FAILING_JOB + meet)
    assert (code, "async save" in lines) == (0, False), lines


def test_program_that_closes_ends_with_the_error_of_its_save() -> None:
    code, lines = run_program(FAILING_JOB + "checkpointer.close()")
    assert code == 1
    assert "no room" in lines
    assert "nothing waited" not in lines


def test_failed_async_save_is_raised_by_the_next_call_once() -> None:
    storage = Full()
    with Checkpointer(storage) as checkpointer:
        checkpointer.async_save(make_state(), iteration=1)
        with pytest.raises(OSError, match="No space left"):
            checkpointer.save(make_state(), iteration=2)
        storage.is_full = False
        checkpointer.save(make_state(), iteration=3)
        assert checkpointer.iterations() == [3]


def test_async_save_that_went_well_is_not_kept() -> None:
    with Checkpointer(MemoryStorage()) as checkpointer:
        kept = weakref.ref(checkpointer.async_save(make_state(), iteration=1))
        assert checkpointer.latest_iteration() == 1
        gc.collect()
        assert kept() is None


def test_heartbeat_goes_on_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    touched = threading.Semaphore(0)

    class Fails(MemoryStorage):
        def touch(self, name: str) -> None:
            touched.release()
            raise io_error()

    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.001)
    with heartbeat.Heartbeat(Fails(), "pending-x", active=True):
        for _ in range(3):
            assert touched.acquire(timeout=60)


def test_save_that_is_written_in_the_call_shows_that_it_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    touched = threading.Event()

    class Slow(MemoryStorage):
        def touch(self, name: str) -> None:
            super().touch(name)
            touched.set()

        def create(self, name: str, *, size_hint: int = 0) -> MemoryWriteFile:
            assert "shard-" not in name or touched.wait(timeout=20)
            return super().create(name, size_hint=size_hint)

    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.001)
    with Checkpointer(Slow(), max_staging_bytes=0) as checkpointer:
        checkpointer.async_save(make_state(), iteration=1).wait()


# Closing


def test_every_call_after_close_is_an_error() -> None:
    checkpointer = Checkpointer(MemoryStorage())
    checkpointer.save(make_state(), iteration=1)
    checkpointer.close()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    for verb, call in {
        "prepare": lambda: checkpointer.prepare(make_state()),
        "guard": lambda: checkpointer.guard(optimizer),
        "save": lambda: checkpointer.save(make_state(), iteration=2),
        "load": lambda: checkpointer.load(make_state()),
        "read": checkpointer.read,
        "ask": checkpointer.latest_iteration,
    }.items():
        with pytest.raises(CheckpointError, match=f"{verb}: this Checkpointer is closed"):
            call()
    checkpointer.close()


# Arguments


def test_numpy_integers_are_integers() -> None:
    storage = MemoryStorage()
    with Checkpointer(storage, mesh={"tp": (np.int64(0), np.int32(1))}) as checkpointer:  # type: ignore[dict-item]
        report = checkpointer.save(make_state(), iteration=np.int64(7))  # type: ignore[arg-type]
        assert type(report.iteration) is int
        assert checkpointer.load(make_state(0.0), np.int16(7)).iteration == 7  # type: ignore[arg-type]
        assert "w" in checkpointer.read(np.uint8(7))["model"]  # type: ignore[arg-type,operator]
        assert checkpointer.iterations() == [7]


@pytest.mark.parametrize("iteration", [1.0, "1", None])
def test_iteration_that_is_no_integer_is_refused(iteration: object) -> None:
    with Checkpointer(MemoryStorage()) as checkpointer, pytest.raises(TypeError, match="integer"):
        checkpointer.save(make_state(), iteration=iteration)  # type: ignore[arg-type]


def test_read_takes_a_string_for_one_key() -> None:
    with Checkpointer(MemoryStorage()) as checkpointer:
        checkpointer.save(make_state() | {"m": 1, "o": 2}, iteration=1)
        assert list(checkpointer.read(keys="model")) == ["model"]
        assert checkpointer.read(keys="step") == {"step": 5}
        with pytest.raises(MismatchError) as caught:
            checkpointer.read(keys="mo")
        assert caught.value.missing == ("mo",)


class Recorded(ThreadCoordinator):
    """Knows how long others were given."""

    def __init__(self, inner: ThreadCoordinator) -> None:
        self._inner = inner
        self.timeouts_s: set[float] = set()

    @property
    def rank(self) -> int:
        return self._inner.rank

    @property
    def world_size(self) -> int:
        return self._inner.world_size

    def gather(self, tag: str, payload: bytes, *, timeout_s: float) -> object:  # type: ignore[override]
        self.timeouts_s.add(timeout_s)
        return self._inner.gather(tag, payload, timeout_s=timeout_s)

    def scatter(self, tag: str, payloads: object, *, timeout_s: float) -> bytes:
        return self._inner.scatter(tag, payloads, timeout_s=timeout_s)  # type: ignore[arg-type]


def test_functions_for_one_directory_take_a_timeout(tmp_path: Path) -> None:
    def run(inner: ThreadCoordinator) -> list[set[float]]:
        found = []

        def recorded() -> Coordinator:
            found.append(Recorded(inner))
            return found[-1]

        distckpt.save(make_state(), tmp_path / "a", coordinator=recorded(), timeout_s=21)
        distckpt.async_save(make_state(), tmp_path / "b", coordinator=recorded(), timeout_s=22).wait()
        distckpt.load(make_state(0.0), tmp_path / "a", coordinator=recorded(), timeout_s=23)
        distckpt.read(tmp_path / "b", coordinator=recorded(), timeout_s=24)
        return [coordinator.timeouts_s for coordinator in found]

    assert run_ranks(2, run) == [[{21}, {22}, {23}, {24}]] * 2


# Reports


def test_reports_count_bytes_and_name_the_backend(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        saved = checkpointer.save(make_state(), iteration=1)
        loaded = checkpointer.load(make_state(0.0))
    files = [file for file in (tmp_path / "iter_0000001").iterdir() if not file.name.startswith("index-")]
    assert saved.bytes == sum(file.stat().st_size for file in files)
    assert saved.backend == PosixStorage(os.fspath(tmp_path)).io_backend
    assert loaded.bytes == 4000
    assert loaded.bytes_read >= loaded.bytes
    with Checkpointer(MemoryStorage()) as checkpointer:
        assert checkpointer.save(make_state(), iteration=1).backend == "MemoryStorage"


def test_async_save_of_a_directory_is_a_pending_save(tmp_path: Path) -> None:
    pending = distckpt.async_save(make_state(), tmp_path)
    assert isinstance(pending, PendingSave)
    assert pending.wait().bytes > 4000


def test_loaded_tensors_can_be_resized() -> None:
    """As FSDP does with parameters on the host."""
    with Checkpointer(MemoryStorage()) as checkpointer:
        checkpointer.save({"a": torch.ones(20, 30), "b": torch.ones(4, 4)}, iteration=1)
        state: State = {"a": torch.zeros(20, 30), "b": torch.zeros(8, 8)[::2, ::2]}
        checkpointer.load(state)
        for tensor in state.values():
            assert torch.equal(tensor, torch.ones_like(tensor))  # type: ignore[call-overload,arg-type]
            tensor.untyped_storage().resize_(0)  # type: ignore[attr-defined]


def test_empty_state_is_saved_and_loaded() -> None:
    with Checkpointer(MemoryStorage()) as checkpointer:
        checkpointer.save({}, iteration=1)
        assert checkpointer.load({}).bytes == 0
