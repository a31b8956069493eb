"""How the ranks of a job share out a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """Coordinates of one rank."""

    tp: int
    dp: int
    pp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """tp x dp x pp ranks. As in Megatron the tensor-parallel coordinate changes fastest, then the data-parallel one."""

    tp: int = 1
    pp: int = 1
    dp: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.dp * self.pp

    def place(self, rank: int) -> Place:
        return Place(tp=rank % self.tp, dp=rank // self.tp % self.dp, pp=rank // (self.tp * self.dp))

    def __str__(self) -> str:
        return f"tp{self.tp} pp{self.pp} dp{self.dp}"


def layout_of(ranks: int) -> Layout:
    """For so many ranks: two tensor-parallel ranks if they come out even, pipeline stages for the rest."""
    tp = 2 if ranks % 2 == 0 else 1
    return Layout(tp=tp, pp=ranks // tp)
