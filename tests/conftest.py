"""What holds for all tests."""

from __future__ import annotations

import signal

# Who is started in the background may have Ctrl-C ignored, and so would all that it starts: tests send it, and wait.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
