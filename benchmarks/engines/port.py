"""What the harness asks of an engine. Every rank has one, and all ranks make the same calls in the same order."""

from __future__ import annotations

from pathlib import Path

from benchmarks.state import RankState


class Engine:
    """Saves and loads `state` below `root`; kept for the whole job, so that it can reuse what it wants to.

    An engine defines the calls that its row in ENGINES lets it take part in. backend: what moves the bytes, for the
    report. is_durable: whether save and wait leave nothing to fsync; if not, the harness fsyncs files and directories
    after them, and counts it. has_prepare: whether prepare() does anything.
    """

    backend = "page cache"
    is_durable = False
    has_prepare = False

    def __init__(self, root: Path, state: RankState) -> None:
        self.root = root
        self.state = state

    def path(self, step: int) -> Path:
        """The directory of a step's checkpoint."""
        return self.root / f"step_{step}"

    def make_path(self, step: int) -> Path:
        """The same, made, by whichever rank comes first."""
        path = self.path(step)
        path.mkdir(exist_ok=True)
        return path

    def save(self, step: int) -> None:
        raise NotImplementedError

    def load(self, step: int) -> None:
        """Into the tensors of the state."""
        raise NotImplementedError

    def prepare(self) -> None:
        """What a job would do before its first async save."""

    def async_save(self, step: int) -> None:
        """On return the state may advance()."""
        raise NotImplementedError

    def poll(self) -> bool:
        """What a training loop calls after each step of an async save; whether the save has ended on this rank."""
        raise NotImplementedError

    def wait(self) -> None:
        """For the async save under way."""
        raise NotImplementedError

    def index_files(self, step: int) -> list[Path]:
        """The files that say where the pieces lie. On rank 0 only."""
        raise NotImplementedError

    def open_index(self, step: int) -> None:
        """Read and decode all that they say. On rank 0 only."""
        raise NotImplementedError

    def close(self) -> None:
        """Free what was kept for the next save."""
