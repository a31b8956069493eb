"""What a run was made with, recorded with every checkpoint: environment, arguments, assets, base, lineage.

Decides what is in the record and when a difference from a stored one forbids a resume. Kept in the index as the
checkpoint's metadata, so that it can be read without reading a tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from os import PathLike

import msgspec
from torch import Tensor

from distckpt.contents import Contents
from distckpt.coordinator import Coordinator, default_coordinator
from distckpt.errors import MismatchError
from distckpt.training.assets import digest_assets, read_assets
from distckpt.training.base_checkpoint import BaseCheckpoint, check_base
from distckpt.training.environment import Differences, compare_records, json_of, record_environment
from distckpt.training.parameter_names import author_class
from distckpt.training.resumable import RECORD, VERSION
from distckpt.training.sections import Parts

_COMPARED = ("environment", "arguments", "assets", "models")


class RunRecord:
    """The record of this run. Made once, when it is first asked for; collective then."""

    def __init__(
        self,
        parts: Parts,
        *,
        arguments: object,
        assets: Mapping[str, str | PathLike[str]],
        base: BaseCheckpoint | None,
        coordinator: Coordinator | None,
    ) -> None:
        self._arguments = json_of(arguments)
        self._base = base
        self._coordinator = coordinator
        self.asset_files: dict[str, dict[str, Tensor]] = read_assets(assets)
        self._assets = digest_assets(self.asset_files)
        models = parts.unwrapped().items()
        self._models = {prefix or "model": {"class": author_class(model)} for prefix, model in models}
        self._environment: dict[str, object] | None = None
        self._resumed: list[dict[str, object]] = []

    def facts(self) -> dict[str, object]:
        """What is compared on a resume."""
        if self._environment is None:
            coordinator = default_coordinator() if self._coordinator is None else self._coordinator
            try:
                self._environment = dict(record_environment(coordinator=coordinator))
            finally:
                if self._coordinator is None:
                    coordinator.close()
        found = (self._environment, self._arguments, self._assets, self._models)
        return dict(zip(_COMPARED, found, strict=True))

    def metadata(self, sections: Collection[str], left_out: Collection[str], user: object) -> dict[str, object]:
        """What is stored with a checkpoint. sections: what it holds of the job, left_out: what not; user: the rest."""
        record = {
            "version": VERSION,
            "sections": sorted(sections),
            "left_out": sorted(left_out),
            "base": None if self._base is None else msgspec.to_builtins(self._base),
            "resumed_from": list(self._resumed),
            **self.facts(),
        }
        return {RECORD: record, "user": user}

    def compare(self, contents: Contents, overrides: Mapping[str, object], allow: Collection[str]) -> Differences:
        """Raises MismatchError for a difference that forbids a resume, unless it is allowed or overridden."""
        stored = stored_record(contents.metadata)
        if stored is None:
            return Differences(())
        check_base(stored.get("base"), self._base, contents.iteration)
        differences = compare_records(
            {name: stored.get(name) for name in _COMPARED},
            self.facts(),
            overrides=[*(f"arguments.{name}" for name in overrides), *allow],
        )
        if differences.must_block:
            raise MismatchError(
                f"iteration {contents.iteration} was saved by another run than this:\n{differences.text()}\nIf that is "
                f"meant, allow=(name, ...) says so"
            )
        return differences

    def note_resume(self, save_id: str, iteration: int, overrides: Mapping[str, object]) -> None:
        """What is saved from now on goes back to this checkpoint, with these arguments changed on purpose."""
        self._resumed.append({"save_id": save_id, "iteration": iteration, "overrides": json_of(dict(overrides))})


def stored_record(metadata: object) -> dict[str, object] | None:
    """The record in a checkpoint's metadata; None if it was not saved by a TrainState."""
    record = metadata.get(RECORD) if isinstance(metadata, dict) else None
    return record if isinstance(record, dict) else None
