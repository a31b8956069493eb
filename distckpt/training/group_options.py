"""Hyper-parameters of parameter groups as plain values: how they are stored, known again, and given back.

A group is known by what it holds, so that ranks whose optimizers have other groups (pipeline stages) can be stored
together, and groups that were split or joined since find theirs. A tensor among the options (a learning rate for a
captured step) is stored as the numbers in it: a save waits for its device for these few bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor

from distckpt.contents import StoredTensor
from distckpt.errors import CorruptionError, MismatchError, UnsupportedTypeError
from distckpt.training.nested import with_items

Options = dict[str, object]
# Schedulers of torch write these into groups; they come and go with the scheduler.
OF_SCHEDULERS = frozenset(("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"))
_TENSOR, _ARRAY = "tensor", "array"
_MAX_ELEMENTS = 4096
_KEY_DIGITS = 16


def options_of(group: Mapping[str, object], where: str) -> Options:
    """To be stored. Raises UnsupportedTypeError for an option that is no small plain value."""
    return {name: _plain(value, f"{where}/{name}") for name, value in sorted(group.items()) if name != "params"}


def key_of(options: Options) -> str:
    """What a group is known by: another one for each other value in it."""
    return hashlib.sha256(repr(options).encode()).hexdigest()[:_KEY_DIGITS]


def _plain(value: object, where: str) -> object:
    if isinstance(value, (Tensor, np.ndarray)):
        size = value.numel() if isinstance(value, Tensor) else value.size
        if size > _MAX_ELEMENTS:
            raise UnsupportedTypeError(f"{where}: an option of {size} elements; keep such in the optimizer's state")
        if isinstance(value, Tensor):
            return {_TENSOR: str(value.dtype).removeprefix("torch."), "values": value.detach().tolist()}
        return {_ARRAY: value.dtype.name, "values": value.tolist()}
    return with_items(value, lambda one: _plain(one, where))


def check_options(stored: object, where: str) -> Options:
    """Raises CorruptionError for what is no stored group."""
    if not isinstance(stored, dict) or not all(isinstance(name, str) for name in stored) or "params" in stored:
        raise CorruptionError(f"{where}: stored is {stored!r:.100}, expected the options of a parameter group by name")
    options = {name: _restored(value, f"{where}/{name}") for name, value in stored.items()}
    if "lr" in options and not _is_rate(options["lr"]):
        raise CorruptionError(f"{where}/lr: stored is {stored['lr']!r:.100}, expected a finite number")
    return options


def _is_rate(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and math.isfinite(float(value))
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(float(value))


def _restored(value: object, where: str) -> object:
    """The option as it was, tensors on the host."""
    if isinstance(value, StoredTensor):
        raise CorruptionError(f"{where}: stored is a tensor, expected a plain value")
    if type(value) is dict and len(value) == 2 and "values" in value and (_TENSOR in value or _ARRAY in value):
        name = value.get(_TENSOR, value.get(_ARRAY))
        try:
            if not isinstance(name, str) or not isinstance(getattr(torch, name, None), torch.dtype):
                raise ValueError(f"no element type {name!r}")
            if _TENSOR in value:
                return torch.tensor(value["values"], dtype=getattr(torch, name))
            return np.array(value["values"], dtype=name)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise CorruptionError(f"{where}: stored is {value!r:.100}, which is no {name}: {error}") from error
    return with_items(value, lambda one: _restored(one, where))


def fitting_options(
    stored: Options, group: Mapping[str, object], where: str, allow: Collection[str]
) -> tuple[Options, list[str]]:
    """Of stored options those that a group takes, and warnings of what is not as it was.

    An option that nothing is stored of (a newer torch has added it) keeps the group's own value. One that the group
    does not have is left out if it is switched off, or allowed. Raises MismatchError for another, and for a value of
    another kind than the group's.
    """
    taken: Options = {}
    warnings: list[str] = []
    for name, value in stored.items():
        if name not in group and name not in OF_SCHEDULERS:
            if value and not any(fnmatchcase(f"{where}/{name}", pattern) for pattern in allow):
                raise MismatchError(
                    f"{where}/{name}: stored is {value!r:.60}, and this job's optimizer has no such option; it has "
                    f"{', '.join(sorted(group.keys() - {'params'}))}. If that is meant, "
                    f"allow=('{where.rpartition('/')[0]}/*/{name}',) leaves it out"
                )
            warnings.append(f"{where}/{name}: {value!r:.60} is stored, and this optimizer has no such option")
        elif name in group and not _is_alike(value, group[name]):
            raise MismatchError(
                f"{where}/{name}: stored is {value!r:.60}, this job's optimizer has {group[name]!r:.60}, which is of "
                f"another kind"
            )
        else:
            taken[name] = value
            if _is_changed(name, value, stored, group):
                warnings.append(
                    f"{where}/{name}: {value!r:.60} goes on, as stored; this job's {group[name]!r:.60} is not used"
                )
    warnings.extend(
        f"{where}/{name}: nothing is stored of it, it stays {group[name]!r:.60}"
        for name in sorted(group.keys() - stored.keys() - OF_SCHEDULERS - {"params"})
    )
    return taken, warnings


def _is_changed(name: str, value: object, stored: Options, group: Mapping[str, object]) -> bool:
    """Whether this job was given another value than the one that goes on. What schedulers move is no such value."""
    if name not in group or (name in OF_SCHEDULERS and name != "initial_lr"):
        return False
    is_moved = name == "lr" and "initial_lr" in stored and "initial_lr" in group
    is_cycled = name in ("betas", "momentum") and "max_momentum" in stored
    if (
        is_moved
        or is_cycled
        or isinstance(value, (Tensor, np.ndarray))
        or isinstance(group[name], (Tensor, np.ndarray))
    ):
        return False
    return value != group[name]


def _is_alike(stored: object, present: object) -> bool:
    """Whether one can stand where the other stood: numbers, flags and tensors of one, texts, sequences as long."""
    if stored is None or present is None:
        return True
    if isinstance(present, (list, tuple)) and isinstance(stored, (list, tuple)):
        return len(stored) == len(present) and all(map(_is_alike, stored, present))
    kinds: Sequence[tuple[type, ...]] = (
        (int, float, complex, np.number, np.bool_, Tensor, np.ndarray),
        (str,),
        (dict,),
    )
    return any(isinstance(stored, kind) and isinstance(present, kind) for kind in kinds) or type(stored) is type(
        present
    )


def give_options(groups: Sequence[dict[str, object]], taken: Sequence[Options | None]) -> None:
    """Set the options of all groups of an optimizer; None: a group keeps its own.

    A tensor that one group alone has is filled where it is, as a captured step reads it there. One that several share
    would be changed for all of them: each gets its own.
    """
    owners: dict[int, int] = {}
    for group in groups:
        for value in group.values():
            if isinstance(value, Tensor):
                owners[id(value)] = owners.get(id(value), 0) + 1
    for group, options in zip(groups, taken, strict=True):
        for name, value in (options or {}).items():
            present = group.get(name)
            if not isinstance(value, Tensor):
                group[name] = value
            elif isinstance(present, Tensor) and owners[id(present)] == 1 and _is_same_kind(present, value):
                present.detach().copy_(value)
            else:
                group[name] = value.to(_device(group, options or {}), copy=True)


def _is_same_kind(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and not one.is_meta


def _device(group: Mapping[str, object], options: Options) -> torch.device:
    """Where a captured step reads its options: with the parameters."""
    parameters = group.get("params")
    if options.get("capturable") and isinstance(parameters, list) and parameters:
        device: torch.device = parameters[0].device
        return device
    return torch.device("cpu")
