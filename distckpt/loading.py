"""One load: resolve -> match -> read -> apply, each agreed by all ranks before the next. Holds the order of things.

A checkpoint that is damaged for any rank is passed over by all of them; every target is then filled anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch
from torch import Tensor

from distckpt._C import crc32c
from distckpt.adapters import ADAPTERS
from distckpt.commit import Commit, decode_index_of, find_commits, read_index, tracker_warning
from distckpt.coordinator import Coordinator, agree
from distckpt.errors import CheckpointError, CorruptionError, MismatchError
from distckpt.geometry import Box, intersect
from distckpt.index import Index, TensorEntry
from distckpt.planner import is_container, plan_load
from distckpt.reader import ChunkTableReader, fill_targets, read_per_rank
from distckpt.report import LoadReport
from distckpt.saving import Mesh
from distckpt.sharded_tensor import Shard
from distckpt.state_dict import (
    FlatState,
    ObjectLeaf,
    PerRankLeaf,
    TensorLeaf,
    decode_leaf,
    flatten,
    set_per_rank,
    unflatten,
)
from distckpt.storage import Storage

logger = logging.getLogger("distckpt")
_SHOWN = 20


class _Resolved(msgspec.Struct, frozen=True):
    """The checkpoint that all ranks are to load: its commit and the bytes of its index."""

    epoch: int
    commit_seq: int
    iteration: int
    index: bytes
    fell_back_from: dict[int, str]
    warning: str | None


class _Match(msgspec.Struct, frozen=True):
    """A rank's message: what it asks for that is not there, and bitmaps over the sorted stored keys.

    asked: those it takes; named: those below a container of its state.
    """

    missing: list[str]
    mismatched: dict[str, str]
    asked: bytes
    named: bytes


class _Differences(msgspec.Struct, frozen=True):
    missing: list[str]
    unexpected: list[str]


@dataclass(slots=True)
class LoadContext:
    """What a load works with."""

    storage: Storage
    coordinator: Coordinator
    mesh: Mesh
    timeout_s: float


@dataclass(slots=True)
class _Target:
    """A region of a stored tensor and the tensor that takes it."""

    key: str
    box: Box
    data: Tensor


@dataclass(slots=True)
class Request:
    """What one rank wants of one particular checkpoint."""

    tensors: list[tuple[TensorLeaf, TensorEntry]] = field(default_factory=list)
    whole: dict[str, Tensor] = field(default_factory=dict)  # read in full: no target of the state's own
    values: list[tuple[str, Callable[[object], None]]] = field(default_factory=list)
    per_rank: list[tuple[PerRankLeaf, int]] = field(default_factory=list)  # with the number of its file
    reseed: list[PerRankLeaf] = field(default_factory=list)
    skip: list[PerRankLeaf] = field(default_factory=list)
    fresh: list[ObjectLeaf] = field(default_factory=list)  # objects that get the whole stored subtree
    missing: set[str] = field(default_factory=set)
    mismatched: dict[str, str] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    per_rank_values: dict[str, bytes] = field(default_factory=dict)  # encoded, by key, once read


@dataclass(slots=True)
class Load:
    """One load under way. run() once, on every rank."""

    context: LoadContext
    state: dict[str, object]
    iteration: int | None
    strict: bool
    device: torch.device
    label: str
    _flat: FlatState = field(default_factory=FlatState)
    _failed: dict[Commit, str] = field(default_factory=dict)
    _bytes_read: int = 0
    _size_bytes: int = 0

    def run(self) -> tuple[LoadReport, Index]:
        """Fill the state. Raises, the same on all ranks: CheckpointNotFoundError, MismatchError (nothing has been
        changed), CorruptionError (no good checkpoint is left, the state is undefined), DistributedError."""
        started = time.perf_counter()
        while True:
            resolved, index = self._resolve()
            request = _match(self._flat, index, self.context.mesh)
            differences = self._compare(request, index)
            read_started = time.perf_counter()
            why = self._read(resolved, index, request)
            if why is None:
                break
            self._failed[Commit(resolved.epoch, resolved.commit_seq, resolved.iteration)] = why
        read_s = time.perf_counter() - read_started
        self._agree("apply", lambda: self._apply(index, request), lambda done: [None] * len(done), None, None)
        if self.context.coordinator.rank == 0:
            for iteration, reason in resolved.fell_back_from.items():
                logger.warning("iteration %d is damaged and was passed over: %s", iteration, reason)
            if resolved.warning:
                logger.warning("%s", resolved.warning)
        report = LoadReport(
            iteration=index.iteration,
            save_id=index.save_id,
            size_bytes=self._size_bytes,
            bytes_read=self._bytes_read,
            read_s=read_s,
            total_s=time.perf_counter() - started,
            missing=tuple(differences.missing),
            unexpected=tuple(differences.unexpected),
            fell_back_from=resolved.fell_back_from,
            reseeded=tuple(sorted(leaf.key for leaf in request.reseed)),
            skipped=tuple(sorted(leaf.key for leaf in request.skip)),
            warnings=(resolved.warning,) if resolved.warning else (),
        )
        return report, index

    def _agree(self, phase, local, decide, message, decision):  # type: ignore[no-untyped-def]
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
        def local() -> int | None:
            self._flat = flatten(self.state, ADAPTERS)
            return self.iteration

        resolved = self._agree("resolve", local, self._decide_commit, int | None, _Resolved)
        commit = Commit(resolved.epoch, resolved.commit_seq, resolved.iteration)
        return resolved, decode_index_of(commit, resolved.index)

    def _decide_commit(self, wanted: Sequence[int | None]) -> list[_Resolved]:
        """Rank 0: the best commit that has not failed, whose index is sound."""
        if any(w != wanted[0] for w in wanted):
            raise CheckpointError(f"the ranks ask for different iterations: {sorted(set(map(str, wanted)))}")
        storage = self.context.storage
        commits = find_commits(storage, self.iteration)
        for commit in commits:
            if commit in self._failed:
                continue
            try:
                _, data = read_index(storage, commit)
            except (CorruptionError, OSError) as error:
                self._failed[commit] = str(error)
                continue
            fell_back_from = {c.iteration: why for c, why in self._failed.items()}
            warning = tracker_warning(storage, commits[0]) if self.iteration is None else None
            found = _Resolved(commit.epoch, commit.commit_seq, commit.iteration, data, fell_back_from, warning)
            return [found] * len(wanted)
        reasons = "".join(f"\n  {commit.name}: {why}" for commit, why in self._failed.items())
        raise CorruptionError(
            f"no good checkpoint under {storage.location}"
            + ("" if self.iteration is None else f" of iteration {self.iteration}")
            + f"; if tensors had been read, their values are now undefined. Tried:{reasons}"
        )

    def _compare(self, request: Request, index: Index) -> _Differences:
        """Agree on what is missing or in excess, over all ranks."""
        stored = _stored_keys(index)
        named = _named_keys(self._flat, index, stored)

        def local() -> _Match:
            return _Match(
                missing=sorted(request.missing),
                mismatched=request.mismatched,
                asked=np.packbits([key in request.asked for key in stored]).tobytes(),
                named=np.packbits([key in named for key in stored]).tobytes(),
            )

        def decide(ranks: Sequence[_Match]) -> list[_Differences]:
            asked = np.bitwise_or.reduce([np.frombuffer(r.asked, np.uint8) for r in ranks])
            named = np.bitwise_or.reduce([np.frombuffer(r.named, np.uint8) for r in ranks])
            excess = np.unpackbits(named & ~asked)[: len(stored)]
            unexpected = [key for key, is_excess in zip(stored, excess, strict=True) if is_excess]
            missing = sorted({key for r in ranks for key in r.missing})
            mismatched = {key: why for r in reversed(ranks) for key, why in r.mismatched.items()}
            if mismatched or (self.strict and (missing or unexpected)):
                raise _mismatch_error(index, missing, unexpected, mismatched, self.strict)
            return [_Differences(missing, unexpected)] * len(ranks)

        differences: _Differences = self._agree("match", local, decide, _Match, _Differences)
        return differences

    def _read(self, resolved: _Resolved, index: Index, request: Request) -> str | None:
        """Fill all targets on all ranks; None, or why this checkpoint must be passed over (agreed)."""
        directory = Commit(resolved.epoch, resolved.commit_seq, resolved.iteration).directory

        def local() -> str | None:
            try:
                self._read_own(directory, index, request)
            except (CorruptionError, OSError) as error:
                return f"{type(error).__name__}: {error}"
            return None

        def decide(ranks: Sequence[str | None]) -> list[str | None]:
            bad = [f"rank {rank}: {why}" for rank, why in enumerate(ranks) if why is not None]
            why = None if not bad else bad[0] + (f" (and {len(bad) - 1} more ranks)" if len(bad) > 1 else "")
            return [why] * len(ranks)

        why: str | None = self._agree("read", local, decide, str | None, str | None)
        return why

    def _read_own(self, directory: str, index: Index, request: Request) -> None:
        storage = self.context.storage
        targets = self._targets(index, request)
        buffers = [_host_buffer(t.data) for t in targets]
        with ChunkTableReader(storage, directory, index) as table:
            order = sorted(range(len(targets)), key=lambda i: targets[i].key)
            located = [(targets[i].box, table.chunks(targets[i].key)) for i in order]
        keys = [targets[i].key for i in order]
        self._bytes_read += fill_targets(
            storage, directory, index, plan_load(located), [buffers[i] for i in order], keys
        )
        for target, buffer in zip(targets, buffers, strict=True):
            if buffer is not target.data:
                target.data.copy_(buffer)
        self._size_bytes = sum(t.data.nbytes for t in targets)
        stored = {number: read_per_rank(storage, directory, index, number) for _, number in request.per_rank}
        for leaf, number in request.per_rank:
            if leaf.key not in stored[number]:
                raise CorruptionError(f"{index.files[number].name}: per-rank value {leaf.key!r} is not in it")
            request.per_rank_values[leaf.key] = bytes(stored[number][leaf.key])

    def _targets(self, index: Index, request: Request) -> list[_Target]:
        targets: list[_Target] = []
        for leaf, entry in request.tensors:
            if leaf.materialize is not None:
                leaf.shards, leaf.materialize = leaf.materialize(self.device), None
            for shard in leaf.shards:
                target = _clip(shard, entry)
                if target is not None:
                    targets.append(_Target(leaf.key, *target))
        for key, tensor in request.whole.items():
            if tensor.numel():
                targets.append(_Target(key, Box.whole(tensor.shape), tensor))
        return targets

    def _apply(self, index: Index, request: Request) -> None:
        for key, replace in request.values:
            replace(decode_leaf(bytes(index.values[key]), key))
        for leaf, _ in request.tensors:
            if leaf.loaded is not None:
                leaf.loaded()
        for per_rank, _ in request.per_rank:
            set_per_rank(per_rank, request.per_rank_values[per_rank.key])
        for per_rank in request.reseed:
            per_rank.leaf.seed = self._seed(index, per_rank)
        for finish in self._flat.finish:
            finish()
        fresh = {leaf.path for leaf in request.fresh}
        for leaf in self._flat.objects:
            if leaf.path in fresh:
                _load_object(leaf, subtree(index, request.whole, leaf.path))
            elif not any(leaf.path.startswith(f"{path}/") for path in fresh):
                _load_object(leaf, leaf.state)

    def _seed(self, index: Index, per_rank: PerRankLeaf) -> int:
        axes = self.context.mesh if per_rank.leaf.axes is None else per_rank.leaf.axes
        text = f"{index.save_id} {per_rank.key} {[(axis, self.context.mesh[axis]) for axis in axes]}".encode()
        return crc32c(text) | crc32c(text, 0x5EED) << 32


def read_all(
    context: LoadContext, iteration: int | None, keys: Iterable[str] | None, label: str
) -> dict[object, object]:
    """Full tensors and values of a checkpoint as a nested state on the CPU; see Checkpointer.read."""
    load = Load(context, {}, iteration, True, torch.device("cpu"), label)
    while True:
        resolved, index = load._resolve()
        wanted = _select(index, keys)
        request = Request(whole=_empty_tensors(index, wanted))
        why = load._read(resolved, index, request)
        if why is None:
            break
        load._failed[Commit(resolved.epoch, resolved.commit_seq, resolved.iteration)] = why
    return subtree(index, request.whole, "", wanted)


def _select(index: Index, keys: Iterable[str] | None) -> set[str]:
    stored = set(index.tensors) | set(index.values)
    if keys is None:
        return stored
    wanted: set[str] = set()
    missing: list[str] = []
    for key in keys:
        below = {k for k in stored if k == key or _home_path(index, k).startswith(f"{key}/")}
        wanted |= below
        missing += [] if below else [key]
    if missing:
        raise MismatchError(f"iteration {index.iteration} has no {missing}", missing=tuple(missing))
    return wanted


def _home_path(index: Index, key: str) -> str:
    """The path of a stored key: the key itself, or, if it has a container, the key in that."""
    home = index.tensors[key].container if key in index.tensors else None
    return key if home is None else f"{home}/{key}"


def subtree(
    index: Index, tensors: Mapping[str, Tensor], path: str, wanted: set[str] | None = None
) -> dict[object, object]:
    """The nested state below `path`, from tensors that were read and the index's values."""
    below = {k for k in (*index.tensors, *index.values) if not path or _home_path(index, k).startswith(f"{path}/")}
    below = below if wanted is None else below & wanted
    values = {k: v for k, v in index.values.items() if k in below or k == path}
    markers = {k: bytes(v) for k, v in values.items() if is_container(bytes(v))}
    leaves: dict[str, object] = {k: tensors[k] for k in index.tensors if k in below}
    leaves |= {k: decode_leaf(bytes(v), k) for k, v in values.items() if k not in markers}
    return unflatten(leaves, {k: index.tensors[k].container for k in leaves if k in index.tensors}, markers, path)


