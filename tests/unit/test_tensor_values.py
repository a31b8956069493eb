"""Values of one key: statistics, slices and .npy files are what was saved, however it lies."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distckpt import CorruptionError, MismatchError, tensor_statistics, tensor_values
from distckpt.elements import is_of_numpy, numpy_dtype, view_elements
from distckpt.geometry import Box
from distckpt.shard_file import DTYPES
from distckpt.storage import Storage
from distckpt.tensor_values import (
    MIN_MEMORY_BYTES,
    find_key,
    npy_dtype,
    parse_slice,
    read_bands,
    read_values,
    write_npy,
)
from distckpt.testing import MemoryStorage
from tests.unit.damage import change, flip, newest
from tests.unit.laid_out import Layout, laid_out, random_tensor
from tests.unit.saved_roots import RANKS, saved_root

WHOLE = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)
LONG = np.arange(3 * MIN_MEMORY_BYTES // 8, dtype=np.int64).reshape(24, -1)


@pytest.fixture(scope="module")
def root() -> MemoryStorage:
    tensors = {"w": torch.from_numpy(WHOLE), "none": torch.zeros(0, 3), "scalar": torch.tensor(7)}
    return laid_out(tensors, Layout(2, {"w": 1}), values={"lr": 0.5, "sizes": (1, 2)})


@pytest.fixture(scope="module")
def long() -> MemoryStorage:
    return laid_out({"w": torch.from_numpy(LONG)}, Layout(3, {"w": 1}))


def test_statistics_are_those_of_numpy(root: MemoryStorage, long: MemoryStorage) -> None:
    found = tensor_statistics(root, "w")
    assert (found.shape, found.dtype, found.elements, found.bytes) == ((4, 5, 6), "float32", 120, 480)
    assert (found.min, found.max, found.mean, found.zeros, found.nans) == (0.0, 119.0, 59.5, 1, 0)
    assert found.std == pytest.approx(WHOLE.std(dtype=np.float64))
    assert found.norm == pytest.approx(np.linalg.norm(WHOLE.astype(np.float64)))
    told: list[int] = []
    found = tensor_statistics(long, "w", memory_bytes=MIN_MEMORY_BYTES, on_bytes=told.append)
    assert (found.min, found.max, found.mean) == (0, LONG.size - 1, LONG.mean())
    assert sum(told) == LONG.nbytes
    assert len(told) > 20
    assert tensor_statistics(root, "none").mean is None
    assert tensor_statistics(root, "scalar").max == 7


def read(storage: Storage, key: str, text: str) -> np.ndarray:
    stored = find_key(storage, key)
    assert stored.entry is not None
    box, shape = parse_slice(text, stored.entry.global_shape)
    parts = [elements.copy() for elements in read_bands(stored, box, memory_bytes=MIN_MEMORY_BYTES)]
    return np.concatenate(parts).reshape(shape) if parts else np.zeros(shape)


RANGES = st.one_of(
    st.just(":"),
    st.integers(-4, 3).map(str),
    st.tuples(*[st.one_of(st.just(""), st.integers(-8, 8).map(str))] * 2).map(":".join),
)


@given(st.lists(RANGES, max_size=3), st.booleans())
def test_a_slice_is_that_of_numpy(root: MemoryStorage, parts: list[str], has_ellipsis: bool) -> None:
    text = ", ".join(["...", *parts] if has_ellipsis else parts)
    expected = eval(f"WHOLE[{text}]") if text else WHOLE
    assert np.array_equal(read(root, "w", text), expected)


def test_a_slice_across_many_bands_is_that_of_numpy(long: MemoryStorage) -> None:
    assert np.array_equal(read(long, "w", "3:20, 7:200000"), LONG[3:20, 7:200000])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("4", "index 4 is outside a dimension of 4"),
        ("-5", "index -5 is outside"),
        ("::2", "a step is not taken"),
        ("a", "'a' is not one of"),
        ("0,0,0,0", "has 4 dimensions, and the tensor 3"),
        ("..., ...", "more than one"),
    ],
)
def test_a_slice_that_is_none_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_slice(text, WHOLE.shape)


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_npy_file_of_every_dtype_is_loaded_by_numpy_alone(dtype: str, raw: bool, tmp_path: Path) -> None:
    tensor = random_tensor(dtype, (6, 4), 1)
    storage = laid_out({"w": tensor}, Layout(2, {"w": 1}))
    data = tensor.view(torch.uint8).numpy().tobytes()
    written = write_npy(find_key(storage, "w"), tmp_path / "w.npy", raw=raw)
    loaded = np.load(tmp_path / "w.npy")
    assert loaded.dtype == written == npy_dtype(dtype, raw=raw)
    assert (loaded.shape, loaded.dtype.name in dir(np)) == ((6, 4), True)
    stored = view_elements(data, dtype, (6, 4))
    if is_of_numpy(dtype):
        assert loaded.dtype == numpy_dtype(dtype)
    if is_of_numpy(dtype) or loaded.dtype.kind == "u":
        assert loaded.tobytes() == data
    else:
        with np.errstate(invalid="ignore"):
            expected = stored.astype(np.float32)
        found = np.stack([loaded.real, loaded.imag], -1) if dtype == "complex32" else loaded
        assert np.array_equal(found, expected, equal_nan=True)
    assert [path.name for path in tmp_path.iterdir()] == ["w.npy"]


def test_an_npy_file_holds_tensors_longer_than_the_memory(long: MemoryStorage, tmp_path: Path) -> None:
    write_npy(find_key(long, "w"), tmp_path / "w.npy", memory_bytes=MIN_MEMORY_BYTES)
    assert np.array_equal(np.load(tmp_path / "w.npy"), LONG)
    write_npy(find_key(long, "w"), tmp_path / "w.npy", where="5, :10", force=True)
    assert np.array_equal(np.load(tmp_path / "w.npy"), LONG[5, :10])


def test_what_is_there_is_not_written_over_unless_forced(root: MemoryStorage, tmp_path: Path) -> None:
    file = tmp_path / "w.npy"
    file.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="--force"):
        write_npy(find_key(root, "w"), file)
    file.unlink()

    def made_meanwhile(_: int) -> None:
        file.write_bytes(b"precious")

    with pytest.raises(FileExistsError, match="--force"):
        write_npy(find_key(root, "w"), file, on_bytes=made_meanwhile)
    assert file.read_bytes() == b"precious"
    write_npy(find_key(root, "w"), file, force=True)
    assert np.array_equal(np.load(file), WHOLE)
    assert [path.name for path in tmp_path.iterdir()] == ["w.npy"]


@pytest.mark.parametrize("force", [False, True])
def test_a_file_gets_its_name_once_it_is_durable(
    root: MemoryStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    calls: list[str] = []

    def noted(name: str, call: Callable[..., object], *arguments: object) -> object:
        calls.append(name)
        return call(*arguments)

    for owner, name in ((os, "fsync"), (os, "link"), (os, "replace"), (tensor_values, "sync_directory")):
        monkeypatch.setattr(owner, name, partial(noted, name, getattr(owner, name)))
    write_npy(find_key(root, "w"), tmp_path / "w.npy", force=force)
    assert calls == ["fsync", "replace" if force else "link", "sync_directory"]


def test_a_tensor_that_is_damaged_leaves_no_file_and_the_old_one_alone(tmp_path: Path) -> None:
    storage = saved_root(1)
    directory, index = newest(storage)
    change(storage, f"{directory}/{index.files[2].name}", flip(3 << 20))
    (tmp_path / "old.npy").write_bytes(b"old")
    for name, force in (("new.npy", False), ("old.npy", True)):
        with pytest.raises(CorruptionError, match="block 3"):
            write_npy(find_key(storage, "weight"), tmp_path / name, force=force, memory_bytes=MIN_MEMORY_BYTES)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("old.npy", b"old")]
    with pytest.raises(CorruptionError, match="block 3"):
        tensor_statistics(storage, "weight")


def test_a_wrong_key_is_an_error_that_names_near_ones(root: MemoryStorage) -> None:
    with pytest.raises(MismatchError, match=r"no key 'scalr'; did you mean 'scalar'\?"):
        find_key(root, "scalr")
    with pytest.raises(MismatchError, match=r"no key '##'; its keys look like .*'w'") as caught:
        find_key(root, "##")
    assert caught.value.missing == ("##",)
    with pytest.raises(MismatchError, match="'lr' is a value, not a tensor"):
        tensor_statistics(root, "lr")


def test_values_are_their_json(root: MemoryStorage) -> None:
    (value,) = read_values(find_key(root, "sizes"))
    assert (value.coordinates, bytes(value.value)) == ({}, b'{"%tuple":[1,2]}')
    per_rank = read_values(find_key(saved_root(1), "random"))
    assert [bytes(one.value) for one in per_rank] == [b'{"%%tuple":[1,%d]}' % rank for rank in range(RANKS)]


def test_the_box_of_a_slice_has_all_dimensions() -> None:
    assert parse_slice("1, 2:4", (4, 5, 6)) == (Box((1, 2, 0), (1, 2, 6)), (2, 6))


def test_too_little_memory_is_refused(root: MemoryStorage) -> None:
    with pytest.raises(ValueError, match="expected at least"):
        tensor_statistics(root, "w", memory_bytes=1 << 20)


def test_a_link_is_followed_and_what_is_no_file_is_not_replaced(root: MemoryStorage, tmp_path: Path) -> None:
    """`--npy /dev/null --force` must not make a file of it."""
    link, target, pipe = (tmp_path / name for name in ("link", "target", "pipe"))
    link.symlink_to(target)
    with pytest.raises(FileExistsError, match="--force"):
        write_npy(find_key(root, "w"), link)
    write_npy(find_key(root, "w"), link, force=True)
    assert link.is_symlink()
    assert np.array_equal(np.load(target), WHOLE)
    os.mkfifo(pipe)
    read: list[bytes] = []
    for force in (False, True):
        reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
        reader.start()
        write_npy(find_key(root, "w"), pipe, force=force)
        assert pipe.is_fifo()
        reader.join(30)
    assert read == [target.read_bytes()] * 2


def test_what_cannot_be_a_file_is_refused_before_anything_is_read(root: MemoryStorage, tmp_path: Path) -> None:
    stored = find_key(root, "w")
    for path, error in ((tmp_path, IsADirectoryError), (tmp_path / "no" / "w.npy", FileNotFoundError)):
        with pytest.raises(error, match=re.escape(str(path))):
            write_npy(stored, path, force=True, on_bytes=lambda _: pytest.fail("read"))
    write_npy(stored, tmp_path / f"{'n' * 250}.npy")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_wrong_key_is_answered_in_a_few_words_however_long_keys_are() -> None:
    long = "k" * 100_000
    names = [*(f"{long}{i}" for i in range(4)), *(f"layer.{i}.w" for i in range(3000))]
    storage = laid_out({}, Layout(1), values=dict.fromkeys(names, 0))
    for key in (long, f"{long}x", "nothing"):
        with pytest.raises(MismatchError) as raised:
            find_key(storage, key)
        assert len(str(raised.value)) < 2000
    with pytest.raises(MismatchError, match=r"did you mean 'layer\.2999\.w'"):
        find_key(storage, "layer.2999.z")
