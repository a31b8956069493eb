"""One load: resolve -> match -> read -> apply, each agreed by all ranks before the next. Holds the order of things.

A checkpoint that is damaged for any rank is passed over by all of them; every target is then filled anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeAlias, TypeVar

import msgspec
import numpy as np

from distckpt.adapters import ADAPTERS
from distckpt.applying import apply_request
from distckpt.candidates import Candidate, copies_of, find_candidates, newer_work
from distckpt.checkpoint_files import check_files_hold, is_damage
from distckpt.commit import Commit, decode_index_of, read_index, tracker_warning
from distckpt.contents import Contents
from distckpt.coordinator import Coordinator, agree
from distckpt.errors import CheckpointError, CorruptionError, MismatchError
from distckpt.filling import DeviceOf, fill_targets, make_modules_real, read_values, targets_of
from distckpt.host import peak_rss_bytes
from distckpt.host_group import Board, Host, HostGroup, PeerFailed, group_ranks, this_host
from distckpt.index import Index, Mesh
from distckpt.matching import (
    Request,
    match_state,
    mismatch_error,
    named_keys,
    select_keys,
    stored_keys,
    subtree,
    what_was_changed,
)
from distckpt.repairing import rebuild_damaged
from distckpt.report import LoadReport, slowest_ranks
from distckpt.selecting import parse_selector, select_commits, select_one, selector_text
from distckpt.shared_reading import row_bytes
from distckpt.state_dict import FlatState, flatten
from distckpt.storage import Storage
from distckpt.transport import Transports, peak_device_bytes

logger = logging.getLogger("distckpt")
M = TypeVar("M")
D = TypeVar("D")
State: TypeAlias = dict[str, object]


class _Wanted(msgspec.Struct, frozen=True):
    """What a rank was called with; all must have been called alike."""

    iteration: int | str | None
    strict: bool
    convert_dtypes: bool
    allow: list[str]


class _ReadOutcome(msgspec.Struct, frozen=True):
    """Why a checkpoint could not be read, or None. is_echo: because another rank could not, which says so itself."""

    why: str | None
    is_echo: bool = False


class _Resolved(msgspec.Struct, frozen=True):
    """The checkpoint that all ranks are to load: its commit, in which of the roots, and the bytes of its index."""

    epoch: int
    commit_seq: int
    iteration: int
    root: int
    index: bytes
    fell_back_from: dict[int, str]
    warning: str | None

    @property
    def candidate(self) -> Candidate:
        return Candidate(Commit(self.epoch, self.commit_seq, self.iteration), self.root)


class _Match(msgspec.Struct, frozen=True):
    """A rank's message: what it asks for that is not there, and bitmaps over the sorted stored keys.

    asked: those it takes; named: those below a container of its state. refused: why no state could be made for them.
    """

    missing: list[str]
    mismatched: dict[str, str]
    asked: bytes
    named: bytes
    host: Host
    refused: str | None = None


class _Differences(msgspec.Struct, frozen=True):
    """The decision: what the ranks' states and the checkpoint do not share, and who reads together with this rank."""

    missing: list[str]
    unexpected: list[str]
    group: HostGroup


class _Applied(msgspec.Struct, frozen=True):
    """A rank's message: how long it took, and how much memory. slowest: the decision's, as of LoadReport."""

    seconds: dict[str, float]
    peak_rss_bytes: int
    device_bytes: int
    slowest: dict[str, tuple[int, float]] = {}


class _Selection(msgspec.Struct, frozen=True):
    """A rank's message: the keys that it asks for and that are not there."""

    missing: list[str]
    host: Host


@dataclass(slots=True)
class LoadContext:
    """What a load works with. storages: the roots, the nearest first."""

    storages: Sequence[Storage]
    coordinator: Coordinator
    mesh: Mesh
    timeout_s: float
    transports: Transports


