"""What each of three processes does in test_save_load.py: every check_ function runs on all of them, in order.

python save_load_ranks.py <directory>    prints one line of JSON, [name, "ok" or a traceback], for each check
"""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import distckpt
from distckpt import (
    CheckpointError,
    CorruptionError,
    DistributedError,
    InvalidShardingError,
    MismatchError,
    PerRank,
    ShardedTensor,
)
from distckpt.storage import PosixStorage, ReadFile, Storage, WriteFile
from tests.distributed.checks import run_checks

WORLD_SIZE = 3
Checkpointer = partial(distckpt.Checkpointer, timeout_s=20.0)
ROWS = 4  # of each rank


class AlteredStorage:
    """A PosixStorage that treats some names in a way of its own: `alter` changes what is read, or raises."""

    def __init__(self, root: Path, alter: Callable[[str, bytearray], None]) -> None:
        self._inner: Any = PosixStorage(root)
        self._alter = alter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def open(self, name: str) -> ReadFile:
        file = self._inner.open(name)
        content = bytearray(file.size_bytes)
        file.read_into(0, content)
        file.close()
        self._alter(name, content)
        return _BytesFile(name, bytes(content))


class _BytesFile:
    def __init__(self, name: str, content: bytes) -> None:
        self.name = name
        self.size_bytes = len(content)
        self._content = content

    def read_into(self, offset: int, buffer: Any) -> None:
        view = memoryview(buffer).cast("B")
        if offset + len(view) > len(self._content):
            raise EOFError(f"{self.name} ends before")
        view[:] = self._content[offset : offset + len(view)]

    def close(self) -> None:
        pass


def make_state(number: int, rank: int | None = None) -> dict[str, Any]:
    """Everything in it is a function of `number`."""
    rank = dist.get_rank() if rank is None else rank
    whole = torch.arange(WORLD_SIZE * ROWS * 5, dtype=torch.float32).reshape(-1, 5) + 1000 * number
    return {
        "model": {
            "split": ShardedTensor.from_rank_offsets(
                "split", whole[rank * ROWS : (rank + 1) * ROWS].clone(), (0, rank, WORLD_SIZE)
            ),
            "shared": torch.full((7,), float(number)),
        },
        "number": number,
        "own": PerRank([number, rank]),
    }


def assert_state(state: dict[str, Any], number: int) -> None:
    expected = make_state(number)
    assert torch.equal(state["model"]["split"].data, expected["model"]["split"].data), state
    assert torch.equal(state["model"]["shared"], expected["model"]["shared"]), state
    assert state["number"] == number, state
    assert state["own"].value == [number, dist.get_rank()], state


def same_everywhere(error: BaseException) -> str:
    """The error's text, which is the same, as is its type, on every rank."""
    found: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(found, (type(error).__name__, str(error)))
    assert found == found[:1] * WORLD_SIZE, found
    return str(error)


# Bad states.


def _hole(state: dict[str, Any]) -> None:
    state["model"]["split"] = ShardedTensor("split", torch.zeros(3, 5), global_shape=(12, 5), global_offset=(5, 0))


def _overlap(state: dict[str, Any]) -> None:
    state["model"]["split"] = ShardedTensor("split", torch.zeros(5, 5), global_shape=(12, 5), global_offset=(3, 0))


def _other_tensor(state: dict[str, Any]) -> None:
    state["model"]["shared"][6] = -1.0


def _other_value(state: dict[str, Any]) -> None:
    state["number"] = 10


def _other_nesting(state: dict[str, Any]) -> None:
    state["number"] = {"nested": 1}


def _other_shape(state: dict[str, Any]) -> None:
    state["model"]["shared"] = torch.ones(8)


def _unsupported(state: dict[str, Any]) -> None:
    state["model"]["lock"] = threading.Lock()


BAD_STATES: dict[Callable[[dict[str, Any]], None], tuple[type[CheckpointError], str]] = {
    _hole: (InvalidShardingError, "'split' (12, 5): rows 4-4 are in no shard.\n  Ranks 0, 1, 2 gave shards"),
    _overlap: (
        InvalidShardingError,
        "'split' (12, 5): [0:4, 0:5] of rank 0 and [3:8, 0:5] of rank 1 overlap: rows 3-",
    ),
    _other_tensor: (InvalidShardingError, "'model/shared' (7,): rows 0-6 differ between rank 0 and rank 1"),
    _other_value: (InvalidShardingError, "value 'number' is 9 on rank 0 but 10 on rank 1"),
    _other_nesting: (
        InvalidShardingError,
        "'number' is a leaf of the state on one rank and the container of 'number/n",
    ),
    _other_shape: (InvalidShardingError, "'model/shared' is float32 (7,) on rank 0 but float32 (8,) on rank 1"),
    _unsupported: (
        DistributedError,
        "rank 1 of 3: UnsupportedTypeError: 'model/lock': a _thread.lock cannot be stored",
    ),
}


