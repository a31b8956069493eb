"""What torch.distributed.checkpoint makes of a simulated world: its default planner and its metadata, pickled as its
own gather, scatter and file writer pickle them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, Metadata, SavePlan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from benchmarks.world import World


def local_plans(world: World) -> Iterator[SavePlan]:
    """What each rank would send to rank 0."""
    tensors = [world.tensors(stage) for stage in range(world.sizes["pp"])]
    for rank in range(world.ranks):
        items = []
        stage = world.mesh(rank)["pp"][0]
        for (key, spec), box in zip(tensors[stage], world.boxes(rank).tolist(), strict=True):
            chunk = ChunkStorageMetadata(torch.Size(box[:2]), torch.Size(box[2:]))
            properties = TensorProperties(dtype=getattr(torch, spec.dtype))
            data = TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(spec.global_shape))
            items.append(WriteItem(MetadataIndex(key, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
        yield SavePlan(items, planner_data={})


def global_plan(plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
    return DefaultSavePlanner().create_global_plan(plans)


def metadata_file(plans: Sequence[SavePlan], metadata: Metadata) -> bytes:
    """The content of .metadata: with the place of every chunk, as the file writer adds them."""
    places: dict[MetadataIndex, _StorageInfo] = {}
    for rank, plan in enumerate(plans):
        at = 0
        for item in plan.items:
            assert item.tensor_data is not None
            size = item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
            places[item.index] = _StorageInfo(f"__{rank}_0.distcp", at, size)
            at += size
    return pickle.dumps(replace(metadata, storage_data=places))


def read_items(metadata: Metadata, world: World) -> list[ReadItem]:
    """What the rank that loads World.targets would read."""
    items = []
    for key, box in world.targets():
        tensor = metadata.state_dict_metadata[key]
        assert isinstance(tensor, TensorStorageMetadata)
        chunk = ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape))
        items += create_read_items_for_chunk_list(key, tensor, [chunk])
    return items
