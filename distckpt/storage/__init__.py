"""Where checkpoints lie: the Storage port and its backends."""

from distckpt.storage.checked import Part, Target, drop_cache, read_checked, write_checked
from distckpt.storage.port import FreeSpace, ReadFile, Storage, WriteFile
from distckpt.storage.posix import PosixStorage
from distckpt.storage.whole_files import new_file

__all__ = [
    "FreeSpace",
    "Part",
    "PosixStorage",
    "ReadFile",
    "Storage",
    "Target",
    "WriteFile",
    "drop_cache",
    "new_file",
    "read_checked",
    "write_checked",
]
