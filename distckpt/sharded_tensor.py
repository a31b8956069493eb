"""ShardedTensor: a local tensor, the key of the global tensor it is a part of, and where in it the part lies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import torch
from torch import Tensor

from distckpt.errors import CheckpointError, InvalidShardingError, UnsupportedTypeError
from distckpt.geometry import MAX_DIMS, Box, flat_range_boxes
from distckpt.index import Spec
from distckpt.shard_file import DTYPES

PLAIN_TENSOR_TYPES = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
_DTYPE_NAMES = {getattr(torch, name): name for name in DTYPES if hasattr(torch, name)}  # of this torch


class Shard(msgspec.Struct, frozen=True):  # As many as there are tensors: a dataclass takes five times as long.
    """One box of a global tensor and the view of the local tensor that holds it, detached; the shapes are equal."""

    box: Box
    data: Tensor


class ShardedTensor:
    """A part of the global tensor `key`: any box, or a flat range of boxes.

    key: name of the global tensor; what is stored under it does not depend on where in the state this stands.
    data: the local tensor, any strides, any device; load fills it in place (a meta tensor is replaced).
    global_shape, global_offset: of the tensor, and of data in it. global_shape may have more dimensions than data
        (leading ones that data has one slice of).
    replica_id: accepted for Megatron's sake. Copies are recognised by their box, and must agree.
    partition, owner, blocks: recorded for resharding: the mesh axis that splits each dimension; the mesh axis whose
        coordinate holds the tensor; the number of sub-blocks of each dimension that are split one by one.
    allow_shape_mismatch: load what the stored tensor and this one have in common (a padded vocabulary).

    Raises InvalidShardingError when the part does not lie inside the global tensor, UnsupportedTypeError when data
    is a tensor subclass, of which no part is a box of plain elements.
    """

    def __init__(
        self,
        key: str,
        data: Tensor,
        *,
        global_shape: Sequence[int],
        global_offset: Sequence[int],
        replica_id: int | tuple[int, ...] = 0,
        partition: Sequence[str | None] | None = None,
        owner: str | None = None,
        blocks: Sequence[int] | None = None,
        allow_shape_mismatch: bool = False,
    ) -> None:
        _check_tensor(key, data)
        shape = tuple(map(int, global_shape))
        prepended = len(shape) - data.dim()
        if prepended < 0 or len(global_offset) != len(shape):
            raise InvalidShardingError(
                f"{key!r}: data has shape {tuple(data.shape)}, global_shape is {shape}, global_offset is "
                f"{tuple(global_offset)}; a global shape and offset need one number per dimension"
            )
        self._set(key, data, shape, replica_id, allow_shape_mismatch)
        offset = tuple(map(int, global_offset))
        if min(offset, default=0) < 0:
            raise InvalidShardingError(f"{key!r}: global_offset {offset} has a negative number")
        box = Box(offset, (1,) * prepended + tuple(data.shape))
        if not box.is_inside(shape):
            raise InvalidShardingError(f"{key!r}: the shard {box} is not inside the global shape {shape}")
        for name, labels in (("partition", partition), ("blocks", blocks)):
            if labels is not None and len(labels) != len(shape):
                raise InvalidShardingError(
                    f"{key!r}: {name}={labels!r} needs one entry for each of {len(shape)} dimensions"
                )
        for d, n in enumerate(blocks or ()):
            if n < 1 or shape[d] % n:
                raise InvalidShardingError(f"{key!r}: {n} blocks do not divide dimension {d} of {shape}")
        self.partition = None if partition is None else tuple(partition)
        self.owner = owner
        self.blocks = None if blocks is None else tuple(int(n) for n in blocks)
        self._pieces: tuple[tuple[Box, int], ...] = ()
        self._box: Box | None = box
        self._size = data.numel()

    def _set(
        self,
        key: str,
        data: Tensor,
        shape: tuple[int, ...],
        replica_id: int | tuple[int, ...],
        mismatch: bool,
    ) -> None:
        if not key:
            raise InvalidShardingError("an empty key; every tensor needs a name")
        if not is_text(key):
            raise UnsupportedTypeError(f"{key!r}: a key with a lone surrogate is not text")
        if len(shape) > MAX_DIMS:
            raise UnsupportedTypeError(f"{key!r}: {len(shape)} dimensions, at most {MAX_DIMS} can be stored")
        self.key = key
        self.data = data
        self.global_shape = shape
        self.replica_id = replica_id
        self.allow_shape_mismatch = mismatch

    @classmethod
    def from_rank_offsets(
        cls,
        key: str,
        data: Tensor,
        *rank_offsets: tuple[int, int, int],
        replica_id: int | tuple[int, ...] = 0,
        prepend_axis_num: int = 0,
        partition: Sequence[str | None] | None = None,
        owner: str | None = None,
        blocks: Sequence[int] | None = None,
        allow_shape_mismatch: bool = False,
    ) -> ShardedTensor:
        """An even grid, by Megatron-core's convention: each (axis, rank_offset, fragments) says that `axis` is cut into
        `fragments` equal parts, of which data is number rank_offset. Axes count after prepend_axis_num leading
        ones have been added, of which data holds one slice each; other axes are not cut."""
        _check_tensor(key, data)
        shape = [1] * prepend_axis_num + list(data.shape)
        offset = [0] * len(shape)
        seen: set[int] = set()
        for axis, at, fragments in rank_offsets:
            if not 0 <= axis < len(shape) or axis in seen or not 0 <= at < fragments:
                raise InvalidShardingError(
                    f"{key!r}: rank offset (axis {axis}, offset {at}, fragments {fragments}) for shape {tuple(shape)}: "
                    f"axes must exist and come once, the offset must be below the number of fragments"
                )
            seen.add(axis)
            offset[axis] = at * shape[axis]
            shape[axis] *= fragments
        return cls(
            key,
            data,
            global_shape=shape,
            global_offset=offset,
            replica_id=replica_id,
            partition=partition,
            owner=owner,
            blocks=blocks,
            allow_shape_mismatch=allow_shape_mismatch,
        )

    @classmethod
    def from_flat_range(
        cls,
        key: str,
        flat: Tensor,
        *,
        of: ShardedTensor | Sequence[ShardedTensor],
        flat_range: slice,
        replica_id: int | tuple[int, ...] = 0,
    ) -> ShardedTensor:
        """A piece of a flattened shard, as ZeRO-1, Megatron's distributed optimizer and FSDP1 keep it.

        `of` describes the tensor that was flattened, as if it were this key's; several describe parts that were
        flattened one after the other (the halves of a SwiGLU weight). flat (1-d) holds elements flat_range of
        that. Its elements lie, in C order, in a few boxes of the global tensor.
        """
        _check_tensor(key, flat)
        parts = [of] if isinstance(of, ShardedTensor) else list(of)
        if not parts or any(p.global_shape != parts[0].global_shape for p in parts):
            shapes = [p.global_shape for p in parts]
            raise InvalidShardingError(
                f"{key!r}: `of` needs one or more parts of one global tensor, got shapes {shapes}"
            )
        boxes = [box for part in parts for box in part.boxes()]
        total = sum(box.size for box in boxes)
        start, stop, step = flat_range.indices(total)
        if step != 1 or flat.dim() != 1 or (flat_range.stop or 0) > total or stop - start != flat.numel():
            raise InvalidShardingError(
                f"{key!r}: flat_range {flat_range.start}:{flat_range.stop} of {total} elements for a buffer of shape "
                f"{tuple(flat.shape)}; expected a 1-d buffer of exactly that many"
            )
        self = cls.__new__(cls)
        self._set(key, flat, parts[0].global_shape, replica_id, any(p.allow_shape_mismatch for p in parts))
        self.partition, self.owner, self.blocks = parts[0].partition, parts[0].owner, parts[0].blocks
        self._pieces = tuple(_flat_pieces(boxes, start, stop))
        self._box = None
        self._size = flat.numel()
        return self

    @property
    def spec(self) -> Spec:
        """What all shards of the key have in common."""
        return Spec(
            dtype=dtype_name(self.data.dtype, self.key),
            global_shape=self.global_shape,
            partition=self.partition,
            owner=self.owner,
            blocks=self.blocks,
        )

    def boxes(self) -> list[Box]:
        """Where in the global tensor the elements of `data` lie, in the order of its flattened elements."""
        return [self._box] if self._box is not None else [box for box, _ in self._pieces]

    def shards(self) -> list[Shard]:
        """The boxes of this part, each with the view of `data` that holds it."""
        _check_tensor(self.key, self.data)
        data = self.data.detach()
        if data.numel() != self._size:
            raise InvalidShardingError(
                f"{self.key!r}: data has been replaced by one of shape {tuple(data.shape)}, not of the size of its "
                f"box; make a new ShardedTensor"
            )
        if self._box is not None:
            prepended = len(self._box.shape) - data.dim()
            return [Shard(self._box, data[(None,) * prepended] if prepended else data)]
        return [Shard(box, data.narrow(0, at, box.size).view(box.shape)) for box, at in self._pieces]

    def __repr__(self) -> str:
        boxes = ", ".join(map(str, self.boxes()))
        return f"ShardedTensor({self.key!r}, {boxes} of {self.global_shape}, {self.data.dtype})"


def _check_tensor(key: str, data: object) -> None:
    if not isinstance(data, Tensor):
        raise UnsupportedTypeError(f"{key!r}: data is a {type(data).__name__}, expected a torch.Tensor")
    if type(data) not in PLAIN_TENSOR_TYPES:
        raise UnsupportedTypeError(
            f"{key!r}: data is a {type(data).__qualname__}; give each plain tensor that it is made of a ShardedTensor"
        )


def _flat_pieces(boxes: Sequence[Box], start: int, stop: int) -> Iterator[tuple[Box, int]]:
    """Boxes of elements start..stop-1 of the flattened and concatenated boxes, with their positions in the range."""
    begin = 0
    for outer in boxes:
        first, last = max(start - begin, 0), min(stop - begin, outer.size)
        if first < last:
            at = begin + first - start
            for inner in flat_range_boxes(outer.shape, first, last):
                offset = tuple(o + i for o, i in zip(outer.offset, inner.offset, strict=True))
                yield Box(offset, inner.shape), at
                at += inner.size
        begin += outer.size


def is_text(key: str) -> bool:
    """Whether a string can be written down: a lone surrogate cannot."""
    if key.isascii():
        return True
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


def torch_dtype(name: str, key: str) -> torch.dtype:
    """The element type of a stored tensor. Raises CheckpointError when this torch has none of that name."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{key!r}: torch {torch.__version__} has no {name}; load it with a newer one")
    return dtype


def dtype_name(dtype: torch.dtype, key: str) -> str:
    """torch's name of an element type that can be stored. Raises UnsupportedTypeError naming the key."""
    name = _DTYPE_NAMES.get(dtype)
    if name is None:
        raise UnsupportedTypeError(f"{key!r}: tensors of dtype {dtype} cannot be stored; convert it first")
    return name
