"""The sections of a training state: what each holds when it is saved, and how it comes back.

Decides what is in a checkpoint, what a load asks for, and what is missing from the one or the other: a part of the job
of which nothing is stored, or that is stored and not a part of the job, is an error that names it, never a silent
fresh start.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial

from torch import nn
from torch.optim import Optimizer

from distckpt.contents import Contents, StoredTensor
from distckpt.errors import CorruptionError, MismatchError
from distckpt.training.data_position import DataPosition
from distckpt.training.gradients import clear_gradients, gradient_state, gradient_template
from distckpt.training.learning_rate import check_groups
from distckpt.training.model_state import State, first_on_meta, model_state, put_back
from distckpt.training.optimizer_state import class_of, optimizer_state, optimizer_template
from distckpt.training.parameter_names import classes_of, parameters_of, unwrapped
from distckpt.training.random_streams import RandomStreams
from distckpt.training.resumable import stored_record
from distckpt.training.sampler import PositionReport
from distckpt.training.sharded_optimizer import ShardedOptimizer, local_values, sharded_optimizer_template

SECTIONS = ("model", "optimizer", "scheduler", "scaler", "data", "rng", "progress", "extra", "gradients", "assets")
LOADED = SECTIONS[:-1]  # Assets are compared, and written out when they are asked for.


@dataclass(slots=True)
class Parts:
    """What a job is made of. Models and optimizers by prefix, which is "" of the only one; None is what it has not."""

    models: Mapping[str, nn.Module]
    optimizers: Mapping[str, object]
    scheduler: object | None
    scaler: object | None
    position: DataPosition | None
    streams: RandomStreams
    extra: dict[str, object] | None
    trainable_only: bool

    def sections(self) -> set[str]:
        """Those that the job has, but for progress and what is there at times."""
        has = {
            "model": True,
            "rng": True,
            "optimizer": bool(self.optimizers),
            "scheduler": self.scheduler is not None,
            "scaler": self.scaler is not None,
            "data": self.position is not None,
            "extra": self.extra is not None,
        }
        return {name for name, is_there in has.items() if is_there}

    def names(self) -> dict[int, str]:
        """id of each parameter -> its name."""
        return {id(parameter): name for name, parameter in parameters_of(self.models)}

    def unwrapped(self) -> dict[str, nn.Module]:
        """The models as their author made them."""
        return {prefix: unwrapped(model) for prefix, model in self.models.items()}

    def torch_optimizers(self) -> list[Optimizer]:
        return [optimizer for optimizer in self.optimizers.values() if isinstance(optimizer, Optimizer)]

    def schedulers(self) -> list[object]:
        given = self.scheduler
        if isinstance(given, Mapping):
            return list(given.values())
        return list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]


def saved_sections(parts: Parts, micro_step: int) -> dict[str, object]:
    """The state of all parts but progress and assets; what a job has not is left out."""
    sections: dict[str, object] = {
        "model": model_state(parts.models, to_save=True, trainable_only=parts.trainable_only)
    }
    names = parts.names()
    if parts.optimizers:
        sections["optimizer"] = _under_prefixes(
            {prefix: _saved_optimizer(prefix, own, names, parts) for prefix, own in parts.optimizers.items()}
        )
    as_they_are = {"scheduler": parts.scheduler, "scaler": parts.scaler, "extra": parts.extra}
    sections |= {name: part for name, part in as_they_are.items() if part is not None}
    if parts.position is not None:
        sections["data"] = parts.position.state()
    sections["rng"] = parts.streams.state()
    if micro_step:
        sections["gradients"] = gradient_state(parts.models, micro_step)
    return sections


def _under_prefixes(states: dict[str, object]) -> object:
    return states.get("", states)


def _where(prefix: str) -> str:
    return f"optimizer/{prefix}" if prefix else "optimizer"


def _saved_optimizer(prefix: str, optimizer: object, names: Mapping[int, str], parts: Parts) -> object:
    if isinstance(optimizer, ShardedOptimizer):
        return optimizer.sharded_state_dict(model_state(parts.models, to_save=True))
    if isinstance(optimizer, Optimizer):
        return optimizer_state(optimizer, names, _where(prefix))
    return optimizer  # Whatever else has a state_dict(): the state of a job takes it as it is.


@dataclass(slots=True)
class Restoration:
    """What is done once all that a load asked for is there. Stands in the state, so that all ranks learn of a failure.

    begun_anew: sections that do not go on: nothing is stored of them, or that of another class. unread: sections that
    are stored, and no part of this job.
    """

    steps: list[Callable[[], None]] = field(default_factory=list)
    begun_anew: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    data: PositionReport | None = None

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, _: Mapping[str, object]) -> None:
        for step in self.steps:
            step()


@dataclass(slots=True)
class SectionLoad:
    """One load of a training state. template() makes what fits a checkpoint; restoration is then what it makes of it.

    wanted: the sections to load. allow: sections, and patterns of keys, that may begin anew or be left unread.
    progress: makes the template of that section, for what is stored; restore_progress: for when it is filled.
    """

    parts: Parts
    wanted: Collection[str]
    allow: Collection[str]
    progress: Callable[[object], dict[str, object]]
    restore_progress: Callable[[dict[str, object]], None]
    restoration: Restoration = field(default_factory=Restoration)

    def template(self, contents: Contents) -> dict[str, object]:
        """The state to fill. Raises MismatchError for a section that is missing, or stored and not asked for."""
        self.restoration = restoration = Restoration()
        state: dict[str, object] = {}
        tree = contents.tree
        makers: dict[str, Callable[[], object]] = {
            "model": self._model,
            "optimizer": lambda: self._optimizers(tree),
            "data": lambda: self._data(contents),
            "rng": self._random,
            "gradients": lambda: self._gradients(contents),
            "progress": lambda: self._progress(contents),
            "scaler": lambda: self._scaler(contents),
            **{name: partial(self._as_it_is, name) for name in ("scheduler", "extra")},
        }
        if {"gradients", "progress"} <= set(self.wanted) and not _micro_step(contents):
            restoration.steps.append(partial(clear_gradients, self.parts.models))
        for section in self._sections_to_load(contents, [name for name in makers if name in self.wanted]):
            if (section == "optimizer" and self._is_of_another_class(tree)) or (
                section == "scheduler" and section in self.allow and self._has_other_schedulers(contents)
            ):
                restoration.begun_anew.append(section)
                continue
            state[section] = makers[section]()
        restoration.steps.append(partial(check_groups, self.parts.schedulers()))
        state["restoration"] = restoration
        return state

    def _sections_to_load(self, contents: Contents, wanted: Sequence[str]) -> list[str]:
        """Those that the job has, and that are stored. Raises MismatchError for one that is only the one of it."""
        stored = _stored_sections(contents)
        # Gradients are there if a step was under way; progress is always.
        job = self.parts.sections() | {"progress"} | ({"gradients"} if _micro_step(contents) else set())
        lacking = [name for name in wanted if name in job and name not in stored]
        excess = [name for name in wanted if name in stored and name not in job]
        self.restoration.begun_anew = [name for name in lacking if name in self.allow]
        self.restoration.unread = [name for name in excess if name in self.allow]
        missing = tuple(name for name in lacking if name not in self.allow)
        unexpected = tuple(name for name in excess if name not in self.allow)
        if missing or unexpected:
            lines = [
                f"iteration {contents.iteration} is not what this job goes on from:",
                *(f"  {name}: this job has one, and nothing is stored of it: it would begin anew" for name in missing),
                *(f"  {name}: it is stored, and this job has none: it would not go on" for name in unexpected),
                f"It has {', '.join(sorted(stored))}. If that is meant, allow=(section, ...) says so; load_weights() "
                f"takes the model alone, to begin at step 0.",
            ]
            raise MismatchError("\n".join(lines), missing=missing, unexpected=unexpected)
        return [name for name in wanted if name in job and name in stored]

    def _as_it_is(self, section: str) -> object:
        return getattr(self.parts, section)

    def _scaler(self, contents: Contents) -> object:
        """Raises MismatchError if a scale is stored, and the scaler would drop it."""
        scaler = self.parts.scaler
        is_enabled = getattr(scaler, "is_enabled", None)
        if (
            callable(is_enabled)
            and not is_enabled()
            and stored_section(contents, "scaler")
            and "scaler" not in self.allow
        ):
            raise MismatchError(
                "scaler: a scale is stored, and this job's scaler is switched off: it would not go on. If that is "
                "meant, allow=('scaler',) says so",
                unexpected=("scaler",),
            )
        return scaler

    def _model(self) -> State:
        models = self.parts.models
        state = model_state(models, to_save=False, trainable_only=self.parts.trainable_only)
        _check_meta(self.parts, state)
        self.restoration.steps.append(partial(put_back, models, state))
        return state

    def _is_of_another_class(self, tree: Mapping[str, object]) -> bool:
        """Whether the optimizer begins anew, as an allowed one of another class. Raises MismatchError if it is not."""
        for prefix, optimizer in self.parts.optimizers.items():
            own = _stored_optimizer(tree, prefix)
            was = own.get("class")
            if not isinstance(optimizer, Optimizer) or not isinstance(was, str) or was == class_of(optimizer):
                continue
            where = f"{_where(prefix)}/class"
            if where in self.allow:
                continue
            if "optimizer" in self.allow:
                return True
            raise MismatchError(
                f"{_where(prefix)}: what is stored is the state of {was}, and this job's is {class_of(optimizer)}, "
                f"which would not find its own in it. If that is meant, allow=('optimizer',) begins anew; "
                f"allow=({where!r},) takes the stored state as it is, for another implementation of the same optimizer"
            )
        return False

    def _has_other_schedulers(self, contents: Contents) -> bool:
        record = stored_record(contents.metadata, f"iteration {contents.iteration}")
        now = classes_of(self.parts.schedulers())
        return record is not None and bool(record.schedulers) and record.schedulers != now

    def _optimizers(self, tree: Mapping[str, object]) -> object:
        parts, model = self.parts, tree.get("model")
        names = parts.names()
        dtypes = _dtypes(model if isinstance(model, dict) else {})
        made: dict[str, object] = {}
        for prefix, optimizer in parts.optimizers.items():
            made[prefix] = self._optimizer(prefix, optimizer, names, _stored_optimizer(tree, prefix), dtypes)
        return _under_prefixes(made)

    def _optimizer(
        self,
        prefix: str,
        optimizer: object,
        names: Mapping[int, str],
        stored: Mapping[str, object],
        dtypes: Mapping[str, str],
    ) -> object:
        if isinstance(optimizer, ShardedOptimizer):
            weights = model_state(self.parts.models, to_save=False)
            state = sharded_optimizer_template(optimizer, weights, stored)
            self.restoration.steps.append(lambda: optimizer.load_state_dict(local_values(state)))  # type: ignore[arg-type]
            return state
        if not isinstance(optimizer, Optimizer):
            return optimizer
        template = optimizer_template(optimizer, names, stored, dtypes, _where(prefix), self.allow)
        self.restoration.warnings += template.warnings
        self.restoration.steps.append(template.restore)
        return template.state

    def _data(self, contents: Contents) -> object:
        position = self.parts.position
        assert position is not None
        state = position.template(stored_section(contents, "data"), "data" in self.allow)

        def restore() -> None:
            self.restoration.data = position.restore(state)

        self.restoration.steps.append(restore)
        return state

    def _random(self) -> object:
        streams = self.parts.streams
        state = streams.template()
        self.restoration.steps.append(lambda: self.restoration.warnings.extend(streams.restore(state)))
        return state

    def _progress(self, contents: Contents) -> object:
        state = self.progress(stored_section(contents, "progress"))
        self.restoration.steps.append(partial(self.restore_progress, state))
        return state

    def _gradients(self, contents: Contents) -> object:
        state, restore = gradient_template(self.parts.models, stored_section(contents, "gradients"))
        self.restoration.steps.append(restore)
        return state


def _stored_optimizer(tree: Mapping[str, object], prefix: str) -> dict[str, object]:
    stored = tree.get("optimizer")
    if prefix:
        stored = stored.get(prefix) if isinstance(stored, dict) else None
    return stored if isinstance(stored, dict) else {}


def stored_section(contents: Contents, name: str) -> dict[str, object]:
    """A section of Contents.tree; empty if all of it differs by rank. Raises CorruptionError for what is none."""
    stored = contents.tree.get(name, {})
    if not isinstance(stored, dict):
        raise CorruptionError(
            f"iteration {contents.iteration}: what is stored as {name!r} is a {type(stored).__name__}, and no section"
        )
    return stored


def _stored_sections(contents: Contents) -> set[str]:
    """Those of which something is stored, and those that had nothing to store (a scaler that is switched off)."""
    found = {str(name) for name in contents.tree} | {key.partition("/")[0] for key in contents.per_rank}
    record = stored_record(contents.metadata, f"iteration {contents.iteration}")
    return found | (set() if record is None else set(record.sections))


def _micro_step(contents: Contents) -> object:
    return stored_section(contents, "progress").get("micro_step")


def _dtypes(model: Mapping[object, object]) -> dict[str, str]:
    return {str(name): stored.dtype for name, stored in model.items() if isinstance(stored, StoredTensor)}


def _check_meta(parts: Parts, state: State) -> None:
    """Raises MismatchError for a model on the meta device to which something refers that would keep what it has."""
    meta = first_on_meta(state)
    if meta is not None and (parts.optimizers or _is_fully_sharded(parts.models)):
        raise MismatchError(
            f"model: {meta!r} is on the meta device, and an optimizer or fully_shard already refers to it. Make "
            f"it real first: model.to_empty(device=...)"
        )


def _is_fully_sharded(models: Mapping[str, nn.Module]) -> bool:
    """Whether fully_shard was applied: it goes by the parameters that it has seen."""
    return any(callable(getattr(module, "unshard", None)) for model in models.values() for module in model.modules())


def weights_template(parts: Parts, section: str, allow: Collection[str], contents: Contents) -> dict[str, object]:
    """The state to fill for a load of the weights alone; what is allowed and of another shape is left as it is.

    Raises MismatchError if no such section is stored.
    """
    stored: object = contents.tree
    for name in section.split("/"):
        stored = stored.get(name) if isinstance(stored, dict) else None
    if not isinstance(stored, dict):
        raise MismatchError(
            f"iteration {contents.iteration} has no section {section!r}; it has {sorted(map(str, contents.tree))}. "
            f"Name the one that holds the model: load_weights(..., section=...)",
            missing=(section,),
        )
    weights = model_state(parts.models, to_save=False)
    _check_meta(parts, weights)
    for name, weight in list(weights.items()):
        found = stored.get(name)
        is_other = isinstance(found, StoredTensor) and found.global_shape != tuple(getattr(weight, "shape", ()))
        if is_other and any(fnmatchcase(f"{section}/{name}", pattern) for pattern in allow):
            del weights[name]
    state: dict[str, object] = weights
    for name in reversed(section.split("/")):
        state = {name: state}
    return state | {"restoration": Restoration([partial(put_back, parts.models, weights)])}
