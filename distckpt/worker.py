"""Worker: one background thread that does what it is given, in order. Decides nothing of what that is."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

logger = logging.getLogger("distckpt")


class Worker:
    """Runs calls one after the other, in a thread that is there while there is work. Safe to use from any thread.

    A call that raises is logged as a warning, and the next one follows. The program's end waits for the work at most
    `timeout_s`, and then leaves it where it is: whatever is given here must bear that, as it must bear a crash.
    """

    def __init__(self, name: str, timeout_s: float) -> None:
        """name: of the thread, and in what is logged."""
        self._name = name
        self._timeout_s = timeout_s
        self._work: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._is_running = False

    def submit(self, work: Callable[[], None]) -> None:
        """Have it done after what was given before. Where the host gives no thread it is done here and now."""
        with self._changed:
            self._work.append(work)
            if self._is_running:
                return
            self._is_running = True
        atexit.register(self._leave)
        try:
            # A daemon: a call that hangs must not keep the program from ending.
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
        except RuntimeError:
            self._run()

    def wait(self, timeout_s: float) -> bool:
        """Wait until nothing is left to do; False if something still is after timeout_s."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            return self._changed.wait_for(lambda: not self._is_running, max(0.0, deadline - time.monotonic()))

    def abandon(self) -> int:
        """Forget what was not begun yet, and let the program end while the rest goes on; how many calls that were."""
        with self._changed:
            count = len(self._work)
            self._work.clear()
        atexit.unregister(self._leave)
        return count

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._work:
                    self._is_running = False
                    atexit.unregister(self._leave)
                    self._changed.notify_all()
                    return
                work = self._work.popleft()
            try:
                work()
            except BaseException as error:  # An exit too: it would end this thread only, and in silence.
                logger.warning("%s: %s: %s", self._name, type(error).__name__, error)
            del work

    def _leave(self) -> None:
        """At the end of the program."""
        if not self.wait(self._timeout_s):
            logger.warning("%s: the program ends while it is at work", self._name)
