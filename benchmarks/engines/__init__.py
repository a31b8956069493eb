"""The engines by name. Each is imported only in the processes that measure it, as its package may be missing."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from benchmarks.engines.port import Engine
from benchmarks.state import RankState


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the tables: a class in a module of this package, and what it is made with."""

    home: str
    options: dict[str, str | int] = field(default_factory=dict)
    is_peer: bool = True
    has_async: bool = False

    def make(self, root: Path, state: RankState) -> Engine:
        """Raises ImportError if the engine is not installed."""
        module, name = self.home.split(":")
        engine: type[Engine] = getattr(import_module(f"benchmarks.engines.{module}"), name)
        return engine(root, state, **self.options)


ENGINES = {
    "distckpt": Entry("distckpt:Distckpt", {"io_backend": "io_uring"}, is_peer=False, has_async=True),
    "distckpt-threads": Entry("distckpt:Distckpt", {"io_backend": "threads"}, is_peer=False, has_async=True),
    "torch.save": Entry("torch_save:TorchSave"),
    "safetensors": Entry("safetensors:Safetensors"),
    "dcp": Entry("dcp:Dcp", {"thread_count": 1}, has_async=True),
    "dcp-2-threads": Entry("dcp:Dcp", {"thread_count": 2}, has_async=True),
    "megatron-core": Entry("megatron:MegatronCore", has_async=True),
    "torchsnapshot": Entry("torchsnapshot:TorchSnapshot", has_async=True),
}
