"""An optimizer as a section of the training state: its state by parameter name, its hyper-parameters by group.

torch numbers parameters by their place in param_groups, so that a changed order, a frozen layer or another pipeline
stage makes moment 3 that of another weight. Names do not change. The state is set as it was stored, to the bit:
Optimizer.load_state_dict() would cast float32 moments of bfloat16 parameters.

    class                       of the optimizer: another one does not find its own state in this
    state/<parameter>/<entry>   what the optimizer keeps for a parameter
    groups/<key>/<option>       hyper-parameters, once for all groups that have the same; the key is a digest of them
    group_of/<parameter>        the key of its group
    empty/<number>              the key of a group without parameters
    other/<entry>               what it keeps for no parameter
    arrays/<parameter>          entries of its state that are NumPy arrays
    order                       the parameters in order, if the state of one is that of all, or is numbered
    own                         in place of state and groups: what the optimizer itself says, if that is more
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from distckpt.contents import StoredTensor
from distckpt.errors import CorruptionError, InvalidShardingError, MismatchError, UnsupportedTypeError
from distckpt.training.group_options import (
    Options,
    check_options,
    fitting_options,
    give_options,
    key_of,
    options_of,
)
from distckpt.training.nested import with_items

State = dict[str, object]
Names = Mapping[int, str]  # id of a parameter -> its name


def optimizer_state(optimizer: Optimizer, names: Names, where: str) -> State:
    """The state to save; its tensors are the optimizer's own.

    Raises InvalidShardingError for a parameter that is in no model: `where` names the optimizer. Raises
    UnsupportedTypeError for an optimizer whose state cannot be given back as it was.
    """
    parameters = [(parameter, name) for _, parameter, name in _parameters(optimizer, names, where)]
    order = [name for _, name in parameters]
    if _says_more(optimizer, where):
        _check_own_word(optimizer, where)
        return {"class": class_of(optimizer), "own": optimizer.state_dict(), "order": order}
    by_name: dict[str, object] = {}
    arrays: dict[str, object] = {}
    for parameter, name in parameters:
        own = optimizer.state.get(parameter)
        if own:
            by_name[name] = dict(own)
            if of_numpy := [key for key, value in own.items() if isinstance(value, np.ndarray)]:
                arrays[name] = of_numpy
    others = cast("Mapping[object, object]", optimizer.state)  # torch itself keeps parameters only; some others do not
    state: State = {
        "class": class_of(optimizer),
        "state": by_name,
        **_saved_groups(optimizer, names, where),
        "other": {key: value for key, value in others.items() if not isinstance(key, Tensor)},
    }
    if arrays:
        state["arrays"] = arrays
    if _is_of_all(optimizer):
        state["order"] = order
    return state


def _saved_groups(optimizer: Optimizer, names: Names, where: str) -> State:
    groups: dict[str, Options] = {}
    group_of: dict[str, str] = {}
    empty: dict[str, str] = {}
    for number, group in enumerate(optimizer.param_groups):
        options = options_of(group, f"{where}/groups/{number}")
        key = key_of(options)
        groups[key] = options
        group_of |= {names[id(parameter)]: key for parameter in group["params"]}
        if not group["params"]:
            empty[str(number)] = key
    return {"groups": groups, "group_of": group_of} | ({"empty": empty} if empty else {})


def class_of(optimizer: Optimizer) -> str:
    return type(optimizer).__qualname__


def _parameters(optimizer: Optimizer, names: Names, where: str) -> Iterator[tuple[int, Tensor, str]]:
    """(number of its group, parameter, name) of all, in order."""
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            yield number, parameter, _name_of(parameter, names, f"{where}: parameter {place} of group {number}")


def _name_of(parameter: Tensor, names: Names, what: str) -> str:
    name = names.get(id(parameter))
    if name is None:
        raise InvalidShardingError(
            f"{what}, of shape {tuple(parameter.shape)}, is no parameter of the model. Make the optimizer after the "
            f"model is wrapped, moved and sharded, or pass every model that it trains: TrainState({{name: model}}, ...)"
        )
    return name


# What an optimizer says itself


def _says_more(optimizer: Optimizer, where: str) -> bool:
    """Whether state_dict() of this class has more in it than the state of its parameters and its groups.

    Raises UnsupportedTypeError for one that keeps other ranks' state from us.
    """
    if hasattr(optimizer, "consolidate_state_dict"):  # ZeroRedundancyOptimizer
        raise UnsupportedTypeError(
            f"{where}: a {class_of(optimizer)} keeps on each rank the state of some parameters, where nobody else sees "
            f"it. Use fully_shard with a plain optimizer; or consolidate_state_dict() and save what rank 0 has then"
        )
    hooks = ("_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks")
    if type(optimizer).state_dict is Optimizer.state_dict and not any(getattr(optimizer, name, None) for name in hooks):
        return False
    said = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = said.get("state")
    if set(said) != {"state", "param_groups"} or not isinstance(state, dict):
        return True
    expected = {
        number: own
        for number, parameter in enumerate(parameters)
        if (own := optimizer.state.get(parameter)) is not None
    }
    return state.keys() != expected.keys() or not all(_is_same(state[number], own) for number, own in expected.items())


def _is_same(said: object, own: Mapping[object, object]) -> bool:
    return isinstance(said, dict) and said.keys() == own.keys() and all(said[key] is own[key] for key in own)


def _check_own_word(optimizer: Optimizer, where: str) -> None:
    """Raises UnsupportedTypeError if load_state_dict(), which goes through torch's, would cast the state."""
    for parameter, own in optimizer.state.items():
        for key, value in cast("Mapping[object, object]", own).items():
            if not isinstance(value, Tensor) or not value.is_floating_point() or key == "step":
                continue
            if value.dtype != parameter.dtype:
                raise UnsupportedTypeError(
                    f"{where}: a {class_of(optimizer)} has more to store than the state of its parameters, and its "
                    f"load_state_dict() would make {parameter.dtype} of {key!r}, which is {value.dtype}. Give it in an "
                    f"object of your own, whose state_dict() and load_state_dict() keep it as it is"
                )


