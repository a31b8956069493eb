"""Heartbeat: shows other jobs that a save is alive, by the age of its pending marker."""

from __future__ import annotations

import threading

from distckpt.commit import HEARTBEAT_S
from distckpt.storage import Storage


class Heartbeat:
    """Touches the pending marker while the body runs, so that no sweep takes the save for dead."""

    def __init__(self, storage: Storage, marker: str, *, active: bool) -> None:
        self._storage = storage
        self._marker = marker
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="distckpt-heartbeat", daemon=True) if active else None

    def __enter__(self) -> None:
        if self._thread is not None:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                self._storage.touch(self._marker)
            except OSError:
                continue  # The save itself finds out what is wrong with the storage.
