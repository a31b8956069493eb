"""One save, from the flat state to the commit: plan -> stage -> write -> commit. Holds the order of things.

Planning and staging run in the caller's thread; writing and committing may run in another. Nothing here is kept
between saves.
"""

from __future__ import annotations

import operator
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from distckpt._C import crc32c
from distckpt.adapters import ADAPTERS
from distckpt.assembling import Commitment, Written, chunk_table_of, index_of, raw_json
from distckpt.commit import (
    HEARTBEAT_S,
    CommitFailed,
    Writer,
    discard,
    iteration_directory,
    new_save_id,
    pending_marker,
    sweep,
)
from distckpt.coordinator import Coordinator, agree
from distckpt.errors import CheckpointError, DistributedError, InvalidShardingError, UnsupportedTypeError
from distckpt.geometry import Box
from distckpt.index import Mesh, ShardFile, Spec
from distckpt.json_value import EMPTY_DICT, encode_value
from distckpt.leaf_value import encode_leaf
from distckpt.planner import (
    PerRankKind,
    RankShards,
    RankValues,
    SavePlan,
    check_replicas,
    encode_specs,
    encode_values,
    join_values,
    plan_save,
)
from distckpt.report import SaveReport
from distckpt.shard_file import FORMAT, FORMAT_VERSION, Chunk, file_name, nested_json, plan_file, split_into_files
from distckpt.sharded_tensor import Shard
from distckpt.staging import Arena, StagedFile, new_file, stage, stage_in_place
from distckpt.state_dict import FlatState, PerRankLeaf, flatten
from distckpt.storage import FreeSpace, Storage
from distckpt.transport import sample_checksum

MAX_SHARED_METADATA_BYTES = 8 << 20  # characters: escaped in a header they may take six times as many bytes


class _Offer(msgspec.Struct, frozen=True):
    """A rank's message to the plan: what it has, and the room on the file system that it writes to."""

    iteration: int
    metadata: bytes
    shards: RankShards
    values: RankValues
    samples: bytes  # uint32, a checksum over samples of the bytes of each shard
    filesystem_id: str
    free_bytes: int


class _Order(msgspec.Struct, frozen=True):
    """What a rank is to write: numbers of its shards (int32), keys of its PerRank values."""

    save_id: str
    epoch: int
    shards: bytes
    per_rank: list[str]


class _Outcome(msgspec.Struct, frozen=True):
    size_bytes: int
    slowest: dict[str, tuple[int, float]]


@dataclass(slots=True)
class SaveContext:
    """What a save works with. `writer` is rank 0's, from the first save on."""

    storage: Storage
    coordinator: Coordinator
    mesh: Mesh
    arena: Arena
    timeout_s: float
    backend: str
    removal_grace_s: float
    writer: Writer | None = None
    parent: str | None = None


