"""Fixtures of the crash tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from distckpt import removing, writing
from tests.crash.loop_disk import LoopDisk, MountRefused, mounted

pytest.register_assert_rewrite("tests.crash.failing_saves")


@pytest.fixture
def everything_is_stale(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A later sweep is one at once, and so is a second try: what a failed save has left is old the moment it fails."""
    monkeypatch.setattr(removing, "STALE_AFTER_S", 0.0)
    monkeypatch.setattr(writing, "RETRY_AFTER_S", (0.0, 0.0))
    caplog.set_level(logging.CRITICAL, "distckpt")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[LoopDisk]:
    """An ext4 file system of this test's own; the test is skipped where mounting is refused."""
    with ExitStack() as stack:
        try:
            disk = stack.enter_context(mounted(tmp_path, size_mib=48))
        except MountRefused as refused:
            pytest.skip(str(refused))
        yield disk
