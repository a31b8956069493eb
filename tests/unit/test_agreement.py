"""What agree() promises, with threads as ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from distckpt.coordinator import (
    RankFailure,
    SingleProcess,
    TorchDistCoordinator,
    agree,
    default_coordinator,
    torch_dist,
)
from distckpt.errors import (
    CheckpointError,
    CorruptionError,
    DistributedError,
    FencedError,
    InvalidShardingError,
    MismatchError,
    UnsupportedTypeError,
)
from distckpt.testing import CoordinatorContract, ThreadCoordinator, run_ranks


class Message(msgspec.Struct):
    rank: int
    keys: list[str] = []


class Decision(msgspec.Struct):
    total: int
    blob: bytes = b""


class TestSingleProcess(CoordinatorContract):
    def run(self, check: Callable[[Any], None]) -> None:
        check(SingleProcess())


class TestThreadCoordinator(CoordinatorContract):
    def run(self, check: Callable[[Any], None]) -> None:
        run_ranks(3, check)


def total(messages: Sequence[Message]) -> list[Decision]:
    return [Decision(sum(one.rank for one in messages))] * len(messages)


def attempt(
    coordinator: Any,
    local: Callable[[], Any],
    decide: Callable[[Sequence[Any]], Sequence[Any]] = total,
    *,
    phase: str = "plan 1000",
    message: Any = Message,
    decision: Any = Decision,
    timeout_s: float = 20,
    committed_if_lost: Any = "no",
) -> Any:
    """agree(), returning what it raises."""
    try:
        return agree(
            coordinator,
            phase,
            local,
            decide,
            message=message,
            decision=decision,
            timeout_s=timeout_s,
            committed_if_lost=committed_if_lost,
        )
    except BaseException as error:
        return error


def raiser(error: BaseException) -> Callable[..., Any]:
    def raise_it(*_: Any, **__: Any) -> Any:
        raise error

    return raise_it


def assert_same_everywhere(errors: Sequence[DistributedError]) -> None:
    assert {type(error) for error in errors} == {DistributedError}, errors
    assert len({str(error) for error in errors}) == 1, errors
    assert all(error.failures == errors[0].failures for error in errors)
    assert len({error.committed for error in errors}) == 1, errors


def test_every_rank_gets_its_own_decision_of_all_messages() -> None:
    def decide(messages: Sequence[Message]) -> list[Decision]:
        assert [one.rank for one in messages] == [0, 1, 2]
        return [Decision(10 * one.rank, b"x" * one.rank) for one in messages]

    results = run_ranks(3, lambda c: attempt(c, lambda: Message(c.rank, ["k"]), decide))
    assert results == [Decision(0, b""), Decision(10, b"x"), Decision(20, b"xx")]


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (bytes, b"\0\xff"),
        (type(None), None),
        (None, None),
        (dict[str, int], {"a": 1}),
        (tuple[int, ...], (1, 2)),
    ],
)
def test_plain_types_travel(world_size: int, kind: Any, value: Any) -> None:
    results = run_ranks(world_size, lambda c: attempt(c, lambda: value, list, message=kind, decision=kind))
    assert results == [value] * world_size


def test_ranks_that_share_a_decision_share_a_payload() -> None:
    class Watched(SingleProcess):
        """Rank 0 of a group whose other ranks answer as it does."""

        world_size = 4  # type: ignore[assignment]

        def gather(self, tag: str, payload: bytes, *, timeout_s: float) -> list[bytes]:
            return [payload] * 4

        def scatter(self, tag: str, payloads: Sequence[bytes] | None, *, timeout_s: float) -> bytes:
            assert payloads is not None
            distinct.append(len({id(one) for one in payloads}))
            return payloads[0]

    distinct: list[int] = []
    a, b = Decision(1), Decision(2)
    assert attempt(Watched(), lambda: Message(0), lambda messages: [a, b, a, b]) == a
    assert distinct == [2, 1]


def test_local_error_on_some_ranks_is_the_same_error_on_all() -> None:
    original = {1: ValueError("no such key"), 2: OSError(28, "No space left on device", "shard-2")}
    decided = []

    def rank(c: ThreadCoordinator) -> Any:
        local = raiser(original[c.rank]) if c.rank in original else lambda: Message(c.rank)
        return attempt(c, local, lambda messages: decided.append(1) or total(messages), committed_if_lost="unknown")

    errors = run_ranks(4, rank)
    assert_same_everywhere(errors)
    assert errors[0].failures == {
        1: "ValueError: no such key",
        2: "OSError: [Errno 28] No space left on device: 'shard-2'",
    }
    assert "'plan 1000' failed on ranks 1, 2 of 4" in str(errors[0])
    assert errors[0].committed == "no"  # decide was not run
    assert not decided
    assert [error.__cause__ for error in errors] == [None, original[1], original[2], None]


def test_local_error_on_rank_0_is_chained_there() -> None:
    original = ValueError("boom")
    errors = run_ranks(2, lambda c: attempt(c, raiser(original) if c.rank == 0 else lambda: Message(1)))
    assert_same_everywhere(errors)
    assert [error.__cause__ for error in errors] == [original, None]


def test_checkpoint_error_of_local_names_its_rank() -> None:
    errors = run_ranks(
        2, lambda c: attempt(c, raiser(MismatchError("x", missing=("k",))) if c.rank else lambda: Message(0))
    )
    assert_same_everywhere(errors)
    assert errors[0].failures == {1: "MismatchError: x"}


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("interrupted", [0, 1])
def test_interrupt_in_local_is_reported_and_stays_an_interrupt(interrupt: BaseException, interrupted: int) -> None:
    results = run_ranks(
        3, lambda c: attempt(c, raiser(interrupt) if c.rank == interrupted else lambda: Message(c.rank))
    )
    assert results.pop(interrupted) is interrupt
    assert_same_everywhere(results)
    assert list(results[0].failures) == [interrupted]
    assert results[0].failures[interrupted].startswith(type(interrupt).__name__)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(3)])
def test_interrupt_in_decide_is_reported_and_stays_an_interrupt(interrupt: BaseException) -> None:
    results = run_ranks(3, lambda c: attempt(c, lambda: Message(c.rank), raiser(interrupt)))
    assert results.pop(0) is interrupt
    assert_same_everywhere(results)
    assert list(results[0].failures) == [0]


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("a"),
        InvalidShardingError("b"),
        UnsupportedTypeError("c"),
        CorruptionError("d"),
        FencedError("e"),
        MismatchError("f", missing=("a", "b"), unexpected=("c",), mismatched=("d",)),
        DistributedError("g", failures={5: "OSError: gone"}, committed="yes"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_checkpoint_error_of_decide_is_raised_as_itself(error: CheckpointError) -> None:
    results = run_ranks(3, lambda c: attempt(c, lambda: Message(c.rank), raiser(error)))
    assert results[0] is error
    for other in results[1:]:
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert vars(other) == vars(error)


def test_subclass_unknown_to_the_other_ranks_is_its_nearest_known_type_there() -> None:
    class HeaderCorruption(CorruptionError):
        def __init__(self, file: str, block: int) -> None:
            super().__init__(f"{file}, block {block}")

    results = run_ranks(2, lambda c: attempt(c, lambda: Message(c.rank), raiser(HeaderCorruption("f", 3))))
    assert [type(one) for one in results] == [HeaderCorruption, CorruptionError]
    assert str(results[1]) == "f, block 3"


def test_other_error_of_decide_names_rank_0() -> None:
    original = OSError(5, "Input/output error", "index-1.json")
    errors = run_ranks(3, lambda c: attempt(c, lambda: Message(c.rank), raiser(original), committed_if_lost="unknown"))
    assert_same_everywhere(errors)
    assert errors[0].failures == {0: "OSError: [Errno 5] Input/output error: 'index-1.json'"}
    assert errors[0].committed == "unknown"  # decide had begun
    assert "unknown whether the checkpoint was committed" in str(errors[0])
    assert errors[0].__cause__ is original


def test_wrong_number_of_decisions_is_an_error_everywhere() -> None:
    errors = run_ranks(3, lambda c: attempt(c, lambda: Message(c.rank), lambda messages: [Decision(1)]))
    assert_same_everywhere(errors)
    assert errors[0].failures == {0: "ValueError: decide made 1 decisions for 3 ranks"}


@pytest.mark.parametrize("bad", [Message("one"), object(), 2**70, b"raw"])  # type: ignore[arg-type]
def test_message_of_a_wrong_type_names_its_rank(bad: Any) -> None:
    errors = run_ranks(3, lambda c: attempt(c, lambda: bad if c.rank == 1 else Message(c.rank)))
    assert_same_everywhere(errors)
    assert list(errors[0].failures) == [1]
    assert errors[1].__cause__ is not None


def test_decision_of_a_wrong_type_is_an_error_everywhere() -> None:
    def decide(messages: Sequence[Message]) -> list[Any]:
        return [Decision(1), Decision("two"), Decision(3)]  # type: ignore[arg-type]

    errors = run_ranks(3, lambda c: attempt(c, lambda: Message(c.rank), decide))
    assert_same_everywhere(errors)
    assert list(errors[0].failures) == [1]


def test_text_that_is_not_unicode_travels() -> None:
    name = os.fsdecode(b"shard-\xff")
    errors = run_ranks(2, lambda c: attempt(c, raiser(OSError(2, "No such file", name))))
    assert_same_everywhere(errors)
    assert r"shard-\udcff" in str(errors[0])
    mismatch = MismatchError(name, missing=(name,))
    assert isinstance(run_ranks(2, lambda c: attempt(c, lambda: Message(1), raiser(mismatch)))[1], MismatchError)


def test_thousands_of_failures_are_all_in_failures_and_some_in_the_text() -> None:
    errors = run_ranks(40, lambda c: attempt(c, raiser(ValueError("x" * 100_000))))
    assert_same_everywhere(errors)
    assert list(errors[0].failures) == list(range(40))
    assert len(str(errors[0])) < 100_000
    assert "and 24 more" in str(errors[0])


def test_ranks_in_different_phases_are_told_who_is_where() -> None:
    errors = run_ranks(
        4, lambda c: attempt(c, lambda: Message(c.rank), phase="save 2000" if c.rank == 2 else "load 1000")
    )
    assert_same_everywhere(errors)
    assert "ranks 0, 1, 3 in 'load 1000'; rank 2 in 'save 2000'" in str(errors[0])
    assert errors[0].failures == {2: "is in phase 'save 2000', rank 0 in 'load 1000'"}


def test_silent_rank_is_named_on_every_other_rank() -> None:
    over = threading.Event()

    def rank(c: ThreadCoordinator) -> Any:
        if c.rank == 1:
            over.wait(20)
            return None
        result = attempt(c, lambda: Message(c.rank), timeout_s=1)
        if c.rank == 0:
            over.set()
        return result

    errors = run_ranks(4, rank)
    del errors[1]
    assert_same_everywhere(errors)
    assert errors[0].failures == {1: "no answer to 'plan 1000' within 1 s"}
    assert isinstance(errors[0].__cause__, RankFailure)
    assert errors[0].committed == "no"


def test_rank_that_comes_late_raises_what_the_others_raised() -> None:
    given_up = threading.Event()

    def rank(c: ThreadCoordinator) -> Any:
        if c.rank == 1:
            assert given_up.wait(20)
        first = attempt(c, lambda: Message(c.rank), timeout_s=1)
        given_up.set()
        return first, attempt(c, lambda: Message(c.rank), phase="plan 2000")

    results = run_ranks(3, rank)
    assert_same_everywhere([first for first, _ in results])
    assert [second for _, second in results] == [Decision(3)] * 3


@pytest.mark.parametrize("committed", ["no", "unknown"])
def test_lost_rank_0_is_named_and_the_commit_is_what_the_caller_says(committed: Any) -> None:
    def rank(c: ThreadCoordinator) -> Any:
        if c.rank == 0:
            return None
        return attempt(c, lambda: Message(c.rank), timeout_s=0.2, committed_if_lost=committed)

    errors = run_ranks(3, rank)[1:]
    assert_same_everywhere(errors)
    assert list(errors[0].failures) == [0]
    assert errors[0].committed == committed


def test_rank_0_that_was_given_up_raises_too() -> None:
    """It had all messages, and decided; nobody waited for it."""
    given_up = threading.Barrier(3)

    def decide(messages: Sequence[Message]) -> list[Decision]:
        given_up.wait(20)
        return total(messages)

    def rank(c: ThreadCoordinator) -> Any:
        result = attempt(c, lambda: Message(c.rank), decide, timeout_s=1, committed_if_lost="unknown")
        if c.rank != 0:
            given_up.wait(20)
        return result, attempt(c, lambda: Message(c.rank), phase="plan 2000")

    results = run_ranks(3, rank)
    firsts = [first for first, _ in results]
    assert {type(first) for first in firsts} == {DistributedError}
    assert set(firsts[0].failures) == {1, 2}
    assert set(firsts[1].failures) == set(firsts[2].failures) == {0}
    assert {first.committed for first in firsts} == {"unknown"}


def test_rank_that_dies_before_it_has_its_decision_fails_all() -> None:
    class Dying(Exception):
        pass

    def rank(c: ThreadCoordinator) -> Any:
        if c.rank == 2:
            c.scatter = raiser(Dying())  # type: ignore[method-assign]
        return attempt(c, lambda: Message(c.rank), timeout_s=5, committed_if_lost="unknown")

    errors = run_ranks(3, rank)
    assert_same_everywhere(errors[:2])
    assert list(errors[0].failures) == [2]
    assert errors[0].committed == "unknown"
    assert isinstance(errors[2], DistributedError)
    assert isinstance(errors[2].__cause__, Dying)


def test_rank_0_held_up_after_handing_out_gives_up_everywhere() -> None:
    """The others may have given it up already: whoever has not learns that it is void."""

    def rank(c: ThreadCoordinator) -> Any:
        if c.rank == 0:
            scatter = c.scatter

            def slow(tag: str, payloads: Sequence[bytes] | None, *, timeout_s: float) -> bytes:
                result = scatter(tag, payloads, timeout_s=timeout_s)
                if not tag.endswith("/taken"):
                    time.sleep(1.6)
                return result

            c.scatter = slow  # type: ignore[method-assign]
        return attempt(c, lambda: Message(c.rank), timeout_s=1 if c.rank == 0 else 20)

    errors = run_ranks(3, rank)
    assert_same_everywhere(errors)
    assert errors[0].failures[0].startswith("TimeoutError: was held up")


def test_failing_rounds_do_not_disturb_later_ones() -> None:
    def rank(c: ThreadCoordinator) -> list[Any]:
        results = []
        for number in range(30):
            fails = number % 3 == 1 and c.rank == number % 4
            local = raiser(ValueError("x")) if fails else lambda: Message(c.rank)
            decide = raiser(FencedError("y")) if number % 3 == 2 else total
            results.append(attempt(c, local, decide, phase=f"plan {number}"))
        return [type(one) for one in results]

    assert run_ranks(4, rank) == [[Decision, DistributedError, FencedError] * 10] * 4


class TestOneProcess:
    def test_errors_of_local_are_themselves(self) -> None:
        error = ValueError("x")
        assert attempt(SingleProcess(), raiser(error)) is error

    def test_errors_of_decide_are_themselves(self) -> None:
        error = OSError(5, "x")
        assert attempt(SingleProcess(), lambda: Message(0), raiser(error)) is error

    def test_wrong_types_are_found(self) -> None:
        wrong = attempt(SingleProcess(), lambda: Message("one"))  # type: ignore[arg-type]
        assert isinstance(wrong, msgspec.ValidationError)
        wrong = attempt(SingleProcess(), lambda: Message(0), lambda messages: [Decision("x")])  # type: ignore[arg-type]
        assert isinstance(wrong, msgspec.ValidationError)
        wrong = attempt(SingleProcess(), lambda: Message(0), lambda messages: [])
        assert isinstance(wrong, ValueError)


class TestRunRanks:
    def test_first_error_is_raised_and_the_others_are_notes(self) -> None:
        failed = threading.Event()

        def rank(c: ThreadCoordinator) -> None:
            if c.rank == 2:
                failed.set()
                raise ValueError("first")
            failed.wait(20)
            c.gather("x", b"", timeout_s=20)
            c.scatter("x", [b""] * 3 if c.rank == 0 else None, timeout_s=20)

        with pytest.raises(ValueError, match="first") as caught:
            run_ranks(3, rank)
        notes = caught.value.__notes__
        assert notes[0] == "raised on rank 2"
        assert any("also raised on rank 0: RankFailure" in note for note in notes)

    def test_rank_that_hangs_is_shown(self) -> None:
        release = threading.Event()
        with pytest.raises(TimeoutError, match=r"rank 1:\n(.|\n)*release\.wait") as caught:
            run_ranks(2, lambda c: release.wait(20) if c.rank == 1 else None, timeout_s=0.2)
        release.set()
        assert "rank 0:" not in str(caught.value)


class TestDefaultCoordinator:
    @pytest.fixture(autouse=True)
    def _no_launcher(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)

    def test_plain_process_is_alone(self) -> None:
        assert isinstance(default_coordinator(), SingleProcess)

    def test_mpirun_of_one_process_is_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
        assert isinstance(default_coordinator(), SingleProcess)

    @pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
    def test_mpirun_without_mpi4py_is_refused(self, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
        monkeypatch.setenv(variable, "2")
        monkeypatch.setitem(sys.modules, "mpi4py", None)
        with pytest.raises(CheckpointError, match=rf"{variable}=2.*mpi4py.*install distckpt\[mpi\]"):
            default_coordinator()

    def test_torchrun_job_without_torch_distributed_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "4")
        with pytest.raises(CheckpointError, match=r"WORLD_SIZE=4.*init_process_group"):
            default_coordinator()

    def test_torch_coordinator_without_torch_distributed_is_refused(self) -> None:
        with pytest.raises(CheckpointError, match="init_process_group"):
            TorchDistCoordinator()


class TestOwnHost:
    def test_master_addr_that_is_this_host_is_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        assert torch_dist._own_host() == "localhost"

    def test_master_addr_elsewhere_gives_the_local_address_that_routes_there(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MASTER_ADDR", "203.0.113.7")  # reserved for documentation: nobody has it
        assert torch_dist._is_local(torch_dist._own_host())

    def test_without_master_addr_it_is_a_name_that_resolves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MASTER_ADDR", raising=False)
        assert torch_dist._is_local(torch_dist._own_host())


def test_import_imports_neither_torch_nor_mpi() -> None:
    code = "import sys, distckpt.coordinator; print({'torch', 'mpi4py', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stdout
