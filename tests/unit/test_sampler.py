"""Every sample of an epoch is given once, in one order, whatever worlds and batch sizes a run goes through."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from distckpt import Checkpointer, CheckpointError, ResumableSampler
from distckpt.coordinator import SingleProcess
from distckpt.testing import MemoryStorage
from distckpt.training.sampler import permutation, position_report

FIRST = [8, 1, 4, 2, 6, 0, 7, 3, 5, 9]
Layout = tuple[int, int]  # ranks, batch size of each


def make_ranks(
    length: int, layout: Layout, *, state: dict[str, object] | None = None, drop_last: bool = True, seed: int = 3
) -> list[ResumableSampler]:
    """One sampler for each rank of a job that has loaded `state`."""
    ranks = [
        ResumableSampler(length, layout[1], rank=rank, world_size=layout[0], drop_last=drop_last, seed=seed)
        for rank in range(layout[0])
    ]
    for sampler in ranks:
        if state is not None:
            sampler.load_state_dict(json.loads(json.dumps(state)))
    return ranks


def global_batches(ranks: list[ResumableSampler]) -> Iterator[list[int]]:
    """One epoch's rest, as a loop consumes it: what all ranks are given in one step, in the order of the ranks."""
    for batches in zip(*ranks, strict=True):
        assert len({len(batch) for batch in batches}) == 1
        for sampler in ranks:
            sampler.advance()
        yield [sample for batch in batches for sample in batch]


LAYOUTS = st.tuples(st.integers(1, 5), st.integers(1, 4))


@given(
    length=st.integers(20, 90),
    drop_last=st.booleans(),
    switches=st.lists(st.tuples(LAYOUTS, st.integers(0, 6)), min_size=1, max_size=6),
    last=LAYOUTS,
)
def test_every_sample_is_given_once_whatever_the_layouts(
    length: int, drop_last: bool, switches: list[tuple[Layout, int]], last: Layout
) -> None:
    given_out: list[int] = []
    state: dict[str, object] | None = None
    for layout, steps in switches:
        ranks = make_ranks(length, layout, state=state, drop_last=drop_last)
        batches = global_batches(ranks)
        for _ in range(steps):
            if ranks[0].epoch > 0:
                break
            given_out += next(batches)
        states = [sampler.state_dict() for sampler in ranks]
        assert all(one == states[0] for one in states)
        state = states[0]
        if ranks[0].epoch > 0:
            break
    else:
        ranks = make_ranks(length, last, state=state, drop_last=drop_last)
        if ranks[0].epoch == 0:
            for batch in global_batches(ranks):
                given_out += batch
    assert ranks[0].epoch == 1
    assert ranks[0].consumed_samples == 0
    order = permutation(length, 3, 0).tolist()
    if drop_last:
        assert given_out == order[: len(given_out)]
        assert length - len(given_out) < max(ranks * size for (ranks, size), _ in [*switches, (last, 0)])
    else:
        assert given_out[:length] == order
        repeated = given_out[length:]
        assert repeated == (order * 2)[: len(repeated)]
        assert len(repeated) < len(ranks)


@given(
    length=st.integers(20, 200), layouts=st.tuples(LAYOUTS, LAYOUTS), steps=st.integers(0, 9), drop_last=st.booleans()
)
def test_position_is_exact_if_and_only_if_the_same_samples_follow(
    length: int, layouts: tuple[Layout, Layout], steps: int, drop_last: bool
) -> None:
    before = make_ranks(length, layouts[0], drop_last=drop_last)
    for sampler in before:
        sampler.advance(steps)
    state = before[0].state_dict()
    after = make_ranks(length, layouts[1], drop_last=drop_last)
    report = position_report(state, after[0].state_dict())
    for sampler in after:
        sampler.load_state_dict(state)

    def follow(ranks: list[ResumableSampler]) -> list[list[int]]:
        """The rest of this epoch, and two more."""
        epochs: dict[int, list[int]] = {epoch: [] for epoch in range(before[0].epoch, before[0].epoch + 3)}
        while (epoch := ranks[0].epoch) in epochs:
            for batch in global_batches(ranks):
                epochs[epoch] += batch
        return list(epochs.values())

    assert report.is_exact == (follow(after) == follow(before)), report
    assert report.is_exact == (report.reason == "")


