"""What the Coordinator port promises, as tests. A backend subclasses CoordinatorContract and gives `run`.

A check is a function of one rank's coordinator that is called on all ranks at once; it asserts what that rank
must see. A world of one process passes them all; three ranks or more make them mean something.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from distckpt.coordinator.agreement import agree
from distckpt.coordinator.port import Coordinator, RankFailure
from distckpt.errors import DistributedError

LARGE_BYTES = 20 << 20
ROUNDS = 300
_TIMEOUT_S = 30.0


def check_payloads_come_back_in_rank_order(coordinator: Coordinator) -> None:
    gathered = coordinator.gather("who", b"from %d" % coordinator.rank, timeout_s=_TIMEOUT_S)
    if coordinator.rank == 0:
        assert gathered is not None
        assert list(gathered) == [b"from %d" % rank for rank in range(coordinator.world_size)]
        payloads = [b"to %d" % rank for rank in range(coordinator.world_size)]
    else:
        assert gathered is None
        payloads = None
    assert coordinator.scatter("who", payloads, timeout_s=_TIMEOUT_S) == b"to %d" % coordinator.rank


def check_calls_may_come_in_any_order(coordinator: Coordinator) -> None:
    """Several gathers, several scatters, the same tag again."""
    for first, second in ((b"a", b"b"), (b"c", b"d")):
        _check_scatter(coordinator, first)
        _check_scatter(coordinator, second)
        _check_gather(coordinator, first)
        _check_gather(coordinator, second)


def check_empty_payloads(coordinator: Coordinator) -> None:
    _check_gather(coordinator, b"")
    _check_scatter(coordinator, b"")


def check_large_payloads(coordinator: Coordinator) -> None:
    rank, world_size = coordinator.rank, coordinator.world_size
    gathered = coordinator.gather("large", bytes([rank]) * LARGE_BYTES, timeout_s=_TIMEOUT_S)
    if gathered is not None:
        ends = [(len(one), one[0], one[-1]) for one in gathered]
        assert ends == [(LARGE_BYTES, r, r) for r in range(world_size)]
    same = [bytes([7]) * LARGE_BYTES] * world_size if rank == 0 else None
    assert coordinator.scatter("same", same, timeout_s=_TIMEOUT_S) == bytes([7]) * LARGE_BYTES
    sizes = [LARGE_BYTES - r for r in range(world_size)]
    different = [bytes([r]) * sizes[r] for r in range(world_size)] if rank == 0 else None
    assert coordinator.scatter("different", different, timeout_s=_TIMEOUT_S) == bytes([rank]) * sizes[rank]
    _check_gather(coordinator, b"after")


def check_many_rounds(coordinator: Coordinator) -> None:
    for number in range(ROUNDS):
        _check_gather(coordinator, b"%d" % number)
        _check_scatter(coordinator, b"%d" % number)


def check_silent_rank_is_named_and_may_come_back(coordinator: Coordinator) -> None:
    """The last rank comes to a gather when rank 0 has given it up: named, and late for nothing else."""
    world_size, last = coordinator.world_size, coordinator.world_size - 1
    if world_size == 1:
        return
    for bound_s in (
        0.2,
        0.4,
        0.8,
        1.6,
        3.2,
    ):  # on a busy machine it may not be late enough, or another one too
        _check_gather(coordinator, b"all here")
        result = None
        if coordinator.rank == last:
            time.sleep(3 * bound_s)
        try:
            coordinator.gather("missing", b"", timeout_s=bound_s if coordinator.rank == 0 else _TIMEOUT_S)
        except RankFailure as failure:
            result = [b"done" if set(failure.failures) == {last} else b"again"] * world_size
        else:
            result = [b"again"] * world_size if coordinator.rank == 0 else None
        result_here = coordinator.scatter("result", result, timeout_s=_TIMEOUT_S)
        _check_gather(coordinator, b"all here again")
        _check_scatter(coordinator, b"all here again")
        if result_here == b"done":
            return
    raise AssertionError("a gather without the last rank did not fail naming it")


def check_silent_rank_0_is_named(coordinator: Coordinator) -> None:
    """Rank 0 does not scatter; the others learn it within the bound, and all meet in the next round."""
    _check_gather(coordinator, b"all here")
    if coordinator.rank != 0:
        with pytest.raises(RankFailure) as caught:
            coordinator.scatter("missing", None, timeout_s=0.3)
        assert set(caught.value.failures) == {0}
    _check_gather(coordinator, b"next")
    _check_scatter(coordinator, b"next")


def check_works_in_a_background_thread(coordinator: Coordinator) -> None:
    errors: list[BaseException] = []

    def background() -> None:
        try:
            _check_gather(coordinator, b"background")
            _check_scatter(coordinator, b"background")
        except BaseException as error:
            errors.append(error)

    for _ in range(3):
        thread = threading.Thread(target=background)
        thread.start()
        thread.join()
        _check_gather(coordinator, b"foreground")
    if errors:
        raise errors[0]


def check_agree(coordinator: Coordinator) -> None:
    rank, world_size = coordinator.rank, coordinator.world_size
    for shift in range(3):
        decision = agree(
            coordinator,
            f"phase {shift}",
            lambda shift=shift: rank + shift,  # type: ignore[misc]
            lambda messages: [f"{rank} of {sum(messages)}" for rank in range(len(messages))],
            message=int,
            decision=str,
            timeout_s=_TIMEOUT_S,
        )
        assert decision == f"{rank} of {sum(range(world_size)) + shift * world_size}"


def check_agree_raises_the_same_everywhere(coordinator: Coordinator) -> None:
    failing = coordinator.world_size - 1

    def local() -> None:
        if coordinator.rank == failing:
            raise ValueError("disk is on fire")

    for _ in range(2):
        with pytest.raises((DistributedError, ValueError)) as caught:
            agree(
                coordinator,
                "write",
                local,
                lambda messages: [None] * len(messages),
                message=type(None),
                decision=type(None),
                timeout_s=_TIMEOUT_S,
            )
        if isinstance(caught.value, DistributedError):
            why = "ValueError: disk is on fire"
            assert caught.value.failures == {failing: why}
            assert str(caught.value) == f"'write' failed on rank {failing} of {failing + 1}: {why}"
        else:
            assert coordinator.world_size == 1


def check_close_twice(coordinator: Coordinator) -> None:
    _check_gather(coordinator, b"x")
    _check_scatter(coordinator, b"x")
    coordinator.close()
    coordinator.close()


def _check_gather(coordinator: Coordinator, payload: bytes) -> None:
    gathered = coordinator.gather("gather", payload, timeout_s=_TIMEOUT_S)
    assert gathered is None if coordinator.rank else list(gathered or ()) == [payload] * coordinator.world_size


def _check_scatter(coordinator: Coordinator, payload: bytes) -> None:
    payloads = None if coordinator.rank else [payload] * coordinator.world_size
    assert coordinator.scatter("scatter", payloads, timeout_s=_TIMEOUT_S) == payload


class CoordinatorContract:
    """Subclass it and define `run`; then pytest runs every check on the backend."""

    def run(self, check: Callable[[Coordinator], None]) -> None:
        """Call `check` on every rank of a new group; raise when it raised on any."""
        raise NotImplementedError

    def test_payloads_come_back_in_rank_order(self) -> None:
        self.run(check_payloads_come_back_in_rank_order)

    def test_calls_may_come_in_any_order(self) -> None:
        self.run(check_calls_may_come_in_any_order)

    def test_empty_payloads(self) -> None:
        self.run(check_empty_payloads)

    def test_large_payloads(self) -> None:
        self.run(check_large_payloads)

    def test_many_rounds(self) -> None:
        self.run(check_many_rounds)

    def test_silent_rank_is_named_and_may_come_back(self) -> None:
        self.run(check_silent_rank_is_named_and_may_come_back)

    def test_silent_rank_0_is_named(self) -> None:
        self.run(check_silent_rank_0_is_named)

    def test_works_in_a_background_thread(self) -> None:
        self.run(check_works_in_a_background_thread)

    def test_agree(self) -> None:
        self.run(check_agree)

    def test_agree_raises_the_same_everywhere(self) -> None:
        self.run(check_agree_raises_the_same_everywhere)

    def test_close_twice(self) -> None:
        self.run(check_close_twice)
