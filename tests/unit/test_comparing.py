"""Comparing checkpoints: the answer is numpy's, whatever the layouts are, and what cannot be read is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt import CheckpointNotFoundError, ComparisonReport, PerRank, compare_checkpoints
from distckpt.checkpointer import Checkpointer
from distckpt.commit import list_commits
from distckpt.coordinator import Coordinator
from distckpt.paired_reading import MIN_MEMORY_BYTES
from distckpt.shard_file import BLOCK_BYTES, DTYPES
from distckpt.storage import PosixStorage
from distckpt.testing import MemoryStorage, run_ranks
from tests.unit.damage import change, flip, newest
from tests.unit.laid_out import Layout, laid_out, layouts, random_tensor, save_laid_out
from tests.unit.saved_roots import RANKS, ROWS, saved_root

SHAPES = {"w": (5, 4), "v": (7,), "cube": (3, 4, 5), "scalar": (), "none": (0, 3)}


@settings(max_examples=15)
@given(st.data())
def test_any_two_layouts_differ_by_what_numpy_says(data: st.DataObject) -> None:
    a = {key: random_tensor("float32", shape, 1) for key, shape in SHAPES.items()}
    b = {key: tensor.clone() for key, tensor in a.items()}
    for key, tensor in b.items():
        flat = tensor.reshape(-1)
        for i in data.draw(st.sets(st.integers(0, len(flat) - 1), max_size=3)) if len(flat) else ():
            flat[i] = data.draw(st.floats(width=32))
        b[key] = flat.reshape(tensor.shape)
    roots = laid_out(a, data.draw(layouts(SHAPES))), laid_out(b, data.draw(layouts(SHAPES)))
    report = compare_checkpoints(*roots)
    found = {one.key: one for one in report.tensors}
    assert report.tensors_compared == len(SHAPES)
    for key in SHAPES:
        x, y = a[key].numpy(), b[key].numpy()
        differ = np.asarray(x.view(np.uint32) != y.view(np.uint32))
        assert (key in found) == differ.any()
        if key not in found:
            continue
        one = found[key]
        assert one.differing == one.outside == differ.sum()
        assert one.first_index == tuple(np.argwhere(differ)[0].tolist())
        is_nan = np.isnan(x) | np.isnan(y)
        assert one.nans == (differ & is_nan).sum()
        with np.errstate(invalid="ignore"):  # Signalling NaNs, and infinities that are the same.
            apart = np.abs(x.astype(np.float64) - y.astype(np.float64))[differ & ~is_nan]
        assert one.max_abs == apart.max(initial=0)
    assert report.is_equal == (not found)
    assert report.tensors_same_bits == len(SHAPES) - len(found)


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_of_every_dtype_is_compared(dtype: str) -> None:
    a, b = random_tensor(dtype, (6, 4), 1), random_tensor(dtype, (6, 4), 1)
    b.view(torch.uint8)[3, 0] ^= 1
    first = laid_out({"w": a, "same": a}, Layout(2, {"w": 0}))
    report = compare_checkpoints(first, laid_out({"w": b, "same": a}, Layout(2, {"w": 1})))
    (one,) = report.tensors
    assert (one.key, one.dtype_a, one.differing, one.first_index) == ("w", dtype, 1, (3, 0))
    assert not report.is_equal
    assert compare_checkpoints(first, first).is_equal


def test_tensors_longer_than_the_memory_are_compared_whole() -> None:
    a = torch.arange(3 * MIN_MEMORY_BYTES // 8, dtype=torch.int64).reshape(24, -1)
    b = a.clone()
    b[20, 17] += 2
    b[23, 5] -= 3
    first, second = laid_out({"w": a}, Layout(2, {"w": 0})), laid_out({"w": b}, Layout(3, {"w": 1}))
    told: list[int] = []
    report = compare_checkpoints(first, second, memory_bytes=MIN_MEMORY_BYTES, on_bytes=told.append)
    (one,) = report.tensors
    assert (one.differing, one.first_index, one.max_abs) == (2, (20, 17), 3)
    assert (one.first_a, one.first_b) == (int(a[20, 17]), int(a[20, 17]) + 2)
    assert sum(told) == a.nbytes
    assert len(told) > 40
    stored = sum(file.size_bytes for root in (first, second) for file in newest(root)[1].files)
    assert report.bytes_read < 1.1 * stored


def test_keys_shapes_dtypes_and_values_that_differ_are_listed() -> None:
    a = laid_out(
        {"w": torch.ones(2, 3), "x": torch.ones(4), "y": torch.ones(3), "old": torch.ones(1)},
        values={"lr": 0.1, "step": 7, "n": {"betas": (0.9, 0.95), "eps": 1e-8}, "gone": 1},
    )
    b = laid_out(
        {"w": torch.ones(3, 2), "x": torch.ones(4, dtype=torch.bfloat16), "y": torch.ones(3), "new": torch.ones(1)},
        values={"lr": 0.1, "step": 7.0, "n": {"betas": (0.9, 0.99), "eps": 1e-8}, "come": 1},
    )
    report = compare_checkpoints(a, b)
    assert [(one.key, one.kind) for one in report.only_in_a] == [("old", "tensor"), ("gone", "value")]
    assert [(one.key, one.kind) for one in report.only_in_b] == [("new", "tensor"), ("come", "value")]
    shape, dtype = report.tensors
    assert (shape.key, shape.shape_a, shape.shape_b, shape.differing) == ("w", (2, 3), (3, 2), None)
    assert (dtype.key, dtype.dtype_a, dtype.dtype_b, dtype.differing) == ("x", "float32", "bfloat16", 0)
    found = {one.path: (bytes(one.a or b""), bytes(one.b or b"")) for one in report.values}
    assert found == {"step": (b"7", b"7.0"), "n/betas[1]": (b"0.95", b"0.99")}
    assert (report.is_equal, report.is_complete) == (False, True)


def test_another_dtype_is_no_difference_if_that_is_asked_for() -> None:
    a, b = laid_out({"w": torch.ones(4)}), laid_out({"w": torch.ones(4, dtype=torch.bfloat16)})
    assert not compare_checkpoints(a, b).is_equal
    assert compare_checkpoints(a, b, ignore_dtype=True).is_equal
    other = laid_out({"w": torch.full((4,), 1.5, dtype=torch.bfloat16)})
    (one,) = compare_checkpoints(a, other, ignore_dtype=True).tensors
    assert (one.differing, one.max_abs) == (4, 0.5)


def test_what_differs_by_less_than_the_tolerance_is_equal() -> None:
    a = laid_out({"w": torch.tensor([1.0, 2.0])}, values={"lr": 0.1})
    b = laid_out({"w": torch.tensor([1.0, 2.001])}, values={"lr": 0.10001})
    assert compare_checkpoints(a, b, rtol=1e-3).is_equal
    assert not compare_checkpoints(a, b).is_equal
    report = compare_checkpoints(a, b, rtol=1e-5)
    assert ([one.key for one in report.tensors], [one.path for one in report.values]) == (["w"], ["lr"])
    assert compare_checkpoints(a, b, atol=1e-2).is_equal


def test_only_selected_keys_are_compared() -> None:
    a = laid_out({"model/w": torch.ones(2), "optimizer/w": torch.ones(2)}, values={"optimizer/lr": 1})
    b = laid_out({"model/w": torch.ones(2), "optimizer/w": torch.zeros(2)}, values={"optimizer/lr": 2})
    assert compare_checkpoints(a, b, select=["*model*"]).is_equal
    assert compare_checkpoints(a, b, drop=["*optimizer*"]).is_equal
    assert not compare_checkpoints(a, b, select=["*w"], drop=["*model*"]).is_equal


def test_worst_tensors_come_first() -> None:
    a = laid_out({"one": torch.zeros(2), "ten": torch.zeros(2), "nan": torch.zeros(2), "shape": torch.zeros(2)})
    b = laid_out(
        {
            "one": torch.ones(2),
            "ten": torch.full((2,), 10.0),
            "nan": torch.full((2,), torch.nan),
            "shape": torch.zeros(3),
        }
    )
    assert [one.key for one in compare_checkpoints(a, b).tensors] == ["shape", "nan", "ten", "one"]


def test_metadata_and_metrics_are_compared_if_that_is_asked_for() -> None:
    roots = [
        laid_out({"w": torch.ones(1)}, metadata={"run": run}, metrics={"%loss": loss})
        for run, loss in ((1, 2.5), (2, 2.25))
    ]
    assert compare_checkpoints(*roots).is_equal
    report = compare_checkpoints(*roots, metadata=True)
    assert [one.path for one in report.values] == ["metadata/run", "metrics"]


def with_per_rank(values: list[object]) -> MemoryStorage:
    """Of as many ranks; None: this one has none."""
    storage = MemoryStorage()

    def save(coordinator: Coordinator) -> None:
        mesh = {"pp": (coordinator.rank, len(values))}
        with Checkpointer(storage, mesh=mesh, coordinator=coordinator) as checkpointer:
            value = values[coordinator.rank]
            checkpointer.save({} if value is None else {"rng": PerRank(value, axes=("pp",))}, iteration=1)

    run_ranks(len(values), save)
    return storage


def test_per_rank_values_are_compared_by_coordinates() -> None:
    first = with_per_rank([{"seed": 1}, {"seed": 2}, {"seed": 3}])
    report = compare_checkpoints(first, with_per_rank([{"seed": 1}, {"seed": 5}, {"seed": 3}]))
    assert [(one.path, one.coordinates) for one in report.values] == [("rng/seed", {"pp": 1})]
    assert (bytes(report.values[0].a or b""), bytes(report.values[0].b or b"")) == (b"2", b"5")
    report = compare_checkpoints(first, with_per_rank([{"seed": 1}, {"seed": 2}]))
    assert [(one.path, one.coordinates) for one in report.values] == [("rng", None)]
    assert b"3" in bytes(report.values[0].a or b"")
    (one,) = compare_checkpoints(first, with_per_rank([{"seed": 1}, None, {"seed": 3}])).values
    assert (one.coordinates, bytes(one.a or b""), one.b) == ({"pp": 1}, b'{"seed":2}', None)
    assert compare_checkpoints(first, first).is_equal


def damaged(root: MemoryStorage, rank: int, position: int) -> MemoryStorage:
    directory, index = newest(root)
    change(root, f"{directory}/{index.files[rank].name}", flip(position))
    return root


def test_a_tensor_that_cannot_be_read_is_named_and_the_others_are_compared() -> None:
    sound, other = saved_root(1), saved_root(2)
    report = compare_checkpoints(sound, damaged(other, 1, 2 * BLOCK_BYTES + 5))
    weight, bias = report.tensors
    assert weight.key == "weight"
    assert weight.problem is not None
    assert weight.problem.startswith("B: ")
    assert "block 2" in weight.problem
    assert (bias.key, bias.differing, bias.max_abs) == ("bias", 5, 1)
    assert (report.is_equal, report.is_complete) == (False, False)


@pytest.mark.parametrize(("rank", "block"), [(0, 1), (RANKS - 1, ROWS // RANKS)])
def test_a_tensor_that_is_damaged_in_a_band_is_named_once(rank: int, block: int) -> None:
    broken = damaged(saved_root(1), rank, block * BLOCK_BYTES)
    report = compare_checkpoints(saved_root(1), broken, memory_bytes=MIN_MEMORY_BYTES)
    assert [one.key for one in report.tensors] == ["weight"]
    assert report.tensors_same_bits == report.tensors_compared - 1


def test_a_missing_file_is_named() -> None:
    root = saved_root(1)
    directory, index = newest(root)
    root.remove(f"{directory}/{index.files[2].name}")
    report = compare_checkpoints(saved_root(1), root)
    assert index.files[2].name in str(report.tensors[0].problem)
    assert [one.problem is not None for one in report.values] == [True]  # Its per-rank values.


def test_a_checkpoint_that_is_removed_meanwhile_is_not_called_damaged() -> None:
    root = saved_root(1)

    def remove(_: int) -> None:
        for name in root.list("iter_0000001"):
            root.remove(f"iter_0000001/{name}")

    with pytest.raises(CheckpointNotFoundError, match="removed while it was being compared"):
        compare_checkpoints(saved_root(1), root, on_bytes=remove)


def test_iterations_of_one_root_and_of_two_are_selected(tmp_path) -> None:
    for name, shift in (("a", 0), ("b", 1)):
        for iteration in (1, 2):
            tensors = {"w": torch.tensor([iteration + shift])}
            save_laid_out(PosixStorage(tmp_path / name), tensors, Layout(), iteration=iteration)
    a, b = tmp_path / "a", tmp_path / "b"

    def compared(report: ComparisonReport) -> tuple[int, int]:
        assert report.is_equal == (report.a.iteration == report.b.iteration + (report.a.root != report.b.root))
        return report.a.iteration, report.b.iteration

    assert compared(compare_checkpoints(a, b)) == (2, 2)
    assert compared(compare_checkpoints(a, b, 1)) == (1, 1)
    assert compared(compare_checkpoints(a, b, 1, "latest")) == (1, 2)
    assert compared(compare_checkpoints(a, b / "iter_0000001", 2)) == (2, 1)
    assert compared(compare_checkpoints(a / "iter_0000001", a / "iter_0000002")) == (1, 2)
    assert compared(compare_checkpoints(a, a, other_iteration=1)) == (2, 1)


def test_too_little_memory_is_refused() -> None:
    root = saved_root(1)
    assert list_commits(root)
    with pytest.raises(ValueError, match="expected at least"):
        compare_checkpoints(root, root, memory_bytes=1 << 20)


@pytest.mark.parametrize("globs", [{"select": ["modle/*"]}, {"drop": ["*.bais"]}])
def test_a_glob_that_no_key_matches_is_an_error_and_no_equality(globs: dict[str, list[str]]) -> None:
    storage = saved_root(1)
    with pytest.raises(ValueError, match="no key of either checkpoint matches"):
        compare_checkpoints(storage, storage, **globs)
