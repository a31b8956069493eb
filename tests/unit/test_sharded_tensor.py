"""ShardedTensor: what it accepts and refuses, and that any memory can be saved from and loaded into."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from distckpt import Checkpointer, InvalidShardingError, MismatchError, ShardedTensor, UnsupportedTypeError
from distckpt.geometry import Box
from distckpt.testing import MemoryStorage


def part(
    shape: tuple[int, ...], offset: tuple[int, ...] | None = None, of: tuple[int, ...] | None = None
) -> ShardedTensor:
    return ShardedTensor("w", torch.zeros(shape), global_shape=of or shape, global_offset=offset or (0,) * len(shape))


def counted(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape) + 1


def save(state: dict[str, object]) -> MemoryStorage:
    storage = MemoryStorage()
    with Checkpointer(storage) as checkpointer:
        checkpointer.save(state, iteration=1)
    return storage


def load(storage: MemoryStorage, state: dict[str, Any], **options: Any) -> dict[str, Any]:
    with Checkpointer(storage) as checkpointer:
        checkpointer.load(state, **options)
    return state


# Boxes.


def test_global_shape_may_have_leading_dimensions_that_data_is_one_slice_of() -> None:
    tensor = ShardedTensor("w", torch.zeros(2, 3), global_shape=(4, 5, 2, 6), global_offset=(3, 1, 0, 3))
    assert tensor.boxes() == [Box((3, 1, 0, 3), (1, 1, 2, 3))]
    assert tensor.shards()[0].data.shape == (1, 1, 2, 3)
    assert tensor.shards()[0].data.data_ptr() == tensor.data.data_ptr()


@pytest.mark.parametrize(
    ("global_shape", "offset", "message"),
    [
        ((2,), (0,), "'w': data has shape (2, 3), global_shape is (2,), global_offset is (0,)"),
        ((2, 3), (0,), "a global shape and offset need one number per dimension"),
        ((4, 3), (3, 0), "'w': the shard [3:5, 0:3] is not inside the global shape (4, 3)"),
        ((4, 3), (0, -1), "'w': global_offset (0, -1) has a negative number"),
        ((4, 2), (0, 0), "'w': the shard [0:2, 0:3] is not inside the global shape (4, 2)"),
    ],
)
def test_a_part_outside_its_global_tensor_is_refused(
    global_shape: tuple[int, ...], offset: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InvalidShardingError, match=re.escape(message)):
        ShardedTensor("w", torch.zeros(2, 3), global_shape=global_shape, global_offset=offset)


def test_partition_and_blocks_need_an_entry_for_each_dimension() -> None:
    make = {"global_shape": (6, 4), "global_offset": (0, 0)}
    with pytest.raises(InvalidShardingError, match=re.escape("partition=('tp',) needs one entry for each of 2")):
        ShardedTensor("w", torch.zeros(6, 4), partition=("tp",), **make)  # type: ignore[arg-type]
    with pytest.raises(InvalidShardingError, match=re.escape("'w': 4 blocks do not divide dimension 0 of (6, 4)")):
        ShardedTensor("w", torch.zeros(6, 4), blocks=(4, 1), **make)  # type: ignore[arg-type]
    tensor = ShardedTensor("w", torch.zeros(6, 4), partition=("tp", None), blocks=(3, 1), owner="pp", **make)  # type: ignore[arg-type]
    assert (tensor.spec.partition, tensor.spec.blocks, tensor.spec.owner) == (("tp", None), (3, 1), "pp")


MAKERS = {
    "box": lambda key, data: ShardedTensor(key, data, global_shape=(1,), global_offset=(0,)),
    "rank offsets": lambda key, data: ShardedTensor.from_rank_offsets(key, data),
    "flat range": lambda key, data: ShardedTensor.from_flat_range(key, data, of=part((1,)), flat_range=slice(0, 1)),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_an_empty_key_and_what_is_no_tensor_are_refused(maker: str) -> None:
    with pytest.raises(InvalidShardingError, match="an empty key"):
        MAKERS[maker]("", torch.zeros(1))
    with pytest.raises(UnsupportedTypeError, match=r"'w': data is a list, expected a torch\.Tensor"):
        MAKERS[maker]("w", [1.0])


class Quantized(torch.Tensor):
    pass


@pytest.mark.parametrize("maker", MAKERS)
def test_a_tensor_subclass_as_data_is_refused_with_its_key(maker: str) -> None:
    with pytest.raises(UnsupportedTypeError, match="'w': data is a Quantized; give each plain tensor"):
        MAKERS[maker]("w", torch.zeros(1).as_subclass(Quantized))
    assert MAKERS[maker]("w", torch.nn.Parameter(torch.zeros(1))).key == "w"


@pytest.mark.parametrize("maker", MAKERS)
def test_data_that_was_replaced_is_looked_at_again(maker: str) -> None:
    tensor = MAKERS[maker]("w", torch.zeros(1))
    storage = save({"w": tensor})
    tensor.data = torch.ones(1)
    assert load(storage, {"w": tensor})["w"].data.tolist() == [0]
    for other, error, why in (
        (torch.zeros(4), InvalidShardingError, r"'w': data has been replaced by one of shape \(4,\)"),
        (torch.zeros(1).as_subclass(Quantized), UnsupportedTypeError, "'w': data is a Quantized"),
    ):
        tensor.data = other
        with pytest.raises(error, match=why):
            save({"w": tensor})
        with pytest.raises(error, match=why):
            load(storage, {"w": tensor})
        assert not other.as_subclass(Tensor).any()


def test_repr_says_key_boxes_shape_and_type() -> None:
    assert repr(part((2, 3), (4, 0), (8, 3))) == "ShardedTensor('w', [4:6, 0:3] of (8, 3), torch.float32)"
    flat = ShardedTensor.from_flat_range("w", torch.zeros(4), of=part((2, 3), (4, 0), (8, 3)), flat_range=slice(1, 5))
    assert repr(flat) == "ShardedTensor('w', [4:5, 1:3], [5:6, 0:2] of (8, 3), torch.float32)"


# Rank offsets.


def test_rank_offsets_multiply_the_axes_they_name() -> None:
    tensor = ShardedTensor.from_rank_offsets("w", torch.zeros(2, 3), (1, 2, 4), (0, 1, 3))
    assert tensor.global_shape == (6, 12)
    assert tensor.boxes() == [Box((2, 6), (2, 3))]


def test_rank_offsets_count_prepended_axes_first() -> None:
    tensor = ShardedTensor.from_rank_offsets("w", torch.zeros(2, 3), (0, 5, 8), (2, 1, 2), prepend_axis_num=2)
    assert tensor.global_shape == (8, 1, 4, 3)
    assert tensor.boxes() == [Box((5, 0, 2, 0), (1, 1, 2, 3))]


def test_no_rank_offsets_mean_the_whole_tensor() -> None:
    assert ShardedTensor.from_rank_offsets("w", torch.zeros(())).boxes() == [Box((), ())]
    assert ShardedTensor.from_rank_offsets("w", torch.zeros(2, 3)).boxes() == [Box((0, 0), (2, 3))]


@pytest.mark.parametrize(
    "offsets",
    [[(2, 0, 1)], [(-1, 0, 1)], [(0, 2, 2)], [(0, -1, 2)], [(0, 0, 0)], [(0, 0, 2), (0, 1, 2)]],
    ids=["axis too high", "axis negative", "offset too high", "offset negative", "no fragments", "axis twice"],
)
def test_bad_rank_offsets_are_refused(offsets: list[tuple[int, int, int]]) -> None:
    with pytest.raises(InvalidShardingError, match=r"'w': rank offset \(axis"):
        ShardedTensor.from_rank_offsets("w", torch.zeros(2, 3), *offsets)


# Flat ranges.


def test_a_flat_range_has_the_boxes_of_its_elements() -> None:
    of = part((3, 4), (0, 4), (3, 12))
    tensor = ShardedTensor.from_flat_range("m", torch.zeros(7), of=of, flat_range=slice(2, 9))
    assert tensor.key == "m"
    assert tensor.global_shape == (3, 12)
    assert tensor.boxes() == [Box((0, 6), (1, 2)), Box((1, 4), (1, 4)), Box((2, 4), (1, 1))]
    assert [s.data.data_ptr() - tensor.data.data_ptr() for s in tensor.shards()] == [0, 8, 24]


def test_a_flat_range_over_two_parts_continues_in_the_second() -> None:
    of = [part((2, 2), (0, 0), (8, 2)), part((2, 2), (4, 0), (8, 2))]
    tensor = ShardedTensor.from_flat_range("w", torch.zeros(4), of=of, flat_range=slice(2, 6))
    assert tensor.boxes() == [Box((1, 0), (1, 2)), Box((4, 0), (1, 2))]


def test_an_empty_flat_range_has_no_boxes() -> None:
    tensor = ShardedTensor.from_flat_range("w", torch.zeros(0), of=part((2, 2)), flat_range=slice(3, 3))
    assert tensor.boxes() == []
    assert tensor.shards() == []


def test_a_flat_range_keeps_what_its_parts_say_of_resharding() -> None:
    of = ShardedTensor.from_rank_offsets(
        "w", torch.zeros(2, 2), (0, 1, 2), partition=("tp", None), owner="pp", blocks=(2, 1), allow_shape_mismatch=True
    )
    tensor = ShardedTensor.from_flat_range("m", torch.zeros(4), of=of, flat_range=slice(0, 4))
    assert tensor.spec == of.spec
    assert tensor.allow_shape_mismatch


@pytest.mark.parametrize(
    ("flat", "flat_range"),
    [
        (torch.zeros(3), slice(0, 4)),
        (torch.zeros(4), slice(1, 4)),
        (torch.zeros(4), slice(4, 8)),
        (torch.zeros(0), slice(9, 9)),
        (torch.zeros(2, 2), slice(0, 4)),
        (torch.zeros(3), slice(0, 6, 2)),
        (torch.zeros(0), slice(5, 3)),
        (torch.zeros(()), slice(0, 1)),
    ],
    ids=["short", "long", "past the end", "behind the end", "2-d", "step", "backwards", "0-d"],
)
def test_a_flat_range_that_is_not_of_the_buffer_is_refused(flat: Tensor, flat_range: slice) -> None:
    with pytest.raises(InvalidShardingError, match=rf"'w': flat_range {flat_range.start}:{flat_range.stop} of 6 elem"):
        ShardedTensor.from_flat_range("w", flat, of=part((2, 3)), flat_range=flat_range)


@pytest.mark.parametrize("of", [[], [part((2, 3)), part((3, 3))]], ids=["none", "two shapes"])
def test_a_flat_range_needs_parts_of_one_tensor(of: list[ShardedTensor]) -> None:
    with pytest.raises(InvalidShardingError, match="'w': `of` needs one or more parts of one global tensor"):
        ShardedTensor.from_flat_range("w", torch.zeros(6), of=of, flat_range=slice(0, 6))


# Memory.


def misaligned(count: int) -> Tensor:
    return torch.frombuffer(bytearray(4 * count + 1), dtype=torch.float32, offset=1, count=count)


MEMORIES = {
    "view of a large storage": lambda: torch.zeros(100_000)[50_000:50_012].view(3, 4),
    "column of a matrix": lambda: torch.zeros(3, 4, 5)[:, :, 2],
    "transposed": lambda: torch.zeros(4, 3).t(),
    "every other": lambda: torch.zeros(6, 8)[::2, ::2],
    "misaligned": lambda: misaligned(12).view(3, 4),
    "real part": lambda: torch.zeros(3, 4, dtype=torch.complex64).real,
    "imaginary part, negated": lambda: torch.zeros(3, 4, dtype=torch.complex64).conj().imag,
    "parameter": lambda: torch.nn.Parameter(torch.zeros(3, 4)),
}


@pytest.mark.parametrize("memory", MEMORIES)
def test_memory_of_any_kind_is_saved_and_loaded(memory: str) -> None:
    source, target = MEMORIES[memory](), MEMORIES[memory]()
    with torch.no_grad():
        source.copy_(counted(3, 4))
    storage = save({"w": ShardedTensor("w", source, global_shape=(3, 4), global_offset=(0, 0)), "plain": source})
    plain = MEMORIES[memory]()
    load(storage, {"w": ShardedTensor("w", target, global_shape=(3, 4), global_offset=(0, 0)), "plain": plain})
    assert torch.equal(target, counted(3, 4))
    assert torch.equal(plain, counted(3, 4))


def test_a_conjugated_view_is_saved_as_what_it_shows() -> None:
    values = torch.complex(counted(2, 3), -counted(2, 3))
    target = torch.zeros(2, 3, dtype=torch.complex64).conj()
    load(save({"w": values.conj()}), {"w": target})
    assert torch.equal(target, values.conj())


def test_an_expanded_tensor_is_saved_but_no_target() -> None:
    storage = save({"w": torch.ones(1, 3).expand(4, 3)})
    with pytest.raises(MismatchError, match=r"w: .*share memory"):
        load(storage, {"w": torch.zeros(1, 3).expand(4, 3)})
    assert torch.equal(load(storage, {"w": torch.zeros(4, 3)})["w"], torch.ones(4, 3))


def test_only_the_view_of_a_large_storage_is_stored() -> None:
    storage = save({"w": torch.zeros(1_000_000)[:10]})
    (name,) = (name for name in storage.list("iter_0000001") if name.endswith(".safetensors"))
    file = storage.open(f"iter_0000001/{name}")
    assert file.size_bytes < 20_000
    file.close()


def test_a_tensor_on_the_meta_device_gets_data_by_loading_and_cannot_be_saved() -> None:
    storage = save({"w": ShardedTensor("w", counted(4, 3), global_shape=(4, 3), global_offset=(0, 0))})
    box = ShardedTensor("w", torch.empty(2, 3, device="meta"), global_shape=(4, 3), global_offset=(1, 0))
    flat = ShardedTensor.from_flat_range("w", torch.empty(5, device="meta"), of=part((4, 3)), flat_range=slice(4, 9))
    load(storage, {"w": [box, flat]})
    assert torch.equal(box.data, counted(4, 3)[1:3])
    assert torch.equal(flat.data, counted(12)[4:9])
    with pytest.raises(UnsupportedTypeError, match="'w': a tensor on the meta device has no values to save"):
        save({"w": ShardedTensor("w", torch.empty(2, device="meta"), global_shape=(2,), global_offset=(0,))})


# Another global shape.


def resized(data: Tensor, rows: int, *, allow: bool) -> ShardedTensor:
    return ShardedTensor("w", data, global_shape=(rows, 2), global_offset=(0, 0), allow_shape_mismatch=allow)


@pytest.mark.parametrize("rows", [3, 7])
def test_allow_shape_mismatch_loads_what_both_have(rows: int) -> None:
    storage = save({"w": resized(counted(5, 2), 5, allow=False)})
    target = torch.full((rows, 2), -1.0)
    load(storage, {"w": resized(target, rows, allow=True)})
    expected = torch.full((rows, 2), -1.0)
    expected[:5] = counted(5, 2)[:rows]
    assert torch.equal(target, expected)
    with pytest.raises(MismatchError, match=re.escape(f"w: the state has ({rows}, 2), stored is (5, 2)")):
        load(storage, {"w": resized(target, rows, allow=False)})


def test_allow_shape_mismatch_of_a_flat_range() -> None:
    storage = save({"w": resized(counted(5, 2), 5, allow=False)})
    flat = torch.full((8,), -1.0)
    of = resized(torch.zeros(7, 2), 7, allow=True)
    load(storage, {"w": ShardedTensor.from_flat_range("w", flat, of=of, flat_range=slice(5, 13))})
    assert flat.tolist() == [6, 7, 8, 9, 10, -1, -1, -1]


def test_allow_shape_mismatch_is_not_for_another_number_of_dimensions() -> None:
    storage = save({"w": resized(counted(5, 2), 5, allow=False)})
    target = ShardedTensor("w", torch.zeros(5), global_shape=(5,), global_offset=(0,), allow_shape_mismatch=True)
    with pytest.raises(MismatchError, match=re.escape("w: the state has (5,), stored is (5, 2)")):
        load(storage, {"w": target})


def test_another_dtype_is_an_error() -> None:
    storage = save({"w": resized(counted(5, 2), 5, allow=False)})
    with pytest.raises(MismatchError, match="w: the state has bfloat16, stored is float32"):
        load(storage, {"w": resized(torch.zeros(5, 2, dtype=torch.bfloat16), 5, allow=True)})
