"""A job whose save of one iteration never ends: it is held just ahead of the commit, for a test to kill the job there.

python held_save.py <iteration> <script> <arguments of the script>    rank 0 prints "held"
"""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path

from distckpt.storage import PosixStorage
from tests.distributed.launch import say


def main() -> None:
    index = f"iter_{int(sys.argv[1]):07d}/index-"
    put_if_absent = PosixStorage.put_if_absent

    def held(self: PosixStorage, name: str, data: bytes) -> bool:
        if name.startswith(index):
            say("held")
            time.sleep(600)
        return put_if_absent(self, name, data)

    PosixStorage.put_if_absent = held  # type: ignore[method-assign]
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
