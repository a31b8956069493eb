"""Which sample comes when: an order of each epoch that no world size changes, and a position in it that can be stored.

The sampler decides what the ranks are given and what a stored position means on another layout. It reads no data.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
import torch.distributed
from torch.utils.data import Sampler
from typing_extensions import Self

from distckpt.decoding import decode_builtins
from distckpt.errors import CheckpointError
from distckpt.training.fingerprint import fingerprint_of

logger = logging.getLogger("distckpt")

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Size = Annotated[int, msgspec.Meta(ge=1)]


class SamplerState(msgspec.Struct, frozen=True, kw_only=True):
    """A position, and all that it needs to mean the same samples again. The same on every rank."""

    epoch: _Count
    consumed_samples: _Count  # of this epoch, by all ranks together
    seed: int
    shuffle: bool
    drop_last: bool
    dataset_length: _Size
    fingerprint: str | None
    global_batch_size: _Size
    world_size: _Size


@dataclass(frozen=True, slots=True)
class PositionReport:
    """Whether a stored position goes on with exactly the samples that were to come; if not, `reason` says why.

    is_other_data: it is a position in other data, or in another order of them.
    """

    is_exact: bool
    reason: str = ""
    is_other_data: bool = False

    def __str__(self) -> str:
        return "exact" if self.is_exact else f"inexact, because {self.reason}"


@dataclass(frozen=True, slots=True)
class _Cuts:
    """How an epoch is cut into global batches, from any position on."""

    length: int
    batch_size: int  # of a rank
    world_size: int
    drop_last: bool

    @classmethod
    def of(cls, state: SamplerState) -> Self:
        return cls(state.dataset_length, state.global_batch_size // state.world_size, state.world_size, state.drop_last)

    def samples_of_rank(self, consumed: int) -> int:
        """How many samples each rank is given at this position; 0 at the end of the epoch."""
        left = self.length - consumed
        if left >= self.batch_size * self.world_size:
            return self.batch_size
        return 0 if self.drop_last or left <= 0 else -(-left // self.world_size)

    def after(self, consumed: int) -> int:
        return min(consumed + self.batch_size * self.world_size, self.length)

    def batches_from(self, consumed: int) -> int:
        left, size = max(0, self.length - consumed), self.batch_size * self.world_size
        return left // size if self.drop_last else -(-left // size)

    def end_from(self, consumed: int) -> int:
        """Where the epoch ends: what lies behind is dropped."""
        if not self.drop_last:
            return self.length
        return consumed + self.batches_from(consumed) * self.batch_size * self.world_size

    def repeated_from(self, consumed: int) -> int:
        """How many samples are given twice, so that all ranks get equally many of the last batch."""
        return 0 if self.drop_last else (consumed - self.length) % (self.batch_size * self.world_size) % self.world_size


class ResumableSampler(Sampler[list[int]]):
    """A batch sampler whose position can be stored: DataLoader(dataset, batch_sampler=ResumableSampler(dataset, 8)).

    The order of an epoch is a permutation by (seed, epoch), the same in any version of any library and for any world
    and batch size. The global batch at position p is samples p..p + batch_size * world_size - 1 of it, of which rank r
    gets the r-th contiguous piece: a job of half the ranks that accumulates twice as many batches sees the same
    samples in the same step.

    The position counts samples of the epoch that all ranks together have consumed. Iterating does not move it, because
    workers run ahead of the loop: the loop calls advance() when it has a batch behind it (TrainState does). Iterating
    goes from the position to the end of the epoch; after that it is the next epoch's. torchdata's StatefulDataLoader
    may hold it too (with its default of a snapshot at every step: one that skips steps does not tell the sampler).

    dataset_or_length: its length, and its fingerprint if none is given, are stored with the position. rank,
    world_size: those of torch.distributed if it is initialised, else 0 and 1; in a tensor- or pipeline-parallel job
    the coordinate and size of the data-parallel axis. batch_size: of one rank. drop_last: an epoch ends with the last
    full global batch. Without it all ranks get equally many batches, and in the last one equally many samples: up
    to world_size - 1 of the first of the epoch are given once more. fingerprint: a name for the data that changes
    when they do; by default fingerprint_of(dataset), which reads a few items.
    Memory: 8 bytes per sample, 16 while an epoch is shuffled.
    """

    def __init__(
        self,
        dataset_or_length: Sized | int,
        batch_size: int,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = True,
        fingerprint: str | None = None,
    ) -> None:
        if (rank is None) != (world_size is None):
            raise ValueError(f"rank={rank}, world_size={world_size}: give both or neither")
        if rank is None or world_size is None:
            rank, world_size = _place_in_group()
        length = dataset_or_length if isinstance(dataset_or_length, int) else len(dataset_or_length)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}, world_size={world_size}: expected 0 <= rank < world_size")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1")
        if length < (batch_size * world_size if drop_last else 1):
            raise ValueError(
                f"a dataset of {length} samples has no batch of {batch_size} for each of {world_size} ranks: every "
                "epoch would be empty. Take smaller batches or drop_last=False"
            )
        if fingerprint is None and not isinstance(dataset_or_length, int):
            fingerprint = fingerprint_of(dataset_or_length)
        self.batch_size, self.drop_last = batch_size, drop_last  # what frameworks ask a batch sampler for
        self._rank = rank
        self._seed, self._shuffle, self._fingerprint = seed, shuffle, fingerprint
        self._cuts = _Cuts(length, batch_size, world_size, drop_last)
        self._epoch = 0
        self._consumed = 0
        self._order: tuple[int, np.ndarray] | None = None  # of the epoch that was asked for last
        self._ran_from: tuple[int, int] | None = None  # where an iteration began that ran to the end of the epoch

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def consumed_samples(self) -> int:
        """Of this epoch, by all ranks together."""
        return self._consumed

    @property
    def global_batch_size(self) -> int:
        return self._cuts.batch_size * self._cuts.world_size

    def advance(self, batches: int = 1) -> None:
        """The loop has consumed so many batches. On all ranks alike."""
        if batches < 0:
            raise ValueError(f"batches={batches}: expected at least 0")
        for _ in range(batches):
            self._move_to(self._epoch, self._cuts.after(self._consumed))

    def _move_to(self, epoch: int, consumed: int) -> None:
        if self._cuts.samples_of_rank(consumed) == 0:
            epoch, consumed = epoch + 1, 0
        self._epoch, self._consumed = epoch, consumed

    def __len__(self) -> int:
        """Batches that are left of this epoch."""
        return self._cuts.batches_from(self._consumed)

    def __iter__(self) -> Iterator[list[int]]:
        if self._ran_from == (self._epoch, self._consumed):
            logger.warning(
                "epoch %d is given once more from sample %d on: the loop must call advance() for each batch",
                *self._ran_from,
            )
            self._ran_from = None
        return _Batches(self)

    def state_dict(self) -> dict[str, object]:
        """Plain JSON values, the same on every rank: those of SamplerState."""
        state = SamplerState(
            epoch=self._epoch,
            consumed_samples=self._consumed,
            seed=self._seed,
            shuffle=self._shuffle,
            drop_last=self._cuts.drop_last,
            dataset_length=self._cuts.length,
            fingerprint=self._fingerprint,
            global_batch_size=self.global_batch_size,
            world_size=self._cuts.world_size,
        )
        values: dict[str, object] = msgspec.to_builtins(state)
        return values

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go to the stored position, in samples; seed, sizes and the rest stay those of this sampler.

        What else changed, and what that means, position_report says. Raises CheckpointError for what is no such state.
        """
        stored = decode_sampler_state(state)
        self._move_to(stored.epoch, stored.consumed_samples)
        self._ran_from = None

    def _batch_at(self, epoch: int, consumed: int) -> list[int]:
        """This rank's samples of the global batch at a position; none at the end of the epoch."""
        size = self._cuts.samples_of_rank(consumed)
        first = consumed + self._rank * size
        places = range(first, first + size)
        length = self._cuts.length
        if not self._shuffle:
            return [place % length for place in places]
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, permutation(length, self._seed, epoch))
        order = self._order[1]
        batch: list[int] = order.take(places, mode="wrap").tolist() if size else []
        return batch


