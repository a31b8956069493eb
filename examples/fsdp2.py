"""The job of ddp.py with fully_shard (FSDP2): resumes on any number of ranks, from shards of any sizes.

    torchrun --nproc-per-node 2 examples/fsdp2.py --checkpoint-dir out/fsdp2 --log-file out/fsdp2.jsonl

Start it again with another --nproc-per-node (1 or 4, so that the global batch stays a multiple): weights, moments and
data position are cut anew, and each step sees the samples that it would have seen. No width is a multiple of the
number of ranks, and some ranks hold nothing of some parameters. The optimizer is new after a restart, without any
state: a load makes it, sharded as the parameters are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ddp import CLASSES, FEATURES, make_dataset, parse_arguments, start
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from distckpt import Checkpointer, CheckpointSchedule, ResumableSampler, TrainState


class Block(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        self.scale = nn.Parameter(torch.ones(1))  # one element: a single rank holds it

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


def make_model(*, plain: bool) -> nn.Sequential:
    dropout = 0.0 if plain else 0.1
    blocks = [Block(13, hidden, dropout) for hidden in (21, 37)]
    return nn.Sequential(nn.Linear(FEATURES, 13), *blocks, nn.Linear(13, CLASSES))


def train_step(
    model: FSDPModule, batches: Iterator[list[Tensor]], passes: int, device: torch.device
) -> tuple[Tensor, list[int]]:
    """Accumulate gradients; returns this rank's mean loss and the samples that it saw."""
    losses, seen = [], []
    for number in range(passes):
        samples, features, labels = next(batches)
        model.set_requires_gradient_sync(number == passes - 1)
        loss = F.cross_entropy(model(features.to(device)), labels.to(device))
        (loss / passes).backward()
        losses.append(loss.detach())
        seen += samples.tolist()
    return torch.stack(losses).mean(), seen


def main() -> None:
    args = parse_arguments()
    args.log_file.parent.mkdir(parents=True, exist_ok=True)
    device = start()
    torch.manual_seed(0)  # fully_shard takes each rank's own weights: they must be alike
    model = make_model(plain=args.plain).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp",))
    for part in (*model, model):
        fully_shard(part, mesh=mesh)
    torch.manual_seed(1 + dist.get_rank())  # dropout differs by rank
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
