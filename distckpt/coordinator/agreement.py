"""agree(): every rank leaves with its decision, or every rank leaves with an error.

It decides what counts as a failure and what each rank raises. It never knows what is being agreed, and moves
bytes only through the Coordinator port.

An agreement is two exchanges, each a gather to rank 0 and a scatter from it:

1. Every rank reports the result of `local`, or its error; rank 0 runs `decide` and hands out the decisions.
   On any failure it hands out the error instead, and that is the end.
2. Every rank reports that it holds its decision, and rank 0 hands out that all do.

The second exchange is what makes the first binding: without it a rank that was stopped while it waited would
wake up with a decision that the others have long given up, or they would act on one that it never saw. What
is left is a rank 0 that is stopped between its last look at the clock and its last message.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar, cast

import msgspec

from distckpt import errors
from distckpt.coordinator.port import Coordinator, RankFailure
from distckpt.decoding import decode_msgpack
from distckpt.errors import CheckpointError, CheckpointNotFoundError, Committed, DistributedError, MismatchError
from distckpt.utf8_text import utf8_text

M = TypeVar("M")
D = TypeVar("D")

_NOTHING = msgspec.Raw(b"\xc0")  # msgpack nil
_LISTED = 16  # failed ranks that a message spells out; `failures` has all of them
_DESCRIPTION_CHARS = 4000


class _Report(msgspec.Struct, array_like=True, frozen=True):
    """From every rank to rank 0."""

    phase: str
    failure: str | None
    body: msgspec.Raw


class _Error(msgspec.Struct, array_like=True, frozen=True):
    """A CheckpointError on its way to the other ranks."""

    kind: str
    message: str
    failures: dict[int, str] = {}
    committed: Committed = "no"
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()


class _Verdict(msgspec.Struct, array_like=True, frozen=True):
    """From rank 0 to every rank."""

    error: _Error | None
    body: msgspec.Raw


def agree(
    coordinator: Coordinator,
    phase: str,
    local: Callable[[], M],
    decide: Callable[[Sequence[M]], Sequence[D]],
    *,
    message: type[M],
    decision: type[D],
    timeout_s: float,
    committed_if_lost: Committed = "no",
) -> D:
    """Run `local` on every rank and `decide`, on all their results, on rank 0; return this rank's decision.

    All ranks call it with the same phase, in the same order; the phase names the save or load that it belongs
    to, so that ranks which lost each other cannot be mistaken for being in step. `decide` gets the results by
    rank and returns one decision per rank; ranks that get the same object share one message. Results and
    decisions travel as msgpack: `message` and `decision` are msgspec.Struct types or plain types.

    Raises on every rank that lives:
    * DistributedError, the same everywhere, when `local` raised on some ranks (`decide` is not run), when
      ranks are silent for `timeout_s` seconds, or when they are in different phases. Where `local` raised,
      its error is the cause; a KeyboardInterrupt or SystemExit is raised there as itself.
    * The CheckpointError that `decide` raised. Any other error of it is a DistributedError naming rank 0.
    * DistributedError naming rank 0, when that is silent for twice `timeout_s` or gone.

    `committed` of these errors is "no" until `decide` has begun, then `committed_if_lost`. In a group of one
    rank errors are raised as themselves.
    """
    matter = _Matter(local, decide, message, decision, timeout_s)
    if coordinator.world_size == 1:
        return _decode(matter.settle([matter.report()])[0], decision)
    first = _Exchange(coordinator, phase, timeout_s, "no", committed_if_lost)
    body = first.run(matter.report, matter.settle)
    second = _Exchange(coordinator, f"{phase}/taken", timeout_s, committed_if_lost, committed_if_lost)
    second.run(partial(matter.take, body), matter.confirm)
    return matter.taken


class _Matter(Generic[M, D]):
    """What is agreed: the two parts of every rank, and the two of rank 0."""

    taken: D

    def __init__(
        self,
        local: Callable[[], M],
        decide: Callable[[Sequence[M]], Sequence[D]],
        message: type[M],
        decision: type[D],
        timeout_s: float,
    ) -> None:
        self._local, self._decide = local, decide
        self._message, self._decision = message, decision
        self._timeout_s = timeout_s
        self._decided_at = 0.0

    def report(self) -> msgspec.Raw:
        body = _encode_raw(self._local())
        _decode(body, self._message)  # here, and not only on rank 0: a wrong type is an error of this rank
        return body

    def settle(self, bodies: Sequence[msgspec.Raw]) -> list[msgspec.Raw]:
        decisions = self._decide([_decode(body, self._message) for body in bodies])
        if len(decisions) != len(bodies):
            raise ValueError(f"decide made {len(decisions)} decisions for {len(bodies)} ranks")
        answers = _once_each(_encode_raw, decisions)
        self._decided_at = time.monotonic()
        return answers

    def take(self, body: msgspec.Raw) -> msgspec.Raw:
        self.taken = _decode(body, self._decision)
        return _NOTHING

    def confirm(self, bodies: Sequence[msgspec.Raw]) -> list[msgspec.Raw]:
        # The others wait twice timeout_s for this answer: a rank 0 that was stopped meanwhile has lost them.
        held_up_s = time.monotonic() - self._decided_at
        if held_up_s > 1.5 * self._timeout_s:
            raise TimeoutError(f"was held up for {held_up_s:.1f} s; the other ranks do not wait that long")
        return [_NOTHING] * len(bodies)


@dataclass(frozen=True, slots=True)
class _Exchange:
    """One gather and one scatter, after which every rank has its answer or raises the same error.

    before, after: what an error says of the commit when it struck before or after `settle` began.
    """

    coordinator: Coordinator
    phase: str
    timeout_s: float
    before: Committed
    after: Committed

    def run(
        self,
        attempt: Callable[[], msgspec.Raw],
        settle: Callable[[Sequence[msgspec.Raw]], Sequence[msgspec.Raw]],
    ) -> msgspec.Raw:
        own: BaseException | None = None
        try:
            report = _Report(self.phase, None, attempt())
        except BaseException as error:  # an interrupted rank must not leave the others waiting
            own = error
            report = _Report(self.phase, _describe(error), _NOTHING)
        outcome = self._lead(report, settle) if self.coordinator.rank == 0 else self._follow(report)
        if own is not None and not isinstance(own, Exception):
            raise own
        if isinstance(outcome, BaseException):
            if own is not None:
                outcome.__cause__ = own
            raise outcome
        return outcome

    def _lead(
        self, report: _Report, settle: Callable[[Sequence[msgspec.Raw]], Sequence[msgspec.Raw]]
    ) -> msgspec.Raw | BaseException:
        """Rank 0's part: collect, settle, hand out. Returns what rank 0 itself returns or raises."""
        error: BaseException | None = None
        try:
            answers = self._settle(report, settle)
            payloads = _once_each(_encode_answer, answers)
        except CheckpointError as known:
            error = shown = known
        except Exception as unexpected:
            error = shown = self._failed({0: _describe(unexpected)}, self.after)
            error.__cause__ = unexpected
        except BaseException as interrupt:
            error, shown = interrupt, self._failed({0: _describe(interrupt)}, self.after)
        if error is not None:
            payloads = [_encode(_Verdict(_freeze(shown), _NOTHING))] * self.coordinator.world_size
        try:
            self.coordinator.scatter(self.phase, payloads, timeout_s=self.timeout_s)
        except Exception as lost:
            failures = lost.failures if isinstance(lost, RankFailure) else {0: _describe(lost)}
            if error is None:
                error = self._failed(failures, self.after)
                error.__cause__ = lost
        return answers[0] if error is None else error

    def _settle(
        self, report: _Report, settle: Callable[[Sequence[msgspec.Raw]], Sequence[msgspec.Raw]]
    ) -> Sequence[msgspec.Raw]:
        try:
            gathered = self.coordinator.gather(self.phase, _encode(report), timeout_s=self.timeout_s)
        except RankFailure as lost:
            raise self._failed(lost.failures, self.before) from lost
        if gathered is None:
            raise RuntimeError(f"{type(self.coordinator).__name__}.gather gave rank 0 nothing")
        reports = [_decode(one, _Report) for one in gathered]
        self._check_phases(reports)
        failures = {rank: one.failure for rank, one in enumerate(reports) if one.failure is not None}
        if failures:
            raise self._failed(failures, self.before)
        return settle([one.body for one in reports])

    def _follow(self, report: _Report) -> msgspec.Raw | BaseException:
        """The part of every other rank. Rank 0 may be collecting for timeout_s, so it is given twice that."""
        error: BaseException
        try:
            self.coordinator.gather(self.phase, _encode(report), timeout_s=self.timeout_s)
            payload = self.coordinator.scatter(self.phase, None, timeout_s=2 * self.timeout_s)
            verdict = _decode(payload, _Verdict)
        except RankFailure as lost:
            error = self._failed(lost.failures, self.after)
            error.__cause__ = lost
            return error
        except Exception as broken:
            error = self._failed({self.coordinator.rank: _describe(broken)}, self.after)
            error.__cause__ = broken
            return error
        return verdict.body if verdict.error is None else _thaw(verdict.error)

    def _check_phases(self, reports: Sequence[_Report]) -> None:
        ranks_by_phase: dict[str, list[int]] = {}
        for rank, report in enumerate(reports):
            ranks_by_phase.setdefault(report.phase, []).append(rank)
        if len(ranks_by_phase) == 1:
            return
        where = "; ".join(f"{_name_ranks(ranks)} in {phase!r}" for phase, ranks in ranks_by_phase.items())
        failures = {
            rank: f"is in phase {report.phase!r}, rank 0 in {self.phase!r}"
            for rank, report in enumerate(reports)
            if report.phase != self.phase
        }
        raise DistributedError(
            f"the ranks are in different phases: {where}. All must make the same calls in the same order",
            failures=failures,
            committed=self.before,
        )

    def _failed(self, failures: Mapping[int, str], committed: Committed) -> DistributedError:
        ranks = sorted(failures)
        of = f"of {self.coordinator.world_size}"
        if len(ranks) == 1:
            text = f"{self.phase!r} failed on rank {ranks[0]} {of}: {failures[ranks[0]]}"
        else:
            lines = [f"\n  rank {rank}: {failures[rank]}" for rank in ranks[:_LISTED]]
            if len(ranks) > _LISTED:
                lines.append(f"\n  and {len(ranks) - _LISTED} more")
            text = f"{self.phase!r} failed on {_name_ranks(ranks)} {of}:" + "".join(lines)
        if committed == "unknown":
            text += "\nIt is unknown whether the checkpoint was committed."
        return DistributedError(text, failures=failures, committed=committed)


