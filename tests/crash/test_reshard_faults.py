"""A reshard that is cut short anywhere goes on when it is started again, and ends in the same checkpoint."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from msgspec.structs import replace

import distckpt
from distckpt import Checkpointer, ShardedTensor
from distckpt.checked_json import encode_record
from distckpt.commit import list_commits, read_index
from distckpt.coordinator import Coordinator
from distckpt.errors import CheckpointError, CorruptionError, DistributedError, FencedError
from distckpt.report import ReshardReport
from distckpt.resharding import job, planning
from distckpt.resharding.part import Journal, LotMemory, PartWriter, read_journal
from distckpt.resharding.plan_file import ReshardPlan, TensorRule
from distckpt.resharding.shard_output import Fragment, OutputState
from distckpt.resharding.steps import Position
from distckpt.resharding.target_files import Lot
from distckpt.storage import Storage
from distckpt.storage.faults import Result
from distckpt.testing import Crash, CrashingStorage, MemoryStorage, run_ranks
from tests.crash.states import unexplained
from tests.unit.damage import change, flip
from tests.unit.model_states import held_chunks, read_tensors, same_bits

Moment = Literal["before", "half", "after"]
KEYS = {"a": (12, 300), "b": (7,), "c": (16, 16, 3), "d": (2000,)}


def whole(key: str) -> torch.Tensor:
    shape = KEYS[key]
    return (
        (torch.arange(torch.Size(shape).numel()) * 31 + ord(key))
        .to(torch.int16 if key == "b" else torch.int32)
        .view(shape)
    )


@pytest.fixture(scope="module")
def source() -> MemoryStorage:
    storage = MemoryStorage()

    def run(coordinator: Coordinator) -> None:
        state: dict[str, object] = {"step": 5}
        for key in KEYS:
            dim = 1 if key == "a" else 0
            parts = whole(key).chunk(2, dim)
            offset = [0] * whole(key).dim()
            offset[dim] = coordinator.rank * parts[0].shape[dim]
            state[key] = ShardedTensor(
                key,
                parts[coordinator.rank].clone(),
                global_shape=KEYS[key],
                global_offset=offset,
                partition=["tp" if d == dim else None for d in range(whole(key).dim())],
            )
        with Checkpointer(storage, coordinator=coordinator, mesh={"tp": (coordinator.rank, 2)}) as checkpointer:
            checkpointer.save(state, iteration=5)

    run_ranks(2, run)
    return storage


@pytest.fixture(autouse=True)
def noted_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a few KiB, each followed by a journal."""
    write = PartWriter._write

    def write_and_note(self: PartWriter, *arguments: object) -> None:
        write(self, *arguments)  # type: ignore[arg-type]
        self.note()

    monkeypatch.setattr(PartWriter, "_write", write_and_note)
    monkeypatch.setattr(planning, "share_memory", lambda *_, **__: LotMemory(1, 12 << 10))
    monkeypatch.setattr(job, "_STEP_S", 0.01)


def reshard(source: Storage, target: Storage, tp: int = 3, **options: object) -> ReshardReport:
    return distckpt.reshard(source, target, {"tp": tp}, **options)  # type: ignore[arg-type]


def check_whole(storage: Storage) -> None:
    """It has the checkpoint, whole, and nothing besides."""
    (commit,) = list_commits(storage)
    index, _ = read_index(storage, commit)
    assert index.mesh == {"tp": 3}
    found = read_tensors(storage)
    assert found.keys() == KEYS.keys()
    for key in KEYS:
        assert same_bits(found[key], whole(key)), key
    assert bytes(index.values["step"]) == b"5"
    assert unexplained(storage) == set()


def is_none_or_whole(storage: Storage) -> bool:
    """Whether it has a checkpoint, and fails if that is not whole."""
    if not list_commits(storage):
        return False
    assert distckpt.verify(storage).is_sound
    for key, tensor in read_tensors(storage).items():
        assert same_bits(tensor, whole(key)), key
    return True


