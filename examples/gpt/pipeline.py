"""The GPipe schedule (Huang et al., 2019, arXiv:1811.06965): all micro-batches forward, then all backward.

A send never waits for the neighbour, and all stages visit the micro-batches in the same order: no deadlock.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from model import Stage
from parallel import Axis
from torch import Tensor


class _Neighbours:
    """Activations and gradients, (micro_batch, sequence, hidden), to and from the stages next to this one."""

    def __init__(self, pp: Axis, shape: tuple[int, int, int]) -> None:
        self.pp = pp
        self.shape = shape
        self.sends: list[tuple[dist.Work, Tensor]] = []  # a tensor must live until it is sent

    def send(self, x: Tensor, stage: int) -> None:
        x = x.detach().contiguous()
        self.sends.append((dist.isend(x, group=self.pp.group, group_dst=stage), x))

    def receive(self, stage: int) -> Tensor:
        x = torch.empty(self.shape)
        dist.recv(x, group=self.pp.group, group_src=stage)
        return x

    def finish(self) -> None:
        for work, _ in self.sends:
            work.wait()


def forward_backward(stage: Stage, batch: Tensor, *, micro_batch: int, scale: float) -> Tensor:
    """Add the gradients of `scale` times the sum of the micro-batch losses.

    batch: token ids (micro_batches * micro_batch, sequence + 1). Returns the losses without `scale`
    (micro_batches,), zeros on all but the last stage.
    """
    pp = stage.parallel.pp
    micro_batches = batch.split(micro_batch)
    neighbours = _Neighbours(pp, (micro_batch, stage.config.sequence, stage.config.hidden))
    losses = torch.zeros(len(micro_batches))
    inputs, outputs = [], []
    for number, tokens in enumerate(micro_batches):
        x = tokens[:, :-1] if pp.is_first else neighbours.receive(pp.rank - 1).requires_grad_()
        y = stage(x, tokens[:, 1:])
        if pp.is_last:
            losses[number] = y.detach()
            y = y * scale
        else:
            neighbours.send(y, pp.rank + 1)
        inputs.append(x)
        outputs.append(y)
    for x, y in zip(inputs, outputs, strict=True):
        y.backward(None if pp.is_last else neighbours.receive(pp.rank + 1))
        if not pp.is_first:
            neighbours.send(x.grad, pp.rank - 1)
    neighbours.finish()
    return losses