def _is_of_all(optimizer: Optimizer) -> bool:
    """Whether the state found at one parameter is that of all of them in a row, as LBFGS keeps it."""
    sizes = [parameter.numel() for group in optimizer.param_groups for parameter in group["params"]]
    if len(sizes) < 2:
        return False
    return any(
        isinstance(value, Tensor) and value.dim() == 1 and value.numel() == sum(sizes)
        for own in optimizer.state.values()
        if isinstance(own, dict)
        for value in own.values()
    )


# What is stored


@dataclass(frozen=True, slots=True)
class _Stored:
    """What is stored of one optimizer, checked as far as it goes without the optimizer."""

    state: dict[str, dict[object, object]]
    groups: dict[str, Options]
    groups_as_stored: dict[object, object]
    group_of: dict[str, str]
    empty: dict[str, str]
    other: dict[object, object]
    arrays: dict[str, list[object]]
    order: list[object] | None
    own: dict[object, object] | None

    @classmethod
    def of(cls, stored: Mapping[str, object], where: str) -> _Stored:
        """Raises MismatchError for what another kind of optimizer has stored, CorruptionError for what is none."""
        if "own" not in stored and "groups" not in stored:
            raise MismatchError(
                f"{where}: what is stored has no groups: it is not what an optimizer of torch has stored; it has "
                f"{', '.join(sorted(map(str, stored)))[:100] or 'nothing'}"
            )
        state = {name: _dict(own, f"{where}/state/{name}") for name, own in _dict(stored, where, "state").items()}
        groups = {
            key: check_options(group, f"{where}/groups/{key}") for key, group in _dict(stored, where, "groups").items()
        }
        keys = [_dict(stored, where, "group_of"), _dict(stored, where, "empty")]
        for key in (key for found in keys for key in found.values()):
            if not isinstance(key, str) or key not in groups:
                raise CorruptionError(f"{where}/group_of: {key!r:.60} is no stored group; there are {sorted(groups)}")
        arrays, order = _dict(stored, where, "arrays"), stored.get("order")
        if not all(isinstance(entries, list) for entries in arrays.values()) or not isinstance(
            order, (list, type(None))
        ):
            raise CorruptionError(f"{where}: arrays {arrays!r:.60}, order {order!r:.60}: expected lists of names")
        return cls(
            cast("dict[str, dict[object, object]]", state),
            cast("dict[str, Options]", groups),
            _dict(stored, where, "groups"),
            cast("dict[str, str]", keys[0]),
            cast("dict[str, str]", keys[1]),
            _dict(stored, where, "other"),
            cast("dict[str, list[object]]", arrays),
            order,
            _dict(stored, where, "own") if "own" in stored else None,
        )

    def check_order(self, names: list[str], where: str) -> None:
        if self.order is not None and self.order != names:
            at = next((n for n, pair in enumerate(zip(self.order, names, strict=False)) if pair[0] != pair[1]), 0)
            raise MismatchError(
                f"{where}: its state is that of all parameters in their order, which was {self.order[at:][:3]}... from "
                f"place {at} on, and is {names[at:][:3]}... now. Give the optimizer its parameters in the order of then"
            )


