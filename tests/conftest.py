"""What holds for all tests."""

from __future__ import annotations

import signal

import pytest

# Who is started in the background may have Ctrl-C ignored, and so would all that it starts: tests send it, and wait.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    """With several processes the tests of one directory run one after the other, in one of them."""
    from xdist.scheduler import LoadScopeScheduling

    class DirectoryScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0].rpartition("/")[0]

    return DirectoryScheduling(config, log) if config.getoption("dist") == "load" else None
