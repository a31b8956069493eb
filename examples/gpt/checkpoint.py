"""What a checkpoint of this job holds, and how it comes back. This is the module to copy.

The state is built anew for every save; it refers to the tensors, it does not copy them.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass

import numpy as np
import torch
from data import TextLoader
from model import Stage
from optimizer import ShardedAdamW, WarmupCosine
from parallel import Axis, Parallel, split_of
from torch import Tensor

from distckpt import Checkpointer, CheckpointNotFoundError, LoadReport, PerRank, ShardedTensor


@dataclass(slots=True)
class Job:
    """Everything that training changes."""

    parallel: Parallel
    stage: Stage
    optimizer: ShardedAdamW
    schedule: WarmupCosine
    data: TextLoader
    iteration: int = 0


def build_state(job: Job) -> dict:
    weights = {name: _shards(name, param, job.parallel.tp) for name, param in job.stage.named_parameters()}
    moments = {
        moment: [
            ShardedTensor.from_flat_range(
                f"optimizer.{moment}.{own.name}", getattr(own, moment), of=weights[own.name], flat_range=own.flat_range
            )
            for own in job.optimizer.owned
        ]
        for moment in ("exp_avg", "exp_avg_sq")
    }
    replicated = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()}
    split = {"torch": job.parallel.split_generator.get_state()}
    return {
        "model": [shard for shards in weights.values() for shard in shards],
        "optimizer": {**moments, "steps": job.optimizer.steps},
        "scheduler": asdict(job.schedule),
        "data": {"consumed_samples": job.data.consumed_samples, "seed": job.data.seed},
        "iteration": job.iteration,
        "rng": {  # no "tp" among the first one's axes: a reseed, too, gives all tp ranks the same stream
            "replicated": PerRank(replicated, axes=("pp", "dp"), on_change="reseed"),
            "split": PerRank(split, axes=("tp", "pp", "dp"), on_change="reseed"),
        },
    }


def resume(ckpt: Checkpointer, job: Job) -> LoadReport | None:
    """Continue from the newest checkpoint, whatever layout saved it; None when there is none."""
    state = build_state(job)
    try:
        report = ckpt.load(state)  # fills the tensors in place, replaces the other leaves of `state`
    except CheckpointNotFoundError:
        return None
    job.iteration = state["iteration"]
    job.optimizer.steps = state["optimizer"]["steps"]
    job.schedule = WarmupCosine(**state["scheduler"])
    job.data.consumed_samples = state["data"]["consumed_samples"]
    job.data.seed = state["data"]["seed"]
    _restore_random(job.parallel, **state["rng"])
    return report


def _shards(name: str, param: Tensor, tp: Axis) -> list[ShardedTensor]:
    """One shard per block: a fused weight is several boxes of one key (see `parallel.Split`)."""
    split = split_of(param)
    if split is None:
        return [ShardedTensor.from_rank_offsets(name, param.detach(), owner="pp")]
    partition = tuple("tp" if dim == split.dim else None for dim in range(param.ndim))
    return [
        ShardedTensor.from_rank_offsets(
            name, piece, (split.dim, block * tp.size + tp.rank, split.blocks * tp.size), partition=partition, owner="pp"
        )
        for block, piece in enumerate(param.detach().chunk(split.blocks, split.dim))
    ]


def _restore_random(parallel: Parallel, replicated: PerRank, split: PerRank) -> None:
    """The exact streams on the layout that saved them, else new ones from the seeds that the load derived."""
    if replicated.seed is None:
        torch.set_rng_state(replicated.value["torch"])
        random.setstate(replicated.value["python"])
        np.random.set_state(replicated.value["numpy"])
    else:
        parallel.seed_replicated(replicated.seed)
    if split.seed is None:
        parallel.split_generator.set_state(split.value["torch"])
    else:
        parallel.seed_split(split.seed)
