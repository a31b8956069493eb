"""What tests of distckpt, and of code that uses or extends it, are built from. Needs the `test` extra."""

from __future__ import annotations

from distckpt.storage.contract import StorageContract
from distckpt.storage.faults import Crash, CrashingStorage
from distckpt.storage.memory import MemoryStorage

__all__ = ["Crash", "CrashingStorage", "MemoryStorage", "StorageContract"]
