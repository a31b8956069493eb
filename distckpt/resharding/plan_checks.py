"""Checks that everything is used that a plan says, and every size that is asked for. Pure; no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import msgspec

from distckpt.errors import CheckpointError
from distckpt.resharding.numbering import numbers_in
from distckpt.resharding.plan_file import ReshardPlan, glob_of
from distckpt.resharding.target_layout import TargetMesh, TargetTensor

# Axes over which a tensor is the same unless something says otherwise: of its replicas any one is written, so that
# who wrote a chunk says little.
REPLICATING = frozenset(("dp", "cp"))
STAGES = "pp"
_MAX_SHOWN = 12


def check_rules(plan: ReshardPlan, keys: Sequence[str]) -> None:
    for rule in plan.tensors:
        if not any(fnmatchcase(key, rule.match) for key in keys):
            raise CheckpointError(
                f"the plan has a rule for {rule.match!r}, which is the key of no tensor; keys are {_some(keys)}"
            )


def check_stages(plan: ReshardPlan, mesh: TargetMesh, tensors: Sequence[TargetTensor]) -> None:
    """What a plan says of stages is never passed over in silence."""
    used = {axis for tensor in tensors for axis in (*(tensor.spec.partition or ()), tensor.spec.owner)}
    for axis, stage in plan.stages.items():
        if tensors and axis not in used:
            raise CheckpointError(f"plan: stages of {axis!r}, but no tensor is split over it or held by one coordinate")
        if stage.counts is not None and len(stage.counts) != mesh.size(axis):
            raise CheckpointError(
                f"plan: counts of {axis!r} are {list(stage.counts)}, {mesh.size(axis)} numbers expected, one for each "
                f"coordinate"
            )


def check_plan_axes(plan: ReshardPlan, known: Collection[str]) -> None:
    named = [(axis, f"stages of {axis!r}") for axis in plan.stages]
    for rule in plan.tensors:
        axes = [axis for axis in (*(rule.partition or ()), rule.owner) if axis is not None]
        named += [(axis, f"the rule for {rule.match!r} names {axis!r}") for axis in axes]
    for axis, where in named:
        if axis not in known:
            raise CheckpointError(f"plan: {where}, which is no axis of the mesh; axes are {', '.join(sorted(known))}")


def check_axes(mesh: TargetMesh, tensors: Sequence[TargetTensor], before: Mapping[str, int]) -> None:
    """Nobody asks for tp 4 to get four times nothing. Over an axis that keeps its size tensors may stay replicated; but
    stages never hold the same."""
    for tensor in tensors:
        axes = [axis for axis in tensor.spec.partition or () if axis is not None]
        if len(set(axes)) < len(axes):  # Its coordinates would have the diagonal, and nobody the rest.
            raise CheckpointError(f"{tensor.key!r}: partition {list(tensor.spec.partition or ())} has an axis twice")
    used = {axis for tensor in tensors for axis in (*(tensor.spec.partition or ()), tensor.spec.owner)}
    idle = [
        axis
        for axis, size in mesh.sizes.items()
        if size > 1 and (size != before.get(axis) or axis == STAGES) and axis not in used | REPLICATING
    ]
    if idle and tensors:
        raise CheckpointError(
            f"no tensor is split over {idle[0]!r}, or held by one of its coordinates: the checkpoint does not say how, "
            f"so size {mesh.size(idle[0])} would change nothing. Say in a plan (--plan FILE) how, such as\n"
            f"  {_example(tensors, idle[0])}"
        )


def _example(tensors: Sequence[TargetTensor], axis: str) -> str:
    """What a plan may say of an axis: stages hold layers; other axes split tensors."""
    key = next((tensor.key for tensor in tensors if numbers_in(tensor.key)), None)
    if axis == STAGES and key is not None:
        word, _ = numbers_in(key)[0]
        match = f"*{glob_of(word)}{key[key.index(word) + len(word)]}*"
        plan: dict[str, object] = {"stages": {axis: {"numbered_by": word}}}
        plan["tensors"] = [{"match": match, "owner": axis}]
    else:
        spec = tensors[0].spec
        partition = [axis if d == 0 else None for d in range(len(spec.global_shape))]
        plan = {"tensors": [{"match": glob_of(tensors[0].key), "partition": partition}]}
    return msgspec.json.encode(plan).decode()


def _some(keys: Iterable[str]) -> str:
    keys = list(keys)
    more = f" and {len(keys) - _MAX_SHOWN} more" if len(keys) > _MAX_SHOWN else ""
    return ", ".join(repr(key) for key in keys[:_MAX_SHOWN]) + more
