"""Files that commands write where they are told to: whole, or not at all. Those of checkpoints storage writes."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to. What lies there when the body ends takes the place of what lay under `path`; if the body
    fails or is interrupted, that stays as it was, and nothing else is left.

    What is no regular file, such as /dev/stdout or a pipe, is written to itself. Raises OSError.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = Path(os.path.realpath(path))  # What a link leads to is replaced, and not the link.
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no directory {path.parent}")
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
