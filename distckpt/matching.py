"""Matching: what of a state one checkpoint can fill, and where the two differ. Decides; reads and changes nothing."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from distckpt.errors import CheckpointError, MismatchError
from distckpt.garbage import postponed_collection
from distckpt.index import Index, Mesh, TensorEntry
from distckpt.json_value import LIST_MARKER, TUPLE_MARKER, is_container, is_empty_list
from distckpt.leaf_value import decode_leaf
from distckpt.sharded_tensor import torch_dtype
from distckpt.state_dict import (
    FlatState,
    ObjectLeaf,
    PerRankLeaf,
    TensorLeaf,
    ValueLeaf,
    is_context,
    unflatten,
)

_SHOWN = 20
_LOOKED_AT = 1 << 20  # elements; of more, strides that may overlap are taken to do so


@dataclass(slots=True)
class Request:
    """What one rank wants of one particular checkpoint."""

    tensors: list[tuple[TensorLeaf, TensorEntry]] = field(default_factory=list)
    whole: set[str] = field(default_factory=set)  # to be read in full: no target of the state's own
    whole_tensors: dict[str, Tensor] = field(default_factory=dict)  # those, once allocated
    values: list[tuple[str, Callable[[object], None]]] = field(default_factory=list)
    per_rank: list[tuple[PerRankLeaf, int]] = field(default_factory=list)  # with the number of its file
    reseed: list[PerRankLeaf] = field(default_factory=list)
    skip: list[PerRankLeaf] = field(default_factory=list)
    fresh: list[ObjectLeaf] = field(default_factory=list)  # objects that get the whole stored subtree
    missing: set[str] = field(default_factory=set)
    mismatched: dict[str, str] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    per_rank_values: dict[str, object] = field(default_factory=dict)  # by key, once read
    decoded: dict[str, object] = field(default_factory=dict)  # the values, by key, once read


def select_keys(index: Index, keys: Iterable[str] | None) -> tuple[set[str], list[str]]:
    """The stored keys that are in `keys` or below a container in it (all if None), and the keys that mean nothing."""
    stored = set(index.tensors) | set(index.values)
    if keys is None:
        return stored, []
    homes = _homes(index)
    wanted: set[str] = set()
    missing: list[str] = []
    for key in [keys] if isinstance(keys, str) else keys:
        below = _keys_below(homes, key) | ({key} & stored)
        wanted |= below
        missing += [] if below else [key]
    return wanted, missing


def _homes(index: Index) -> list[tuple[str, str]]:
    """(path, stored key), in the order of paths."""
    return sorted((_home_path(index, key), key) for key in (*index.tensors, *index.values))


def _keys_below(homes: Sequence[tuple[str, str]], path: str) -> set[str]:
    """The stored keys below a path: those that start with it and "/", up to it and the character after that."""
    low, high = bisect_left(homes, (f"{path}/",)), bisect_left(homes, (f"{path}0",))
    return {key for _, key in homes[low:high]}


def _home_path(index: Index, key: str) -> str:
    """The path of a stored key: the key itself, or, if it has a container, the key in that."""
    home = index.tensors[key].container if key in index.tensors else None
    return key if home is None else f"{home}/{key}"


def subtree(
    index: Index, tensors: Mapping[str, Tensor], path: str, wanted: set[str] | None = None
) -> dict[str, object]:
    """The nested state below `path`, from tensors that were read and the index's values."""
    below = {k for k in (*index.tensors, *index.values) if not path or _home_path(index, k).startswith(f"{path}/")}
    below = below if wanted is None else below & wanted
    values = {k: v for k, v in index.values.items() if k in below or k == path}
    markers = {k: bytes(v) for k, v in values.items() if is_container(bytes(v))}
    leaves: dict[str, object] = {
        k: tensors[k].numpy() if index.tensors[k].given_as == "numpy" else tensors[k]
        for k in index.tensors
        if k in below
    }
    leaves |= {k: decode_leaf(bytes(v), k) for k, v in values.items() if k not in markers}
    return unflatten(leaves, {k: index.tensors[k].container for k in leaves if k in index.tensors}, markers, path)