@dataclass(slots=True)
class Save:
    """One save under way. plan(), stage(), then finish() once, in this order, on every rank."""

    context: SaveContext
    state: dict[str, object]
    iteration: int
    metadata: object
    label: str
    unseen: BaseException | None = None  # of an earlier save: raised everywhere if any rank has not seen it
    _metadata: bytes = b"null"
    _shards: list[tuple[str, Spec, Shard]] = field(default_factory=list)
    _encoded: dict[str, bytes] = field(default_factory=dict)
    _plan: SavePlan | None = None
    _values: dict[str, bytes] = field(default_factory=dict)
    _order: _Order | None = None
    _files: list[StagedFile] = field(default_factory=list)
    _stage_error: BaseException | None = None
    _seconds: dict[str, float] = field(default_factory=dict)

    def plan(self) -> None:
        """Agree on who writes what. Collective. Raises what all ranks raise; then nothing has been written."""
        started = time.perf_counter()
        try:
            self._order = agree(
                self.context.coordinator,
                f"{self.label}: plan",
                self._offer,
                self._decide_plan,
                message=_Offer,
                decision=_Order,
                timeout_s=self.context.timeout_s,
            )
        except BaseException:
            self._discard()
            raise
        self._seconds["plan"] = time.perf_counter() - started

    def _offer(self) -> _Offer:
        if self.unseen is not None:
            raise self.unseen
        self.iteration = operator.index(self.iteration)
        if self.iteration < 0:
            raise ValueError(f"iteration {self.iteration} is negative")
        flat = flatten(self.state, ADAPTERS)
        shards, values = self._describe_shards(flat), self._describe_values(flat)
        samples = np.array([sample_checksum(s.data) for _, _, s in self._shards], np.uint32).tobytes()
        self.state = {}
        self._metadata = encode_value(self.metadata, "metadata")
        free = _free_space(self.context.storage)
        return _Offer(self.iteration, self._metadata, shards, values, samples, free.filesystem_id, free.size_bytes)

    def _describe_shards(self, flat: FlatState) -> RankShards:
        number: dict[tuple[str, Spec], int] = {}
        of_shard: list[int] = []
        for leaf in flat.tensors:
            if leaf.materialize is not None:
                raise UnsupportedTypeError(f"{leaf.key!r}: a tensor on the meta device has no values to save")
            described = number.setdefault((leaf.key, leaf.spec), len(number))
            of_shard += [described] * len(leaf.shards)
            self._shards += [(leaf.key, leaf.spec, shard) for shard in leaf.shards]
        boxes = [n for _, _, shard in self._shards for n in (*shard.box.offset, *shard.box.shape)]
        return RankShards(
            specs=encode_specs(list(number)),
            tensor=np.array(of_shard, np.int32).tobytes(),
            boxes=np.array(boxes, np.int64).tobytes(),
            per_rank={leaf.key: self._describe_per_rank(leaf) for leaf in flat.per_rank},
            mesh=dict(self.context.mesh),
        )

    def _describe_values(self, flat: FlatState) -> RankValues:
        self._encoded = {leaf.key: encode_leaf(leaf.leaf.value, leaf.key) for leaf in flat.per_rank}
        values = {leaf.key: leaf.encoded for leaf in flat.values}
        values |= flat.fixed | dict.fromkeys(flat.empty, EMPTY_DICT)
        return RankValues(encode_values(values), {key: crc32c(encoded) for key, encoded in self._encoded.items()})

    def _describe_per_rank(self, leaf: PerRankLeaf) -> PerRankKind:
        axes = tuple(self.context.mesh) if leaf.leaf.axes is None else leaf.leaf.axes
        unknown = [axis for axis in axes if axis not in self.context.mesh]
        if unknown:
            raise CheckpointError(f"PerRank {leaf.key!r}: axes {unknown} are not in the mesh {list(self.context.mesh)}")
        return PerRankKind(axes, leaf.leaf.on_change)

    def _decide_plan(self, offers: Sequence[_Offer]) -> list[_Order]:
        """Rank 0."""
        for rank, offer in enumerate(offers):
            if (offer.iteration, offer.metadata) != (self.iteration, self._metadata):
                raise InvalidShardingError(
                    f"rank 0 saves iteration {self.iteration} with metadata {self._metadata!r}, rank {rank} "
                    f"iteration {offer.iteration} with {offer.metadata!r}"
                )
        plan = plan_save([offer.shards for offer in offers])
        self._values = join_values(plan, [offer.values for offer in offers])
        samples = [np.frombuffer(offer.samples, np.uint32) for offer in offers]
        check_replicas(plan, [of_rank[plan.replicated_of(r)].tobytes() for r, of_rank in enumerate(samples)])
        context = self.context
        if context.writer is None:
            context.writer = Writer.claim(context.storage)
        context.writer.check_fence()
        # Before space is judged: what dead and retired saves left may be what fills the disk.
        removed = sweep(context.storage, grace_s=context.removal_grace_s)
        gained = max(0, _free_space(context.storage).size_bytes - offers[0].free_bytes) if removed else 0
        _check_free_space(offers, plan, gained)
        save_id = new_save_id()
        self._plan = plan
        self._order = _Order(save_id, context.writer.epoch, b"", [])
        context.writer.announce(self.iteration, save_id)
        return [
            _Order(save_id, context.writer.epoch, plan.shards_of(rank).tobytes(), plan.per_rank_keys_of(rank))
            for rank in range(len(offers))
        ]

    @property
    def save_id(self) -> str:
        assert self._order is not None
        return self._order.save_id

    def stage(self, *, in_place: bool) -> None:
        """Copy what this rank writes; on return the state may change. A failure is raised by finish(), everywhere.

        in_place: the state stays as it is until finish() returns, and is written from where it is.
        """
        started = time.perf_counter()
        try:
            self._files = self._stage(in_place)
        except BaseException as error:  # Even an exit: the other ranks are waiting in finish().
            self._stage_error = error
        self._seconds["stage"] = time.perf_counter() - started

    def _stage(self, in_place: bool) -> list[StagedFile]:
        order, rank, world_size = self._order, self.context.coordinator.rank, self.context.coordinator.world_size
        assert order is not None
        mine = [self._shards[i] for i in np.frombuffer(order.shards, np.int32)]
        self._shards = []
        chunks = [
            Chunk(key, spec.dtype, shard.box.offset, shard.box.shape, shard.box == Box.whole(spec.global_shape))
            for key, spec, shard in mine
        ]
        per_rank = msgspec.json.encode(raw_json({key: self._encoded[key] for key in order.per_rank}))
        if not chunks and not order.per_rank and rank != 0:
            return []
        shared = self._shared_metadata()
        files = split_into_files(
            chunks,
            metadata_bytes=[len(nested_json({key: spec})) for key, spec, _ in mine],
            first_metadata_bytes=len(msgspec.json.encode(shared)),
        )
        metadata = [self._header_metadata([mine[i] for i in f], {} if k else shared) for k, f in enumerate(files)]
        layouts = [
            plan_file(chunks, numbers).lay_out(b"{}" if k else per_rank, metadata[k]) for k, numbers in enumerate(files)
        ]
        tensors = [shard.data for _, _, shard in mine]
        parts = stage_in_place(layouts, tensors) if in_place else stage(layouts, tensors, self.context.arena)
        names = [file_name(rank, part, world_size, order.save_id) for part in range(len(files))]
        return [StagedFile(*file) for file in zip(names, layouts, parts, strict=True)]

    def _header_metadata(self, mine: Sequence[tuple[str, Spec, Shard]], shared: Mapping[str, str]) -> dict[str, str]:
        """What rebuilding an index from the files alone needs."""
        return {
            "format": FORMAT,
            "version": str(FORMAT_VERSION),
            "save_id": self.save_id,
            "iteration": str(self.iteration),
            "rank": str(self.context.coordinator.rank),
            "mesh": msgspec.json.encode(self.context.mesh).decode(),
            "tensors": msgspec.json.encode({key: spec for key, spec, _ in mine}).decode(),
            **shared,
        }

    def _shared_metadata(self) -> dict[str, str]:
        """The same, of what belongs to no tensor: in the first file of rank 0, unless it is too long for a header."""
        if self._plan is None:
            return {}
        values = msgspec.json.encode(raw_json(self._values)).decode()
        shared = {"values": values, "metadata": self._metadata.decode()}
        return shared if sum(map(len, shared.values())) <= MAX_SHARED_METADATA_BYTES else {}

    def finish(self, *, is_async: bool) -> SaveReport:
        """Write, and make the checkpoint exist. Collective; any thread.

        Raises DistributedError, FencedError or CheckpointError, the same on all ranks, when it does not, or may not.
        """
        started = time.perf_counter()
        context = self.context
        is_leader = context.coordinator.rank == 0
        try:
            with _Heartbeat(context.storage, pending_marker(self.iteration, self.save_id), active=is_leader):
                outcome = agree(
                    context.coordinator,
                    f"{self.label}: commit {self.save_id}",
                    self._write,
                    self._decide_commit,
                    message=Written,
                    decision=_Outcome,
                    timeout_s=context.timeout_s,
                    committed_if_lost="unknown",
                )
        except BaseException as error:
            if getattr(error, "committed", "no") == "no":
                self._discard()
            raise
        self._seconds["commit"] = time.perf_counter() - started - self._seconds["write"]
        return self._report(outcome, is_async)

    def _write(self) -> Written:
        started = time.perf_counter()
        if self._stage_error is not None:
            raise self._stage_error
        context, order = self.context, self._order
        assert order is not None
        directory = iteration_directory(self.iteration)
        mesh = {axis: at for axis, (at, _) in context.mesh.items()}
        files: list[ShardFile] = []
        count = len(order.shards) // 4
        file_of, start_of = np.zeros(count, np.int32), np.zeros(count, np.int64)
        for number, staged in enumerate(self._files):
            files.append(staged.write(context.storage, directory, rank=context.coordinator.rank, mesh=mesh))
            at = list(staged.layout.order)
            file_of[at], start_of[at] = number, staged.layout.starts
        self._files = []
        self._seconds["write"] = time.perf_counter() - started
        return Written(files, file_of.tobytes(), start_of.tobytes(), self._seconds)

    def _decide_commit(self, ranks: Sequence[Written]) -> list[_Outcome]:
        """Rank 0."""
        plan, writer = self._plan, self.context.writer
        assert plan is not None
        assert writer is not None
        who = Commitment(
            save_id=self.save_id,
            epoch=writer.epoch,
            commit_seq=writer.commit_seq,
            iteration=self.iteration,
            parent=self.context.parent,
            world_size=self.context.coordinator.world_size,
            metadata=self._metadata,
        )
        try:
            table, data, places = chunk_table_of(plan, ranks, self.save_id)
            name = f"{iteration_directory(self.iteration)}/{table.name}"
            with new_file(self.context.storage, name, len(data)) as file:
                file.write(0, data)
            writer.publish(index_of(who, plan, self._values, ranks, table, places))
        except CommitFailed as error:
            raise DistributedError(
                f"saving iteration {self.iteration}: {error}",
                failures={0: str(error)},
                committed=error.committed,
            ) from error
        except OSError as error:  # The chunk table: nothing was published yet.
            raise DistributedError(
                f"saving iteration {self.iteration}: {error}", failures={0: str(error)}, committed="no"
            ) from error
        slowest = {
            phase: max(((rank, w.seconds.get(phase, 0.0)) for rank, w in enumerate(ranks)), key=lambda item: item[1])
            for phase in ("plan", "stage", "write")
        }
        total = sum(file.size_bytes for written in ranks for file in written.files) + table.size_bytes
        return [_Outcome(total, slowest)] * len(ranks)

    def _discard(self) -> None:
        """After a failure: rank 0 removes what was written, as far as it can; the next sweep takes the rest."""
        if self.context.coordinator.rank == 0 and self._order is not None:
            try:
                discard(self.context.storage, self.iteration, self.save_id)
            except OSError:
                return

    def _report(self, outcome: _Outcome, is_async: bool) -> SaveReport:
        s = self._seconds
        return SaveReport(
            iteration=self.iteration,
            save_id=self.save_id,
            bytes=outcome.size_bytes,
            plan_s=s["plan"],
            stage_s=s["stage"],
            stall_s=s["plan"] + s["stage"] if is_async else sum(s.values()),
            write_s=s["write"],
            commit_s=s["commit"],
            total_s=sum(s.values()),
            slowest=outcome.slowest,
            backend=self.context.backend,
        )


