"""What a run was made with, recorded with every checkpoint: environment, arguments, assets, base, lineage.

Decides what is in the record and when a difference from a stored one forbids a resume. Kept in the index as the
checkpoint's metadata, so that it can be read without reading a tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from os import PathLike

import msgspec
from torch import Tensor

from distckpt.contents import Contents
from distckpt.coordinator import Coordinator, agree, default_coordinator
from distckpt.errors import MismatchError
from distckpt.training.assets import digest_assets, read_assets
from distckpt.training.base_checkpoint import BaseCheckpoint, check_base
from distckpt.training.environment import (
    Differences,
    Json,
    compare_records,
    json_of,
    record_environment,
    value_names,
)
from distckpt.training.parameter_names import author_class, class_name, classes_of
from distckpt.training.resumable import RECORD, VERSION, StoredRecord, stored_record
from distckpt.training.sections import SECTIONS, Parts

_COMPARED = ("environment", "arguments", "assets", "models", "schedulers", "scaler")
_OF_SECTION = {
    "schedulers": "scheduler",
    "scaler": "scaler",
}  # which a job may have or not have: that is told elsewhere
_TIMEOUT_S = 600.0


_MAX_RESUMES = 100  # that are recorded


class _OfRank(msgspec.Struct, frozen=True):
    """From every rank: the digest of its base; from rank 0 also its record, as JSON."""

    base: str | None
    record: str


class RunRecord:
    """The record of this run, which is rank 0's: what differs by rank (arguments that hold it, stages of a pipeline) is
    recorded and compared as rank 0 has it. Made once, when it is first asked for; collective then."""

    def __init__(
        self,
        parts: Parts,
        *,
        arguments: object,
        assets: Mapping[str, str | PathLike[str]],
        base: BaseCheckpoint | None,
        coordinator: Coordinator | None,
    ) -> None:
        self._base = base
        self._coordinator = coordinator
        self.asset_files: dict[str, dict[str, Tensor]] = read_assets(assets)
        models = parts.unwrapped().items()
        self._own: dict[str, object] = {
            "arguments": json_of(arguments),
            "assets": digest_assets(self.asset_files),
            "models": {prefix or "model": {"class": author_class(model)} for prefix, model in models},
            "schedulers": classes_of(parts.schedulers()),
            "scaler": {} if parts.scaler is None else {"class": class_name(parts.scaler)},
            "base": None if base is None else msgspec.to_builtins(base),
        }
        self._agreed: dict[str, object] | None = None
        self._resumed: list[dict[str, object]] = []
        self._stored_resumed: list[dict[str, object]] = []  # of the checkpoint that is being loaded

    def facts(self) -> dict[str, object]:
        """What is compared on a resume, and the base. Raises MismatchError if ranks have different bases."""
        if self._agreed is None:
            coordinator = default_coordinator() if self._coordinator is None else self._coordinator
            try:
                environment = record_environment(coordinator=coordinator)
                self._agreed = {"environment": environment, **self._of_rank_0(coordinator)}
            finally:
                if self._coordinator is None:
                    coordinator.close()
        return self._agreed

    def _of_rank_0(self, coordinator: Coordinator) -> dict[str, Json]:
        def local() -> _OfRank:
            record = self._own if coordinator.rank == 0 else {}
            return _OfRank(None if self._base is None else self._base.digest, msgspec.json.encode(record).decode())

        def decide(ranks: Sequence[_OfRank]) -> list[str]:
            other = next((rank for rank, one in enumerate(ranks) if one.base != ranks[0].base), None)
            if other is not None:
                raise MismatchError(
                    f"base: rank 0 has the digest {ranks[0].base!r:.20}, rank {other} {ranks[other].base!r:.20}: all "
                    f"ranks of a job have one base"
                )
            return [ranks[0].record] * len(ranks)

        agreed = agree(coordinator, "run record", local, decide, message=_OfRank, decision=str, timeout_s=_TIMEOUT_S)
        record: dict[str, Json] = msgspec.json.decode(agreed)
        return record

    def metadata(self, sections: Collection[str], left_out: Collection[str], user: object) -> dict[str, object]:
        """What is stored with a checkpoint. sections: what it holds of the job, left_out: what not; user: the rest."""
        record = {
            "version": VERSION,
            "sections": sorted(sections),
            "left_out": sorted(left_out),
            "resumed_from": list(self._resumed),
            **self.facts(),
        }
        return {RECORD: record, "user": user}

    def compare(self, contents: Contents, overrides: Mapping[str, object], allow: Collection[str]) -> Differences:
        """Raises MismatchError for a difference that forbids a resume, unless it is allowed or overridden, for a record
        that this package does not know all of, and for an override of no argument; CorruptionError for what is none."""
        name = f"iteration {contents.iteration}"
        stored = stored_record(contents.metadata, name)
        now = self.facts()
        self._check_overrides(overrides, None if stored is None else stored.arguments)
        if stored is None:
            return Differences(())
        _check_known(stored, contents, allow)
        self._stored_resumed = list(stored.resumed_from)
        check_base(stored.base, self._base, contents.iteration)
        left_out = {name for name in _OF_SECTION if not getattr(stored, name) or not now[name]}
        compared = [name for name in _COMPARED if name not in left_out]
        differences = compare_records(
            {name: getattr(stored, name) for name in compared},
            {name: now[name] for name in compared},
            overrides=[
                *(f"arguments.{name}" for name in overrides),
                *allow,
                *(f"{name}.*" for name, section in _OF_SECTION.items() if section in allow),
            ],
        )
        if differences.must_block:
            raise MismatchError(
                f"{name} was saved by another run than this:\n{differences.text()}\nIf that is meant, "
                f"allow=(name, ...) says so"
            )
        return differences

    def _check_overrides(self, overrides: Mapping[str, object], stored: object) -> None:
        """Raises MismatchError for one that is no argument, as by a typing error: nothing would be changed by it."""
        there_are = sorted({*value_names(self.facts()["arguments"]), *value_names(stored)})
        for name in overrides:
            if name != "lr" and not any(fnmatchcase(one, name) for one in there_are):
                raise MismatchError(
                    f"overrides: there is no argument {name!r}; there are {', '.join(there_are) or 'none recorded'}. "
                    f"'lr' is always there; others are those in TrainState(..., arguments=...)"
                )

    def note_resume(self, save_id: str, iteration: int, overrides: Mapping[str, object]) -> None:
        """What is saved from now on goes back to this checkpoint, with these arguments changed on purpose."""
        changed = json_of(dict(overrides))
        own: dict[str, object] = {"save_id": save_id, "iteration": iteration, "overrides": changed}
        self._resumed = [*self._stored_resumed, own][-_MAX_RESUMES:]
        arguments = self.facts()["arguments"]
        if isinstance(arguments, dict) and isinstance(
            changed, dict
        ):  # In force from now on, whatever the job was given.
            arguments.update({name: value for name, value in changed.items() if name in arguments})


def stored_arguments(contents: Contents) -> object:
    """The arguments that are recorded with a checkpoint. Raises CorruptionError for a record that is none."""
    stored = stored_record(contents.metadata, f"iteration {contents.iteration}")
    return None if stored is None else stored.arguments


def _check_known(stored: StoredRecord, contents: Contents, allow: Collection[str]) -> None:
    """Raises MismatchError for what a later version of this package has saved, and this one would leave out."""
    if stored.version > VERSION:
        raise MismatchError(
            f"iteration {contents.iteration}: its record has version {stored.version}, this package knows {VERSION}: "
            f"resume with the package that saved it, or a later one"
        )
    named = {*stored.sections, *stored.left_out}
    unknown = sorted(named - {*SECTIONS, *allow})
    if unknown:
        raise MismatchError(
            f"iteration {contents.iteration} has sections that this package does not know: {', '.join(unknown)}. "
            f"Resume with the package that saved it; allow={tuple(unknown)} leaves them unread",
            unexpected=tuple(unknown),
        )