def _empty_tensors(index: Index, keys: Iterable[str]) -> dict[str, Tensor]:
    return {
        key: torch.empty(index.tensors[key].global_shape, dtype=getattr(torch, index.tensors[key].dtype))
        for key in sorted(keys)
        if key in index.tensors
    }


def _match(flat: FlatState, index: Index, mesh: Mesh) -> Request:
    """What of the state this checkpoint can fill, and what it cannot."""
    request = Request()
    left_out: set[int] = set()
    for leaf in flat.objects:
        _match_object(leaf, index, request, left_out)
    for tensor in flat.tensors:
        if id(tensor) not in left_out:
            _match_tensor(tensor, index, request)
    for value in flat.values:
        if id(value) in left_out:
            continue
        request.asked.add(value.key)
        if value.key in index.values:
            request.values.append((value.key, value.replace))
        elif value.key in index.tensors:
            request.mismatched[value.key] = "the state has a value, stored is a tensor"
        else:
            request.missing.add(value.key)
    for key, marker in flat.lists.items():
        request.asked.add(key)
        stored = index.values.get(key)
        if (
            stored is not None
            and bytes(stored) != marker
            and not any(_is_below(key, leaf.path) for leaf in request.fresh)
        ):
            request.mismatched[key] = f"the state has {marker.decode()}, stored is {bytes(stored).decode()}"
    for per_rank in flat.per_rank:
        _match_per_rank(per_rank, index, mesh, request)
    return request