def _dict(stored: object, where: str, key: str | None = None) -> dict[Any, object]:
    found = stored if key is None else cast("Mapping[str, object]", stored).get(key, {})
    if not isinstance(found, dict):
        raise CorruptionError(f"{where}{'' if key is None else f'/{key}'}: stored is {found!r:.60}, expected a dict")
    return found


def emptied(stored: object, present: object = None) -> object:
    """The same nested value with an empty tensor for each stored one, sharded as the present one is."""
    if isinstance(stored, StoredTensor):
        if isinstance(present, Tensor) and tuple(present.shape) == stored.global_shape:
            return torch.empty_like(present, dtype=getattr(torch, stored.dtype), requires_grad=False)
        return torch.empty(stored.global_shape, dtype=getattr(torch, stored.dtype))
    if type(stored) is dict:
        inside = present if isinstance(present, dict) else {}
        return {key: emptied(value, inside.get(key)) for key, value in stored.items()}
    if type(stored) in (list, tuple):
        row = present if isinstance(present, (list, tuple)) and len(present) == len(stored) else [None] * len(stored)  # type: ignore[arg-type]
        return type(stored)(map(emptied, stored, row))  # type: ignore[call-arg,call-overload]
    return stored


# Loading


@dataclass(slots=True)
class OptimizerTemplate:
    """What a load fills (`state`), and then restore() gives to the optimizer.

    groups: for each group of the optimizer the options that it takes, or None: it keeps its own. warnings: of options
    that are not as they were.
    """

    optimizer: Optimizer
    names: Names
    state: State
    groups: list[Options | None]
    warnings: list[str] = field(default_factory=list)

    def restore(self) -> None:
        """Give what was loaded to the optimizer; parameters for which nothing was stored have no state then."""
        if "own" in self.state:
            self.optimizer.load_state_dict(cast("dict[str, object]", self.state["own"]))
            return
        state = cast("Mapping[str, dict[str, object]]", self.state["state"])
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.optimizer.state.pop(parameter, None)
                own = state.get(self.names[id(parameter)])
                if own is not None:
                    self.optimizer.state[parameter] = own
        give_options(self.optimizer.param_groups, self.groups)
        self.optimizer.state.update(cast("Mapping[Tensor, object]", self.state["other"]))


def optimizer_template(
    optimizer: Optimizer,
    names: Names,
    stored: Mapping[str, object],
    stored_dtypes: Mapping[str, str],
    where: str,
    allow: Collection[str] = (),
) -> OptimizerTemplate:
    """What fits the stored state: the optimizer's own tensors where it has them, else new ones like its parameters.

    stored: the optimizer's part of Contents.tree. stored_dtypes: the element type of each stored parameter, which says
    whether a moment has the type of its parameter or one of its own. allow: patterns of stored options that may be
    left out. Raises MismatchError, InvalidShardingError, CorruptionError, UnsupportedTypeError.
    """
    checked = _Stored.of(stored, where)
    checked.check_order([name for _, _, name in _parameters(optimizer, names, where)], where)
    says_more = _says_more(optimizer, where)
    if checked.own is not None:
        state: State = {"class": None, "own": emptied(checked.own, optimizer.state_dict()), "order": None}
        return OptimizerTemplate(optimizer, names, state, [])
    if says_more:
        raise MismatchError(
            f"{where}: a {class_of(optimizer)} of this job has more to store than the state of its parameters, and "
            f"nothing is stored of that"
        )
    template = _by_name(optimizer, names, checked, where, allow)
    by_name, group_of = cast("State", template.state["state"]), cast("State", template.state["group_of"])
    for number, parameter, name in _parameters(optimizer, names, where):
        group_of[name] = ""
        own = checked.state.get(name)
        if own is not None:
            effective = optimizer.param_groups[number] | (template.groups[number] or {})
            like = _Like(
                f"{where}/state/{name}", parameter, effective, stored_dtypes.get(name), checked.arrays.get(name, [])
            )
            present = optimizer.state.get(parameter)
            by_name[name] = like.fill(own, present if isinstance(present, dict) else {})
    return template


