"""Roots in memory that models were saved to, and reshards of them."""

from __future__ import annotations

from typing import Any

import distckpt
from distckpt.commit import list_commits, read_index
from distckpt.index import Index
from distckpt.report import ReshardReport
from distckpt.resharding.plan_file import ReshardPlan
from distckpt.storage import Storage
from distckpt.testing import MemoryStorage
from tests.unit.model_states import Layout, Model, save_model


def saved(model: Model, layout: Layout, *, labels: bool = True) -> MemoryStorage:
    storage = MemoryStorage()
    save_model(storage, model, layout, labels=labels)
    return storage


def reshard(source: Storage, layout: Layout, plan: ReshardPlan | None = None, **options: Any) -> MemoryStorage:
    """Into a new root."""
    target = MemoryStorage()
    reshard_into(source, target, layout, plan, **options)
    return target


def reshard_into(
    source: Storage, target: Storage, layout: Layout, plan: ReshardPlan | None = None, **options: Any
) -> ReshardReport:
    return distckpt.reshard(source, target, layout.mesh, plan=plan, **options)


def index_of(storage: Storage) -> Index:
    """Of the newest checkpoint."""
    return read_index(storage, list_commits(storage)[0])[0]