def _is_below(key: str, path: str) -> bool:
    return key == path or key.startswith(f"{path}/")


def _match_object(leaf: ObjectLeaf, index: Index, request: Request, left_out: set[int]) -> None:
    """An object whose state lacks stored keys (a new optimizer) is given the whole stored subtree instead."""
    stored = {k for k in (*index.tensors, *index.values) if _home_path(index, k).startswith(f"{leaf.path}/")}
    leaves = {k for k in stored if k in index.tensors or not is_container(bytes(index.values[k]))}
    own = {t.key for t in leaf.tensors} | {v.key for v in leaf.values}
    request.asked |= stored
    if leaves <= own:
        return
    if _holds_sharded_parameters(leaf.owner):
        request.mismatched[leaf.path] = (
            f"the optimizer has sharded parameters but no state for {sorted(leaves - own)[:3]}...; "
            f"initialise its state first (torch.distributed.checkpoint.state_dict.get_optimizer_state_dict does)"
        )
        return
    request.fresh.append(leaf)
    request.missing |= own - leaves
    left_out |= {id(t) for t in leaf.tensors} | {id(v) for v in leaf.values}
    request.whole |= _empty_tensors(index, leaves)


def _holds_sharded_parameters(owner: object) -> bool:
    return isinstance(owner, torch.optim.Optimizer) and any(
        type(p) not in (Tensor, torch.nn.Parameter) for group in owner.param_groups for p in group["params"]
    )


