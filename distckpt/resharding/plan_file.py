"""The plan file of a reshard: what the index of a checkpoint does not record, as people write it down. Reads it only.

    {
      "stages": {"pp": {"numbered_by": "layers", "counts": [6, 6, 6, 6]}},
      "tensors": [
        {"match": "embedding.weight", "partition": ["tp", null], "owner": "pp", "at": 0},
        {"match": "*.qkv.weight", "partition": ["tp", null], "blocks": [3, 1]},
        {"match": "*word_embeddings.weight", "pad": {"dim": 0, "size": 50257, "multiple": 128}},
        {"match": "model/*", "dtype": "bfloat16"}
      ]
    }

docs/cli.md says what each word means.
"""

from __future__ import annotations

import os
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec

from distckpt.decoding import decode_builtins, decode_json
from distckpt.errors import CheckpointError
from distckpt.index import Natural

_MAX_BYTES = 16 << 20
Positive: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=2**62)]


class Pad(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A dimension that has `size` real entries and is padded to a multiple of `multiple` times the number of parts."""

    dim: Natural
    size: Positive
    multiple: Positive = 1


class TensorRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is said of the tensors whose key matches a glob; it wins over what the index records.

    partition, owner, blocks: as of a Spec. at: the coordinate of the owner axis that holds it, or "first" or "last".
    dtype: what a floating-point tensor is converted to.
    """

    match: str
    partition: tuple[str | None, ...] | None = None
    owner: str | None = None
    at: Natural | str | None = None
    blocks: tuple[Positive, ...] | None = None
    pad: Pad | None = None
    dtype: str | None = None


class StageRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How what is numbered in keys (layers, experts) is dealt out to the coordinates of a mesh axis.

    numbered_by: the word before the number ("layers" of "decoder.layers.3.mlp"). counts: how many each one gets.
    """

    numbered_by: str | None = None
    counts: tuple[Natural, ...] | None = None


class ReshardPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """stages: by mesh axis. tensors: of rules that match one key, the first that says a thing counts for it."""

    stages: dict[str, StageRule] = {}
    tensors: tuple[TensorRule, ...] = ()

    def rule_of(self, key: str) -> TensorRule:
        """All that is said of a key."""
        said: dict[str, object] = {}
        for rule in self.tensors:
            if fnmatchcase(key, rule.match):
                for field in rule.__struct_fields__:
                    if getattr(rule, field) is not None:
                        said.setdefault(field, getattr(rule, field))
        return decode_builtins({**said, "match": key}, TensorRule) if said else TensorRule(match=key)


def glob_of(key: str) -> str:
    """The glob that matches this key alone."""
    return re.sub(r"([*?[])", r"[\1]", key)


def read_plan(path: Path) -> ReshardPlan:
    """Raises CheckpointError for what is no plan, OSError."""
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)  # Not by its size: a device has none, and no end.
    if len(data) > _MAX_BYTES:
        raise CheckpointError(f"{path} is no plan: more than {_MAX_BYTES} bytes")
    try:
        return decode_json(data, ReshardPlan)
    except (msgspec.DecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no plan: {error}. docs/cli.md has the grammar.") from error


def plan_of(plan: ReshardPlan | str | os.PathLike[str] | None) -> ReshardPlan:
    """A plan, or the file that has one; the empty plan for None. Raises as read_plan does."""
    if plan is None:
        return ReshardPlan()
    return plan if isinstance(plan, ReshardPlan) else read_plan(Path(plan))
