"""The engines by name. Each is imported only in the processes that measure it, as its package may be missing."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from benchmarks.engines.port import Engine
from benchmarks.figures import Kind
from benchmarks.request import ASYNC_MODES, Mode
from benchmarks.state import RankState

ALL: frozenset[Kind] = frozenset({"sync", "async", "loop", "layouts", "memory", "index", "small", "replicas"})
SAME_LAYOUT = ALL - {"layouts", "index"}  # each rank's tensors are its own, without a global index


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the tables: a class in a module of this package, what it is made with, and where it takes part."""

    home: str
    kinds: frozenset[Kind]
    options: dict[str, str | int] = field(default_factory=dict)
    is_peer: bool = True
    has_sync: bool = True
    has_async: bool = True

    def takes(self, mode: Mode) -> bool:
        return self.has_async if mode in ASYNC_MODES else self.has_sync

    def make(self, root: Path, state: RankState) -> Engine:
        """Raises ImportError if the engine is not installed."""
        module, name = self.home.split(":")
        engine: type[Engine] = getattr(import_module(f"benchmarks.engines.{module}"), name)
        return engine(root, state, **self.options)


ENGINES = {
    "distckpt": Entry("distckpt:Distckpt", ALL, {"io_backend": "io_uring"}, is_peer=False),
    "distckpt-lazy": Entry(
        "distckpt:Distckpt",
        frozenset({"async", "loop", "memory"}),
        {"io_backend": "io_uring", "snapshot": "lazy"},
        is_peer=False,
        has_sync=False,
    ),
    "distckpt-threads": Entry(
        "distckpt:Distckpt", frozenset({"sync", "async"}), {"io_backend": "threads"}, is_peer=False
    ),
    "distckpt-parity": Entry(
        "distckpt:Distckpt", frozenset({"sync", "async"}), {"io_backend": "io_uring", "parity": True}, is_peer=False
    ),
    "distckpt-verified": Entry(
        "distckpt:Distckpt",
        frozenset({"sync", "async"}),
        {"io_backend": "io_uring", "verify_after_save": True},
        is_peer=False,
    ),
    "torch.save": Entry("torch_save:TorchSave", SAME_LAYOUT, has_async=False),
    "safetensors": Entry("safetensors:Safetensors", SAME_LAYOUT, has_async=False),
    "dcp": Entry("dcp:Dcp", ALL, {"thread_count": 1}),
    "dcp-2-threads": Entry("dcp:Dcp", frozenset({"sync", "async"}), {"thread_count": 2}),
    "megatron-core": Entry("megatron:MegatronCore", ALL),
    "torchsnapshot": Entry("torchsnapshot:TorchSnapshot", SAME_LAYOUT | {"index"}),
    # A directory per tensor: tens of thousands of small ones are not what it is for.
    "tensorstore": Entry("tensorstore:TensorStore", ALL - {"small", "index"}),
}
