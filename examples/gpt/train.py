"""Train a small GPT on any tp * pp * dp layout, saving as it goes and resuming from whatever is newest.

    torchrun --nproc-per-node 4 examples/gpt/train.py --tp 2 --pp 2 --checkpoint-dir DIR --log-file LOG

Killed and started again, on the same or another number of ranks, it continues at the newest checkpoint.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
from data import TextLoader
from model import Config, Stage
from optimizer import ShardedAdamW, WarmupCosine
from parallel import Parallel, derive_seed
from pipeline import forward_backward

from distckpt import Checkpointer, PendingSave, PerRank, TrainState


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small GPT; resumes from the newest checkpoint.")
    for axis in ("tp", "pp", "dp"):
        parser.add_argument(f"--{axis}", type=int, default=1)
    for size in fields(Config):
        parser.add_argument(f"--{size.name}", type=type(size.default), default=size.default)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--global-batch", type=int, default=8, help="samples per iteration")
    parser.add_argument("--micro-batch", type=int, default=2, help="samples per step of the pipeline")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--save-interval", type=int, default=10)
    parser.add_argument("--keep-last", type=int, default=3)
    parser.add_argument("--checkpoint-dir", type=Path, required=True)
    parser.add_argument("--log-file", type=Path, required=True, help="JSON lines, appended")
    args = parser.parse_args()
    if any(size % args.tp for size in (args.heads, args.ffn, args.vocabulary)):
        parser.error("--tp must divide --heads, --ffn and --vocabulary")
    if args.pp > args.layers:
        parser.error("--pp must not exceed --layers")
    if args.global_batch % (args.micro_batch * args.dp):
        parser.error("--micro-batch times --dp must divide --global-batch")
    return args


@dataclass(frozen=True, slots=True)
class Job:
    """What a step works on."""

    parallel: Parallel
    stage: Stage
    optimizer: ShardedAdamW
    schedule: WarmupCosine
    data: TextLoader

    @classmethod
    def start(cls, args: argparse.Namespace) -> Job:
        parallel = Parallel.start(tp=args.tp, pp=args.pp, dp=args.dp)
        pp, dp, tp = parallel.pp.rank, parallel.dp.rank, parallel.tp.rank
        parallel.seed_replicated(derive_seed(args.seed, "replicated", pp, dp))
        parallel.seed_split(derive_seed(args.seed, "split", pp, dp, tp))
        stage = Stage(Config(**{size.name: getattr(args, size.name) for size in fields(Config)}), parallel)
        stage.initialise(args.seed)
        return cls(
            parallel=parallel,
            stage=stage,
            optimizer=ShardedAdamW(stage, parallel),
            schedule=WarmupCosine(peak=args.lr, warmup=args.warmup, total=args.iterations),
            data=TextLoader(sequence=args.sequence, global_batch=args.global_batch, seed=args.seed, dp=parallel.dp),
        )

    def state(self, **arguments: object) -> TrainState:
        """All that training changes. arguments: recorded with it, and compared when it is resumed.

        What is replicated over tp draws the same numbers on all tp ranks: no "tp" among the axes of those streams, or
        a reseed, on another layout, would give each of them another one.
        """
        split = PerRank(self.parallel.split_generator, axes=("tp", "pp", "dp"), on_change="reseed")
        return TrainState(
            self.stage,
            self.optimizer,
            scheduler=self.schedule,
            dataloader=self.data,
            rng_axes=("pp", "dp"),
            generators={"split": split},
            arguments=arguments,
        )


def train_step(job: Job, train: TrainState, batches: Iterator[torch.Tensor], *, micro_batch: int) -> dict[str, object]:
    """One iteration on all ranks; returns what the log says about it."""
    micro_batches = job.data.global_batch // micro_batch
    losses = forward_backward(job.stage, next(batches), micro_batch=micro_batch, scale=1 / micro_batches)
    lr = job.schedule.at(train.step + 1)
    grad_norm = job.optimizer.step(lr)
    loss = global_mean(losses, job.parallel)
    train.end_step(loss=loss, grad_norm=grad_norm, learning_rates=[lr])
    return {"loss": loss, "loss_hex": loss.hex(), "lr": lr, "grad_norm": grad_norm}


def global_mean(losses: torch.Tensor, parallel: Parallel) -> float:
    """Mean of all micro-batch losses, added in the order of the batch, which no layout changes.

    losses: (micro_batches / dp,), those of the last pipeline stage count.
    """
    slots = torch.zeros(parallel.dp.size, len(losses), dtype=torch.float64)
    if parallel.pp.is_last and parallel.tp.is_first:
        slots[parallel.dp.rank] = losses.double()
    dist.all_reduce(slots)  # exact: each slot has one addend that is not zero
    return sum(slots.flatten().tolist()) / slots.numel()


class Log:
    """Appends JSON lines on rank 0, does nothing elsewhere."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1) if dist.get_rank() == 0 else None

    def write(self, **record: object) -> None:
        if self._file:
            self._file.write(json.dumps(record) + "\n")


@dataclass(frozen=True, slots=True)
class Save:
    """A save in the background, and when it was asked for."""

    iteration: int
    pending: PendingSave
    start: float

    def record(self) -> dict[str, object]:
        """Wait for the end. The phases follow each other: seconds since the epoch, [start, end]."""
        report = self.pending.wait()
        stall_ms = report.stall_s * 1e3
        phases, end = {}, self.start
        for name in ("plan", "stage", "write", "commit"):
            begin, end = end, end + getattr(report, f"{name}_s")
            phases[name] = [begin, end]
        return {"save": self.iteration, "bytes": report.bytes, "stall_ms": stall_ms, "phases": phases}


def main() -> None:
    args = parse_arguments()
    job = Job.start(args)
    log = Log(args.log_file)
    train = job.state(lr=args.lr, warmup=args.warmup, iterations=args.iterations, global_batch=args.global_batch)
    with Checkpointer(args.checkpoint_dir, mesh=job.parallel.mesh, keep_last=args.keep_last) as ckpt:
        resumed = train.resume(ckpt)
        log.write(start=time.time(), mesh=job.parallel.mesh, resumed_from=resumed and resumed.load.iteration)
        batches = train.batches()
        save = None
        while train.step < args.iterations:
            start = time.time()
            record = train_step(job, train, batches, micro_batch=args.micro_batch)
            record["compute_s"] = time.time() - start
            if train.step % args.save_interval == 0:
                if save:
                    log.write(**save.record())
                asked = time.time()
                save = Save(train.step, train.async_save(ckpt), asked)
                record["stall_ms"] = (time.time() - asked) * 1e3
            log.write(iteration=train.step, **record, start=start, step_s=time.time() - start)
        if save:
            log.write(**save.record())
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    main()
