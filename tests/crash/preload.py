"""Libraries that stand between a program and the C library, compiled when first asked for."""

from __future__ import annotations

import atexit
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path


@functools.cache
def preload_library(source: str) -> str:
    """What LD_PRELOAD is to name: the library made of a C++ file of this directory."""
    directory = tempfile.mkdtemp(prefix="preload-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    library = Path(directory, source).with_suffix(".so")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, "-o", str(library), str(Path(__file__).with_name(source)), "-ldl"], check=True)
    return str(library)
