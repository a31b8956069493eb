"""One rank of a job that makes every measurement of the benchmarks, one after the other, on a tiny state.

Argument: a directory. Rank 0 leaves answers.json there: engine -> mode -> Answer.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from benchmarks.engines import ENGINES
from benchmarks.figures import LAYOUT_CHANGES, Kind
from benchmarks.layout import layout_of
from benchmarks.measuring import loop
from benchmarks.model import Model
from benchmarks.request import Answer, Mode, Request
from benchmarks.worker import measure

MODES: tuple[Mode, ...] = ("sync", "async", "loop", "store", "reload", "peak_save", "peak_load", "peak_async", "index")
OF_KIND: dict[Mode, Kind] = {"store": "layouts", "reload": "layouts", "index": "index"}
MODEL = Model(size_bytes=1_000_000, small_tensors=16)


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    loop.COMPUTE_S = 0.001
    answers: dict[str, dict[str, Answer]] = {}
    for name in ("distckpt", "distckpt-lazy", "torch.save", "dcp"):
        for mode in MODES:
            if not ENGINES[name].takes(mode) or (mode in OF_KIND and OF_KIND[mode] not in ENGINES[name].kinds):
                continue
            answers.setdefault(name, {})[mode] = _measure(directory, name, mode, answers.get(name, {}))
    if dist.get_rank() == 0:
        (directory / "answers.json").write_bytes(msgspec.json.encode(answers))
    dist.destroy_process_group()


def _measure(directory: Path, name: str, mode: Mode, before: dict[str, Answer]) -> Answer:
    """What a second job would find of a first one lies below the first one's name."""
    source = {"reload": "store", "peak_load": "peak_save"}.get(mode, mode)
    root = directory / name / source
    root.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    request = Request(
        mode=mode,
        engine=name,
        layout=layout_of(dist.get_world_size()),
        model=replace(MODEL, content="small" if mode == "index" else "gpt"),
        repeats=2,
        root=str(root),
        answer="",
        stored_step=before[source].last_step if source != mode else 0,
        label=next(iter(LAYOUT_CHANGES)),
    )
    return measure(request)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
