"""The data position as a section of the training state. Decides what a loader's state means on another layout.

What counts samples of all ranks together (ResumableSampler, or any loader whose state_dict() has "consumed_samples")
is stored once, and means the same samples on every layout. Any other loader's state, such as torchdata's
StatefulDataLoader's, is that of one rank, and goes on only where the ranks are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Protocol, runtime_checkable

from distckpt import PerRank
from distckpt.errors import MismatchError, UnsupportedTypeError
from distckpt.index import OnChange
from distckpt.training.fingerprint import fingerprint_of
from distckpt.training.sampler import PositionReport, ResumableSampler, position_report

CONSUMED = "consumed_samples"


@runtime_checkable
class StatefulLoader(Protocol):
    """torchdata's protocol: what a loader, a dataset or a sampler that keeps its position has."""

    def state_dict(self) -> dict[str, object]: ...

    def load_state_dict(self, state_dict: dict[str, object]) -> object: ...


class DataPosition:
    """Of one loader. axes: mesh axes whose ranks read different data; None is all of them."""

    def __init__(self, loader: object, axes: tuple[str, ...] | None) -> None:
        self._axes = axes
        self.sampler = _sampler_of(loader)
        keeper = loader if self.sampler is None else self.sampler
        if not isinstance(keeper, StatefulLoader):
            raise UnsupportedTypeError(
                f"dataloader: a {type(loader).__qualname__} keeps no position, and a resume would start from the first "
                f"sample. Give it a batch_sampler=distckpt.ResumableSampler(dataset, batch_size), use torchdata's "
                f"StatefulDataLoader, or pass dataloader=None and the position in extra"
            )
        self._keeper = keeper
        self._data = None if self.sampler is not None else getattr(loader, "dataset", None)

    def counted(self) -> object:
        """Where it is, if that is counted in samples of all ranks; else None."""
        own = self._keeper.state_dict()
        return (own.get("epoch"), own[CONSUMED]) if CONSUMED in own else None

    def state(self) -> dict[str, object]:
        """To be saved."""
        own = self._keeper.state_dict()
        if CONSUMED in own:
            return {"position": dict(own)}
        state: dict[str, object] = {"loader": PerRank(dict(own), self._axes)}
        return state if self._fingerprint is None else state | {"fingerprint": self._fingerprint}

    @cached_property
    def _fingerprint(self) -> str | None:
        """Of the data of a loader that says nothing of them itself, if they can be read by number."""
        is_indexed = hasattr(self._data, "__len__") and hasattr(self._data, "__getitem__")
        return fingerprint_of(self._data) if is_indexed else None

    def template(self, stored: Mapping[str, object], accept_other_data: bool) -> dict[str, object]:
        """To be loaded. stored: the section of Contents.tree. Raises MismatchError for a position in other data."""
        own = self._keeper.state_dict()
        if CONSUMED not in own:
            on_change: OnChange = "skip" if accept_other_data else "exact"
            was = stored.get("fingerprint")
            if not accept_other_data and None not in (was, self._fingerprint) and was != self._fingerprint:
                raise MismatchError(
                    f"data: the position is one in other data: the fingerprint is {self._fingerprint!r}, it was "
                    f"{was!r}. Give the job the data that it had, or allow 'data' to go on with the loader's state"
                )
            template: dict[str, object] = {"loader": PerRank(None, self._axes, on_change=on_change)}
            return template | ({"fingerprint": None} if "fingerprint" in stored else {})
        position = stored.get("position")
        if not isinstance(position, dict):
            if accept_other_data:
                return {}
            raise MismatchError(
                "data: the checkpoint has the position of another kind of loader, of one rank each; this job's counts "
                "samples of all ranks. Allow 'data' to start from the first sample",
                missing=("data/position",),
            )
        report = PositionReport(True) if self.sampler is None else position_report(position, own)
        if report.is_other_data and not accept_other_data:
            raise MismatchError(
                f"data: the position is one in other data, or in another order: {report.reason}. Give the job the data "
                f"that it had, or allow 'data' to go on at the same number of samples"
            )
        return {"position": dict(position)}

    def restore(self, state: Mapping[str, object]) -> PositionReport:
        """Go to the position that a template was filled with; stay, if it was one rank's and these have changed."""
        position, loader = state.get("position"), state.get("loader")
        if isinstance(position, dict):
            report = (
                PositionReport(True) if self.sampler is None else position_report(position, self.sampler.state_dict())
            )
            self._keeper.load_state_dict(position)
            return report
        if loader is None:
            return PositionReport(False, "the position is that of another kind of loader")
        assert isinstance(loader, PerRank)
        if loader.value is None:
            return PositionReport(False, "the loader's state is that of one rank, and there are other ranks now")
        assert isinstance(loader.value, dict)
        self._keeper.load_state_dict(loader.value)
        return PositionReport(True)


def _sampler_of(loader: object) -> ResumableSampler | None:
    """The sampler in a loader, which has consumed less than its loader's workers have asked it for."""
    for holder in (loader, getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)):
        if isinstance(holder, ResumableSampler):
            return holder
    return None
