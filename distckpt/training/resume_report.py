"""What a load of a training state has restored, and what not quite."""

from __future__ import annotations

from dataclasses import dataclass

from distckpt import LoadReport
from distckpt.training.environment import Differences
from distckpt.training.sampler import PositionReport

_SHOWN = 8


@dataclass(frozen=True, slots=True)
class ResumeReport:
    """step: the steps that were made. load: what was read. data: where the data go on; None if no position was loaded.

    begun_anew: sections of which nothing was stored, unread: sections that are stored and no part of this job, both
    because they were allowed. differences: of environment, arguments and assets, from what was recorded.
    """

    step: int
    load: LoadReport
    data: PositionReport | None
    begun_anew: tuple[str, ...]
    unread: tuple[str, ...]
    differences: Differences
    warnings: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        """Whether all went on that was saved, exactly, and nothing else."""
        is_exact = self.data is None or self.data.is_exact
        left = (self.begun_anew, self.unread, self.warnings, self.load.missing, self.load.unexpected)
        return is_exact and not any(left)

    def __str__(self) -> str:
        """One line."""
        parts = [f"resumed at step {self.step} from iteration {self.load.iteration}"]
        if self.data is not None:
            parts.append(f"data position {self.data}")
        if self.load.reseeded:
            parts.append(f"random streams reseeded, as the layout has changed: {', '.join(self.load.reseeded)}")
        for title, names in (
            ("begun anew", self.begun_anew),
            ("stored, but unread", self.unread),
            ("keys begun anew", self.load.missing),
            ("keys stored, but unread", self.load.unexpected),
        ):
            if names:
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                parts.append(f"{title}: {', '.join(names[:_SHOWN])}{more}")
        if self.load.converted:
            parts.append(f"{len(self.load.converted)} tensors converted to another type")
        return "; ".join((*parts, *self.warnings))
