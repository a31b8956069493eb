"""distckpt reshard, from a source tree, alone or under mpirun or torchrun:

torchrun --nproc-per-node 4 tools/reshard.py SRC DST --tp 4
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distckpt.cli import main

if __name__ == "__main__":
    main(["reshard", *sys.argv[1:]])