def test_half_the_ranks_with_twice_the_accumulation_see_the_same_samples_in_each_step() -> None:
    four, two = make_ranks(64, (4, 2)), make_ranks(64, (2, 2))
    steps = list(global_batches(four))
    halves = list(global_batches(two))
    assert [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)] == steps


def test_order_of_an_epoch_is_a_permutation_that_stays_as_it_is() -> None:
    # Stored positions mean these orders: they must never change.
    assert permutation(10, 0, 0).tolist() == FIRST
    assert permutation(10, 0, 1).tolist() != FIRST
    assert permutation(10, 1, 0).tolist() != FIRST
    assert sorted(permutation(1000, 7, 3).tolist()) == list(range(1000))


def test_shuffle_gives_no_place_any_sample_more_often_than_another() -> None:
    counts = np.zeros((6, 6))
    for epoch in range(6000):
        counts[np.arange(6), permutation(6, 11, epoch)] += 1
    # 1000 expected in each of 36 cells, with a deviation of 29.
    assert np.abs(counts - 1000).max() < 150


def test_without_shuffling_samples_come_in_their_own_order() -> None:
    sampler = ResumableSampler(7, 3, shuffle=False, drop_last=False)
    assert list(sampler) == [[0, 1, 2], [3, 4, 5], [6]]


def test_last_batch_is_filled_from_the_start_so_that_all_ranks_get_as_much() -> None:
    ranks = [ResumableSampler(13, 2, rank=rank, world_size=4, shuffle=False, drop_last=False) for rank in range(4)]
    assert [list(sampler) for sampler in ranks] == [
        [[0, 1], [8, 9]],
        [[2, 3], [10, 11]],
        [[4, 5], [12, 0]],
        [[6, 7], [1, 2]],
    ]
    tiny = [ResumableSampler(1, 2, rank=rank, world_size=4, shuffle=False, drop_last=False) for rank in range(4)]
    assert [list(sampler) for sampler in tiny] == [[[0]]] * 4


def test_iterating_does_not_move_the_position_and_advancing_does() -> None:
    sampler = ResumableSampler(20, 4)
    first = list(sampler)
    assert (sampler.consumed_samples, len(sampler), len(first)) == (0, 5, 5)
    sampler.advance()
    assert (sampler.consumed_samples, len(sampler)) == (4, 4)
    assert list(sampler) == first[1:]
    sampler.advance(4)
    assert (sampler.epoch, sampler.consumed_samples, len(sampler)) == (1, 0, 5)
    assert list(sampler) != first


def test_loop_that_never_advances_is_told(caplog: pytest.LogCaptureFixture) -> None:
    sampler = ResumableSampler(8, 4)
    with caplog.at_level(logging.WARNING, "distckpt"):
        list(sampler)
        sampler.advance(2)
        list(sampler)
        assert not caplog.records
        list(sampler)
    assert "must call advance()" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_that_prefetch_resume_after_the_batch_that_was_consumed(workers: int) -> None:
    def loader(sampler: ResumableSampler) -> DataLoader[int]:
        return DataLoader(range(40), batch_sampler=sampler, num_workers=workers)  # type: ignore[arg-type]

    sampler, whole = ResumableSampler(40, 4), [batch.tolist() for batch in loader(ResumableSampler(40, 4))]
    seen = []
    for batch in loader(sampler):
        seen.append(batch.tolist())
        sampler.advance()
        if len(seen) == 3:
            break
    again = ResumableSampler(40, 4)
    again.load_state_dict(sampler.state_dict())
    assert seen + [batch.tolist() for batch in loader(again)] == whole


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("steps", [0, 3, 10, 13])
def test_stateful_data_loader_goes_on_where_it_was(workers: int, steps: int) -> None:
    loading = pytest.importorskip("torchdata.stateful_dataloader")

    def run(loader: object, sampler: ResumableSampler, count: int) -> list[list[int]]:
        batches: list[list[int]] = []
        while len(batches) < count:
            for batch in loader:  # type: ignore[attr-defined]
                batches.append(batch.tolist())
                sampler.advance()
                if len(batches) == count:
                    break
        return batches

    def make() -> tuple[ResumableSampler, object]:
        sampler = ResumableSampler(40, 4)
        return sampler, loading.StatefulDataLoader(range(40), batch_sampler=sampler, num_workers=workers)

    straight, whole = make()
    expected = run(whole, straight, 25)
    sampler, loader = make()
    seen = run(loader, sampler, steps)
    state = loader.state_dict()  # type: ignore[attr-defined]
    again, fresh = make()
    fresh.load_state_dict(state)  # type: ignore[attr-defined]
    rest = run(fresh, again, 25 - steps)
    assert seen + rest == expected
    assert again.state_dict() == straight.state_dict()


