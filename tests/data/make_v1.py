"""Writes the golden checkpoints of format version 1 below tests/data/v1. Run once; what it wrote is never edited.

    python -m tests.data.make_v1

The states are formulas, which the tests compute again. save_id, times and epochs are whatever they were.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distckpt import Checkpointer, PerRank, ShardedTensor
from distckpt.shard_file import DTYPES
from distckpt.testing import run_ranks

ROOT = Path(__file__).parent / "v1"
State = dict[str, Any]
TP, PP = 2, 2


def pattern(dtype: str, *shape: int) -> torch.Tensor:
    """Bytes that differ from element to element, as elements of any dtype; booleans alternate."""
    if dtype == "bool":
        return (torch.arange(math.prod(shape)) % 3 == 0).reshape(shape)
    size = math.prod(shape) * DTYPES[dtype].item_bytes
    data = torch.arange(size, dtype=torch.int64).mul(29).add(3).remainder(241).to(torch.uint8)
    return data.view(getattr(torch, dtype)).reshape(shape)


def single_state() -> State:
    """One process: every dtype, scalars, empty tensors, all kinds of values, keys that need escaping."""
    return {
        "dtypes": {dtype: pattern(dtype, 3, 2) for dtype in DTYPES},
        "scalars": {dtype: pattern(dtype) for dtype in DTYPES},
        "empty": [torch.zeros(0), torch.zeros(3, 0, 2, dtype=torch.int8)],
        "tuple": (torch.arange(3), {"n": 1, "t": torch.ones(1)}, None),
        "numpy": np.arange(6, dtype=np.uint16).reshape(2, 3),
        "a.b": torch.tensor(1),
        "a": {"b": torch.tensor(2), "": torch.tensor(3)},
        "a/b %@\u00e9__": torch.tensor(4),
        "__metadata__": torch.tensor(5),
        7: {None: torch.tensor(6), (1, "x"): torch.tensor(7)},
        "values": {
            "atoms": [None, True, 1, -1.5, "\u00e9\n", -0.0, math.inf, -math.inf],
            "nan": math.nan,
            "integers": [2**63 - 1, -(2**63), 2**63, -(2**127) - 1],
            "tuples": ((), (1, (2.0,))),
            "bytes": [b"\x00\xff", bytearray(b"ab")],
            "complex": complex(-0.0, math.inf),
            "dicts": [{}, {1: "a", None: 2.5, (1, "x"): b""}, {"%int": 1}, Counter("aab")],
            "scalars": [
                np.float16(0.1),
                np.float32(-0.0),
                np.int64(-1),
                np.uint8(255),
                np.bool_(True),
                np.complex64(1j),
            ],
            "no entries": {},
        },
        "rng": PerRank({"state": pattern("uint8", 16), "numpy": np.arange(3, dtype=">f8"), "n": (1, None)}),
    }


def full_tensors(iteration: int) -> dict[str, torch.Tensor]:
    """The global tensors of the sharded checkpoint."""
    tensors = {f"layers.{i}.fc1": torch.arange(48.0).reshape(8, 6) + 100 * i for i in range(PP)}
    tensors["layers.0.norm"] = torch.arange(6.0).to(torch.bfloat16)
    tensors["embedding"] = torch.arange(21, dtype=torch.float64).reshape(7, 3)
    tensors["odd"] = torch.arange(35, dtype=torch.int32).reshape(7, 5)
    tensors["exp_avg"] = torch.arange(48, dtype=torch.float32).reshape(8, 6) / 8
    return {key: (tensor + iteration).to(tensor.dtype) for key, tensor in tensors.items()}


# Boxes that are no grid, one for each rank.
ODD = (((0, 0), (4, 2)), ((0, 2), (2, 3)), ((2, 2), (5, 3)), ((4, 0), (3, 2)))


def sharded_state(tp: int, pp: int, iteration: int) -> State:
    """What rank (tp, pp) of a tensor- and pipeline-parallel job has."""
    full = full_tensors(iteration)

    def part(key: str, offset: tuple[int, ...], shape: tuple[int, ...], **labels: Any) -> ShardedTensor:
        where = tuple(slice(o, o + n) for o, n in zip(offset, shape))
        return ShardedTensor(
            key, full[key][where].clone(), global_shape=full[key].shape, global_offset=offset, **labels
        )

    model: State = {
        "fc1": part(f"layers.{pp}.fc1", (4 * tp, 0), (4, 6), partition=("tp", None), owner="pp", blocks=(2, 1)),
        "norm": ShardedTensor("layers.0.norm", full["layers.0.norm"], global_shape=(6,), global_offset=(0,)),
        "odd": part("odd", *ODD[2 * pp + tp]),
    }
    if pp == 0:
        model["embedding"] = part("embedding", ((0, 0), (4, 0))[tp], ((4, 3), (3, 3))[tp], partition=("tp", None))
    shard = part("exp_avg", (4 * tp, 0), (4, 6), partition=("tp", None))
    piece = (slice(0, 7), slice(7, 24))[pp]
    flat = shard.data.reshape(-1)[piece].clone()
    return {
        "model": model,
        "optimizer": {
            "exp_avg": ShardedTensor.from_flat_range("exp_avg", flat, of=shard, flat_range=piece),
            "step": torch.tensor(float(iteration)),
            "groups": [{"lr": 0.1 * iteration, "betas": (0.9, 0.95)}],
        },
        "iteration": iteration,
        "rng": PerRank(np.arange(4) + 100 * tp + 10 * pp + iteration),
        "data": PerRank({"position": 1000 * iteration + tp}, axes=("tp",), on_change="skip"),
    }


def main() -> None:
    with Checkpointer(ROOT / "single") as checkpointer:
        checkpointer.save(single_state(), iteration=5, metadata={"note": ("golden", 1)})

    def save(coordinator: Any) -> None:
        tp, pp = coordinator.rank % TP, coordinator.rank // TP
        mesh = {"tp": (tp, TP), "pp": (pp, PP)}
        with Checkpointer(ROOT / "sharded", mesh=mesh, coordinator=coordinator) as checkpointer:
            for iteration in (10, 20):
                checkpointer.save(sharded_state(tp, pp, iteration), iteration=iteration)

    run_ranks(TP * PP, save)
    for writer in ROOT.glob("*/writer-*"):
        writer.write_text('{"host": "golden", "pid": 1}')  # Who wrote it is nobody's business.


if __name__ == "__main__":
    main()
