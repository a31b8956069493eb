"""What tests of distckpt, and of code that uses or extends it, are built from. Needs the `test` extra."""

from __future__ import annotations

from distckpt.coordinator.contract import CoordinatorContract
from distckpt.coordinator.threads import ThreadCoordinator, run_ranks
from distckpt.storage.contract import StorageContract
from distckpt.storage.faults import Crash, CrashingStorage
from distckpt.storage.memory import MemoryStorage
from distckpt.transport.contract import TransportContract
from distckpt.transport.fake import FakeAccelerator

__all__ = [
    "CoordinatorContract",
    "Crash",
    "CrashingStorage",
    "FakeAccelerator",
    "MemoryStorage",
    "StorageContract",
    "ThreadCoordinator",
    "TransportContract",
    "run_ranks",
]
