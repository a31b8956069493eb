"""What the saves of one Checkpointer work with, and what each leaves to the next. Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass

from distckpt.after_commit import AfterCommit
from distckpt.arena import Arena
from distckpt.assembling import ChunkRecords
from distckpt.commit import Writer
from distckpt.coordinator import Coordinator
from distckpt.index import Mesh
from distckpt.share import Share
from distckpt.storage import Storage
from distckpt.transport import Transports


@dataclass(slots=True)
class SaveContext:
    """What saves work with, and what one leaves to the next. after_commit, writer, records: rank 0's; parent: a
    save_id. second: the root that is copied to."""

    storage: Storage
    coordinator: Coordinator
    mesh: Mesh
    arena: Arena
    timeout_s: float
    backend: str
    removal_grace_s: float
    max_write_bytes_per_s: float
    transports: Transports
    after_commit: AfterCommit
    second: Storage | None = None
    share: Share | None = None
    writer: Writer | None = None
    records: ChunkRecords | None = None
    parent: str | None = None
