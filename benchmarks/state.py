"""The state that every engine saves and loads: one rank's part of a model and its optimizer's state.

The bits of every element are a whole number that depends on key, global position and step, so that what was
loaded can be compared exactly without keeping a copy. Nothing here saves or loads.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.layout import Layout
from benchmarks.model import Model

DTYPES = {2: torch.bfloat16, 4: torch.float32}  # by bytes an item
BITS = {2: torch.int16, 4: torch.int32}
# Row numbers count modulo a prime, which no shape is a multiple of. Twice the prime, and hundreds of steps more,
# stay below the bits of infinity: every value is an ordinary number.
PRIMES = {2: 16_127, 4: 1_068_999_991}
POISON = -1  # as bits, NaN, which the state never has


@dataclass(frozen=True, slots=True)
class Piece:
    """This rank's part of one global tensor: part `at` of `parts` along `axis`, or all of it if axis is None.

    replica: which of the equal pieces of several ranks this is; 0 is the one that an engine has to save.
    """

    key: str
    global_shape: tuple[int, ...]
    axis: int | None
    at: int
    parts: int
    replica: int
    data: Tensor

    @property
    def bits(self) -> Tensor:
        return self.data.view(BITS[self.data.element_size()])

    def fill(self, step: int) -> None:
        self.bits.copy_(self._expected(step))

    def holds(self, step: int) -> bool:
        """Whether every bit is that of `step`."""
        return torch.equal(self.bits, self._expected(step))

    def _expected(self, step: int) -> Tensor:
        """Row, counted over all dimensions but the last, and column, in the global tensor; plus the key's number."""
        prime = PRIMES[self.data.element_size()]
        positions = []
        for d, size in enumerate(self.data.shape):
            start = self.at * size if d == self.axis else 0
            stride = math.prod(self.global_shape[d + 1 :])
            positions.append(torch.arange(start, start + size) * stride)
        row = torch.tensor(zlib.crc32(self.key.encode()))
        for index in positions[:-1]:
            row = row.unsqueeze(-1) + index
        row, column = row % prime + step, positions[-1] % prime
        kind = self.bits.dtype
        return row.to(kind).unsqueeze(-1) + column.to(kind)


class CountingOptimizer(torch.optim.Optimizer):
    """Its step changes every parameter and every tensor of its state, as a training step does: bits + 1.

    change_s: what the last step took without the hooks around it.
    """

    def __init__(self, states: Mapping[torch.nn.Parameter, Mapping[str, Tensor]]) -> None:
        super().__init__(states, {})
        for parameter, tensors in states.items():
            self.state[parameter].update(tensors)
        self.change_s = 0.0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # It has no loss to return.
        start = time.perf_counter()
        for group in self.param_groups:
            for parameter in group["params"]:
                for tensor in (parameter, *self.state[parameter].values()):
                    _change(tensor.data)
        self.change_s = time.perf_counter() - start


class RankState:
    """The pieces of one rank, by key. `step` counts advance()."""

    def __init__(self, layout: Layout, rank: int, model: Model) -> None:
        self.layout = layout
        self.rank = rank
        self.place = layout.place(rank)
        self.step = 0
        self.pieces: dict[str, Piece] = {}
        self._parameters: dict[torch.nn.Parameter, dict[str, Tensor]] = {}
        for parameter in model.parameters(layout, self.place.pp):
            shape = list(parameter.global_shape)
            if parameter.axis is not None:
                shape[parameter.axis] //= layout.tp
            own: dict[str, Tensor] = {}
            for copy, item_bytes in model.copies.items():
                own[copy] = torch.empty(shape, dtype=DTYPES[item_bytes])
                self._add(f"{copy}.{parameter.name}", parameter.global_shape, parameter.axis, own[copy])
            weight = torch.nn.Parameter(own.pop("model"), requires_grad=False)
            self._parameters[weight] = own
        self._optimizer: CountingOptimizer | None = None
        for piece in self.pieces.values():
            piece.fill(self.step)

    @property
    def optimizer(self) -> CountingOptimizer:
        """Of all pieces. Made when it is first asked for: torch takes a second of every rank to load what it needs."""
        if self._optimizer is None:
            self._optimizer = CountingOptimizer(self._parameters)
        return self._optimizer

    def _add(self, key: str, global_shape: tuple[int, ...], axis: int | None, data: Tensor) -> None:
        place, tp = self.place, self.layout.tp
        replica = place.dp if axis is not None else place.dp * tp + place.tp
        self.pieces[key] = Piece(key, global_shape, axis, place.tp, tp, replica, data)

    @property
    def size_bytes(self) -> int:
        """What this rank holds."""
        return sum(piece.data.nbytes for piece in self.pieces.values())

    @property
    def own_bytes(self) -> int:
        """Its part of the checkpoint, in which every piece is once."""
        return sum(piece.data.nbytes for piece in self.pieces.values() if piece.replica == 0)

    @property
    def own_chunks(self) -> int:
        return sum(piece.replica == 0 for piece in self.pieces.values())

    def tensors(self) -> dict[str, Tensor]:
        return {key: piece.data for key, piece in self.pieces.items()}

    def advance(self) -> None:
        """A training step without the computing, with the hooks of the optimizer if anybody has asked for it."""
        self.step += 1
        if self._optimizer is None:
            for piece in self.pieces.values():
                _change(piece.data)
        else:
            self._optimizer.step()

    def poison(self) -> None:
        """Overwrite every value with one that the state never has."""
        for piece in self.pieces.values():
            piece.bits.fill_(POISON)

    def check(self, step: int) -> None:
        """Raise ValueError unless every value is that of `step`."""
        for key, piece in self.pieces.items():
            if not piece.holds(step):
                raise ValueError(f"{key} on rank {self.rank} does not hold the values of step {step}")


def _change(tensor: Tensor) -> None:
    tensor.view(BITS[tensor.element_size()]).add_(1)
