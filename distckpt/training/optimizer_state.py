"""An optimizer as a section of the training state: its state by parameter name, its hyper-parameters by group.

torch numbers parameters by their place in param_groups, so that a changed order, a frozen layer or another pipeline
stage makes moment 3 that of another weight. Names do not change. The state is set as it was stored, to the bit:
Optimizer.load_state_dict() would cast float32 moments of bfloat16 parameters.

    class                       of the optimizer: another one does not find its own state in this
    state/<parameter>/<entry>   what the optimizer keeps for a parameter
    groups/<i>/<option>         hyper-parameters of the i-th group
    group_of/<parameter>        the number of its group
    other/<entry>               what it keeps for no parameter
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from distckpt.contents import StoredTensor
from distckpt.errors import InvalidShardingError, MismatchError

State = dict[str, object]
Names = Mapping[int, str]  # id of a parameter -> its name


def optimizer_state(optimizer: Optimizer, names: Names, where: str) -> State:
    """The state to save; its tensors are the optimizer's own.

    Raises InvalidShardingError for a parameter that is in no model: `where` names the optimizer.
    """
    state: State = {"class": class_of(optimizer), "state": {}, "groups": [], "group_of": {}, "other": {}}
    for number, group in enumerate(optimizer.param_groups):
        state["groups"].append({key: value for key, value in group.items() if key != "params"})  # type: ignore[attr-defined]
        for place, parameter in enumerate(group["params"]):
            name = _name_of(parameter, names, f"{where}: parameter {place} of group {number}")
            state["group_of"][name] = number  # type: ignore[index]
            own = optimizer.state.get(parameter)
            if own:
                state["state"][name] = dict(own)  # type: ignore[index]
    others = cast("Mapping[object, object]", optimizer.state)  # torch itself keeps parameters only; some others do not
    state["other"] = {key: value for key, value in others.items() if not isinstance(key, Tensor)}
    return state


def class_of(optimizer: Optimizer) -> str:
    return type(optimizer).__qualname__


def _name_of(parameter: Tensor, names: Names, what: str) -> str:
    name = names.get(id(parameter))
    if name is None:
        raise InvalidShardingError(
            f"{what}, of shape {tuple(parameter.shape)}, is no parameter of the model. Make the optimizer after the "
            f"model is wrapped, moved and sharded, or pass every model that it trains: TrainState({{name: model}}, ...)"
        )
    return name


@dataclass(slots=True)
class OptimizerTemplate:
    """What a load fills (`state`), and then restore() gives to the optimizer.

    groups: for each group of the optimizer the stored one whose hyper-parameters it takes, or None: it keeps its own.
    """

    optimizer: Optimizer
    names: Names
    state: State
    groups: list[int | None]

    def restore(self) -> None:
        """Give what was loaded to the optimizer; parameters for which nothing was stored have no state then."""
        state, groups = self.state["state"], self.state["groups"]
        assert isinstance(state, dict)
        assert isinstance(groups, list)
        for number, group in enumerate(self.optimizer.param_groups):
            for parameter in group["params"]:
                self.optimizer.state.pop(parameter, None)
                own = state.get(self.names[id(parameter)])
                if own is not None:
                    self.optimizer.state[parameter] = own
            taken = self.groups[number]
            if taken is not None:
                group.update(groups[taken])
        other = self.state["other"]
        assert isinstance(other, dict)
        self.optimizer.state.update(other)


def optimizer_template(
    optimizer: Optimizer,
    names: Names,
    stored: Mapping[str, object],
    stored_dtypes: Mapping[str, str],
    where: str,
) -> OptimizerTemplate:
    """What fits the stored state: the optimizer's own tensors where it has them, else new ones like its parameters.

    stored: the optimizer's part of Contents.tree. stored_dtypes: the element type of each stored parameter, which says
    whether a moment has the type of its parameter or one of its own. Raises MismatchError, InvalidShardingError.
    """
    by_name, group_of = _mapping(stored, "state"), _mapping(stored, "group_of")
    template: State = {
        "class": None,
        "state": {},
        "groups": _groups(stored),
        "group_of": {},
        "other": emptied(stored.get("other", {})),
    }
    sources: list[int | None] = []
    for number, group in enumerate(optimizer.param_groups):
        group_names: list[str] = []
        for place, parameter in enumerate(group["params"]):
            name = _name_of(parameter, names, f"{where}: parameter {place} of group {number}")
            group_names.append(name)
            template["group_of"][name] = number  # type: ignore[index]
            own = by_name.get(name)
            if isinstance(own, dict):
                like = _Like(f"{where}/state/{name}", parameter, group, stored_dtypes.get(name))
                present = optimizer.state.get(parameter)
                template["state"][name] = like.fill(own, present if isinstance(present, dict) else {})  # type: ignore[index]
        sources.append(_source(number, group_names, group_of, _stored_groups(stored), where))
    return OptimizerTemplate(optimizer, names, template, sources)


def _mapping(stored: Mapping[str, object], key: str) -> dict[str, object]:
    found = stored.get(key)
    return found if isinstance(found, dict) else {}


def _stored_groups(stored: Mapping[str, object]) -> list[object]:
    found = stored.get("groups")
    return found if isinstance(found, list) else []


def _groups(stored: Mapping[str, object]) -> object:
    """As many as are stored, whatever the optimizer has now: which of them it takes is decided by name."""
    return emptied(_stored_groups(stored))


def emptied(stored: object) -> object:
    """The same nested value with an empty tensor for each stored one."""
    if isinstance(stored, StoredTensor):
        return torch.empty(stored.global_shape, dtype=getattr(torch, stored.dtype))
    if type(stored) is dict:
        return {key: emptied(value) for key, value in stored.items()}
    if type(stored) in (list, tuple):
        return type(stored)(emptied(value) for value in stored)  # type: ignore[call-arg,attr-defined]
    return stored


def _source(
    number: int, names: list[str], group_of: Mapping[str, object], groups: list[object], where: str
) -> int | None:
    """The stored group whose hyper-parameters a group takes: that of its parameters, however they are grouped now."""
    found = sorted({at for name in names if isinstance(at := group_of.get(name), int) and 0 <= at < len(groups)})
    if any(groups[at] != groups[found[0]] for at in found):
        differing = [name for name in names if group_of.get(name) != found[0]][:3]
        raise MismatchError(
            f"{where}: the parameters of group {number} were saved in groups {found}, whose hyper-parameters differ "
            f"({', '.join(differing)}... are not in group {found[0]}). Group them as they were"
        )
    return found[0] if found else None


@dataclass(frozen=True, slots=True)
class _Like:
    """Makes what a parameter's stored state is loaded into."""

    path: str
    parameter: Tensor
    group: Mapping[str, object]
    stored_dtype: str | None  # of the parameter

    def fill(self, stored: Mapping[object, object], present: Mapping[object, object]) -> dict[object, object]:
        return {key: self._leaf(value, present.get(key), key) for key, value in stored.items()}

    def _leaf(self, stored: object, present: object, key: object) -> object:
        if isinstance(stored, StoredTensor):
            return self._tensor(stored, present, key)
        if type(stored) is dict:
            return {k: self._leaf(v, present.get(k) if type(present) is dict else None, k) for k, v in stored.items()}
        if type(stored) in (list, tuple):
            return type(stored)(self._leaf(v, None, key) for v in stored)  # type: ignore[call-arg,attr-defined]
        return stored

    def _tensor(self, stored: StoredTensor, present: object, key: object) -> Tensor:
        if isinstance(present, Tensor) and tuple(present.shape) == stored.global_shape:
            return present
        parameter = self.parameter
        # A moment of its parameter's type goes with the parameter; one of a type of its own, and a count, keep theirs.
        has_own_type = stored.dtype != self.stored_dtype or key == "step"
        dtype = getattr(torch, stored.dtype) if has_own_type else parameter.dtype
        if tuple(parameter.shape) == stored.global_shape and stored.global_shape:
            return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        if stored.is_sharded:
            raise MismatchError(
                f"{self.path}/{key}: stored as shards of a tensor {stored.global_shape}, the parameter is "
                f"{tuple(parameter.shape)}, and the optimizer has no state yet that says how it is sharded. Take a "
                f"step before the load, or load on one rank",
                missing=(self.path,),
            )
        # torch keeps "step" on the host unless a captured or fused step counts it on the device.
        on_host = key == "step" and not (self.group.get("capturable") or self.group.get("fused"))
        return torch.empty(stored.global_shape, dtype=dtype, device="cpu" if on_host else parameter.device)