def test_undisturbed_reshard_goes_through_all_that_is_made_to_fail_below(source: MemoryStorage) -> None:
    target = MemoryStorage()
    counting = CrashingStorage(target)
    reshard(source, counting)
    check_whole(target)
    assert sum(call.startswith("replace") and "reshard-" in call for call in counting.calls) > 4
    assert {call.split()[0] for call in counting.calls} >= {
        "create",
        "write",
        "finish",
        "put_if_absent",
        "remove",
    }


FAULTS: list[tuple[str, Exception, Moment]] = [
    ("crash", Crash(), "half"),
    ("crash after", Crash(), "after"),
    ("EIO after", OSError(errno.EIO, "injected"), "after"),
]


@pytest.mark.parametrize(("error", "moment"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_reshard_that_failed_at_any_call_goes_on(source: MemoryStorage, error: Exception, moment: Moment) -> None:
    counting = CrashingStorage(MemoryStorage())
    reshard(source, counting)
    resumed = 0
    for call in range(1, len(counting.calls) + 1):
        inner = MemoryStorage()
        target = CrashingStorage(inner, fail_at=call, error=error, moment=moment)
        try:
            reshard(source, target)
        except (Crash, OSError, DistributedError):
            pass
        else:
            assert is_none_or_whole(inner), counting.calls[call - 1]
        left = (inner.power_cut(), inner.power_cut(seed=call), inner)[call % 3]
        was_there = is_none_or_whole(left)
        report = reshard(source, left)
        assert report.is_there == was_there
        resumed += report.is_resumed
        check_whole(left)
    assert resumed > len(counting.calls) // 2


def test_reshard_that_fails_again_and_again_gets_there(source: MemoryStorage) -> None:
    """Each run dies after a few more calls than the one before it; what it had noted it does not do again."""
    target, written = MemoryStorage(), []
    for calls in range(60, 1000, 8):
        try:
            reshard(source, CrashingStorage(target, fail_at=calls, error=Crash()), on_bytes=written.append)
            break
        except Crash:
            target = target.power_cut(seed=calls)
    check_whole(target)
    total = sum(whole(key).nbytes for key in KEYS)
    assert total <= sum(written) < 2 * total


@pytest.mark.parametrize("jobs", [2, 3])
def test_several_jobs_and_ranks_go_on_too(source: MemoryStorage, jobs: int) -> None:
    counting = CrashingStorage(MemoryStorage())
    run_ranks(2, lambda coordinator: reshard(source, counting, jobs=jobs, coordinator=coordinator))
    calls = range(7, len(counting.calls), 11)
    crashed = 0
    for call in calls:
        inner = MemoryStorage()
        target = CrashingStorage(inner, fail_at=call, error=Crash())
        try:
            run_ranks(2, lambda c, target=target: reshard(source, target, jobs=jobs, coordinator=c))
        except (Crash, DistributedError):
            crashed += 1
        else:
            assert len(target.calls) < call  # Threads met in another order, and made fewer calls.
            check_whole(inner)
        left = inner.power_cut(seed=call)
        # By another number of processes and threads than began it.
        jobs_now = 1 + call % 2
        run_ranks(1 + call % 3, lambda c, left=left, n=jobs_now: reshard(source, left, jobs=n, coordinator=c))
        check_whole(left)
    assert crashed > len(calls) // 2


def test_damaged_source_is_named_and_nothing_is_committed(source: MemoryStorage) -> None:
    damaged = source.power_cut()
    commit = list_commits(damaged)[0]
    name = f"{commit.directory}/{read_index(damaged, commit)[0].files[1].name}"
    change(damaged, name, flip(9000))
    target = MemoryStorage()
    with pytest.raises(CorruptionError, match=name.rpartition("/")[2]) as caught:
        reshard(damaged, target)
    assert "block 0" in str(caught.value)
    assert list_commits(target) == []
    # Once it is repaired, the same command goes on.
    change(damaged, name, flip(9000))
    reshard(damaged, target)
    check_whole(target)


def test_full_disk_is_a_clear_error_and_with_more_room_it_goes_on(source: MemoryStorage) -> None:
    total = sum(whole(key).nbytes for key in KEYS)
    target = MemoryStorage(capacity_bytes=total // 2)
    with pytest.raises(CheckpointError, match=r"not enough space: the new checkpoint takes \d+ bytes more in memory:"):
        reshard(source, target)
    assert unexplained(target) <= {"iter_0000005"} | {f"iter_0000005/{n}" for n in target.list("iter_0000005")}

    class Surprising(MemoryStorage):
        """Whose room is taken by somebody else meanwhile."""

        def free_space(self) -> None:
            return None

    target = Surprising(capacity_bytes=80_000)
    with pytest.raises(OSError, match="No space left"):
        reshard(source, target)
    assert list_commits(target) == []
    target._capacity_bytes = None
    written: list[int] = []
    assert reshard(source, target, on_bytes=written.append).is_resumed
    assert sum(written) < total
    check_whole(target)


class Held:
    """Holds the writer of one reshard after a number of steps, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self._left = steps
        write = PartWriter._write

        def write_or_wait(writer: PartWriter, *arguments: object) -> None:
            if threading.current_thread().name.startswith("held") or self._is_first(writer):
                self._left -= 1
                if self._left == 0:
                    self.reached.set()
                    assert self.go_on.wait(30)
            write(writer, *arguments)  # type: ignore[arg-type]

        self._first: PartWriter | None = None
        monkeypatch.setattr(PartWriter, "_write", write_or_wait)

    def _is_first(self, writer: PartWriter) -> bool:
        if self._first is None:
            self._first = writer
        return self._first is writer


@pytest.mark.parametrize("steps", range(1, 7))
@pytest.mark.parametrize("let_go", ["in the middle", "at the end"])
def test_of_two_reshards_at_once_one_ends_with_an_error(
    source: MemoryStorage, steps: int, let_go: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that was thought dead, and wakes, harms nothing of the other, which goes on with its very files."""
    held = Held(monkeypatch, steps)
    target = MemoryStorage()
    errors: list[BaseException] = []

    def first() -> None:
        try:
            reshard(source, target)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=first, name="first")
    thread.start()
    assert held.reached.wait(30)
    if let_go == "in the middle":
        waking = threading.Timer(0.02, held.go_on.set)
        waking.start()
    report = reshard(source, target)
    assert report.is_resumed
    held.go_on.set()
    thread.join(30)
    (error,) = errors
    assert isinstance(error, FencedError), error
    check_whole(target)
    assert reshard(source, target).is_there


class LateStorage(CrashingStorage):
    """Before the first call on a chunk table, somebody else does something; after it, the process dies."""

    def __init__(self, inner: Storage, interfere: Callable[[], object]) -> None:
        super().__init__(inner)
        self._interfere: Callable[[], object] | None = interfere

    def run(self, method: str, name: str, call: Callable[[], Result], half: Callable[[], None] | None = None) -> Result:
        if "chunks-" in name and self._interfere is not None:
            interfere, self._interfere = self._interfere, None
            interfere()
            super().run(method, name, call, half)
            raise Crash
        return super().run(method, name, call, half)


def test_late_commit_takes_nothing_from_that_of_another(source: MemoryStorage) -> None:
    target = MemoryStorage()
    with pytest.raises(Crash):
        reshard(source, LateStorage(target, lambda: reshard(source, target)))
    check_whole(target)
    assert is_none_or_whole(target.power_cut())


WHOLE_A = ReshardPlan(tensors=(TensorRule(match="a", partition=(None, None)),))


@pytest.mark.parametrize("options", [{"tp": 2}, {"drop": ["d"]}, {"plan": WHOLE_A}], ids=["tp", "drop", "plan"])
def test_other_options_go_on_with_nothing_of_a_reshard_that_was_cut_short(
    source: MemoryStorage, options: dict[str, Any]
) -> None:
    """It begins anew, and what the other had written goes."""
    target = MemoryStorage()
    with pytest.raises(Crash):
        reshard(source, CrashingStorage(target, fail_at=70, error=Crash()), tp=3)
    assert any("reshard-" in name for name in target.list("iter_0000005"))
    report = reshard(source, target, **options)
    assert not report.is_resumed
    direct = MemoryStorage()
    reshard(source, direct, **options)
    assert held_chunks(target) == held_chunks(direct)
    found = read_tensors(target)
    assert found.keys() == read_tensors(direct).keys()
    assert all(same_bits(found[key], whole(key)) for key in found)
    assert unexplained(target) == set()


def cut_short(source: MemoryStorage) -> tuple[MemoryStorage, str]:
    """A target, and the name of its journal."""
    target = MemoryStorage()
    with pytest.raises(Crash):
        reshard(source, CrashingStorage(target, fail_at=70, error=Crash()))
    (name,) = (name for name in target.list("iter_0000005") if name.startswith("reshard-"))
    return target, f"iter_0000005/{name}"


def broken(journal: Journal, what: str) -> Journal:
    """The same, with one thing in it that cannot be."""
    state = journal.outputs[0]
    states: dict[str, OutputState] = {
        "sums": replace(state, sums=state.sums + b"1234"),
        "is_whole": replace(state, is_whole=b""),
        "begun": replace(state, begun=((7, ()),)),
        "fragment": replace(state, begun=((0, (Fragment(1 << 20, 1, 0),)),)),
        "page": replace(state, pages=((1 << 40, 5, bytes(4096)),)),
        "page data": replace(state, pages=((0, 5, b"short"),)),
    }
    if what in states:
        return replace(journal, outputs=(states[what], *journal.outputs[1:]))
    return {
        "outputs": replace(journal, outputs=journal.outputs[1:]),
        "lot end": replace(journal, lots=(Lot(Position(0, 0), 9),)),
        "lot begin": replace(journal, lots=(Lot(Position(4, 0), 3),)),
        "element": replace(journal, lots=(Lot(Position(0, 1 << 50), 4),)),
    }[what]


BROKEN = ("sums", "is_whole", "begun", "fragment", "page", "page data", "outputs", "lot end", "lot begin", "element")


@pytest.mark.parametrize("what", BROKEN)
def test_journal_that_cannot_be_is_an_error_that_names_it(source: MemoryStorage, what: str) -> None:
    target, name = cut_short(source)
    target.replace(name, encode_record(broken(read_journal(target, name), what)))
    with pytest.raises(CorruptionError, match=name):
        reshard(source, target)
    assert list_commits(target) == []
    target.remove(name)  # As it says.
    assert not reshard(source, target).is_resumed
    check_whole(target)


@pytest.mark.parametrize("edit", [flip(40), lambda content: content.clear()], ids=["a bit", "nothing in it"])
def test_journal_that_is_damaged_counts_as_none(source: MemoryStorage, edit: Callable[[bytearray], object]) -> None:
    target, name = cut_short(source)
    change(target, name, edit)
    assert not reshard(source, target).is_resumed
    check_whole(target)


def test_two_that_begin_at_once_leave_one_checkpoint(source: MemoryStorage) -> None:
    for _ in range(10):
        target, outcomes = MemoryStorage(), []

        def run(target: Storage = target, outcomes: list[object] = outcomes) -> None:
            try:
                outcomes.append(reshard(source, target))
            except (CheckpointError, OSError) as error:
                outcomes.append(error)

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(outcomes) == 2
        assert reshard(source, target).iteration == 5
        assert is_none_or_whole(target)