def _free_space(storage: Storage) -> FreeSpace:
    return storage.free_space() or FreeSpace("", 2**62)


def _check_free_space(offers: Sequence[_Offer], plan: SavePlan, gained: int) -> None:
    """Raises CheckpointError when the ranks of one file system are about to write more than it has room for.

    gained: bytes that were freed since the offers.
    """
    free: dict[str, int] = {}
    needed: dict[str, int] = {}
    for offer, size in zip(offers, plan.bytes_by_rank.tolist(), strict=True):
        free[offer.filesystem_id] = min(offer.free_bytes, free.get(offer.filesystem_id, offer.free_bytes))
        needed[offer.filesystem_id] = needed.get(offer.filesystem_id, 0) + size
    for filesystem_id, size in needed.items():
        room = free[filesystem_id] + gained
        if size > room:
            raise CheckpointError(
                f"not enough space: the checkpoint takes {size} bytes on file system {filesystem_id}, which has {room} "
                f"bytes free. Nothing was written. Free space there; a checkpoint that keep_last gives up is removed "
                f"at the first save after its grace period."
            )


class _Heartbeat:
    """Touches the pending marker while the body runs, so that no sweep takes the save for dead."""

    def __init__(self, storage: Storage, marker: str, *, active: bool) -> None:
        self._stop = threading.Event()
        self._beat: Callable[[], None] = lambda: storage.touch(marker)
        self._thread = threading.Thread(target=self._run, name="distckpt-heartbeat", daemon=True) if active else None

    def __enter__(self) -> None:
        if self._thread is not None:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                self._beat()
            except OSError:
                continue  # The save itself finds out what is wrong with the storage.
