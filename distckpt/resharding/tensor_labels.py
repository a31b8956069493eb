"""Labels of tensors: over which mesh axis each is split, and which coordinate of which axis holds it. Pure; no torch.

What the plan file says wins over what the index records, and that over what can be inferred: from which ranks wrote
which chunks, and from numbers in keys. What is inferred is only what leaves no choice; for everything else the error
prints the lines that the plan needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from distckpt.chunk_table import Hits
from distckpt.errors import CheckpointError
from distckpt.geometry import Int64Array, grid_cuts
from distckpt.index import Spec
from distckpt.reader import StoredTensors
from distckpt.resharding.numbering import Numbering, numbers_in
from distckpt.resharding.plan_checks import REPLICATING, STAGES, check_axes, check_plan_axes, check_rules, check_stages
from distckpt.resharding.plan_file import ReshardPlan, TensorRule, glob_of
from distckpt.resharding.target_layout import AXIS_ORDER, TargetMesh, TargetTensor
from distckpt.shard_file import DTYPES

_MAX_SHOWN = 12
_INHERITED = ("partition", "owner", "at", "blocks", "pad")  # by the state of an optimizer, from its parameter

Partition = tuple[str | None, ...]


def label_tensors(
    stored: StoredTensors,
    mesh: TargetMesh,
    plan: ReshardPlan,
    dtype: str | None,
    chunks_left_out: Callable[[str], Hits | None],
) -> list[TargetTensor]:
    """What each tensor is in the target. stored: what is taken along. dtype: what floating-point tensors are converted
    to, None leaves them. chunks_left_out: of a tensor that is not taken along but may tell how another lies; None if it
    does not.

    Raises CheckpointError for what is neither recorded nor can be inferred: it has the lines that the plan needs.
    """
    if dtype is not None and dtype not in FLOATING:
        raise CheckpointError(f"dtype {dtype!r}: expected one of {', '.join(FLOATING)}")
    check_plan_axes(plan, {*mesh.sizes, *AXIS_ORDER})
    labels = _Labels(stored, mesh, plan, chunks_left_out)
    tensors = [labels.tensor(key, dtype) for key in stored.keys]
    labels.refuse_unknown()
    check_rules(plan, stored.keys)
    check_stages(plan, mesh, tensors)
    check_axes(mesh, tensors, stored.index.mesh)
    return tensors


@dataclass(slots=True)
class _Labels:
    """Labels of the tensors of one checkpoint; unknown: template of a key -> the line that the plan needs, and why."""

    stored: StoredTensors
    mesh: TargetMesh
    plan: ReshardPlan
    chunks_left_out: Callable[[str], Hits | None]
    unknown: dict[str, tuple[str, str]] = field(default_factory=dict)
    _is_kept: frozenset[str | None] = field(init=False)
    _state_prefixes: dict[str, bool] = field(default_factory=dict)
    _numbering: dict[str, Numbering | None] = field(default_factory=dict)
    _known: dict[str, Spec | None] = field(default_factory=dict)
    _places: dict[str, Int64Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._is_kept = frozenset(self.stored.keys)

    def tensor(self, key: str, dtype: str | None) -> TargetTensor:
        rule = self._rule_of(key)
        spec = self._partitioned(key, rule)
        owner = rule.owner or spec.owner
        spec = msgspec.structs.replace(spec, owner=owner, dtype=_dtype(key, spec.dtype, rule.dtype or dtype))
        spec = _padded(key, spec, rule, self.mesh)
        counts = {axis: stage.counts for axis, stage in self.plan.stages.items() if stage.counts is not None}
        at = None if owner is None else self._coordinate(key, owner, rule)
        return TargetTensor(key, spec, at, counts)

    def refuse_unknown(self) -> None:
        if not self.unknown:
            return
        shown = list(self.unknown.items())[:_MAX_SHOWN]
        more = f"\n  ... and {len(self.unknown) - _MAX_SHOWN} more" if len(self.unknown) > _MAX_SHOWN else ""
        why = "\n".join(f"  {template}: {reason}" for template, (_, reason) in shown)
        lines = ",\n".join(f"  {line}" for _, (line, _) in shown)
        raise CheckpointError(
            f"the checkpoint does not record how these tensors lie on {self.mesh}:\n{why}{more}\n"
            f'Say it in a plan (--plan FILE): {{"tensors": [\n{lines}\n]}}\n'
            f"with, for each dimension, the mesh axis that splits it or null, and the coordinate that holds the tensor."
        )

    def _ask(self, key: str, line: Mapping[str, object], why: str) -> None:
        key = self._stands_for(key) or key
        template = re.sub(r"(?<![^./])\d+(?![^./])", "*", glob_of(key))  # Not the 1 of fc1: fc2 is cut otherwise.
        text = msgspec.json.encode({"match": template, **line}).decode()
        self.unknown.setdefault(template, (text, why))

    def _partitioned(self, key: str, rule: TensorRule) -> Spec:
        """The spec of a tensor with its partition and blocks, as far as they are known."""
        entry = self.stored.index.tensors[key].spec
        ndim = len(entry.global_shape)
        if rule.partition is not None or rule.blocks is not None:
            for name, labels in (("partition", rule.partition), ("blocks", rule.blocks)):
                if labels is not None and len(labels) != ndim:
                    raise CheckpointError(
                        f"plan: {key!r} has {ndim} dimensions {entry.global_shape}, its {name} is {list(labels)}"
                    )
            for d, n in enumerate(rule.blocks or ()):
                if entry.global_shape[d] % n:
                    raise CheckpointError(
                        f"plan: {n} blocks do not divide dimension {d} of {key!r} {entry.global_shape}"
                    )
            return msgspec.structs.replace(
                entry, partition=rule.partition or entry.partition, blocks=rule.blocks or entry.blocks
            )
        known = self._known_spec(key)
        if known is None:
            asked = [axis for axis, size in self.mesh.sizes.items() if size > 1 and axis not in REPLICATING]
            if asked:
                self._ask(
                    key,
                    {"partition": [None] * ndim},
                    f"shape {list(entry.global_shape)}, and nothing tells whether or how {', '.join(asked)} split it",
                )
            return entry
        return known

    def _known_spec(self, key: str) -> Spec | None:
        """As recorded or inferred; None if the target's axes leave a choice."""
        if key not in self._known:
            self._known[key] = self._find_spec(key)
        return self._known[key]

    def _find_spec(self, key: str) -> Spec | None:
        entry = self.stored.index.tensors[key].spec
        # With an owner it was labelled: no partition means that nothing splits it. Plain tensors are whole everywhere.
        is_labelled = entry.partition is not None or entry.owner is not None or entry.given_as != "sharded"
        if is_labelled or not entry.size_bytes:
            return self._with_blocks(key, entry)
        open_axes = [
            axis
            for axis, size in self.mesh.sizes.items()
            if size > 1 and axis not in REPLICATING and self.stored.index.mesh.get(axis, 1) == 1
        ]
        found = None if open_axes else self._infer(entry, self._chunks_of(key))
        if found is not None:
            return found
        return self._as_its_parameter(key, entry)

    def _with_blocks(self, key: str, entry: Spec) -> Spec:
        """Where it is recorded what splits a tensor, but not into which blocks first: as its parameter; or, if it is
        one, by how it was cut."""
        if entry.partition is None or entry.blocks is not None or not entry.size_bytes:
            return entry
        parameter = self._parameter_of(key, entry)
        if parameter is not None:
            known = self._known_spec(parameter)
            is_alike = known is not None and known.partition == entry.partition
            return msgspec.structs.replace(entry, blocks=known.blocks) if known is not None and is_alike else entry
        chunks = self._chunks_of(key)
        cuts = None if chunks is None else grid_cuts(chunks.offsets, chunks.shapes)
        if chunks is None or cuts is None:
            return entry
        blocks = [
            1 if axis is None else self._blocks_in(entry.global_shape[d], cuts[d], chunks, d, axis)
            for d, axis in enumerate(entry.partition)
        ]
        return msgspec.structs.replace(entry, blocks=tuple(blocks)) if max(blocks, default=1) > 1 else entry

    def _blocks_in(self, extent: int, starts: Int64Array, chunks: Hits, dim: int, axis: str) -> int:
        """Into how many blocks a dimension was cut before an axis split each of them."""
        count, size = len(starts), self.stored.index.mesh.get(axis, 1)
        if extent % count or not (starts == np.arange(count) * (extent // count)).all():
            return 1
        if size == 1:
            return count
        of_cell = np.full(count, -1, np.int64)
        place = self._places_on(axis)[chunks.files]
        cell = np.searchsorted(starts, chunks.offsets[:, dim])
        of_cell[cell] = place
        return max(1, _blocks_of(of_cell, size)) if bool((of_cell[cell] == place).all()) else 1

    def _parameter_of(self, key: str, entry: Spec) -> str | None:
        """The tensor whose state this is, as an optimizer's: it has the same shape, and its key ends this one. What is
        before that is before the state of most others, too: norm.weight is no parameter of layers.0.norm.weight."""
        known = self.stored.index.tensors
        for match in re.finditer(r"[./]", key):  # The longest first.
            end = key[match.end() :]
            if end in known and known[end].global_shape == entry.global_shape and self._is_of_state(match.end(), key):
                return end
        return None

    def _is_of_state(self, length: int, key: str) -> bool:
        """Whether the first `length` characters of a key are what keys of the state of parameters begin with."""
        prefix = key[:length]
        if prefix not in self._state_prefixes:
            known = self.stored.index.tensors
            others = [other[length:] for other in known if other.startswith(prefix)]
            self._state_prefixes[prefix] = 2 * sum(other in known for other in others) >= len(others)
        return self._state_prefixes[prefix]

    def _stands_for(self, key: str) -> str | None:
        """The parameter whose state a tensor is, if it is taken along: what is said of that holds for the state."""
        parameter = self._parameter_of(key, self.stored.index.tensors[key])
        return parameter if parameter in self._is_kept else None

    def _rule_of(self, key: str) -> TensorRule:
        """What the plan says of a tensor; of the state of a parameter, too, what it says of that, but for the type."""
        rule, parameter = self.plan.rule_of(key), self._stands_for(key)
        if parameter is None or not self.plan.tensors:
            return rule
        of = self.plan.rule_of(parameter)
        said = {name: getattr(of, name) for name in _INHERITED if getattr(rule, name) is None}
        return msgspec.structs.replace(rule, **said)

    def _chunks_of(self, key: str) -> Hits | None:
        return self.stored.chunks_of(key) if key in self._is_kept else self.chunks_left_out(key)

    def _infer(self, entry: Spec, chunks: Hits | None) -> Spec | None:
        """From which ranks wrote which chunks; None if that does not say."""
        cuts = None if chunks is None else grid_cuts(chunks.offsets, chunks.shapes)
        if chunks is None or cuts is None:
            return None
        places = {
            axis: self._places_on(axis)[chunks.files] for axis, size in self.stored.index.mesh.items() if size > 1
        }
        partition: list[str | None] = []
        blocks: list[int] = []
        for d, starts in enumerate(cuts):
            cell = np.searchsorted(starts, chunks.offsets[:, d])
            are_single = len(starts) == entry.global_shape[d]
            found = _splitting_axis(cell, len(starts), places, self.stored.index.mesh, are_single=are_single)
            if found is None:
                return None
            partition.append(found[0])
            blocks.append(found[1])
        if any(n > 1 and extent % n for n, extent in zip(blocks, entry.global_shape, strict=True)):
            return None
        return msgspec.structs.replace(
            entry, partition=tuple(partition), blocks=tuple(blocks) if max(blocks, default=1) > 1 else None
        )

    def _as_its_parameter(self, key: str, entry: Spec) -> Spec | None:
        """State of an optimizer lies as its parameter does."""
        other = self._parameter_of(key, entry)
        if other is None:
            return None
        rule, parameter = self.plan.rule_of(other), self._known_spec(other)
        if parameter is None and rule.partition is None:
            return None
        of = entry if parameter is None else parameter
        return msgspec.structs.replace(
            entry,
            partition=rule.partition or of.partition,
            blocks=rule.blocks or of.blocks,
            owner=rule.owner or of.owner,
        )

    def _coordinate(self, key: str, axis: str, rule: TensorRule) -> int:
        """Of the owner axis: where a tensor is held."""
        size, before = self.mesh.size(axis), self.stored.index.mesh.get(axis, 1)
        if rule.at is not None:
            return _said_coordinate(key, axis, rule.at, size)
        if size == 1:
            return 0
        held = self._held_at(key, axis)
        stage = self.plan.stages.get(axis)
        if size == before and len(held) == 1 and stage is None:
            return held.pop()
        numbering = self._numbering_of(axis)
        number = None if numbering is None else numbering.number(key)
        if numbering is not None and number is not None:
            return numbering.coordinate(number, size)
        numbers = numbers_in(key)
        # A tied tensor is held by both ends, and stored by one. One of many that are numbered is at an end by chance.
        if before > 1 and held <= {0, before - 1} and (numbering is not None or not numbers):
            return 0 if 0 in held else size - 1
        why = f"which of {size} coordinates of {axis!r} holds it? (first, last or a number)"
        if numbers:
            why += f' {{"stages": {{"{axis}": {{"numbered_by": "{numbers[0][0]}"}}}}}} deals out by number.'
        self._ask(key, {"at": "first"}, why)
        return 0

    def _held_at(self, key: str, axis: str) -> set[int]:
        return set(self._places_on(axis)[self.stored.chunks_of(key).files].tolist())

    def _places_on(self, axis: str) -> Int64Array:
        """The coordinate on an axis of whoever wrote each file."""
        if axis not in self._places:
            self._places[axis] = np.array([file.mesh.get(axis, 0) for file in self.stored.index.files], np.int64)
        return self._places[axis]

    def _numbering_of(self, axis: str) -> Numbering | None:
        if axis not in self._numbering:
            owned = [
                key
                for key in self.stored.keys
                if (self._rule_of(key).owner or self.stored.index.tensors[key].spec.owner) == axis
            ]
            self._numbering[axis] = self._find_numbering(axis, owned)
        return self._numbering[axis]

    def _find_numbering(self, axis: str, keys: Sequence[str]) -> Numbering | None:
        """By which word of the keys what is numbered is dealt out over an axis. Raises CheckpointError."""
        stage = self.plan.stages.get(axis)
        counts = None if stage is None else stage.counts
        words = {word for key in keys for word, _ in numbers_in(key)}
        if stage is not None and stage.numbered_by is not None:
            fitting = {stage.numbered_by} & words
            if not fitting:
                raise CheckpointError(f"plan: no key held by {axis!r} has a number after {stage.numbered_by!r}")
        else:
            fitting = {word for word in words if self._follows(axis, word, keys)}
        if len(fitting) > 1:  # Layers have experts in them, but not every layer need have.
            numbered = [dict(numbers_in(key)) for key in keys if numbers_in(key)]
            everywhere = {word for word in fitting if all(word in numbers for numbers in numbered)}
            fitting = everywhere or fitting
        if not fitting:
            return None
        if len(fitting) > 1:
            raise CheckpointError(
                f"keys held by {axis!r} have numbers after {sorted(fitting)}: say in a plan (--plan FILE) which of "
                f'them counts, such as {{"stages": {{"{axis}": {{"numbered_by": "{min(fitting)}"}}}}}}'
            )
        word = fitting.pop()
        numbers = {dict(numbers_in(key))[word] for key in keys if word in dict(numbers_in(key))}
        return Numbering.of(axis, word, numbers, self.mesh.size(axis), counts)

    def _follows(self, axis: str, word: str, keys: Sequence[str]) -> bool:
        """Whether numbers after a word may be what was dealt out: nowhere does a coordinate fall as they rise."""
        held: dict[int, set[int]] = {}
        for key in keys:
            number = dict(numbers_in(key)).get(word)
            if number is not None:
                held.setdefault(number, set()).update(self._held_at(key, axis))
        if any(len(at) > 1 for at in held.values()):
            return False
        order = [min(held[number]) for number in sorted(held)]
        is_split = self.stored.index.mesh.get(axis, 1) > 1
        return order == sorted(order) and (not is_split or len(set(order)) > 1)


def _splitting_axis(
    cell: Int64Array, count: int, places: Mapping[str, Int64Array], mesh: Mapping[str, int], *, are_single: bool
) -> tuple[str | None, int] | None:
    """The axis that splits a dimension into `count` cells, and into how many blocks first; (None, 1) where none does;
    None where that cannot be told. places: the coordinate, on each axis, of who wrote each chunk. are_single: each cell
    has one entry, as those of stacked layers have."""
    if count == 1:
        return None, 1
    fitting: list[tuple[str, int]] = []
    varies = False
    for axis, place in places.items():
        of_cell = np.full(count, -1, np.int64)
        of_cell[cell] = place
        is_function = bool((of_cell[cell] == place).all())
        blocks = _blocks_of(of_cell, mesh[axis]) if is_function else 0
        if blocks:
            fitting.append((axis, blocks))
        elif axis not in REPLICATING and is_function and len(np.unique(of_cell)) > 1:
            varies = True
    proper = [found for found in fitting if found[0] not in REPLICATING] or fitting
    if are_single and (STAGES, 1) in proper and all(n > 1 for axis, n in proper if axis != STAGES):
        return STAGES, 1
    # Of several one may split, and the others have replicas that were written in turn, which look the same.
    if len(proper) == 1:
        return proper[0]
    return None if proper or varies else (None, 1)


def _blocks_of(of_cell: Int64Array, size: int) -> int:
    """Into how many blocks a dimension is cut, each of whose cells go round the coordinates; 0 if it is not so."""
    count = len(of_cell)
    if count % size:
        return 0
    order = np.arange(count)
    if (of_cell == order // (count // size)).all():
        return 1
    return count // size if (of_cell == order % size).all() else 0


def _said_coordinate(key: str, axis: str, at: int | str, size: int) -> int:
    """Of a plan's "at". Raises CheckpointError."""
    said = {"first": 0, "last": size - 1}.get(at) if isinstance(at, str) else at
    if said is None or said >= size:
        raise CheckpointError(
            f'plan: {key!r}: "at" is {at!r}, expected "first", "last" or a number below {size} ({axis})'
        )
    return said


def _dtype(key: str, stored: str, wanted: str | None) -> str:
    """What a tensor is converted to: floating-point tensors to another such type, all others not."""
    if wanted is None or stored == wanted or stored not in FLOATING:
        return stored
    if wanted not in FLOATING:
        raise CheckpointError(f"plan: {key!r}: dtype {wanted!r}, expected one of {', '.join(FLOATING)}")
    return wanted


FLOATING = tuple(name for name in DTYPES if name.startswith(("float64", "float32", "float16", "bfloat16")))


def _padded(key: str, spec: Spec, rule: TensorRule, mesh: TargetMesh) -> Spec:
    pad = rule.pad
    if pad is None:
        return spec
    if pad.dim >= len(spec.global_shape) or (spec.blocks and spec.blocks[pad.dim] > 1):
        raise CheckpointError(f"plan: {key!r} {spec.global_shape}: dimension {pad.dim} cannot be padded")
    if pad.size > spec.global_shape[pad.dim]:
        raise CheckpointError(
            f"plan: {key!r} {spec.global_shape}: dimension {pad.dim} has fewer than {pad.size} entries, the real ones"
        )
    axis = (spec.partition or (None,) * len(spec.global_shape))[pad.dim]
    unit = pad.multiple * (1 if axis is None else mesh.size(axis))
    shape = list(spec.global_shape)
    shape[pad.dim] = -(-pad.size // unit) * unit
    return msgspec.structs.replace(spec, global_shape=tuple(shape))