class _Batches(Iterator[list[int]]):
    """One iteration to the end of an epoch, with a state for loaders that store how far they have handed out."""

    def __init__(self, sampler: ResumableSampler) -> None:
        self._sampler = sampler
        self._began = (sampler._epoch, sampler._consumed)
        self._epoch, self._consumed = self._began

    def __next__(self) -> list[int]:
        batch = self._sampler._batch_at(self._epoch, self._consumed)
        if not batch:
            self._sampler._ran_from = self._began
            raise StopIteration
        self._consumed = self._sampler._cuts.after(self._consumed)
        return batch

    def state_dict(self) -> dict[str, object]:
        return self._sampler.state_dict() | {"epoch": self._epoch, "consumed_samples": self._consumed}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """As StatefulDataLoader does: what had been handed out when this was stored is now consumed."""
        stored = decode_sampler_state(state)
        self._epoch, self._consumed = self._began = stored.epoch, stored.consumed_samples
        self._sampler.load_state_dict(state)


def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: 0..length-1 by the SplitMix64 numbers that start from a hash of seed and epoch.

    What is sorted are those numbers, with the index in place of their low bits: it need not be carried along, and as no
    two are equal, nothing depends on how a library sorts. (Steele, Lea, Flood: Fast splittable pseudorandom number
    generators, 2014.)
    """
    start = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest()
    numbers = np.arange(1, length + 1, dtype=np.uint64)
    numbers *= np.uint64(0x9E3779B97F4A7C15)
    numbers += np.frombuffer(start, "<u8")[0]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers ^= numbers >> np.uint64(shift)
        numbers *= np.uint64(factor)
    numbers ^= numbers >> np.uint64(31)
    low_bits = np.uint64((1 << (length - 1).bit_length()) - 1)
    numbers &= ~low_bits
    numbers |= np.arange(length, dtype=np.uint64)
    numbers.sort()
    numbers &= low_bits
    return numbers.view(np.int64)


def decode_sampler_state(state: Mapping[str, object]) -> SamplerState:
    """The state as a record. Raises CheckpointError for anything that is none."""
    try:
        decoded = decode_builtins(state, SamplerState)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"this is no state of a ResumableSampler: {error}") from error
    if decoded.global_batch_size % decoded.world_size:
        raise CheckpointError(
            f"this is no state of a ResumableSampler: a global batch of {decoded.global_batch_size} samples is not "
            f"the same for each of {decoded.world_size} ranks"
        )
    return decoded


def position_report(stored: Mapping[str, object], now: Mapping[str, object]) -> PositionReport:
    """Whether a sampler whose state is `now` goes on from `stored` with the very samples that were to come.

    The position of `now` does not count. Another world or batch size leaves the order of the samples as it is; what it
    may change is how many of the last ones of an epoch are dropped or given twice. Raises CheckpointError for what is
    no state of a sampler.
    """
    old, new = decode_sampler_state(stored), decode_sampler_state(now)
    reasons = []
    if old.dataset_length != new.dataset_length:
        reasons.append(f"the dataset has {new.dataset_length} samples, it had {old.dataset_length}")
    if None not in (old.fingerprint, new.fingerprint) and old.fingerprint != new.fingerprint:
        reasons.append(f"the dataset's fingerprint is {new.fingerprint!r}, it was {old.fingerprint!r}")
    if old.shuffle != new.shuffle:
        reasons.append("the samples are {} shuffled".format("now" if new.shuffle else "no longer"))
    elif old.shuffle and old.seed != new.seed:
        reasons.append(f"the seed is {new.seed}, it was {old.seed}")
    is_other_data = bool(reasons)
    if old.dataset_length == new.dataset_length:
        reasons += _changed_ends(old, new)
    return PositionReport(not reasons, "; ".join(reasons), is_other_data)


def _changed_ends(old: SamplerState, new: SamplerState) -> list[str]:
    cuts, consumed = (_Cuts.of(old), _Cuts.of(new)), old.consumed_samples
    found = []
    for which, start in (("this epoch", consumed), ("every later epoch", 0)):
        was, is_ = (one.end_from(start) for one in cuts)
        if was != is_:
            found.append(f"{which} ends after {is_} of {new.dataset_length} samples, it would have after {was}")
        was, is_ = (one.repeated_from(start) for one in cuts)
        if was != is_:
            found.append(f"{which} gives {is_} samples twice to fill its last batch, it would have {was}")
        if consumed == 0:
            break
    if found:
        found[-1] += (
            f" (global batch {old.global_batch_size} -> {new.global_batch_size}, "
            f"ranks {old.world_size} -> {new.world_size}, drop_last {old.drop_last} -> {new.drop_last})"
        )
    return found


def _place_in_group() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