def empty_tensors(index: Index, keys: Iterable[str]) -> dict[str, Tensor]:
    """A tensor for each key that is one. Raises CheckpointError for what this torch or this host cannot hold."""
    tensors: dict[str, Tensor] = {}
    for key in sorted(keys):
        entry = index.tensors.get(key)
        if entry is None:
            continue
        try:
            tensors[key] = torch.empty(entry.global_shape, dtype=torch_dtype(entry.dtype, key))
        except RuntimeError as error:
            raise CheckpointError(f"{key!r}: {entry.size_bytes} bytes cannot be allocated: {error}") from error
    return tensors


@postponed_collection()
def match_state(flat: FlatState, index: Index, mesh: Mesh, convert_dtypes: bool = False) -> Request:
    """What of the state this checkpoint can fill, and what it cannot.

    convert_dtypes: whether a tensor may be filled from one of another floating-point type.
    """
    request = Request()
    left_out: set[int] = set()
    homes = _homes(index) if flat.objects else []
    for leaf in flat.objects:
        _match_object(leaf, _keys_below(homes, leaf.path), flat.fixed, index, request, left_out)
    for tensor in flat.tensors:
        if id(tensor) not in left_out:
            _match_tensor(tensor, index, request, convert_dtypes)
    for value in flat.values:
        if id(value) in left_out:
            continue
        _match_value(value, index, request)
    for key, marker in flat.fixed.items():
        request.asked.add(key)
        stored = index.values.get(key)
        if any(_is_below(key, leaf.path) for leaf in request.fresh):
            continue
        if stored is None and is_context(key):  # What was stored there was no tensor subclass.
            request.missing.add(key)
        elif stored is not None and bytes(stored) != marker:
            request.mismatched[key] = f"the state has {marker.decode()}, stored is {bytes(stored).decode()}"
    for per_rank in flat.per_rank:
        _match_per_rank(per_rank, index, mesh, request)
    return request


def _is_below(key: str, path: str) -> bool:
    return key == path or key.startswith(f"{path}/")


def _match_object(
    leaf: ObjectLeaf, stored: set[str], fixed: Iterable[str], index: Index, request: Request, left_out: set[int]
) -> None:
    """An object whose state lacks keys that are stored below it (a new optimizer) is given the whole subtree instead.

    Not so a module, which knows all its keys: what it lacks is unexpected, as it is below a dict.
    """
    if isinstance(leaf.owner, torch.nn.Module):
        return
    leaves = {k for k in stored if k in index.tensors or not is_container(bytes(index.values[k]))}
    own = {t.key for t in leaf.tensors} | {v.key for v in leaf.values}
    own |= {key for key in fixed if is_context(key) and _is_below(key, leaf.path)}
    request.asked |= stored
    if leaves <= own:
        return
    why = _why_not_whole(leaf, index, leaves - own)
    if why is not None:
        request.mismatched[leaf.path] = (
            f"the object has no state for {', '.join(sorted(leaves - own)[:3])}..., and cannot take what is stored: "
            f"{why}. Initialise its state first (for an optimizer with sharded parameters "
            f"torch.distributed.checkpoint.state_dict.get_optimizer_state_dict does)"
        )
        return
    request.fresh.append(leaf)
    request.missing |= own - leaves
    left_out |= {id(t) for t in leaf.tensors} | {id(v) for v in leaf.values}
    request.whole |= leaves