def test_position_goes_through_a_checkpoint() -> None:
    sampler, again = ResumableSampler(40, 4), ResumableSampler(40, 4)
    sampler.advance(13)
    with Checkpointer(MemoryStorage(), coordinator=SingleProcess()) as checkpointer:
        checkpointer.save({"data": sampler}, iteration=1)
        checkpointer.load({"data": again})
    assert again.state_dict() == sampler.state_dict()
    assert list(again) == list(sampler)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dataset_length": 101}, "has 101 samples, it had 100"),
        ({"fingerprint": "b"}, "fingerprint is 'b', it was 'a'"),
        ({"shuffle": False}, "no longer shuffled"),
        ({"seed": 8}, "seed is 8, it was 7"),
        ({"drop_last": False}, "this epoch ends after 100 of 100 samples, it would have after 96"),
        ({"global_batch_size": 4, "world_size": 2}, "ranks 4 -> 2"),
    ],
)
def test_inexact_position_says_why(changes: dict[str, object], reason: str) -> None:
    sampler = ResumableSampler(100, 2, rank=0, world_size=4, seed=7, fingerprint="a")
    sampler.advance(3)
    state = sampler.state_dict()
    assert str(position_report(state, state)) == "exact"
    report = position_report(state, state | changes)
    assert not report.is_exact
    assert reason in str(report)
    assert str(report).startswith("inexact, because ")


def test_world_that_leaves_the_epochs_ends_alike_is_exact() -> None:
    sampler = ResumableSampler(96, 2, rank=0, world_size=4, fingerprint="a")
    sampler.advance(3)
    other = ResumableSampler(96, 2, rank=1, world_size=2)
    assert position_report(sampler.state_dict(), other.state_dict()).is_exact


def test_dataset_that_shrank_below_the_position_starts_its_next_epoch() -> None:
    sampler = ResumableSampler(100, 10)
    sampler.advance(8)
    smaller = ResumableSampler(50, 10)
    smaller.load_state_dict(sampler.state_dict())
    assert (smaller.epoch, smaller.consumed_samples) == (1, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": -1},
        {"consumed_samples": "3"},
        {"world_size": 0},
        {"global_batch_size": 7, "world_size": 2},
        {"seed": None},
    ],
)
def test_state_of_something_else_is_refused(changes: dict[str, object]) -> None:
    sampler = ResumableSampler(100, 2)
    with pytest.raises(CheckpointError, match="no state of a ResumableSampler"):
        sampler.load_state_dict(sampler.state_dict() | changes)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 11}, "every epoch would be empty"),
        ({"batch_size": 2, "rank": 0}, "give both or neither"),
        ({"batch_size": 2, "rank": 2, "world_size": 2}, "rank=2"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ResumableSampler(10, **arguments)  # type: ignore[arg-type]


def test_fingerprint_of_the_dataset_is_stored() -> None:
    one, other = (ResumableSampler(torch.arange(10) + start, 2) for start in (0, 1))  # type: ignore[arg-type]
    assert not position_report(one.state_dict(), other.state_dict()).is_exact
    assert ResumableSampler(range(10), 2, fingerprint="mine").state_dict()["fingerprint"] == "mine"
    assert ResumableSampler(10, 2).state_dict()["fingerprint"] is None
