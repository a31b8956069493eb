"""Hashes of batches tell different data apart, and are the same again after a restart."""

from __future__ import annotations

import dataclasses
import random
from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, TensorDataset

from distckpt import fingerprint_of
from distckpt.training.fingerprint import hash_batch

Pair = namedtuple("Pair", ["left", "right"])


@dataclasses.dataclass
class Sample:
    tokens: torch.Tensor
    name: str


LARGE = torch.arange(100_000)
DIFFERENT = [
    None,
    0,
    1,
    1.0,
    True,
    "1",
    b"1",
    "",
    [],
    [[]],
    {},
    [1, 2],
    [[1], 2],
    [1, [2]],
    {"a": 1},
    {"a": 2},
    {"b": 1},
    {1, 2},
    torch.tensor([1.0, 2.0]),
    torch.tensor([1.0, 2.0]).double(),
    torch.tensor([[1.0, 2.0]]),
    torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    torch.zeros(0),
    torch.zeros(0, 3),
    torch.tensor([True, False]),
    torch.tensor([1 + 2j]),
    torch.tensor([1 + 2j]).conj(),
    np.array(["a", None], dtype=object),
    LARGE,
    LARGE + 1,
    torch.cat([LARGE[:-1], LARGE[:1]]),
    torch.empty(3, device="meta"),
    object(),
    Sample(torch.arange(3), "x"),
    Sample(torch.arange(3), "y"),
]


def test_different_batches_have_different_hashes() -> None:
    hashes = [hash_batch(batch) for batch in DIFFERENT]
    assert len(set(hashes)) == len(hashes)
    assert all(len(one) == 16 for one in hashes)


def test_equal_batches_have_equal_hashes_however_they_lie() -> None:
    grid = torch.arange(12.0).reshape(3, 4)
    assert hash_batch(grid) == hash_batch(grid.t().contiguous().t())
    assert hash_batch(grid) == hash_batch(grid.numpy())
    assert hash_batch({"a": 1, "b": 2}) == hash_batch({"b": 2, "a": 1}) == hash_batch(UserDict(a=1, b=2))
    assert hash_batch((1, 2)) == hash_batch([1, 2]) == hash_batch(Pair(1, 2))
    assert hash_batch({3, 1, 2}) == hash_batch({2, 3, 1})
    assert hash_batch(grid.requires_grad_()) == hash_batch(grid.detach())
    assert hash_batch(object()) == hash_batch(object())


def test_hashes_stay_as_they_are() -> None:
    # They lie in checkpoints: a later version must find the same.
    assert hash_batch({"tokens": torch.arange(6).reshape(2, 3), "names": ["a", "b"]}) == "b968a3824f820beb"
    assert hash_batch(LARGE) == "37357d415fde77ff"


@given(st.lists(st.integers(0, 255), min_size=1, max_size=6000), st.data())
def test_one_changed_byte_changes_the_hash(values: list[int], data: st.DataObject) -> None:
    batch = torch.tensor(values, dtype=torch.uint8)
    place = data.draw(st.integers(0, len(values) - 1))
    changed = batch.clone()
    changed[place] ^= data.draw(st.integers(1, 255))
    assert hash_batch(batch) != hash_batch(changed)


def test_batch_that_contains_itself_is_hashed_too() -> None:
    batch: list[object] = [1]
    batch += [batch, batch]
    assert hash_batch(batch) == hash_batch(batch)


class Noisy(Dataset[object]):
    """Draws from every global generator at each read."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> object:
        return index, random.random(), np.random.rand(), torch.rand(2)


class Lazy(Dataset[object]):
    """Opens its file at the first read."""

    file: object = None

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> object:
        self.file = "open"
        return index


class Unreadable(Lazy):
    def __getitem__(self, index: int) -> object:
        raise OSError("no disk here")


def test_datasets_of_other_content_length_or_type_have_other_fingerprints() -> None:
    data = torch.arange(1000.0)
    changed = data.clone()
    changed[-1] = 0
    fingerprints = [
        fingerprint_of(one)
        for one in (
            TensorDataset(data),
            TensorDataset(changed),
            TensorDataset(data[:-1]),
            data,
            data.tolist(),
            [],
            Lazy(),
        )
    ]
    assert len(set(fingerprints)) == len(fingerprints)
    assert fingerprint_of(TensorDataset(data)) == fingerprint_of(TensorDataset(data.clone()))


def test_reading_for_a_fingerprint_moves_no_generator_and_opens_nothing() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = Noisy()[0]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert fingerprint_of(Noisy()) == "Noisy, 5 items, content left out: items differ from read to read"
    assert hash_batch(Noisy()[0]) == hash_batch(expected)
    lazy = Lazy()
    assert "content left out" not in fingerprint_of(lazy)
    assert lazy.file is None


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (Unreadable(), "Unreadable, 5 items, content left out: reading an item raises OSError"),
        (iter([]), "list_iterator, of no known length, content left out"),
    ],
)
def test_content_that_cannot_be_read_is_left_out_and_said(dataset: object, expected: str) -> None:
    assert fingerprint_of(dataset) == expected


def test_fingerprint_of_a_hugging_face_dataset_is_its_own() -> None:
    dataset = Lazy()
    dataset._fingerprint = "5f3a"  # type: ignore[attr-defined]
    assert fingerprint_of(dataset) == "datasets:5f3a"
