"""A nested state as flat leaves under keys, and back. Decides keys, which leaf is what, and how loaded values return.

A leaf is a tensor (its boxes), a JSON value, or a PerRank. Keys are paths of escaped segments joined by "/"; a
ShardedTensor has a key of its own. Never does I/O and never talks to other ranks.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast
from urllib.parse import quote, unquote

import msgspec
import numpy as np
import torch
from torch import Tensor

from distckpt.errors import CheckpointError, CorruptionError, InvalidShardingError, UnsupportedTypeError
from distckpt.garbage import postponed_collection
from distckpt.geometry import Box
from distckpt.index import Spec
from distckpt.json_value import LIST_MARKER, TUPLE_MARKER, decode_value, encode_value
from distckpt.leaf_value import (
    Stateful,
    check_storable,
    encode_leaf,
    is_plain_value,
    is_stateful,
)
from distckpt.meta import RealTensors
from distckpt.per_rank import PerRank
from distckpt.sharded_tensor import PLAIN_TENSOR_TYPES, Shard, ShardedTensor, dtype_name, is_text

Setter: TypeAlias = Callable[[object], None]
_Container: TypeAlias = dict[Any, object] | list[object]


class Adapted(msgspec.Struct, frozen=True, kw_only=True):
    """What a foreign leaf means to us; exactly one of the first four is given.

    shards: parts of one global tensor; stored under the leaf's path, or under their own key if `own_key`.
    state: a nested state that stands for the leaf. value: (key, value) to store. skip: not stored.
    on_loaded: called with the filled shards or state, or the loaded value, once all ranks have loaded.
    replacement: of shards on the meta device: makes, of the filled shards, what takes the leaf's place.
    """

    shards: Sequence[ShardedTensor] | None = None
    own_key: bool = False
    state: dict[str, object] | None = None
    value: tuple[str, object] | None = None
    skip: bool = False
    on_loaded: Setter | None = None
    replacement: Callable[[], object] | None = None


Adapter: TypeAlias = Callable[[str, object], Adapted | None]


class TensorLeaf(msgspec.Struct):  # There is one for every tensor of a state: a dataclass takes three times as long.
    """A tensor of which this rank has some boxes.

    materialize: for a tensor on the meta device, puts an empty one on a real device in its place and returns the
    shards of that. loaded: called once the shards are filled.
    """

    key: str
    spec: Spec
    shards: list[Shard]
    allow_shape_mismatch: bool = False
    materialize: Callable[[torch.device], list[Shard]] | None = None
    loaded: Callable[[], None] | None = None


@dataclass(slots=True)
class ValueLeaf:
    key: str
    encoded: bytes
    replace: Setter


@dataclass(slots=True)
class PerRankLeaf:
    key: str
    leaf: PerRank


@dataclass(slots=True)
class ObjectLeaf:
    """An object with load_state_dict(): it gets everything stored below its path."""

    path: str
    owner: Stateful
    state: dict[str, object]
    tensors: list[TensorLeaf]
    values: list[ValueLeaf]


@dataclass(slots=True)
class FlatState:
    """The leaves of one state. `containers` are the paths of its dicts and lists, the root ("") left out.

    `fixed` holds what must be stored as it is here, by key: the length marker of each list that has tensors in it,
    the context of each tensor subclass. `finish` runs, in order,
    once everything is loaded: it rebuilds tuples and merges. Inner ones come before outer ones.
    """

    tensors: list[TensorLeaf] = field(default_factory=list)
    values: list[ValueLeaf] = field(default_factory=list)
    per_rank: list[PerRankLeaf] = field(default_factory=list)
    objects: list[ObjectLeaf] = field(default_factory=list)
    containers: set[str] = field(default_factory=set)
    fixed: dict[str, bytes] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)
    finish: list[Callable[[], None]] = field(default_factory=list)


_CONTEXT = "%c"


def is_context(key: str) -> bool:
    """Whether a key of a value is that of the context of a tensor subclass; no key of a dict looks so."""
    return key.endswith(f"/{_CONTEXT}")


def segment(key: object, where: str) -> str:
    """One dict key as a path segment. Different keys give different segments; strings are kept readable."""
    if isinstance(key, str) and type(key) is str:
        if not is_text(key):
            raise UnsupportedTypeError(f"{where!r}: the key {key!r} with a lone surrogate is not text")
        return key.replace("%", "%25").replace("/", "%2F") or "%e"
    if type(key) is int and 0 <= key < 2**63:  # An optimizer numbers its parameters.
        return f"%k{key}"
    return "%k" + quote(encode_value(key, f"{where} (a key)"), safe="")


def _key_of_segment(text: str) -> object:
    if "%" not in text:
        return text
    if text == "%e":
        return ""
    if text.startswith("%k"):
        key = decode_value(unquote(text[2:]).encode(), f"path segment {text!r}")
        try:
            hash(key)
        except TypeError as error:
            raise CorruptionError(f"path segment {text!r} is not the key of a dict") from error
        return key
    if _LIST_ITEM.fullmatch(text):  # A position beside keys of other kinds: they stood in one list.
        return int(text[2:])
    return unquote(text)


@postponed_collection()
def flatten(state: dict[str, object], adapters: Sequence[Adapter]) -> FlatState:
    """The leaves of a nested state.

    Raises UnsupportedTypeError for a leaf that cannot be stored exactly, InvalidShardingError for shards that
    cannot be; both name the key.
    """
    if type(state) not in (dict, OrderedDict):
        raise UnsupportedTypeError(f"the state is a {type(state).__name__}; expected a dict")
    flat = FlatState()
    flattener = _Flattener(flat, adapters)
    try:
        with torch.no_grad():  # Views that autograd knows of cost more than all the rest.
            flattener.dictionary(state, "")
    except RecursionError as error:
        raise UnsupportedTypeError("the state is nested too deep to be stored") from error
    keys = Counter([leaf.key for leaf in flat.values] + [leaf.key for leaf in flat.per_rank])
    twice = [key for key, count in keys.items() if count > 1]
    if twice:
        raise InvalidShardingError(f"{twice[0]!r}: two leaves of the state have this key")
    return flat


class _Flattener:
    def __init__(self, flat: FlatState, adapters: Sequence[Adapter]) -> None:
        self._flat = flat
        self._adapters = adapters
        self._open: set[int] = set()
        self._real = RealTensors()
        # Many tensors are few kinds: what all of one have in common is looked at and made once.
        self._kinds: dict[tuple[torch.dtype, torch.layout, torch.Size], tuple[Spec, Box]] = {}

    def dictionary(self, state: dict[Any, object], path: str) -> None:
        """`state` is changed by the setters of its leaves, never here."""
        self._enter(state, path)
        for key, value in state.items():
            text = segment(key, path)
            self.leaf(value, f"{path}/{text}" if path else text, state, key)
        self._open.discard(id(state))

    def _enter(self, container: object, path: str) -> None:
        if id(container) in self._open:
            raise UnsupportedTypeError(f"{path!r}: a container that contains itself")
        self._open.add(id(container))
        if path:
            self._flat.containers.add(path)

    def leaf(self, value: object, path: str, container: _Container, key: Any) -> None:
        """`value` is container[key]."""
        if type(value) in PLAIN_TENSOR_TYPES:
            self._tensor(value, path, container, key)  # type: ignore[arg-type]
        elif isinstance(value, ShardedTensor):
            self._sharded([value], path.rpartition("/")[0], None)
        else:
            self._other(value, path, _item_setter(container, key))

    def _other(self, value: object, path: str, replace: Setter) -> None:
        for adapter in self._adapters:
            adapted = adapter(path, value)
            if adapted is not None:
                self._adapted(adapted, path, replace)
                return
        if isinstance(value, PerRank):
            self._flat.per_rank.append(PerRankLeaf(path, value))
        elif isinstance(value, Tensor):
            self._subclass(value, path)
        elif isinstance(value, np.ndarray):
            self._array(value, path, replace)
        elif isinstance(value, dict) and type(value) in (dict, OrderedDict):
            self.dictionary(value, path)
            if not value:
                self._flat.empty.append(path)
        elif type(value) in (list, tuple) and not is_plain_value(value):
            self._sequence(value, path, replace)  # type: ignore[arg-type]
        elif is_stateful(value):
            self._object(value, path)
        else:
            self._flat.values.append(ValueLeaf(path, encode_value(value, path), replace))

    def _adapted(self, adapted: Adapted, path: str, replace: Setter) -> None:
        shards, state, on_loaded, replacement = adapted.shards, adapted.state, adapted.on_loaded, adapted.replacement
        if shards is not None:
            self._sharded(shards, path.rpartition("/")[0] if adapted.own_key else None, path)
            if replacement is not None:
                self._flat.finish.append(lambda: None if shards[0].data.is_meta else replace(replacement()))
            if on_loaded is not None:
                self._flat.finish.append(lambda: on_loaded(shards))
        elif state is not None:
            self.dictionary(state, path)
            if on_loaded is not None:
                self._flat.finish.append(lambda: on_loaded(state))
        elif adapted.value is not None:
            key, value = adapted.value
            self._flat.values.append(ValueLeaf(key, encode_leaf(value, key), adapted.on_loaded or replace))

    def _sharded(self, parts: Sequence[ShardedTensor], container: str | None, path: str | None) -> None:
        """Parts of one tensor under their own key, standing in `container`; or under `path` if that is None."""
        for part in parts:
            key = part.key if container is not None else path or part.key
            check_storable(part.data, key)
            spec = msgspec.structs.replace(part.spec, container=container, given_as="sharded")
            materialize = _materialize_part(part) if part.data.is_meta else None
            self._flat.tensors.append(TensorLeaf(key, spec, part.shards(), part.allow_shape_mismatch, materialize))

    def _tensor(self, tensor: Tensor, path: str, container: _Container, key: Any) -> None:
        if tensor.is_nested:  # It has no shape to be known by.
            check_storable(tensor, path)
        kind = tensor.dtype, tensor.layout, tensor.shape
        known = self._kinds.get(kind)
        if known is None:
            check_storable(tensor, path)
            shape = tuple(tensor.shape)
            known = Spec(dtype=dtype_name(tensor.dtype, path), global_shape=shape), Box.whole(shape)
            self._kinds[kind] = known
        spec, box = known
        materialize = None
        if tensor.is_meta:
            materialize = _materialize_tensor(tensor, self._real, _item_setter(container, key))
        # Detached, it keeps its memory whatever memory the tensor is given before it is copied.
        self._flat.tensors.append(TensorLeaf(path, spec, [Shard(box, tensor.detach())], materialize=materialize))

    def _subclass(self, tensor: Tensor, path: str) -> None:
        """A wrapper is its inner tensors, which load fills in place."""
        names = getattr(tensor, "__tensor_flatten__", None)
        if torch.nn.parameter.is_lazy(tensor):
            raise UnsupportedTypeError(f"{path!r}: the parameter is not initialised; run one forward pass first")
        if names is None:
            raise UnsupportedTypeError(
                f"{path!r}: a {type(tensor).__qualname__} has no __tensor_flatten__ and cannot be stored as it is; "
                f"store the plain tensors it is made of"
            )
        inner_names, context = names()
        inner: dict[object, object] = {name: getattr(tensor, name) for name in inner_names}
        if any(isinstance(part, Tensor) and part.is_meta for part in inner.values()):
            raise UnsupportedTypeError(f"{path!r}: a {type(tensor).__qualname__} on the meta device; make it real")
        self.dictionary(inner, path)
        # What is no tensor in it (a scale, a shape) cannot be filled in place: it must be what was stored.
        self._flat.fixed[f"{path}/{_CONTEXT}"] = encode_leaf(
            context, f"{path} (the context of a {type(tensor).__qualname__})"
        )

    def _array(self, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], path: str, replace: Setter) -> None:
        if type(array) is not np.ndarray:
            raise UnsupportedTypeError(f"{path!r}: a {type(array).__qualname__} cannot be stored; pass a plain array")
        native = np.require(array.astype(array.dtype.newbyteorder("="), copy=False), requirements=["C"])
        if not native.flags.writeable:
            native = native.copy()
        try:
            tensor = torch.from_numpy(native)
        except TypeError as error:
            raise UnsupportedTypeError(f"{path!r}: arrays of dtype {array.dtype} cannot be stored") from error
        check_storable(tensor, path)
        spec = Spec(dtype=dtype_name(tensor.dtype, path), global_shape=tuple(array.shape), given_as="numpy")

        def loaded() -> None:
            if native is array:
                return
            if array.flags.writeable:
                array[...] = native
            else:
                replace(native)

        self._flat.tensors.append(TensorLeaf(path, spec, [Shard(Box.whole(array.shape), tensor)], loaded=loaded))

    def _sequence(self, value: list[object] | tuple[object, ...], path: str, replace: Setter) -> None:
        self._enter(value, path)
        items = value if isinstance(value, list) else list(value)
        before = len(self._flat.tensors)
        for i, item in enumerate(items):
            self.leaf(item, f"{path}/%l{i}", items, i)
        marker = LIST_MARKER if isinstance(value, list) else TUPLE_MARKER
        own_keyed = all(t.spec.container is not None for t in self._flat.tensors[before:])
        if not (own_keyed and len(self._flat.tensors) > before):
            # Stages may have lists of different lengths if all in them have keys of their own.
            self._flat.fixed[path] = marker + b"%d}" % len(items)
        if isinstance(value, tuple):
            self._flat.finish.append(lambda: replace(tuple(items)))
        self._open.discard(id(value))

    def _object(self, value: Stateful, path: str) -> None:
        self._enter(value, path)
        state = dict(value.state_dict())
        flat = self._flat
        tensors, values = len(flat.tensors), len(flat.values)
        self.dictionary(state, path)
        self._open.discard(id(value))
        flat.objects.append(ObjectLeaf(path, value, state, flat.tensors[tensors:], flat.values[values:]))


def _item_setter(container: _Container, key: Any) -> Setter:
    return lambda value: container.__setitem__(key, value)


def _materialize_part(part: ShardedTensor) -> Callable[[torch.device], list[Shard]]:
    def materialize(device: torch.device) -> list[Shard]:
        part.data = torch.empty_like(part.data, device=device)
        return part.shards()

    return materialize


def _materialize_tensor(tensor: Tensor, real: RealTensors, replace: Setter) -> Callable[[torch.device], list[Shard]]:
    def materialize(device: torch.device) -> list[Shard]:
        made = real.make(tensor, device)
        replace(made)
        return [Shard(Box.whole(made.shape), made.detach())]

    return materialize


def set_per_rank(leaf: PerRankLeaf, stored: object) -> None:
    """Give a PerRank its stored value, decoded."""
    value = leaf.leaf.value
    leaf.leaf.seed = None
    if is_stateful(value):
        value.load_state_dict(cast("dict[str, object]", stored))
    else:
        leaf.leaf.value = stored


def unflatten(
    leaves: Mapping[str, object],
    containers: Mapping[str, str | None],
    markers: Mapping[str, bytes],
    below: str = "",
) -> dict[str, object]:
    """The nested state of stored leaves, or the part of it below the path `below`.

    containers: for a key that is not its own path, where it stood. markers: key -> encoded length of a list that
    has tensors in it, or b"{}" for an empty dict.
    """
    tree: dict[str, object] = {}
    for key in markers:
        _descend(tree, key.split("/"))
    for key, value in leaves.items():
        home = containers.get(key)
        if home is None:
            *parents, last = key.split("/")
        else:
            parents, last = home.split("/") if home else [], segment(key, key)
        parent = _descend(tree, parents)
        if last in parent:
            raise CheckpointError(f"two things are stored under {'/'.join([*parents, last])!r}; read them by keys")
        parent[last] = _Leaf(value)
    try:
        return _nest(_descend(tree, below.split("/") if below else []), below, markers)  # type: ignore[return-value]
    except RecursionError as error:
        raise CheckpointError("the stored state is nested too deep to be read") from error


@dataclass(frozen=True, slots=True)
class _Leaf:
    value: object


def _descend(tree: dict[str, object], path: Sequence[str]) -> dict[str, object]:
    for text in path:
        below = tree.setdefault(text, {})
        if not isinstance(below, dict):
            raise CheckpointError(f"something is stored under {'/'.join(path)!r}, and more below it; read it by keys")
        tree = below
    return tree


_LIST_ITEM = re.compile(r"%l[0-9]{1,18}")


def _nest(node: object, path: str, markers: Mapping[str, bytes]) -> object:
    if isinstance(node, _Leaf):
        return node.value
    assert isinstance(node, dict)
    children = {text: _nest(child, f"{path}/{text}" if path else text, markers) for text, child in node.items()}
    if not children or not all(map(_LIST_ITEM.fullmatch, children)):
        return {_key_of_segment(text): child for text, child in children.items()}
    items = [children[text] for text in sorted(children, key=lambda text: int(text[2:]))]
    return tuple(items) if markers.get(path, b"").startswith(TUPLE_MARKER) else items
