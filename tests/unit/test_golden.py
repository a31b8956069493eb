"""Checkpoints of format version 1, written once and committed: every later version loads them bit for bit.

The bytes of the encoders are pinned here and beside each encoder's tests; a change of any of them is a change of
the format, which docs/format.md describes and its version counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from distckpt import Checkpointer, PerRank, ShardedTensor
from distckpt.shard_file import (
    CHECKSUM_ENTRY,
    DTYPES,
    PER_RANK_ENTRY,
    Chunk,
    decode_header,
    plan_file,
    split_into_files,
)
from distckpt.testing import run_ranks
from tests.data import make_v1

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

SINGLE, SHARDED = make_v1.ROOT / "single", make_v1.ROOT / "sharded"
SHARD_FILES = sorted(make_v1.ROOT.rglob("*.safetensors"))


@pytest.fixture(autouse=True)
def _unchanged() -> Iterator[None]:
    before = digests()
    yield
    assert digests() == before


def digests() -> dict[Path, str]:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in make_v1.ROOT.rglob("*") if path.is_file()}


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), where
        assert as_bytes(found) == as_bytes(expected), where
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype.newbyteorder("="), where
        assert np.array_equal(found, expected), where
    elif isinstance(expected, dict):
        assert set(found) == set(expected), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_same(found[i], value, f"{where}[{i}]")
    elif isinstance(expected, PerRank):
        assert_same(found.value, expected.value, where)
    elif isinstance(expected, ShardedTensor):
        assert_same(found.data, expected.data, where)
    else:
        assert repr(found) == repr(expected), where


def emptied(value: Any) -> Any:
    """The same containers with other values in them; tensors and arrays are zeroed."""
    if isinstance(value, torch.Tensor):
        return torch.zeros(value.nbytes, dtype=torch.uint8).view(value.dtype).reshape(value.shape)
    if isinstance(value, np.ndarray):
        return np.zeros_like(value)
    if isinstance(value, ShardedTensor):
        value.data.zero_()
        return value
    if isinstance(value, PerRank):
        return PerRank(None, value.axes, value.on_change)
    if type(value) is dict:
        return {key: emptied(item) for key, item in value.items()}
    if type(value) in (list, tuple) and any(isinstance(v, (torch.Tensor, dict)) for v in value):
        return type(value)(emptied(item) for item in value)
    return "emptied"


def test_single_process_checkpoint_loads() -> None:
    expected = make_v1.single_state()
    target = emptied(expected)
    # A list with dicts in it is one value unless it has tensors in it.
    target["values"] = {key: "emptied" for key in expected["values"] if key != "no entries"} | {"no entries": {}}
    with Checkpointer(SINGLE) as checkpointer:
        report = checkpointer.load(target)
    assert report.iteration == 5
    assert not report.warnings
    assert_same(target, expected)


def test_single_process_checkpoint_is_read() -> None:
    expected = make_v1.single_state()
    del expected["rng"]
    with Checkpointer(SINGLE) as checkpointer:
        assert checkpointer.iterations() == [5]
        assert_same(checkpointer.read(), expected)


@pytest.mark.parametrize("iteration", [10, 20])
def test_sharded_checkpoint_loads_on_its_own_layout(iteration: int) -> None:
    def load(coordinator: Any) -> None:
        tp, pp = coordinator.rank % 2, coordinator.rank // 2
        expected = make_v1.sharded_state(tp, pp, iteration)
        target = emptied(make_v1.sharded_state(tp, pp, iteration))
        target["optimizer"]["groups"] = None
        with Checkpointer(SHARDED, mesh={"tp": (tp, 2), "pp": (pp, 2)}, coordinator=coordinator) as checkpointer:
            assert checkpointer.load(target, iteration).iteration == iteration
        assert_same(target, expected)

    run_ranks(4, load)


def test_sharded_checkpoint_loads_on_another_layout() -> None:
    expected = make_v1.full_tensors(20)

    def load(coordinator: Any) -> None:
        targets = {}
        for key, tensor in expected.items():
            low, high = (len(tensor) * r // 3 for r in (coordinator.rank, coordinator.rank + 1))
            data = torch.zeros_like(tensor[low:high])
            offset = (low, *(0 for _ in tensor.shape[1:]))
            targets[key] = ShardedTensor(key, data, global_shape=tensor.shape, global_offset=offset)
        data_position = PerRank("kept", axes=("tp",), on_change="skip")
        state = {"model": targets, "data": data_position}
        mesh = {"tp": (coordinator.rank, 3), "pp": (0, 1)}
        with Checkpointer(SHARDED, mesh=mesh, coordinator=coordinator) as checkpointer:
            report = checkpointer.load(state, strict=False)
        assert (report.iteration, report.skipped, report.missing) == (20, ("data",), ())
        assert data_position.value == "kept"
        for key, tensor in expected.items():
            low, high = (len(tensor) * r // 3 for r in (coordinator.rank, coordinator.rank + 1))
            assert_same(targets[key].data, tensor[low:high].contiguous(), key)

    run_ranks(3, load)


def test_sharded_checkpoint_is_read_whole() -> None:
    with Checkpointer(SHARDED) as checkpointer:
        assert checkpointer.iterations() == [10, 20]
        state = checkpointer.read(10)
    full = make_v1.full_tensors(10)
    optimizer = make_v1.sharded_state(0, 0, 10)["optimizer"]
    expected = {
        "model": {key: tensor for key, tensor in full.items() if key != "exp_avg"},
        "optimizer": {**optimizer, "exp_avg": full["exp_avg"]},
        "iteration": 10,
    }
    assert_same(state, expected)


# Other readers


def chunk_of(file: str, entry: str) -> torch.Tensor:
    """What an entry of a golden shard file holds, by the formulas."""
    key, _, offset = entry.partition("@")
    if "single" in file:
        state: Any = make_v1.single_state()
        for name in key.split("/"):
            state = state[name]
        return state
    iteration = 10 if "iter_0000010" in file else 20
    full = make_v1.full_tensors(iteration) | {"optimizer/step": torch.tensor(float(iteration))}
    return full[key] if not offset else full[key][tuple(slice(int(o), None) for o in offset.split(","))]


def test_there_are_golden_shard_files() -> None:
    assert len(SHARD_FILES) == 1 + 2 * 4


@pytest.mark.parametrize("path", SHARD_FILES, ids=lambda path: f"{path.parts[-3]}-{path.parts[-2]}-{path.name[:11]}")
def test_safetensors_opens_golden_files(path: Path) -> None:
    with safe_open(path, framework="pt") as file, safe_open(path, framework="np") as arrays:
        metadata = file.metadata()
        assert (metadata["format"], metadata["version"]) == ("distckpt", "1")
        specs = json.loads(metadata["tensors"])
        for entry in file.keys():  # noqa: SIM118
            if entry in (PER_RANK_ENTRY, CHECKSUM_ENTRY):
                continue
            found = file.get_tensor(entry)
            key = entry.partition("@")[0]
            if path.parts[-3] == "sharded" or key.startswith(("dtypes/", "scalars/")):
                whole = chunk_of(str(path), entry)
                spec = specs[key]
                extent = found.shape[: len(spec["global_shape"])]
                assert_bytes = as_bytes(whole[tuple(slice(0, n) for n in extent)].contiguous())
                assert as_bytes(found) == assert_bytes, entry
                assert tuple(found.shape) == (*extent, *DTYPES[spec["dtype"]].trailing)
                if DTYPES[spec["dtype"]].stored not in ("BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0"):
                    assert arrays.get_tensor(entry).tobytes() == assert_bytes, entry


# Bytes

CHUNKS = [
    Chunk("w", "bfloat16", (2, 0), (2, 3), False),
    Chunk("a/b", "complex128", (0,), (1,), True),
    Chunk("__x@%\u00e9", "uint8", (), (), True),
    Chunk("e", "float32", (0,), (2,), True),
]
HEADER = (
    b'{"__metadata__":{"format":"distckpt","note":"\\"q\\""},'
    b'"a/b":{"dtype":"F64","shape":[1,2],"data_offsets":[0,16]},'
    b'"e":{"dtype":"F32","shape":[2],"data_offsets":[16,24]},'
    b'"w@2,0":{"dtype":"BF16","shape":[2,3],"data_offsets":[24,36]},'
    b'"%5F%5Fx%40%25%C3%A9":{"dtype":"U8","shape":[],"data_offsets":[36,37]},'
    b'"__per_rank__":{"dtype":"U8","shape":[7],"data_offsets":[37,44]},'
    b'"__crc32c__":{"dtype":"U32","shape":[1],"data_offsets":[44,48]}}'
)


def test_header_bytes() -> None:
    (order,) = split_into_files(CHUNKS)
    layout = plan_file(CHUNKS, order).lay_out(b'{"r":1}', {"format": "distckpt", "note": '"q"'})
    assert layout.header == (4088).to_bytes(8, "little") + HEADER.ljust(4088)
    assert layout.order == (1, 3, 0, 2)
    assert layout.starts.tolist() == [4096, 4112, 4120, 4132]
    assert (layout.per_rank_start, layout.per_rank_bytes, layout.checksum_start) == (4133, 7, 4140)
    decode_header(layout.header, file_name="file", file_bytes=layout.size_bytes)


@pytest.mark.parametrize("path", SHARD_FILES, ids=lambda path: f"{path.parts[-3]}-{path.parts[-2]}-{path.name[:11]}")
def test_golden_headers_are_laid_out_to_the_same_bytes_again(path: Path) -> None:
    data = path.read_bytes()
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    decoded = decode_header(header, file_name=path.name, file_bytes=len(data))
    specs = json.loads(decoded.metadata["tensors"])
    chunks = []
    for (name, entry), key in zip(decoded.entries.items(), decoded.keys(), strict=False):
        spec = specs[key]
        whole = "@" not in name
        offset = tuple(map(int, name.partition("@")[2].split(","))) if not whole else (0,) * len(spec["global_shape"])
        chunks.append(Chunk(key, spec["dtype"], offset, entry.shape[: len(offset)], whole))
    per_rank = data[decoded.start_of(PER_RANK_ENTRY) : decoded.start_of(CHECKSUM_ENTRY)]
    (order,) = split_into_files(chunks)
    assert plan_file(chunks, order).lay_out(per_rank, decoded.metadata).header == header