@dataclass(slots=True)
class Load:
    """One load under way. run() once, on every rank.

    template: the state to fill, or what makes one for the checkpoint that was found. device: where tensors on the meta
    device are made; or that by path, of which the longest that leads to a tensor counts.
    """

    context: LoadContext
    template: State | Callable[[Contents], State]
    iteration: int | str | None
    strict: bool
    device: DeviceOf
    label: str
    convert_dtypes: bool = False
    allow: Sequence[str] = ()
    unseen: BaseException | None = None  # of an earlier save: raised everywhere if any rank has not seen it
    state: State = field(default_factory=dict)
    leaves_newer: bool = False  # rank 0's: whether something in the first root was saved later than what is loaded
    _flat: FlatState = field(default_factory=FlatState)
    _request: Request = field(default_factory=Request)
    _failed: dict[Candidate, str] = field(default_factory=dict)
    _decoded: Index | None = None  # rank 0's, which has decoded it to see whether it is sound
    _group: HostGroup = field(default_factory=HostGroup.alone)
    _not_shared: str | None = None
    _bytes_read: int = 0
    _size_bytes: int = 0
    _warning: str | None = None  # of this rank alone
    _mended: set[Candidate] = field(default_factory=set)  # of which it was tried
    _rebuilt: list[str] = field(default_factory=list)
    _seconds: dict[str, float] = field(default_factory=dict)  # by phase, of this rank without waiting for others

    def run(self) -> tuple[LoadReport, Index]:
        """Fill the state. Raises, the same on all ranks: CheckpointNotFoundError, MismatchError (nothing has been
        changed), CorruptionError (no good checkpoint is left, the state is undefined), DistributedError."""
        started = time.perf_counter()
        while True:
            resolved, index = self._resolve()
            differences = self._compare(index)
            read_started = time.perf_counter()
            why = self._read(resolved, index)
            if why is None:
                break
            self.pass_over(resolved, why)
        read_s = time.perf_counter() - read_started
        applied = self._agree("apply", lambda: self._apply(index), _summarize, _Applied, _Applied)
        if self.context.coordinator.rank == 0:
            for iteration, reason in resolved.fell_back_from.items():
                logger.warning("iteration %d is damaged and was passed over: %s", iteration, reason)
            if resolved.warning:
                logger.warning("%s", resolved.warning)
        report = LoadReport(
            iteration=index.iteration,
            save_id=index.save_id,
            bytes=self._size_bytes,
            bytes_read=self._bytes_read,
            read_s=read_s,
            total_s=time.perf_counter() - started,
            missing=tuple(differences.missing),
            unexpected=tuple(differences.unexpected),
            fell_back_from=resolved.fell_back_from,
            reseeded=tuple(sorted(leaf.key for leaf in self._request.reseed)),
            skipped=tuple(sorted(leaf.key for leaf in self._request.skip)),
            warnings=tuple(warning for warning in (resolved.warning, self._warning) if warning),
            rebuilt=tuple(self._rebuilt),
            copy_used=self.context.storages[resolved.root].location if resolved.root else None,
            not_shared=self._not_shared,
            converted=tuple(
                sorted(leaf.key for leaf, entry in self._request.tensors if leaf.spec.dtype != entry.dtype)
            ),
            slowest=applied.slowest,
            peak_rss_bytes=applied.peak_rss_bytes,
            device_bytes=applied.device_bytes,
        )
        return report, index

    def pass_over(self, resolved: _Resolved, why: str) -> None:
        """Go on without a checkpoint that could not be read; or with it once more, if rank 0 can mend it by parity."""
        candidate = resolved.candidate
        made: list[str] = []
        if candidate not in self._mended:
            self._mended.add(candidate)
            made = self._agree(
                f"rebuild {len(self._mended)}",
                lambda: None,
                lambda ranks: [self._mend(candidate)] * len(ranks),
                type(None),
                list,
            )
        if made:
            self._rebuilt += made
        else:
            self._failed[candidate] = why

    def _mend(self, candidate: Candidate) -> list[str]:
        """Rank 0, in half of the time that the others wait for it; then all fall back, as without parity."""
        commit, storage = candidate.commit, self.context.storages[candidate.root]
        deadline = time.monotonic() + self.context.timeout_s / 2

        def look_at_the_clock(_: int) -> None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"it takes more than {self.context.timeout_s / 2:g} s; `distckpt repair` may")

        try:
            made = rebuild_damaged(storage, commit, look_at_the_clock)
        except OSError as error:
            logger.warning("iteration %d is damaged, and could not be mended: %s", commit.iteration, error)
            return []
        for name in made:
            logger.warning("iteration %d: %s was damaged; it was made again from parity", commit.iteration, name)
        return made

    def _agree(
        self,
        phase: str,
        local: Callable[[], M],
        decide: Callable[[Sequence[M]], Sequence[D]],
        message: type[M],
        decision: type[D],
    ) -> D:
        return agree(
            self.context.coordinator,
            f"{self.label}: {phase}",
            local,
            decide,
            message=message,
            decision=decision,
            timeout_s=self.context.timeout_s,
        )

    def _resolve(self) -> tuple[_Resolved, Index]:
        def local() -> _Wanted:
            if self.unseen is not None:
                raise self.unseen
            self.iteration = parse_selector(self.iteration)
            if not callable(self.template):
                self.state = self.template
                self._flat = flatten(self.state, ADAPTERS)
            if isinstance(self.allow, str):  # Letter by letter it could be anything.
                raise TypeError(f"allow={self.allow!r}: expected a collection of patterns")
            return _Wanted(self.iteration, bool(self.strict), bool(self.convert_dtypes), list(self.allow))

        resolved = self._agree("resolve", local, self._decide_commit, _Wanted, _Resolved)
        index, self._decoded = self._decoded, None
        return resolved, decode_index_of(resolved.candidate.commit, resolved.index) if index is None else index

    def _decide_commit(self, wanted: Sequence[_Wanted]) -> list[_Resolved]:
        """Rank 0: the best commit that has not failed, whose index is sound."""
        if any(w != wanted[0] for w in wanted):
            asked = {name: sorted({repr(getattr(w, name)) for w in wanted}) for name in _Wanted.__struct_fields__}
            differing = [f"{name} is {' or '.join(values)}" for name, values in asked.items() if len(values) > 1]
            raise CheckpointError(f"the ranks ask for different loads: {'; '.join(differing)}")
        storages = self.context.storages
        candidates = self._candidates()
        while left := [candidate for candidate in candidates if candidate not in self._failed]:
            commit, root = left[0].commit, left[0].root
            try:
                self._decoded, data = read_index(storages[root], commit)
            except (CorruptionError, OSError) as error:
                if not is_damage(error):
                    raise
                self._failed[left[0]] = str(error)
                candidates = self._candidates()  # Listed anew: if the index is gone, it was replaced meanwhile.
                continue
            place = commit.epoch, commit.commit_seq, commit.iteration, root
            found = _Resolved(*place, data, self._fell_back_from(commit), self._warnings(candidates, left[0]))
            return [found] * len(wanted)
        reasons = "".join(f"\n  {failed.commit.name}: {why}" for failed, why in self._failed.items())
        raise CorruptionError(
            f"no good checkpoint under {' or '.join(storage.location for storage in storages)}"
            + selector_text(self.iteration)
            + f"; if tensors had been read, their values are now undefined. Tried:{reasons}"
        )

    def _fell_back_from(self, commit: Commit) -> dict[int, str]:
        """Iteration -> why it was passed over, for this commit."""
        reasons: dict[int, str] = {}
        for failed, why in self._failed.items():
            if failed.commit != commit:  # Else it is another copy of it that was damaged.
                earlier = reasons.get(failed.commit.iteration)
                reasons[failed.commit.iteration] = why if earlier is None else f"{earlier}; {why}"
        return reasons

    def _warnings(self, candidates: Sequence[Candidate], chosen: Candidate) -> str | None:
        """What is odd, but loses nothing."""
        storages = self.context.storages
        odd = [
            f"iteration {failed.commit.iteration} is damaged in {storages[failed.root].location}, and was read from "
            f"{storages[chosen.root].location}: {why}"
            for failed, why in self._failed.items()
            if failed.commit == chosen.commit
        ]
        nearest = max((candidate.commit for candidate in candidates if not candidate.root), default=None)
        if self.iteration is None and nearest is not None:
            assert self._decoded is not None
            newer = newer_work(storages, nearest, chosen, self._decoded.created_unix_s)
            self.leaves_newer = newer is not None
            odd += [one for one in (tracker_warning(storages[0], nearest), newer) if one is not None]
        return "; ".join(odd) or None

    def _candidates(self) -> list[Candidate]:
        """Rank 0: in the order in which they are to be tried."""
        selector, storages = self.iteration, self.context.storages
        if isinstance(selector, str):
            return copies_of(storages, select_one(storages, selector))
        return find_candidates(
            storages, lambda storage: select_commits(storage, selector), by_branch=bool(self._failed)
        )

    def _compare(self, index: Index) -> _Differences:
        """Match this rank's state, and agree on what is missing or in excess over all ranks."""
        stored = stored_keys(index)

        def local() -> _Match:
            started = time.perf_counter()
            if callable(self.template):
                try:
                    self.state = self.template(Contents(index))
                except MismatchError as error:
                    return _Match([*error.missing], {}, _bitmap([]), _bitmap([]), this_host(), str(error))
                self._flat = flatten(self.state, ADAPTERS)
            self._request = request = match_state(self._flat, index, self.context.mesh, self.convert_dtypes)
            named = named_keys(self._flat, index, stored)
            self._seconds["match"] = time.perf_counter() - started
            return _Match(
                missing=sorted(request.missing),
                mismatched=request.mismatched,
                asked=_bitmap(key in request.asked for key in stored),
                named=_bitmap(key in named for key in stored),
                host=this_host(),
            )

        def decide(ranks: Sequence[_Match]) -> list[_Differences]:
            passed_over = [f"{failed.commit.name}: {why}" for failed, why in self._failed.items()]
            for rank in ranks:
                if rank.refused is not None:
                    says = f"{rank.refused}\n{what_was_changed(passed_over)}"
                    raise MismatchError(says, missing=tuple(rank.missing))
            asked = np.bitwise_or.reduce([np.frombuffer(r.asked, np.uint8) for r in ranks])
            named = np.bitwise_or.reduce([np.frombuffer(r.named, np.uint8) for r in ranks])
            excess = np.unpackbits(named & ~asked)[: len(stored)]
            unexpected = [key for key, is_excess in zip(stored, excess, strict=True) if is_excess]
            missing = sorted({key for r in ranks for key in r.missing})
            mismatched = {key: why for r in reversed(ranks) for key, why in r.mismatched.items()}
            lacking, unread = ([key for key in keys if not self._is_allowed(key)] for keys in (missing, unexpected))
            if mismatched or (self.strict and (lacking or unread)):
                raise mismatch_error(index, lacking, unread, mismatched, self.strict, passed_over)
            groups = group_ranks([r.host for r in ranks], row_bytes(index))
            answers = {group.nonce: _Differences(missing, unexpected, group) for group in groups}
            return [answers[group.nonce] for group in groups]

        differences = self._agree("match", local, decide, _Match, _Differences)
        self._group = differences.group
        return differences

    def _is_allowed(self, key: str) -> bool:
        return any(fnmatchcase(key, pattern) for pattern in self.allow)

    def select(self, index: Index, keys: Iterable[str] | None) -> set[str]:
        """The stored keys that `keys` mean; agreed, as the ranks may ask for different ones."""
        wanted: set[str] = set()

        def local() -> _Selection:
            nonlocal wanted
            wanted, missing = select_keys(index, keys)
            return _Selection(missing, this_host())

        def decide(ranks: Sequence[_Selection]) -> list[HostGroup]:
            absent = sorted({key for rank in ranks for key in rank.missing})
            if absent:
                raise MismatchError(
                    f"iteration {index.iteration} has nothing under {', '.join(map(repr, absent))}; it has "
                    f"{sorted({key.partition('/')[0] for key in stored_keys(index)})}",
                    missing=tuple(absent),
                )
            return group_ranks([r.host for r in ranks], row_bytes(index))

        self._group = self._agree("select", local, decide, _Selection, HostGroup)
        return wanted

    def _read(self, resolved: _Resolved, index: Index) -> str | None:
        """Fill all targets on all ranks; None, or why this checkpoint must be passed over (agreed)."""
        candidate = resolved.candidate

        def local() -> _ReadOutcome:
            started = time.perf_counter()
            try:
                with Board(
                    self._group, self.context.coordinator.rank, row_bytes(index), self.context.timeout_s
                ) as board:
                    self._read_own(candidate, index, board)
            except PeerFailed as stopped:
                return _ReadOutcome(str(stopped), is_echo=True)
            except (CorruptionError, OSError) as error:
                if not is_damage(error):
                    raise
                return _ReadOutcome(f"{type(error).__name__}: {error}")
            self._seconds["read"] = time.perf_counter() - started
            return _ReadOutcome(None)

        def decide(ranks: Sequence[_ReadOutcome]) -> list[_ReadOutcome]:
            failed = sorted((r.is_echo, rank) for rank, r in enumerate(ranks) if r.why is not None)
            bad = [f"rank {rank}: {ranks[rank].why}" for is_echo, rank in failed if is_echo == failed[0][0]]
            why = None if not bad else bad[0] + (f" (and {len(bad) - 1} more ranks)" if len(bad) > 1 else "")
            return [_ReadOutcome(why)] * len(ranks)

        return self._agree("read", local, decide, _ReadOutcome, _ReadOutcome).why

    def _read_own(self, candidate: Candidate, index: Index, board: Board) -> None:
        self._make_modules_real(index)
        storage, directory = self.context.storages[candidate.root], candidate.commit.directory
        request = self._request
        whole = sum(index.tensors[key].size_bytes for key in request.whole if key in index.tensors)
        check_files_hold(storage, directory, index, whole)
        targets = targets_of(request, index, self.device)
        filled = fill_targets(
            storage, directory, index, targets, board, self.context.transports, self.context.timeout_s
        )
        self._bytes_read += filled.bytes_read
        self._not_shared, self._warning = filled.not_shared, filled.warning
        self._size_bytes = sum(t.data.nbytes for t in targets)
        read_values(storage, directory, index, request)

    def _make_modules_real(self, index: Index) -> None:
        """Give modules on the meta device real tensors, and match anew what then stands in the state."""
        if make_modules_real(self._flat.objects, self.device):
            self._flat = flatten(self.state, ADAPTERS)
            self._request = match_state(self._flat, index, self.context.mesh, self.convert_dtypes)

    def _apply(self, index: Index) -> _Applied:
        started = time.perf_counter()
        apply_request(self._request, self._flat, index, self.context.mesh)
        self._seconds["apply"] = time.perf_counter() - started
        return _Applied(self._seconds, peak_rss_bytes(), peak_device_bytes())


def read_all(
    context: LoadContext,
    iteration: int | str | None,
    keys: Iterable[str] | None,
    label: str,
    unseen: BaseException | None,
) -> dict[str, object]:
    """Full tensors and values of a checkpoint as a nested state on the CPU; see Checkpointer.read."""
    load = Load(context, {}, iteration, True, "cpu", label, unseen=unseen)
    while True:
        resolved, index = load._resolve()
        wanted = load.select(index, keys)
        load._request = Request(whole=wanted)
        why = load._read(resolved, index)
        if why is None:
            break
        load.pass_over(resolved, why)
    return subtree(index, load._request.whole_tensors, "", wanted)


def _summarize(ranks: Sequence[_Applied]) -> list[_Applied]:
    slowest = slowest_ranks(("match", "read", "apply"), [rank.seconds for rank in ranks])
    memory = max(rank.peak_rss_bytes for rank in ranks), max(rank.device_bytes for rank in ranks)
    return [_Applied({}, *memory, slowest)] * len(ranks)


def _bitmap(bits: Iterable[bool]) -> bytes:
    return np.packbits(np.fromiter(bits, bool)).tobytes()
