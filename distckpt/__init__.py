"""Sharded checkpoints for model-parallel training: safe, checked, loadable on any layout.

The public names; they are imported on first use, so that `import distckpt.index` and the like need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distckpt.after_commit import CommittedSave as CommittedSave
    from distckpt.cataloging import CheckpointEntry as CheckpointEntry
    from distckpt.cataloging import IncompleteSave as IncompleteSave
    from distckpt.cataloging import catalog as catalog
    from distckpt.cataloging import incomplete_saves as incomplete_saves
    from distckpt.checkpointer import Checkpointer as Checkpointer
    from distckpt.comparing import ComparisonReport as ComparisonReport
    from distckpt.comparing import compare_checkpoints as compare_checkpoints
    from distckpt.copier import Copy as Copy
    from distckpt.copying import copy_checkpoint as copy_checkpoint
    from distckpt.errors import CheckpointError as CheckpointError
    from distckpt.errors import CheckpointNotFoundError as CheckpointNotFoundError
    from distckpt.errors import CorruptionError as CorruptionError
    from distckpt.errors import DistributedError as DistributedError
    from distckpt.errors import FencedError as FencedError
    from distckpt.errors import InvalidShardingError as InvalidShardingError
    from distckpt.errors import MismatchError as MismatchError
    from distckpt.errors import UnsupportedTypeError as UnsupportedTypeError
    from distckpt.exchange.exporting import export_safetensors as export_safetensors
    from distckpt.exchange.exporting import export_zarr as export_zarr
    from distckpt.exchange.importing import import_safetensors as import_safetensors
    from distckpt.exchange.importing import import_zarr as import_zarr
    from distckpt.history_log import HistoryLine as HistoryLine
    from distckpt.history_log import history as history
    from distckpt.labelling import label as label
    from distckpt.link_names import LinkNames as LinkNames
    from distckpt.one_directory import async_save as async_save
    from distckpt.one_directory import load as load
    from distckpt.one_directory import read as read
    from distckpt.one_directory import save as save
    from distckpt.pending import PendingSave as PendingSave
    from distckpt.per_rank import PerRank as PerRank
    from distckpt.pruning import PruneReport as PruneReport
    from distckpt.pruning import prune as prune
    from distckpt.repairing import RepairReport as RepairReport
    from distckpt.repairing import repair as repair
    from distckpt.report import CopyReport as CopyReport
    from distckpt.report import ExportReport as ExportReport
    from distckpt.report import ImportReport as ImportReport
    from distckpt.report import LoadReport as LoadReport
    from distckpt.report import ReshardReport as ReshardReport
    from distckpt.report import SaveReport as SaveReport
    from distckpt.resharding.job import reshard as reshard
    from distckpt.resharding.plan_file import ReshardPlan as ReshardPlan
    from distckpt.resharding.planning import ReshardPreview as ReshardPreview
    from distckpt.resharding.planning import preview_reshard as preview_reshard
    from distckpt.retention import Retention as Retention
    from distckpt.sharded_tensor import ShardedTensor as ShardedTensor
    from distckpt.tensor_values import TensorStatistics as TensorStatistics
    from distckpt.tensor_values import tensor_statistics as tensor_statistics
    from distckpt.termination import Termination as Termination
    from distckpt.training.assets import extract_assets as extract_assets
    from distckpt.training.base_checkpoint import BaseCheckpoint as BaseCheckpoint
    from distckpt.training.fingerprint import fingerprint_of as fingerprint_of
    from distckpt.training.resume_check import ResumeVerdict as ResumeVerdict
    from distckpt.training.sampler import PositionReport as PositionReport
    from distckpt.training.sampler import ResumableSampler as ResumableSampler
    from distckpt.training.schedule import CheckpointSchedule as CheckpointSchedule
    from distckpt.training.schedule import Due as Due
    from distckpt.training.train_state import TrainState as TrainState
    from distckpt.verifying import VerifyReport as VerifyReport
    from distckpt.verifying import verify as verify

_HOMES = {
    "Checkpointer": "checkpointer",
    "CheckpointEntry": "cataloging",
    "IncompleteSave": "cataloging",
    "catalog": "cataloging",
    "incomplete_saves": "cataloging",
    "label": "labelling",
    "PruneReport": "pruning",
    "prune": "pruning",
    "Retention": "retention",
    "PendingSave": "pending",
    "CheckpointError": "errors",
    "CheckpointNotFoundError": "errors",
    "CorruptionError": "errors",
    "DistributedError": "errors",
    "FencedError": "errors",
    "InvalidShardingError": "errors",
    "MismatchError": "errors",
    "UnsupportedTypeError": "errors",
    "CommittedSave": "after_commit",
    "ComparisonReport": "comparing",
    "compare_checkpoints": "comparing",
    "Copy": "copier",
    "LinkNames": "link_names",
    "copy_checkpoint": "copying",
    "export_safetensors": "exchange.exporting",
    "export_zarr": "exchange.exporting",
    "import_safetensors": "exchange.importing",
    "import_zarr": "exchange.importing",
    "HistoryLine": "history_log",
    "history": "history_log",
    "async_save": "one_directory",
    "load": "one_directory",
    "read": "one_directory",
    "save": "one_directory",
    "PerRank": "per_rank",
    "CopyReport": "report",
    "ExportReport": "report",
    "ImportReport": "report",
    "LoadReport": "report",
    "SaveReport": "report",
    "ReshardReport": "report",
    "ReshardPlan": "resharding.plan_file",
    "ReshardPreview": "resharding.planning",
    "preview_reshard": "resharding.planning",
    "reshard": "resharding.job",
    "ShardedTensor": "sharded_tensor",
    "RepairReport": "repairing",
    "repair": "repairing",
    "TensorStatistics": "tensor_values",
    "tensor_statistics": "tensor_values",
    "Termination": "termination",
    "CheckpointSchedule": "training.schedule",
    "Due": "training.schedule",
    "fingerprint_of": "training.fingerprint",
    "ResumeVerdict": "training.resume_check",
    "PositionReport": "training.sampler",
    "ResumableSampler": "training.sampler",
    "BaseCheckpoint": "training.base_checkpoint",
    "TrainState": "training.train_state",
    "extract_assets": "training.assets",
    "VerifyReport": "verifying",
    "verify": "verifying",
}
__all__ = list(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'distckpt' has no attribute {name!r}")
    return getattr(import_module(f"distckpt.{_HOMES[name]}"), name)