def check_a_bad_state_of_one_rank_is_the_same_error_on_all(root: Path) -> None:
    with Checkpointer(root / "bad") as checkpointer:
        checkpointer.save(make_state(1), iteration=1)
        for spoil, (kind, words) in BAD_STATES.items():
            state = make_state(9)
            if dist.get_rank() == 1:
                spoil(state)
            with pytest.raises(kind) as caught:
                checkpointer.save(state, iteration=2)
            assert words in same_everywhere(caught.value), (spoil, caught.value)
            with pytest.raises(kind) as caught:
                checkpointer.async_save(state, iteration=2).wait()
            assert words in same_everywhere(caught.value), (spoil, caught.value)
        assert checkpointer.iterations() == [1]
        checkpointer.save(make_state(3), iteration=3)
        state = make_state(0)
        assert checkpointer.load(state).iteration == 3
        assert_state(state, 3)


def check_a_rank_that_saves_another_iteration_is_an_error_on_all(root: Path) -> None:
    with Checkpointer(root / "other") as checkpointer:
        with pytest.raises(InvalidShardingError, match=r"rank 0 saves iteration 0 .* rank 1 iteration 1") as caught:
            checkpointer.save(make_state(1), iteration=dist.get_rank())
        same_everywhere(caught.value)
        assert checkpointer.latest_iteration() is None


def check_a_bad_target_of_one_rank_changes_nothing_on_any(root: Path) -> None:
    with Checkpointer(root / "target") as checkpointer:
        checkpointer.save(make_state(1), iteration=1)
        state = make_state(5)
        if dist.get_rank() == 2:
            state["model"]["shared"] = torch.full((9,), 5.0)
        with pytest.raises(MismatchError, match=r"model/shared: the state has \(9,\), stored is \(7,\)") as caught:
            checkpointer.load(state)
        same_everywhere(caught.value)
        if dist.get_rank() == 2:
            state["model"]["shared"] = torch.full((7,), 5.0)
        assert_state(state, 5)


# Damage that one rank alone sees.


def _two_iterations(root: Path) -> None:
    with Checkpointer(root) as checkpointer:
        checkpointer.save(make_state(1), iteration=1)
        checkpointer.save(make_state(2), iteration=2)