def _once_each(function: Callable[[M], D], values: Sequence[M]) -> list[D]:
    """[function(v) for v in values], called once per object: equal ones (`is`) stay so, and travel once."""
    results = {id(one): function(one) for one in {id(one): one for one in values}.values()}
    return [results[id(one)] for one in values]


def _encode(value: object) -> bytes:
    return msgspec.msgpack.encode(value)


def _encode_raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(value))


def _encode_answer(answer: msgspec.Raw) -> bytes:
    return _encode(_Verdict(None, answer))


def _decode(body: bytes | msgspec.Raw, kind: type[M]) -> M:
    return decode_msgpack(body, kind)


def _name_ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:_LISTED]))
    return f"ranks {shown}" + (f" and {len(ranks) - _LISTED} more" if len(ranks) > _LISTED else "")


def _describe(error: BaseException) -> str:
    return utf8_text(f"{type(error).__name__}: {error}"[:_DESCRIPTION_CHARS])


def _freeze(error: CheckpointError) -> _Error:
    # The nearest type of distckpt.errors: a subclass from elsewhere may take other arguments.
    kind = next(cls.__name__ for cls in type(error).__mro__ if vars(errors).get(cls.__name__) is cls)
    text = utf8_text(str(error))
    if isinstance(error, DistributedError):
        failures = {rank: utf8_text(why) for rank, why in error.failures.items()}
        return _Error(kind, text, failures=failures, committed=error.committed)
    if isinstance(error, MismatchError):
        keys = (error.missing, error.unexpected, error.mismatched)
        missing, unexpected, mismatched = (tuple(map(utf8_text, some)) for some in keys)
        return _Error(kind, text, missing=missing, unexpected=unexpected, mismatched=mismatched)
    if isinstance(error, CheckpointNotFoundError):
        return _Error(kind, text, candidates=tuple(map(utf8_text, error.candidates)))
    return _Error(kind, text)


def _thaw(frozen: _Error) -> CheckpointError:
    cls = cast("type[CheckpointError]", getattr(errors, frozen.kind))
    if issubclass(cls, DistributedError):
        return cls(frozen.message, failures=frozen.failures, committed=frozen.committed)
    if issubclass(cls, MismatchError):
        keys = {name: getattr(frozen, name) for name in ("missing", "unexpected", "mismatched")}
        return cls(frozen.message, **keys)
    if issubclass(cls, CheckpointNotFoundError):
        return cls(frozen.message, candidates=frozen.candidates)
    return cls(frozen.message)
