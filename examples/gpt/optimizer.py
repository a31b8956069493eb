"""AdamW whose state is sharded over data parallelism (ZeRO-1, Rajbhandari et al., 2020, arXiv:1910.02054).

Each dp rank owns a contiguous flat range of every parameter of its stage: it holds the moments of that range
and updates it; the updated ranges are then gathered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from checkpoint import moment_shards
from parallel import Parallel, split_of
from torch import Tensor, nn

from distckpt import ShardedTensor


@dataclass(slots=True)
class OwnedRange:
    """What this rank owns of one parameter: a range of its elements in C order, possibly empty at the end."""

    name: str
    param: nn.Parameter
    width: int  # elements per dp rank, the last one's padded
    flat_range: slice
    exp_avg: Tensor  # (range length,)
    exp_avg_sq: Tensor  # (range length,)
    weight_decay: float
    counts_in_norm: bool  # what several tp ranks hold counts on the first one only

    def of(self, tensor: Tensor) -> Tensor:
        """The range of the parameter, or of its gradient: a view."""
        return tensor.detach().view(-1)[self.flat_range]


class ShardedAdamW:
    """A step sums the gradients over dp, clips them by their global norm and updates the parameters."""

    def __init__(
        self,
        model: nn.Module,
        parallel: Parallel,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        max_norm: float = 1.0,
    ) -> None:
        self.parallel = parallel
        self.betas = betas
        self.eps = eps
        self.max_norm = max_norm
        self.steps = 0
        self.owned = [self._own(name, param, weight_decay) for name, param in model.named_parameters()]

    def _own(self, name: str, param: nn.Parameter, weight_decay: float) -> OwnedRange:
        dp = self.parallel.dp
        width = math.ceil(param.numel() / dp.size)
        start, stop = (min(width * rank, param.numel()) for rank in (dp.rank, dp.rank + 1))
        return OwnedRange(
            name=name,
            param=param,
            width=width,
            flat_range=slice(start, stop),
            exp_avg=torch.zeros(stop - start),
            exp_avg_sq=torch.zeros(stop - start),
            weight_decay=weight_decay if param.ndim > 1 else 0.0,
            counts_in_norm=split_of(param) is not None or self.parallel.tp.is_first,
        )

    def sharded_state_dict(
        self, model_state: Mapping[str, list[ShardedTensor]], is_loading: bool = False
    ) -> dict[str, object]:
        """model_state: the model's sharded_state_dict(). A load fills the moments in place, and replaces the rest.

        is_loading: it is to be filled; the moments, here, are there from the start.
        """
        return {**moment_shards(self.owned, model_state), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take what a load put in the place of values."""
        self.steps = state["steps"]

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Update all parameters and clear their gradients; returns the gradient's norm before clipping."""
        gradients = self._reduce_gradients()
        norm = self._global_norm(gradients)
        clip = min(1.0, self.max_norm / (norm + 1e-6))
        self.steps += 1
        for owned, gradient in zip(self.owned, gradients, strict=True):
            self._update(owned, gradient * clip, lr)
        self._gather_parameters()
        return norm

    def _reduce_gradients(self) -> list[Tensor]:
        """Sum the gradients over dp in one collective; returns the owned range of each."""
        rows = self._rows([owned.param.grad for owned in self.owned])
        # A reduce-scatter would do, but not every version of gloo has one.
        dist.all_reduce(rows, group=self.parallel.dp.group)
        for owned in self.owned:
            owned.param.grad = None
        pieces = rows[self.parallel.dp.rank].split([owned.width for owned in self.owned])
        return [piece[: owned.exp_avg.numel()] for owned, piece in zip(self.owned, pieces, strict=True)]

    def _gather_parameters(self) -> None:
        dp = self.parallel.dp
        rows = self._rows([owned.param for owned in self.owned])
        dist.all_gather(list(rows.unbind()), rows[dp.rank].clone(), group=dp.group)
        columns = rows.split([owned.width for owned in self.owned], dim=1)
        for owned, column in zip(self.owned, columns, strict=True):
            owned.param.view(-1).copy_(column.flatten()[: owned.param.numel()])

    def _rows(self, tensors: list[Tensor]) -> Tensor:
        """One tensor per parameter -> (dp, sum of widths): row r is what dp rank r owns, zero-padded."""
        size = self.parallel.dp.size
        return torch.cat(
            [
                F.pad(tensor.flatten(), (0, owned.width * size - tensor.numel())).view(size, owned.width)
                for owned, tensor in zip(self.owned, tensors, strict=True)
            ],
            dim=1,
        )

    def _global_norm(self, gradients: list[Tensor]) -> float:
        """Over the whole model, each element once; in double precision, so that layouts agree."""
        square = torch.zeros((), dtype=torch.float64)
        for owned, gradient in zip(self.owned, gradients, strict=True):
            if owned.counts_in_norm:
                square += gradient.double().square().sum()
        dist.all_reduce(square)
        return square.sqrt().item()

    def _update(self, owned: OwnedRange, gradient: Tensor, lr: float) -> None:
        beta1, beta2 = self.betas
        owned.exp_avg.lerp_(gradient, 1 - beta1)
        owned.exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = lr / (1 - beta1**self.steps)
        denominator = (owned.exp_avg_sq / (1 - beta2**self.steps)).sqrt_().add_(self.eps)
        param = owned.of(owned.param)
        param.mul_(1 - lr * owned.weight_decay).addcdiv_(owned.exp_avg, denominator, value=-scale)


@dataclass(slots=True)
class WarmupCosine:
    """Learning rate: linear from 0 to `peak`, then a cosine down to a tenth of it."""

    peak: float
    warmup: int
    total: int

    def state_dict(self) -> dict[str, object]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        self.peak, self.warmup, self.total = (state[name] for name in ("peak", "warmup", "total"))

    def at(self, iteration: int) -> float:
        """The rate of the iteration-th step, counted from 1."""
        if iteration <= self.warmup:
            return self.peak * iteration / self.warmup
        progress = min(1.0, (iteration - self.warmup) / max(1, self.total - self.warmup))
        return self.peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
