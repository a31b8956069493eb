"""Where checkpoints lie: the Storage port and its backends."""

from distckpt.storage.checked import Part, Target, read_checked, write_checked
from distckpt.storage.port import FreeSpace, ReadFile, Storage, WriteFile
from distckpt.storage.posix import PosixStorage

__all__ = [
    "FreeSpace",
    "Part",
    "PosixStorage",
    "ReadFile",
    "Storage",
    "Target",
    "WriteFile",
    "read_checked",
    "write_checked",
]
