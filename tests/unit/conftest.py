"""What several tests of training ask for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models that are so small that threads only wait for each other."""
    import torch  # Most tests here need none.

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reshards take many steps, as those of large tensors do, and no time for memory."""
    from distckpt.resharding import planning
    from distckpt.resharding.part import LotMemory

    monkeypatch.setattr(planning, "share_memory", lambda *_, **__: LotMemory(1 << 20, 64 << 10))