def _flip(part: str) -> Callable[[str, bytearray], None]:
    def alter(name: str, content: bytearray) -> None:
        if name.startswith("iter_0000002/") and part in name:
            content[len(content) // 2] ^= 1

    return alter


def _missing(name: str, content: bytearray) -> None:
    if name.startswith("iter_0000002/shard-"):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", name)


def _short(name: str, content: bytearray) -> None:
    if name.startswith("iter_0000002/shard-"):
        del content[-100:]


def check_damage_that_one_rank_sees_makes_all_fall_back_together(root: Path) -> None:
    _two_iterations(root / "damage")
    for rank, alter, why in [
        (1, _flip("shard-"), "CorruptionError"),
        (2, _flip("chunks-"), "CorruptionError"),
        (1, _missing, "FileNotFoundError"),
        (0, _missing, "FileNotFoundError"),
        (2, _short, "CorruptionError"),
    ]:
        mine: Storage | Path = AlteredStorage(root / "damage", alter) if dist.get_rank() == rank else root / "damage"
        with Checkpointer(mine) as checkpointer:
            state = make_state(7)
            report = checkpointer.load(state)
            assert report.iteration == 1
            assert list(report.fell_back_from) == [2]
            assert report.fell_back_from[2].startswith(f"rank {rank}: {why}: "), report.fell_back_from
            assert_state(state, 1)
            with pytest.raises(CorruptionError, match=r"no good checkpoint .* of iteration 2; .* undefined") as caught:
                checkpointer.load(make_state(7), iteration=2)
            same_everywhere(caught.value)
    with Checkpointer(root / "damage") as checkpointer:
        assert checkpointer.load(state).fell_back_from == {}
        assert_state(state, 2)


def check_a_host_with_a_damaged_copy_makes_all_fall_back_together(root: Path) -> None:
    """Every rank has a root of its own, as with a file system of each host; the copy of rank 2 has lost a file."""
    own = root / f"copy-{dist.get_rank()}"
    _two_iterations(root / "original")
    dist.barrier()  # rank 0 tidies up after the others have returned
    shutil.copytree(root / "original", own)
    if dist.get_rank() == 2:
        (victim,) = (own / "iter_0000002").glob("shard-00000-*")
        victim.unlink()
    with Checkpointer(own) as checkpointer:
        state = make_state(7)
        report = checkpointer.load(state)
    assert (report.iteration, list(report.fell_back_from)) == (1, [2])
    assert "rank 2: FileNotFoundError" in report.fell_back_from[2]
    assert_state(state, 1)


def check_a_file_that_is_lost_is_made_again_for_all_from_parity(root: Path) -> None:
    with Checkpointer(root / "parity", parity=True, verify_after_save=True) as checkpointer:
        report = checkpointer.async_save(make_state(1), iteration=1).wait(60)
        assert report.verified
        assert report.parity_bytes > 0
        assert checkpointer.latest_iteration(verified=True) == 1
    for victim in range(WORLD_SIZE):
        (path,) = (root / "parity" / "iter_0000001").glob(f"shard-{victim:05d}-*")
        content = path.read_bytes()
        dist.barrier()
        if dist.get_rank() == victim:
            path.unlink()
        dist.barrier()
        with Checkpointer(root / "parity") as checkpointer:
            state = make_state(7)
            loaded = checkpointer.load(state)
        assert loaded.rebuilt == (path.name,)
        assert not loaded.fell_back_from
        assert_state(state, 1)
        assert path.read_bytes() == content


def check_falling_back_to_what_does_not_match_says_that_the_state_is_undefined(root: Path) -> None:
    with Checkpointer(root / "unlike") as checkpointer:
        checkpointer.save({"model": {"w": torch.zeros(3)}}, iteration=1)
        checkpointer.save(make_state(2), iteration=2)
    mine: Storage | Path = root / "unlike"
    if dist.get_rank() == 1:
        mine = AlteredStorage(root / "unlike", _flip("shard-"))
    with Checkpointer(mine) as checkpointer, pytest.raises(MismatchError, match="undefined") as caught:
        checkpointer.load(make_state(7))
    assert "Nothing was changed" not in same_everywhere(caught.value)
    assert "rank 1: CorruptionError" in str(caught.value)


# Saving in the background.


class _FullStorage:
    """A PosixStorage with no room for shard files."""

    def __init__(self, root: Path) -> None:
        self._inner: Any = PosixStorage(root)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create(self, name: str, *, size_hint: int = 0) -> WriteFile:
        if "/shard-" in name:
            raise OSError(errno.ENOSPC, "No space left on device", name)
        return self._inner.create(name, size_hint=size_hint)  # type: ignore[no-any-return]


def check_async_saves_run_beside_the_trainings_own_collectives(root: Path) -> None:
    state = make_state(0)
    with Checkpointer(root / "async", keep_last=2) as checkpointer:
        total = torch.zeros(1)
        for iteration in range(1, 6):
            state["model"]["split"].data.copy_(make_state(iteration)["model"]["split"].data)
            state["model"]["shared"].fill_(iteration)
            state["number"] = iteration
            state["own"].value = [iteration, dist.get_rank()]
            pending = checkpointer.async_save(state, iteration=iteration)
            state["model"]["split"].data.fill_(-1)  # the next step is free to write over everything at once
            state["model"]["shared"].fill_(-1)
            state["own"].value[0] = -1
            state["number"] = -1
            for _ in range(20):
                one = torch.ones(1)
                dist.all_reduce(one)
                total += one
        report = pending.wait(timeout_s=60)
        assert pending.done()
        assert report.iteration == 5
        assert total == 5 * 20 * WORLD_SIZE
        assert checkpointer.iterations() == [4, 5]
        for iteration in (4, 5):
            checkpointer.load(state, iteration=iteration)
            assert_state(state, iteration)


def check_a_failure_in_the_background_is_raised_on_all_ranks(root: Path) -> None:
    mine: Storage | Path = _FullStorage(root / "full") if dist.get_rank() == 1 else root / "full"
    with Checkpointer(root / "full") as checkpointer:
        checkpointer.save(make_state(1), iteration=1)
    checkpointer = Checkpointer(mine)
    pending = checkpointer.async_save(make_state(2), iteration=2)
    with pytest.raises(DistributedError, match=r"rank 1 .*No space left on device") as caught:
        pending.wait(timeout_s=60)
    assert caught.value.committed == "no"
    same_everywhere(caught.value)
    checkpointer.async_save(make_state(2), iteration=2)
    with pytest.raises(DistributedError, match=r"rank 1 .*No space left on device"):
        checkpointer.latest_iteration()  # the next call raises what nobody has waited for
    checkpointer.async_save(make_state(2), iteration=2)
    with pytest.raises(DistributedError, match=r"rank 1 .*No space left on device"):
        checkpointer.close()
    with Checkpointer(root / "full") as checkpointer:
        assert checkpointer.iterations() == [1]
        state = make_state(0)
        checkpointer.load(state)
        assert_state(state, 1)


if __name__ == "__main__":
    run_checks(globals(), WORLD_SIZE)
