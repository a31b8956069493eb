"""Interruptions: a command that is told to end by Ctrl-C (SIGINT) or SIGTERM unwinds, and says what it leaves.

The first signal raises Interrupted in the main thread, so that every `with` and `finally` on the way out runs. A
second one ends the process at once, also while the main thread hangs in a call to storage that does not answer:
nothing here relies on being cleaned up, which a killed process is not either.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Launchers pass on what a terminal has sent to their ranks already: so soon, a second signal is the first once more.
_SAME_S = 0.3


class Interrupted(KeyboardInterrupt):
    """The command was told to end. left: what it leaves, and how to go on; "" if it did not say."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number
        self.left = ""

    def __str__(self) -> str:
        return f"stopped by {self.number.name}" + (f": {self.left}" if self.left else " before it was done")


@contextmanager
def leaving(what: str) -> Iterator[None]:
    """For the part of a command that takes long: what is told of it if it is interrupted in there, on one line: what it
    leaves behind, and how to go on. The innermost wins."""
    try:
        yield
    except Interrupted as error:
        error.left = error.left or what
        raise


def interruption_in(error: BaseException | None) -> Interrupted | None:
    """The interruption that an error is, or that it was made of: an extension that is being imported makes an
    ImportError of it."""
    while error is not None and not isinstance(error, Interrupted):
        error = error.__cause__ or error.__context__
    return error


def listen_for_signals() -> None:
    """Until the process ends, which it does soon: its threads may have to be waited for. From the main thread. Raises
    Interrupted as soon as it listens.

    A signal that is ignored stays ignored, as nohup and shells want for what runs in the background.
    """
    heard, told = socket.socketpair()
    told.setblocking(False)
    numbers = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    threading.Thread(target=_hear, args=(heard, numbers), name="distckpt-signals", daemon=True).start()
    is_told = threading.Event()

    def handle(number: int, _: FrameType | None) -> None:
        if not is_told.is_set():  # What comes later is the business of _hear.
            is_told.set()
            raise Interrupted(signal.Signals(number))

    signal.set_wakeup_fd(told.detach(), warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, handle)


def _hear(heard: socket.socket, numbers: list[signal.Signals]) -> None:
    """A handler in Python does not run while the main thread is in a call in C; this does."""
    first_at: float | None = None
    while byte := heard.recv(1):
        number, now = byte[0], time.monotonic()
        if number not in numbers:
            continue
        if first_at is None:
            first_at = now
        elif now - first_at > _SAME_S:
            os.write(2, f"distckpt: ended at once by a second {signal.Signals(number).name}\n".encode())
            os._exit(128 + number)
