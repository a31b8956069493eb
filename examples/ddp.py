"""A DistributedDataParallel job that goes on where it was killed, on as many ranks as there are then.

    torchrun --nproc-per-node 2 examples/ddp.py --checkpoint-dir out/ddp --log-file out/ddp.jsonl

Kill it, in the middle of a save too, and start it again: every later loss is the one that it would have had, to the
last bit. On another number of ranks each step sees the samples that it would have seen, and without dropout and
BatchNorm (--plain) the losses differ by rounding only. CPUs talk over gloo, GPUs over NCCL.

What distckpt adds are the ten lines with `sampler`, `train`, `ckpt` and `schedule`. Told to end by a SIGTERM, the job
saves once more first.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from distckpt import Checkpointer, CheckpointSchedule, ResumableSampler, TrainState

SAMPLES, FEATURES, CLASSES = 160, 16, 4  # a multiple of the global batch: no layout drops a rest


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small classifier; resumes from the newest checkpoint.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--global-batch", type=int, default=16, help="samples per step, however many ranks there are")
    parser.add_argument("--micro-batch", type=int, default=4, help="samples per rank and pass")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--plain", action="store_true", help="no dropout and no BatchNorm")
    parser.add_argument("--save-interval", type=int, default=10)
    parser.add_argument("--checkpoint-dir", type=Path, required=True)
    parser.add_argument("--log-file", type=Path, required=True, help="JSON lines, appended by every rank")
    return parser.parse_args()


def start() -> torch.device:
    """Join the ranks that torchrun launched; returns this one's device."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    torch.use_deterministic_algorithms(True)
    dist.init_process_group()  # gloo on CPUs, NCCL on GPUs
    return device


def make_dataset() -> TensorDataset:
    """(number of the sample, features, class)"""
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    features = torch.randn(SAMPLES, FEATURES, generator=generator) + labels.unsqueeze(1)
    return TensorDataset(torch.arange(SAMPLES), features, labels)


def make_model(*, plain: bool) -> nn.Module:
    noisy = [] if plain else [nn.BatchNorm1d(32), nn.Dropout(0.1)]
    return nn.Sequential(nn.Linear(FEATURES, 32), *noisy, nn.ReLU(), nn.Linear(32, CLASSES))


def train_step(
    model: DistributedDataParallel, batches: Iterator[list[Tensor]], passes: int, device: torch.device
) -> tuple[Tensor, list[int]]:
    """Accumulate gradients; returns this rank's mean loss and the samples that it saw."""
    losses, seen = [], []
    for number in range(passes):
        samples, features, labels = next(batches)
        with nullcontext() if number == passes - 1 else model.no_sync():
            loss = F.cross_entropy(model(features.to(device)), labels.to(device))
            (loss / passes).backward()
        losses.append(loss.detach())
        seen += samples.tolist()
    return torch.stack(losses).mean(), seen


def main() -> None:
    args = parse_arguments()
    args.log_file.parent.mkdir(parents=True, exist_ok=True)
    device = start()
    torch.manual_seed(dist.get_rank())
    model = DistributedDataParallel(make_model(plain=args.plain).to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    scheduler = CosineAnnealingLR(optimizer, args.steps)
    dataset = make_dataset()
    sampler = ResumableSampler(dataset, args.micro_batch)
    loader = DataLoader(dataset, batch_sampler=sampler)
    passes = args.global_batch // sampler.global_batch_size

    train = TrainState(model, optimizer, scheduler=scheduler, dataloader=loader, arguments=args)
    schedule = CheckpointSchedule(args.save_interval, on_termination=True)
    with (
        Checkpointer(args.checkpoint_dir, keep_last=3) as ckpt,
        schedule,
        args.log_file.open("a", buffering=1) as log,
    ):
        train.resume(ckpt)
        batches = train.batches()
        while train.step < args.steps and not schedule.should_stop:
            loss, samples = train_step(model, batches, passes, device)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            train.end_step(loss=loss)
            record = {"step": train.step, "rank": dist.get_rank(), "loss": loss.item().hex(), "samples": samples}
            log.write(json.dumps(record) + "\n")
            if schedule.is_due(train.step):
                train.async_save(ckpt)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