def _by_name(
    optimizer: Optimizer, names: Names, stored: _Stored, where: str, allow: Collection[str]
) -> OptimizerTemplate:
    """With all that no parameter has."""
    template = OptimizerTemplate(optimizer, names, {"class": None, "state": {}, "group_of": {}}, [])
    for number, group in enumerate(optimizer.param_groups):
        own_names = [names[id(parameter)] for parameter in group["params"]]
        key = _source(number, own_names, stored, where)
        taken: Options | None = None
        if key is not None:
            taken, warnings = fitting_options(stored.groups[key], group, f"{where}/groups/{key}", allow)
            template.warnings += [warning for warning in warnings if warning not in template.warnings]
        template.groups.append(taken)
    # As many groups as are stored, whatever the optimizer has now: which of them it takes is decided by name.
    template.state["groups"] = emptied(stored.groups_as_stored)
    template.state["other"] = {key: emptied(value, _other(optimizer, key)) for key, value in stored.other.items()}
    if stored.empty:
        template.state["empty"] = dict.fromkeys(stored.empty)
    if stored.arrays:
        template.state["arrays"] = dict.fromkeys(stored.arrays)
    if stored.order is not None:
        template.state["order"] = None
    return template


def _other(optimizer: Optimizer, key: object) -> object:
    return cast("Mapping[object, object]", optimizer.state).get(key)


def _source(number: int, names: list[str], stored: _Stored, where: str) -> str | None:
    """The stored group whose hyper-parameters a group takes: that of its parameters, however they are grouped now."""
    if not names:
        return stored.empty.get(str(number))
    found = sorted({stored.group_of[name] for name in names if name in stored.group_of})
    if len(found) > 1:
        options = [stored.groups[key] for key in found]
        differing = sorted(
            name for name in options[0] if any(str(options[0][name]) != str(own.get(name)) for own in options[1:])
        )
        members = {key: next(name for name in names if stored.group_of.get(name) == key) for key in found}
        raise MismatchError(
            f"{where}: the parameters of group {number} were saved in {len(found)} groups, whose hyper-parameters "
            f"differ ({', '.join(differing)}; {', '.join(members.values())} are in one each). Group them as they were"
        )
    return found[0] if found else None


@dataclass(frozen=True, slots=True)
class _Like:
    """Makes what a parameter's stored state is loaded into."""

    path: str
    parameter: Tensor
    group: Mapping[str, object]  # with the options that it takes
    stored_dtype: str | None  # of the parameter
    arrays: Collection[object]  # entries that are NumPy arrays

    def fill(self, stored: Mapping[object, object], present: Mapping[object, object]) -> dict[object, object]:
        return {key: self._leaf(value, present.get(key), key) for key, value in stored.items()}

    def _leaf(self, stored: object, present: object, key: object) -> object:
        if isinstance(stored, StoredTensor):
            if key in self.arrays:
                return torch.empty(stored.global_shape, dtype=getattr(torch, stored.dtype)).numpy()
            return self._tensor(stored, present, key)
        if type(stored) is dict:
            return {k: self._leaf(v, present.get(k) if type(present) is dict else None, k) for k, v in stored.items()}
        return with_items(stored, lambda item: self._leaf(item, None, key))

    def _tensor(self, stored: StoredTensor, present: object, key: object) -> Tensor:
        # torch keeps "step" on the host unless a captured or fused step counts it on the device.
        on_host = key == "step" and not (self.group.get("capturable") or self.group.get("fused"))
        device = torch.device("cpu") if on_host else self.parameter.device
        is_there = key != "step" or (isinstance(present, Tensor) and present.device == device)
        if isinstance(present, Tensor) and is_there and tuple(present.shape) == stored.global_shape:
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
        return torch.empty(stored.global_shape, dtype=dtype, device=device)