def _match_tensor(leaf: TensorLeaf, index: Index, request: Request) -> None:
    request.asked.add(leaf.key)
    entry = index.tensors.get(leaf.key)
    if entry is None:
        if leaf.key in index.values:
            request.mismatched[leaf.key] = "the state has a tensor, stored is a value"
        else:
            request.missing.add(leaf.key)
    elif entry.dtype != leaf.spec.dtype:
        request.mismatched[leaf.key] = f"the state has {leaf.spec.dtype}, stored is {entry.dtype}"
    elif entry.global_shape != leaf.spec.global_shape and not (
        leaf.allow_shape_mismatch and len(entry.global_shape) == len(leaf.spec.global_shape)
    ):
        request.mismatched[leaf.key] = f"the state has {leaf.spec.global_shape}, stored is {entry.global_shape}"
    elif any(
        n > 1 and s == 0 for shard in leaf.shards for n, s in zip(shard.data.shape, shard.data.stride(), strict=True)
    ):
        request.mismatched[leaf.key] = "the target is an expanded tensor, whose elements share memory; pass a real one"
    else:
        request.tensors.append((leaf, entry))


def _match_per_rank(per_rank: PerRankLeaf, index: Index, mesh: Mesh, request: Request) -> None:
    entry = index.per_rank.get(per_rank.key)
    request.asked.add(per_rank.key)
    if entry is None:
        request.missing.add(per_rank.key)
        return
    now = {axis: mesh[axis][1] for axis, _ in entry.axes if axis in mesh}
    if now == dict(entry.axes):
        at = tuple(mesh[axis][0] for axis, _ in entry.axes)
        number = dict(entry.holders).get(at)
        if number is None:
            request.missing.add(per_rank.key)
        else:
            request.per_rank.append((per_rank, number))
    elif per_rank.leaf.on_change == "exact":
        request.mismatched[per_rank.key] = (
            f"it was saved for mesh axes {dict(entry.axes)}, now they are {now}; "
            f"PerRank(..., on_change='reseed' or 'skip') allows the change"
        )
    elif per_rank.leaf.on_change == "reseed":
        request.reseed.append(per_rank)
    else:
        request.skip.append(per_rank)


