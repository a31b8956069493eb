"""PendingSave: the handle of a save that goes on in the background. Decides who learns of its failure, and when."""

from __future__ import annotations

import atexit
import logging
import threading
import traceback
from collections.abc import Callable

from distckpt.report import SaveReport

logger = logging.getLogger("distckpt")


class PendingSave:
    """An async save. Its failure is raised by wait(), or else by the next call on the Checkpointer, once.

    A failure that the program ends without having met is logged as an error; the exit code is the program's own.
    """

    def __init__(self, work: Callable[[], SaveReport], staged: threading.Event, timeout_s: float) -> None:
        """staged: set, by `work` at the latest, when the caller may change the tensors."""
        self._report: SaveReport | None = None
        self._error: BaseException | None = None
        self._is_known = False
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        # Not the thread's own end: after an interrupted join() a thread that runs may count as ended.
        self._ended = threading.Event()
        self._staged = staged
        self._timeout_s = timeout_s
        self._thread = threading.Thread(target=self._run, args=(work,), name="distckpt-save")

    @classmethod
    def failed(cls, error: BaseException) -> PendingSave:
        """One that has ended already, and whose error somebody knows."""

        def fail() -> SaveReport:
            raise error

        staged = threading.Event()
        staged.set()
        pending = cls(fail, staged, 0.0)
        pending.mark_known()
        pending._run(fail)
        return pending

    def start(self) -> None:
        """Begin. Where the host gives no thread, the save is made here and now, as other ranks are waiting for it."""
        try:
            self._thread.start()
        except RuntimeError:
            self._thread.run()

    def _run(self, work: Callable[[], SaveReport]) -> None:
        try:
            self._report = work()
        except BaseException as error:
            self._error = error
            _let_go_of_locals(error)
            if not self._is_known:
                atexit.register(self._report_unseen_error)
        with self._lock:
            self._ended.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def _report_unseen_error(self) -> None:
        """At the end of the program, which has waited for the thread: a failed save must not pass in silence."""
        logger.error("an async save failed, and nothing waited for it: %s", self._error)

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Have it called when the save has ended, well or not, in the save's thread; at once if it has."""
        with self._lock:
            if not self._ended.is_set():
                self._callbacks.append(callback)
                return
        callback()

    def wait_staged(self) -> None:
        """Return when the caller may change the tensors; an eager save has returned so. Its failure is not raised here.

        Raises TimeoutError when that takes longer than a rank may be silent.
        """
        if not self._staged.wait(self._timeout_s):
            raise TimeoutError(f"the snapshot is still being copied after {self._timeout_s} s")

    def done(self) -> bool:
        """Whether the save has ended, well or not."""
        return self._ended.is_set()

    def wait(self, timeout_s: float | None = None) -> SaveReport:
        """Wait for the end of the save. Raises its error, or TimeoutError while it goes on."""
        if not self._ended.wait(timeout_s):
            raise TimeoutError(f"the save is still under way after {timeout_s} s")
        if self._error is not None:
            self.mark_known()
            raise self._error
        assert self._report is not None
        return self._report

    def take_unseen_error(self) -> BaseException | None:
        """Wait for the end of the save. Its error, unless somebody has seen it; now somebody has."""
        self._ended.wait()
        error = None if self._is_known else self._error
        self.mark_known()
        return error

    def mark_known(self) -> None:
        """Its error, if it has one or comes to have one, need not be raised or logged any more."""
        self._is_known = True
        atexit.unregister(self._report_unseen_error)


def _let_go_of_locals(error: BaseException | None) -> None:
    """Of the calls that failed: they hold the state, and the error is kept for as long as nobody asks for it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
