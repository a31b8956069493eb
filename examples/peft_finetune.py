"""A LoRA fine-tune whose checkpoints hold the adapter alone, and which resumes on the base that it was trained on.

    torchrun --nproc-per-node 2 examples/peft_finetune.py \\
        --base-dir out/base --checkpoint-dir out/lora --log-file out/lora.jsonl

At first it trains a small base model, as any job would, and saves it under --base-dir. Then it loads the base's
weights, puts an adapter on them with `peft`, and trains that. Killed and started again it goes on with the adapter, to
the last bit; on another base that is an error that names both. Needs peft: `pip install '.[peft]'`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from distckpt import Checkpointer, ResumableSampler, TrainState

WORDS, LENGTH, WIDTH = 32, 8, 24


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a small model with LoRA; resumes the newest adapter.")
    parser.add_argument("--base-steps", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-interval", type=int, default=10)
    parser.add_argument("--base-dir", type=Path, required=True)
    parser.add_argument("--checkpoint-dir", type=Path, required=True)
    parser.add_argument("--log-file", type=Path, required=True, help="JSON lines, appended by every rank")
    return parser.parse_args()


class Classifier(nn.Module):
    """Which of two kinds a sequence of words is."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        x = x + F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return self.head(x.mean(1))


def make_dataset(rule: int) -> TensorDataset:
    """Sequences, and whether more than half of their words are of one kind; another rule is another task."""
    words = torch.randint(WORDS, (160, LENGTH), generator=torch.Generator().manual_seed(rule))
    return TensorDataset(words, ((words // rule % 2).sum(1) > LENGTH // 2).long())


def make_loader(rule: int) -> DataLoader:
    dataset = make_dataset(rule)
    return DataLoader(dataset, batch_sampler=ResumableSampler(dataset, 4))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[list[Tensor]]) -> Tensor:
    words, kinds = next(batches)
    loss = F.cross_entropy(model(words), kinds)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def train_base(args: argparse.Namespace) -> None:
    """Unless it is there already."""
    model = DistributedDataParallel(Classifier())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train = TrainState(model, optimizer, dataloader=make_loader(rule=1))
    with Checkpointer(args.base_dir) as ckpt:
        if ckpt.latest_iteration() is not None:
            return
        batches = train.batches()
        while train.step < args.base_steps:
            train.end_step(loss=train_step(model, optimizer, batches))
        train.save(ckpt)


def main() -> None:
    args = parse_arguments()
    args.log_file.parent.mkdir(parents=True, exist_ok=True)
    dist.init_process_group()
    torch.manual_seed(dist.get_rank())
    train_base(args)
    torch.manual_seed(dist.get_rank())  # again: the adapter is the same whether the base was there or not

    model = Classifier()
    base = TrainState(model).load_weights(args.base_dir)
    lora = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q", "v"], modules_to_save=["head"])
    model = DistributedDataParallel(get_peft_model(model, lora))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    train = TrainState(model, optimizer, dataloader=make_loader(rule=4), base=base)
    with Checkpointer(args.checkpoint_dir, keep_last=3) as ckpt, args.log_file.open("a", buffering=1) as log:
        train.resume(ckpt)
        batches = train.batches()
        while train.step < args.steps:
            loss = train_step(model, optimizer, batches)
            train.end_step(loss=loss)
            log.write(json.dumps({"step": train.step, "rank": dist.get_rank(), "loss": loss.item().hex()}) + "\n")
            if train.step % args.save_interval == 0:
                train.async_save(ckpt)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    main()
