"""Byte-level English text in a shuffled order that depends on the seed alone, so that a position resumes it.

The text is the language reference that every Python carries (`pydoc_data.topics`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pydoc_data.topics import topics

import torch
from parallel import Axis, derive_seed
from torch import Tensor

END_OF_TEXT = 256


class TextLoader:
    """Endless batches of token windows; its position is the number of samples that all ranks have taken.

    "consumed_samples" in its state_dict() tells a TrainState that the position means the same on any layout.
    """

    def __init__(self, *, sequence: int, global_batch: int, seed: int, dp: Axis) -> None:
        self.global_batch = global_batch
        self.seed = seed
        self.dp = dp
        self.consumed_samples = 0
        self._samples = _samples(sequence)
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.long)

    def state_dict(self) -> dict[str, object]:
        return {"consumed_samples": self.consumed_samples, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        self.consumed_samples = state["consumed_samples"]

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield self._next_batch()

    def _next_batch(self) -> Tensor:
        """This dp rank's part of the next global batch: token ids (global_batch / dp, sequence + 1)."""
        part = self.global_batch // self.dp.size
        first = self.consumed_samples + self.dp.rank * part
        self.consumed_samples += self.global_batch
        return torch.stack([self._sample(position) for position in range(first, first + part)])

    def _sample(self, position: int) -> Tensor:
        epoch, index = divmod(position, len(self._samples))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            self._order = torch.randperm(len(self._samples), generator=generator)
            self._epoch = epoch
        return self._samples[self._order[index]]


def _samples(sequence: int) -> Tensor:
    """All texts, cut to windows (samples, sequence + 1) that share one token with their successor."""
    tokens = [token for topic in sorted(topics) for token in (*topics[topic].encode(), END_OF_TEXT)]
    return torch.tensor(tokens).unfold(0, sequence + 1, sequence)
