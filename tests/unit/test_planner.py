"""plan_save, join_values, check_replicas and plan_load as functions of plain records."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.chunk_table import Boxes, Chunks, Grids, decode_records, encode_record
from distckpt.errors import InvalidShardingError
from distckpt.geometry import Box, intersect, subtract
from distckpt.index import Spec
from distckpt.json_value import encode_value
from distckpt.planner import (
    PerRankKind,
    RankShards,
    RankValues,
    SavePlan,
    check_replicas,
    encode_specs,
    encode_values,
    join_values,
    plan_load,
    plan_save,
)

PATIENT = settings(deadline=None)


@dataclass(frozen=True)
class Piece:
    key: str
    box: Box
    of: tuple[int, ...]
    dtype: str = "float32"
    sample: int = 0
    partition: tuple[str | None, ...] | None = None
    container: str | None = None


def rows(key: str, start: int, stop: int, of: int, **options: object) -> Piece:
    """Rows start..stop-1 of a tensor of shape (of, 4)."""
    return Piece(key, Box((start, 0), (stop - start, 4)), (of, 4), **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Message:
    """What one rank says of its state: the structure, the values, and a sample of each shard."""

    shards: RankShards
    values: RankValues
    samples: tuple[int, ...]

    def with_available(self, *numbers: int) -> Message:
        available = np.array(numbers, np.int32).tobytes()
        return replace(self, shards=msgspec.structs.replace(self.shards, available=available))


def message(
    *pieces: Piece,
    values: Mapping[str, object] | None = None,
    encoded: Mapping[str, bytes] | None = None,
    per_rank: Mapping[str, tuple[PerRankKind, int]] | None = None,
    mesh: Mapping[str, tuple[int, int]] | None = None,
) -> Message:
    """values: to be encoded, `encoded`: as they are. per_rank: kind and digest."""
    specs: dict[str, Spec] = {}
    for p in pieces:
        specs.setdefault(p.key, Spec(dtype=p.dtype, global_shape=p.of, partition=p.partition, container=p.container))
    number = {key: i for i, key in enumerate(specs)}
    per_rank = per_rank or {}
    json = {key: encode_value(value, key) for key, value in (values or {}).items()} | dict(encoded or {})
    return Message(
        RankShards(
            specs=encode_specs(list(specs.items())),
            tensor=np.array([number[p.key] for p in pieces], np.int32).tobytes(),
            boxes=np.array([n for p in pieces for n in (*p.box.offset, *p.box.shape)], np.int64).tobytes(),
            per_rank={key: kind for key, (kind, _) in per_rank.items()},
            mesh=dict(mesh or {}),
        ),
        RankValues(encode_values(json), {key: digest for key, (_, digest) in per_rank.items()}),
        tuple(p.sample for p in pieces),
    )


def plan_of(*messages: Message) -> SavePlan:
    return plan_save([m.shards for m in messages])


def join(*messages: Message) -> dict[str, bytes]:
    return join_values(plan_of(*messages), [m.values for m in messages])


def compare(plan: SavePlan, *messages: Message) -> None:
    samples = [np.array(m.samples, np.uint32)[plan.replicated_of(r)] for r, m in enumerate(messages)]
    check_replicas(plan, [of_rank.tobytes() for of_rank in samples])


def written(plan: SavePlan) -> list[tuple[str, tuple[int, ...], int, int]]:
    """key, box as numbers, writer, number of the shard in its message; of every chunk."""
    keys = list(plan.specs)
    return [
        (keys[t], tuple(box), writer, int(plan.shards_of(writer)[place]))
        for c in plan.columns
        for t, box, writer, place in zip(
            c.tensor.tolist(), c.boxes.tolist(), c.writer.tolist(), c.place.tolist(), strict=True
        )
    ]


def check_all(*messages: Message) -> None:
    plan = plan_of(*messages)
    join_values(plan, [m.values for m in messages])
    compare(plan, *messages)


def fails(text: str, *messages: Message) -> None:
    with pytest.raises(InvalidShardingError, match=re.escape(text)):
        check_all(*messages)


# Who writes.


def test_every_box_is_written_by_the_rank_that_has_it() -> None:
    plan = plan_of(message(rows("w", 0, 2, 5)), message(rows("w", 2, 5, 5), rows("b", 0, 1, 1)))
    assert written(plan) == [("b", (0, 0, 1, 4), 1, 1), ("w", (0, 0, 2, 4), 0, 0), ("w", (2, 0, 3, 4), 1, 0)]
    assert plan.shards_of(0).tolist() == [0]
    assert plan.shards_of(1).tolist() == [0, 1]
    assert plan.bytes_by_rank.tolist() == [2 * 16, 3 * 16 + 16]


def test_replicas_are_written_once_by_the_least_loaded_rank_that_has_them() -> None:
    own = [rows(f"own{r}", 0, n, n) for r, n in enumerate((10, 0, 3))]
    big, small = rows("big", 0, 8, 8), rows("small", 0, 1, 1)
    plan = plan_of(*(message(p, big, small) for p in own))
    assert {(key, writer) for key, _, writer, _ in written(plan)} == {
        ("own0", 0),
        ("own2", 2),
        ("big", 1),
        ("small", 2),
    }
    assert plan.bytes_by_rank.tolist() == [160, 128, 64]


def test_replicas_spread_evenly() -> None:
    pieces = [rows(f"k{i}", 0, 1 + i % 3, 1 + i % 3) for i in range(12)]
    plan = plan_of(*[message(*pieces)] * 4)
    assert plan.bytes_by_rank.tolist() == [6 * 16] * 4
    assert sorted(n for r in range(4) for n in plan.shards_of(r).tolist()) == list(range(12))


def test_a_box_given_twice_by_one_rank_is_written_once() -> None:
    plan = plan_of(message(rows("tied", 0, 3, 3), rows("tied", 0, 3, 3)))
    assert written(plan) == [("tied", (0, 0, 3, 4), 0, 0)]


@PATIENT
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=4))
def test_each_box_has_one_writer_that_holds_it(held: list[list[int]]) -> None:
    """Row n of "w" is held by the ranks that list it; row 0 to 5 by rank 0 too, so that nothing is missing."""
    held = [[*held[0], *range(6)], *held[1:]]
    messages = [message(*(rows("w", n, n + 1, 6) for n in numbers)) for numbers in held]
    plan = plan_of(*messages)
    chunks = written(plan)
    assert [box[0] for _, box, _, _ in chunks] == list(range(6))
    for _, box, writer, shard in chunks:
        assert held[writer][shard] == box[0]
    assert plan.bytes_by_rank.tolist() == [16 * len(plan.shards_of(r)) for r in range(len(held))]


def test_tensors_without_dimensions_or_elements_and_empty_shards() -> None:
    scalar = Piece("step", Box((), ()), (), "int64")
    hollow = Piece("hollow", Box((0, 0), (0, 4)), (0, 4))
    plan = plan_of(
        message(scalar, rows("w", 0, 0, 3), hollow), message(scalar, rows("w", 0, 3, 3), rows("w", 3, 3, 3)), message()
    )
    assert [(key, box) for key, box, _, _ in written(plan)] == [("step", ()), ("w", (0, 0, 3, 4))]
    assert list(plan.specs) == ["hollow", "step", "w"]
    assert plan.bytes_by_rank.tolist() == [8, 48, 0]
    assert plan.shards_of(2).tolist() == []


def test_a_state_of_nothing() -> None:
    plan = plan_of(message(), message())
    assert written(plan) == []
    assert plan.bytes_by_rank.tolist() == [0, 0]


def test_tensors_of_different_numbers_of_dimensions_share_the_load() -> None:
    flat = Piece("flat", Box((0,), (8,)), (8,), "float64")
    cube = Piece("cube", Box((0, 0, 0), (2, 2, 2)), (2, 2, 2), "float64")
    plan = plan_of(*[message(flat, cube)] * 2)
    assert plan.bytes_by_rank.tolist() == [64, 64]


def test_specs_are_joined_over_the_ranks_and_a_key_keeps_its_innermost_common_container() -> None:
    plan = plan_of(
        message(rows("w", 0, 1, 2, container="model/layers/0"), rows("v", 0, 1, 1, container="model")),
        message(rows("w", 1, 2, 2, container="model/layers/1")),
    )
    assert {key: spec.container for key, spec in plan.specs.items()} == {"w": "model/layers", "v": "model"}


# Errors of tensors.


def test_a_hole_names_the_rows_and_the_ranks_that_gave_nothing() -> None:
    fails(
        "'w' (8, 4): rows 2-5 are in no shard.\n  Ranks 0, 3 gave shards; are ranks 1, 2 missing it from their state?",
        message(rows("w", 0, 2, 8)),
        message(),
        message(),
        message(rows("w", 6, 8, 8)),
    )


def test_a_hole_at_the_end_names_the_last_rank_too() -> None:
    fails(
        "'w' (8, 4): rows 4-7 are in no shard.\n  Rank 0 gave shards; is rank 1 missing it from its state?",
        message(rows("w", 0, 4, 8)),
        message(),
    )


def test_a_hole_although_all_ranks_gave_shards() -> None:
    fails(
        "'w' (8, 4): rows 4-4 are in no shard.\n  Ranks 0, 1 gave shards; is a shard's offset or shape wrong?",
        message(rows("w", 0, 4, 8)),
        message(rows("w", 5, 8, 8)),
    )


def test_a_hole_that_is_not_of_whole_rows() -> None:
    fails(
        "'w' (3, 4): elements [1:3, 2:4] are in no shard",
        message(rows("w", 0, 1, 3), Piece("w", Box((1, 0), (2, 2)), (3, 4))),
    )


def test_a_tensor_of_which_all_shards_are_empty() -> None:
    fails("'w' (3, 4): rows 0-2 are in no shard.\n  No rank gave shards", message(rows("w", 0, 0, 3)))


def test_an_overlap_names_both_boxes_and_their_ranks() -> None:
    fails(
        "'w' (8, 4): [0:5, 0:4] of ranks 0, 2 and [4:8, 0:4] of rank 1 overlap: rows 4-4 are in both",
        message(rows("w", 0, 5, 8)),
        message(rows("w", 4, 8, 8)),
        message(rows("w", 0, 5, 8)),
    )


def test_an_overlap_of_boxes_with_one_offset() -> None:
    fails(
        "[0:2, 0:4] of rank 0 and [0:3, 0:4] of rank 1 overlap",
        message(rows("w", 0, 2, 3)),
        message(rows("w", 0, 3, 3)),
    )


def test_a_box_outside_its_tensor() -> None:
    outside = Piece("w", Box((3, 0), (2, 4)), (4, 4))
    fails(
        "'w': offset and shape [[3, 0], [2, 4]] of rank 1 are not inside the global shape (4, 4)",
        message(rows("w", 0, 3, 4)),
        message(outside),
    )


@pytest.mark.parametrize("shape", [(2**60,), (2**40, 2**40), (0, 2**62)], ids=str)
def test_a_global_shape_that_no_checkpoint_can_have(shape: tuple[int, ...]) -> None:
    fails(
        "more than 288230376151711744 elements", message(Piece("w", Box((0,) * len(shape), (0,) * len(shape)), shape))
    )


def test_an_overlap_that_makes_up_for_a_hole_is_still_one() -> None:
    fails(
        "'w' (6, 4): [0:3, 0:4] of rank 0 and [2:5, 0:4] of rank 1 overlap",
        message(rows("w", 0, 3, 6)),
        message(rows("w", 2, 5, 6)),
    )


def test_two_shapes_of_one_key() -> None:
    fails(
        "'w' is float32 (4, 4) on rank 0 but float32 (8, 4) on rank 1",
        message(rows("w", 0, 4, 4)),
        message(rows("w", 4, 8, 8)),
    )


def test_two_dtypes_of_one_key() -> None:
    fails(
        "'w' is float32 (4, 4) on rank 0 but bfloat16 (4, 4) on rank 2",
        message(rows("w", 0, 4, 4)),
        message(),
        message(rows("w", 0, 4, 4, dtype="bfloat16")),
    )


def test_two_partitions_of_one_key() -> None:
    fails(
        "'w' is float32 (4, 4), partition=('tp', None) on rank 0 but float32 (4, 4), partition=None on rank 1",
        message(rows("w", 0, 2, 4, partition=("tp", None))),
        message(rows("w", 2, 4, 4)),
    )


def test_replicas_whose_samples_differ() -> None:
    fails(
        "'w' (8, 4): rows 2-7 differ between rank 0 and rank 2",
        message(rows("w", 0, 2, 8, sample=1), rows("w", 2, 8, 8, sample=5)),
        message(rows("w", 2, 8, 8, sample=5)),
        message(rows("w", 2, 8, 8, sample=6)),
    )


def test_samples_of_different_boxes_may_differ() -> None:
    messages = message(rows("w", 0, 1, 2, sample=1)), message(rows("w", 1, 2, 2, sample=2))
    plan = plan_of(*messages)
    assert len(written(plan)) == 2
    assert [plan.replicated_of(r).tolist() for r in range(2)] == [[], []]
    compare(plan, *messages)


def test_the_shards_to_compare_are_those_whose_box_is_given_more_than_once() -> None:
    cube = Piece("cube", Box((0, 0, 0), (2, 2, 2)), (2, 2, 2))
    tied = rows("tied", 0, 3, 3)
    plan = plan_of(message(rows("w", 0, 1, 3), cube), message(), message(cube, tied, rows("w", 1, 3, 3), tied))
    assert [plan.replicated_of(r).tolist() for r in range(3)] == [[1], [], [0, 1, 3]]
    check_replicas(plan, [bytes(4), b"", bytes(12)])
    with pytest.raises(ValueError, match="3 samples for 4 replicated shards"):
        check_replicas(plan, [bytes(4), b"", bytes(8)])


def test_a_box_given_twice_by_one_rank_with_other_values() -> None:
    fails(
        "'w' (2, 4): rows 0-1 differ between rank 0 and rank 0",
        message(rows("w", 0, 2, 2, sample=1), rows("w", 0, 2, 2)),
    )


# Shards that changed.


def test_a_box_is_written_by_a_rank_that_can_still_write_it() -> None:
    both = message(rows("w", 0, 2, 4), rows("w", 2, 4, 4))
    plan = plan_of(both.with_available(1), both)
    assert [(box[0], writer) for _, box, writer, _ in written(plan)] == [(0, 1), (2, 0)]
    assert [plan.replicated_of(r).tolist() for r in range(2)] == [[0, 1], [0, 1]]
    assert plan.bytes_by_rank.tolist() == [32, 32]


def test_a_box_that_no_rank_can_write_any_more() -> None:
    a, b = message(rows("v", 0, 1, 1), rows("w", 0, 4, 4)), message(rows("w", 0, 4, 4))
    fails(
        "'w' (4, 4): rows 0-3 can no longer be written: ranks 0, 2, which gave them, have changed them since.",
        a.with_available(0),
        message(),
        b.with_available(),
    )
    fails("'v' (1, 4): rows 0-0 can no longer be written: rank 0, which gave them, has changed", a.with_available(1))


# Values.


def test_values_are_joined_and_sorted() -> None:
    values = join(message(values={"b": 1, "a": [2]}), message(values={"c": None, "b": 1}))
    assert list(values.items()) == [("a", b"[2]"), ("b", b"1"), ("c", b"null")]


def test_values_that_differ() -> None:
    fails(
        "value 'lr' is 0.1 on rank 0 but 0.2 on rank 2",
        message(values={"lr": 0.1}),
        message(),
        message(values={"lr": 0.2}),
    )


def test_values_of_equal_numbers_of_different_types_differ() -> None:
    fails("value 'n' is 1 on rank 0 but 1.0 on rank 1", message(values={"n": 1}), message(values={"n": 1.0}))


def test_a_tensor_on_one_rank_and_a_value_on_another() -> None:
    fails(
        "'w' is a tensor on one rank and the value 3 on rank 1", message(rows("w", 0, 1, 1)), message(values={"w": 3})
    )


@pytest.mark.parametrize(
    "messages",
    [
        [message(values={"a": 1}), message(values={"a/b": 2})],
        [message(values={"a/b/c": 1}), message(rows("a/b", 0, 1, 1))],
        [message(rows("a", 0, 1, 1)), message(rows("a/b/c/d", 0, 1, 1))],
    ],
    ids=["value in value", "value in tensor", "tensor in tensor"],
)
def test_a_leaf_on_one_rank_and_a_container_on_another(messages: Sequence[Message]) -> None:
    for order in (messages, messages[::-1]):
        with pytest.raises(InvalidShardingError, match="is a leaf of the state on one rank and the container of 'a/b"):
            join(*order)


def test_the_own_key_of_a_sharded_tensor_is_no_path() -> None:
    assert list(join(message(rows("a/b", 0, 1, 1, container="x"), values={"a": 1}))) == ["a"]


def test_the_marker_of_a_list_that_other_ranks_have_longer() -> None:
    one, two = (message(encoded={"l": b'{"%%list":%d}' % n}) for n in (1, 2))
    fails('value \'l\' is {"%list":1} on rank 0 but {"%list":2} on rank 1', one, two)


@pytest.mark.parametrize("nothing", [[], ()], ids=["list", "tuple"])
def test_an_empty_list_where_other_ranks_have_shards_is_no_value(nothing: object) -> None:
    shard = rows("w", 0, 1, 1, container="optimizer/moments")
    values = {"optimizer/moments": nothing, "optimizer/other": nothing}
    assert list(join(message(shard), message(values=values))) == ["optimizer/other"]


# Meshes and PerRank.


def test_meshes_of_different_sizes_or_names() -> None:
    one = message(mesh={"tp": (0, 2)})
    fails("mesh is {'tp': 2} on rank 0 but {'tp': 4} on rank 1", one, message(mesh={"tp": (1, 4)}))
    fails("mesh is {'tp': 2} on rank 0 but {'dp': 2} on rank 1", one, message(mesh={"dp": (1, 2)}))
    fails("mesh is {'tp': 2} on rank 0 but {} on rank 1", one, message())


def test_a_coordinate_outside_the_mesh() -> None:
    fails("rank 1: mesh coordinates {'tp': 2} are outside", message(mesh={"tp": (0, 2)}), message(mesh={"tp": (2, 2)}))


def per_rank_message(tp: int, dp: int, digest: int, axes: tuple[str, ...] = ("tp",), change: str = "exact") -> Message:
    kind = PerRankKind(axes, change)  # type: ignore[arg-type]
    return message(mesh={"tp": (tp, 2), "dp": (dp, 2)}, per_rank={"rng": (kind, digest)})


def test_per_rank_values_are_written_once_for_each_combination_of_coordinates() -> None:
    plan = plan_of(*(per_rank_message(tp, dp, 10 + tp) for dp in range(2) for tp in range(2)))
    assert plan.per_rank["rng"].axes == (("tp", 2),)
    assert plan.per_rank["rng"].holders == (((0,), 0), ((1,), 1))
    assert [plan.per_rank_keys_of(r) for r in range(4)] == [["rng"], ["rng"], [], []]


def test_per_rank_values_that_differ_at_the_same_coordinates() -> None:
    fails(
        "PerRank 'rng' differs between ranks 1 and 3, which share the coordinates {'tp': 1}; add the axis",
        *(per_rank_message(tp, dp, 10 * tp * dp) for dp in range(2) for tp in range(2)),
    )


@pytest.mark.parametrize("other", [{"axes": ("dp",)}, {"change": "skip"}], ids=str)
def test_per_rank_values_of_two_kinds(other: dict[str, object]) -> None:
    second = per_rank_message(1, 1, 1, **other)  # type: ignore[arg-type]
    fails("PerRank 'rng' has axes", per_rank_message(0, 0, 1), second)


# Loading.


@dataclass(frozen=True)
class Region:
    """One copy, for one tensor of which chunk i lies in file i % 2 from byte 100 * i on."""

    file: int
    start: int
    chunk: Box
    target: int
    box: Box


def stored(*tensors: Sequence[Box]) -> list[Grids | Boxes]:
    """What is stored of tensors 0, 1, ... of these chunks."""
    records, shapes = [], []
    for boxes in tensors:
        ndim = len(boxes[0].shape)
        offsets, extents = (
            np.array([getattr(b, name) for b in boxes], np.int64).reshape(len(boxes), ndim)
            for name in ("offset", "shape")
        )
        shapes.append(tuple((offsets + extents).max(axis=0).tolist()))
        chunks = Chunks(offsets, extents, np.arange(len(boxes)) % 2, 100 * np.arange(len(boxes)))
        records.append(encode_record(chunks, shapes[-1]))
    ends = np.cumsum([len(r) for r in records]).tolist()
    places = [(end - len(r), len(r)) for end, r in zip(ends, records, strict=True)]
    return decode_records(b"".join(records), places, shapes, [str(t) for t in range(len(tensors))], where="t")


def planned(chunks: list[Grids | Boxes], *targets: tuple[int, Box]) -> list[Region]:
    """The copies for targets: number of the tensor, box. In order of target and position."""
    found = []
    for c in plan_load(chunks, np.array([t for t, _ in targets], np.int64), [box for _, box in targets]):
        columns = (c.hits.files, c.hits.starts, c.hits.offsets, c.hits.shapes, c.target, c.low, c.shape)
        for file, start, offset, extent, target, low, shape in zip(*(x.tolist() for x in columns), strict=True):
            chunk, box = Box(tuple(offset), tuple(extent)), Box(tuple(low), tuple(shape))
            found.append(Region(file, start, chunk, target, box))
    return sorted(found, key=lambda r: (r.target, r.start))


ROWS = [Box((0, 0), (2, 4)), Box((2, 0), (2, 4)), Box((4, 0), (2, 4))]
UNEVEN = [Box((0, 0), (2, 2)), Box((0, 2), (1, 2)), Box((1, 2), (1, 2))]


def test_a_target_is_filled_from_all_chunks_it_meets_and_no_other() -> None:
    assert planned(stored(ROWS), (0, Box((1, 1), (2, 2)))) == [
        Region(file=0, start=0, chunk=ROWS[0], target=0, box=Box((1, 1), (1, 2))),
        Region(file=1, start=100, chunk=ROWS[1], target=0, box=Box((2, 1), (1, 2))),
    ]
    assert planned(stored(UNEVEN), (0, Box((1, 1), (1, 3)))) == [
        Region(file=0, start=0, chunk=UNEVEN[0], target=0, box=Box((1, 1), (1, 1))),
        Region(file=0, start=200, chunk=UNEVEN[2], target=0, box=Box((1, 2), (1, 2))),
    ]


def test_targets_of_several_tensors_and_several_of_one() -> None:
    scalar = Box((), ())
    chunks = stored(UNEVEN, [scalar], ROWS)
    targets = [(2, Box((5, 0), (1, 1))), (1, scalar), (0, Box((0, 3), (1, 1))), (2, Box((0, 0), (1, 1))), (1, scalar)]
    assert [(r.target, r.chunk, r.box) for r in planned(chunks, *targets)] == [
        (0, ROWS[2], Box((5, 0), (1, 1))),
        (1, scalar, scalar),
        (2, UNEVEN[1], Box((0, 3), (1, 1))),
        (3, ROWS[0], Box((0, 0), (1, 1))),
        (4, scalar, scalar),
    ]


def test_asking_for_one_of_a_million_tensors_takes_no_memory_for_all() -> None:
    """Nor time: whoever goes through a checkpoint asks a million times."""
    every, none = np.arange(1 << 20), np.zeros(0, np.int64)
    scalars = np.zeros((1 << 20, 0), np.int64)
    chunks = [Grids(every, every, every, every, none, none, scalars, scalars)]
    tracemalloc.start()
    (copies,) = plan_load(chunks, np.array([77]), [Box((), ())])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert copies.hits.files.tolist() == [77]
    assert peak < 1 << 16


def test_a_target_without_elements_needs_nothing() -> None:
    assert planned(stored(ROWS, UNEVEN), (0, Box((1, 0), (0, 4))), (1, Box((1, 1), (1, 0)))) == []
    assert planned(stored(ROWS)) == []
    assert planned([]) == []


@st.composite
def cut_tensors(draw: st.DrawFn) -> list[Box]:
    """Boxes that tile a tensor: a grid or not."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    if draw(st.booleans()):
        edges = [sorted({0, n, *draw(st.lists(st.integers(1, n), max_size=3))}) for n in shape]
        cells = product(*(pairwise(e) for e in edges))
        return [Box(tuple(a for a, _ in cell), tuple(b - a for a, b in cell)) for cell in cells]
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 6))):  # Cut one in two, again and again.
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        d = draw(st.integers(0, len(shape) - 1))
        first = Box(box.offset, (*box.shape[:d], draw(st.integers(1, box.shape[d])), *box.shape[d + 1 :]))
        boxes += [first, *subtract(box, first)]
    return boxes


@PATIENT
@given(st.lists(cut_tensors(), min_size=1, max_size=3), st.data())
def test_copies_are_the_intersections_of_targets_and_chunks(tensors: list[list[Box]], data: st.DataObject) -> None:
    targets = []
    for _ in range(data.draw(st.integers(0, 4))):
        t = data.draw(st.integers(0, len(tensors) - 1))
        shape = np.max([b.end for b in tensors[t]], axis=0).tolist()
        edges = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
        targets.append((t, Box(tuple(a for a, _ in edges), tuple(b - a for a, b in edges))))
    expected = {
        (i, chunk, common)
        for i, (t, box) in enumerate(targets)
        for chunk in tensors[t]
        if (common := intersect(chunk, box)) is not None
    }
    found = planned(stored(*tensors), *targets)
    assert {(r.target, r.chunk, r.box) for r in found} == expected
    assert len(found) == len(expected)