def _stored_keys(index: Index) -> list[str]:
    """All stored keys in one order that every rank has."""
    return sorted({*index.tensors, *index.values, *index.per_rank})


def _named_keys(flat: FlatState, index: Index, stored: Sequence[str]) -> set[str]:
    """Stored leaves below a container of the state; of the root only if a leaf of the state stands right in it."""
    leaves = (
        *((t.key, t.spec.container) for t in flat.tensors),
        *((v.key, None) for v in (*flat.values, *flat.per_rank)),
    )
    root = any((_parent(key) if home is None else home) == "" for key, home in leaves)
    named: set[str] = set()
    known: dict[str, bool] = {"": root}

    def is_named(path: str) -> bool:
        if path not in known:
            known[path] = path in flat.containers or (_parent(path) != "" and is_named(_parent(path)))
        return known[path]

    for key in stored:
        entry = index.tensors.get(key)
        home = _parent(key) if entry is None or entry.container is None else entry.container
        if is_named(home) and not (key in index.values and is_container(bytes(index.values[key]))):
            named.add(key)
    return named


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _mismatch_error(
    index: Index, missing: list[str], unexpected: list[str], mismatched: Mapping[str, str], strict: bool
) -> MismatchError:
    lines = [f"iteration {index.iteration} is not what the state asks for. Nothing was changed."]
    for title, keys in (
        ("differ", [f"{key}: {why}" for key, why in sorted(mismatched.items())]),
        ("in the state, but not stored", missing if strict else []),
        ("stored below a container of the state, but not in it", unexpected if strict else []),
    ):
        if keys:
            shown = keys[:_SHOWN] + ([f"... and {len(keys) - _SHOWN} more"] if len(keys) > _SHOWN else [])
            lines += [f"  {len(keys)} {title}:", *(f"    {key}" for key in shown)]
    if strict and not mismatched:
        lines.append("  strict=False loads the rest and reports both lists.")
    return MismatchError(
        "\n".join(lines),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        mismatched=tuple(sorted(mismatched)),
    )


def _clip(shard: Shard, entry: TensorEntry) -> tuple[Box, Tensor] | None:
    """The part of a shard that is stored (all of it, but for allow_shape_mismatch), and the view of its data."""
    box = intersect(shard.box, Box.whole(entry.global_shape))
    if box is None:
        return None
    inner = tuple(slice(o - s, o - s + n) for o, s, n in zip(box.offset, shard.box.offset, box.shape, strict=True))
    return box, shard.data[inner]


def _host_buffer(target: Tensor) -> Tensor:
    """Where to read a target's bytes: the target if it lies plainly on the host, else a buffer of its shape there."""
    if target.device.type == "cpu" and not target.is_conj() and not target.is_neg():
        return target
    return torch.empty(target.shape, dtype=target.dtype)


def _load_object(leaf: ObjectLeaf, state: dict[object, object]) -> None:
    if isinstance(leaf.owner, torch.nn.Module) and any(p.is_meta for p in leaf.owner.parameters()):
        leaf.owner.load_state_dict(state, assign=True)  # type: ignore[arg-type]
    else:
        leaf.owner.load_state_dict(state)  # type: ignore[arg-type]