def _why_not_whole(leaf: ObjectLeaf, index: Index, lacking: set[str]) -> str | None:
    """Why an object cannot take what is stored below it as plain, full values; None if it can."""
    sharded = sorted(key for key in lacking if key in index.tensors and index.tensors[key].given_as == "sharded")
    if sharded:
        return f"{sharded[0]!r} was saved as shards"
    contexts = sorted(key for key in lacking if is_context(key))
    if contexts:
        return f"{_parent(contexts[0])!r} is a tensor subclass"
    if _holds_sharded_parameters(leaf.owner):
        return "its parameters are sharded"
    per_rank = sorted(key for key in index.per_rank if _is_below(key, leaf.path))
    return f"{per_rank[0]!r} is a PerRank" if per_rank else None


def _holds_sharded_parameters(owner: object) -> bool:
    return isinstance(owner, torch.optim.Optimizer) and any(
        type(p) not in (Tensor, torch.nn.Parameter) for group in owner.param_groups for p in group["params"]
    )


def _match_value(leaf: ValueLeaf, index: Index, request: Request) -> None:
    request.asked.add(leaf.key)
    stored = bytes(index.values.get(leaf.key, b""))
    if stored.startswith((LIST_MARKER, TUPLE_MARKER)):
        request.mismatched[leaf.key] = f"the state has {leaf.encoded.decode()[:80]}, stored is a list of tensors"
    elif stored:
        request.values.append((leaf.key, leaf.replace))
    elif leaf.key in index.tensors:
        request.mismatched[leaf.key] = "the state has a value, stored is a tensor"
    elif not (is_empty_list(leaf.encoded) and _is_home(leaf.key, index)):
        request.missing.add(leaf.key)


def _is_home(path: str, index: Index) -> bool:
    """Whether stored tensors with keys of their own stood at or below this path."""
    return any(entry.container is not None and _is_below(entry.container, path) for entry in index.tensors.values())


def _match_tensor(leaf: TensorLeaf, index: Index, request: Request, convert_dtypes: bool) -> None:
    request.asked.add(leaf.key)
    entry = index.tensors.get(leaf.key)
    if entry is None:
        if leaf.key in index.values:
            request.mismatched[leaf.key] = "the state has a tensor, stored is a value"
        else:
            request.missing.add(leaf.key)
    elif entry.dtype != leaf.spec.dtype and not (convert_dtypes and _is_convertible(entry, leaf)):
        request.mismatched[leaf.key] = f"the state has {leaf.spec.dtype}, stored is {entry.dtype}" + (
            "; convert_dtypes=True converts it" if _is_convertible(entry, leaf) else ""
        )
    elif entry.global_shape != leaf.spec.global_shape and not (
        leaf.allow_shape_mismatch and len(entry.global_shape) == len(leaf.spec.global_shape)
    ):
        request.mismatched[leaf.key] = f"the state has {leaf.spec.global_shape}, stored is {entry.global_shape}"
    elif any(_shares_elements(shard.data) for shard in leaf.shards):
        request.mismatched[leaf.key] = (
            "elements of the target share memory (it is expanded or overlaps); pass a real one"
        )
    else:
        request.tensors.append((leaf, entry))


def _is_convertible(entry: TensorEntry, leaf: TensorLeaf) -> bool:
    """Whether one stands for the same numbers as the other: both are real floating-point types."""
    stored, wanted = (torch_dtype(name, leaf.key) for name in (entry.dtype, leaf.spec.dtype))
    return stored.is_floating_point and wanted.is_floating_point


def _shares_elements(tensor: Tensor) -> bool:
    """Whether two elements lie in one place."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if stride == 0 or (stride <= reach and tensor.numel() > _LOOKED_AT):
            return tensor.numel() > 0
        if stride <= reach:  # A dimension steps over less than the smaller ones reach: look at every element.
            places = sum(np.ogrid[tuple(map(slice, tensor.shape))][d] * s for d, s in enumerate(tensor.stride()))
            return len(np.unique(places)) < tensor.numel()
        reach += stride * (size - 1)
    return False


def _match_per_rank(per_rank: PerRankLeaf, index: Index, mesh: Mesh, request: Request) -> None:
    entry = index.per_rank.get(per_rank.key)
    request.asked.add(per_rank.key)
    if entry is None:
        request.missing.add(per_rank.key)
        return
    now = {axis: mesh[axis][1] for axis, _ in entry.axes if axis in mesh}
    if now == dict(entry.axes):
        at = tuple(mesh[axis][0] for axis, _ in entry.axes)
        number = dict(entry.holders).get(at)
        if number is None:
            request.missing.add(per_rank.key)
        else:
            request.per_rank.append((per_rank, number))
    elif per_rank.leaf.on_change == "exact":
        request.mismatched[per_rank.key] = (
            f"it was saved for mesh axes {dict(entry.axes)}, now they are {now}; "
            f"PerRank(..., on_change='reseed' or 'skip') allows the change"
        )
    elif per_rank.leaf.on_change == "reseed" and not set(per_rank.leaf.axes or ()) <= mesh.keys():
        request.mismatched[per_rank.key] = f"its axes {per_rank.leaf.axes} are not all in the mesh {list(mesh)}"
    elif per_rank.leaf.on_change == "reseed":
        request.reseed.append(per_rank)
    else:
        request.skip.append(per_rank)


def stored_keys(index: Index) -> list[str]:
    """All stored keys in one order that every rank has."""
    return sorted({*index.tensors, *index.values, *index.per_rank})


def named_keys(flat: FlatState, index: Index, stored: Sequence[str]) -> set[str]:
    """Stored leaves below a container of the state; of the root only if a leaf of the state stands right in it."""
    homes = {_parent(t.key) if t.spec.container is None else t.spec.container for t in flat.tensors}
    homes |= {_parent(v.key) for v in flat.values} | {_parent(p.key) for p in flat.per_rank}
    named: set[str] = set()
    known = {"": "" in homes} | {v.key: True for v in flat.values if is_empty_list(v.encoded)}

    def is_named(path: str) -> bool:
        if path not in known:
            known[path] = path in flat.containers or (_parent(path) != "" and is_named(_parent(path)))
        return known[path]

    for key in stored:
        entry = index.tensors.get(key)
        home = _parent(key) if entry is None or entry.container is None else entry.container
        if is_named(home) and not (key in index.values and is_container(bytes(index.values[key]))):
            named.add(key)
    return named


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def what_was_changed(passed_over: Sequence[str]) -> str:
    """By a load that ends here, for its error; passed_over: see mismatch_error."""
    if not passed_over:
        return "Nothing was changed."
    damaged = "".join(f"\n    {each}" for each in passed_over)
    return (
        f"This load fell back to it; if tensors had been read, their values are now undefined.\n"
        f"  {len(passed_over)} damaged:{damaged}"
    )


def mismatch_error(
    index: Index,
    missing: list[str],
    unexpected: list[str],
    mismatched: Mapping[str, str],
    strict: bool,
    passed_over: Sequence[str],
) -> MismatchError:
    """passed_over: the damaged checkpoints that were tried before, and why; they may have been read in part."""
    lines = [f"iteration {index.iteration} is not what the state asks for. {what_was_changed(passed_over)}"]
    for title, keys in (
        ("differ", [f"{key}: {why}" for key, why in sorted(mismatched.items())]),
        ("in the state, but not stored", missing if strict else []),
        ("stored below a container of the state, but not in it", unexpected if strict else []),
    ):
        if keys:
            shown = keys[:_SHOWN] + ([f"... and {len(keys) - _SHOWN} more"] if len(keys) > _SHOWN else [])
            lines += [f"  {len(keys)} {title}:", *(f"    {key}" for key in shown)]
    if strict and not mismatched:
        lines.append("  allow=(pattern, ...) lets keys be missing or unread; the report lists them.")
    return MismatchError(
        "\n".join(lines),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        mismatched=tuple(sorted(mismatched)),
    )
