"""Storages on real files whose surroundings change at a chosen moment of a save."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from distckpt.storage import FreeSpace, PosixStorage, Storage
from distckpt.storage.faults import Result
from distckpt.testing import CrashingStorage


class TrustingStorage(PosixStorage):
    """Finds room for everything: the space is taken by somebody else after it was looked at."""

    def free_space(self) -> FreeSpace | None:
        space = super().free_space()
        return None if space is None else replace(space, size_bytes=1 << 40)


class InterferedStorage(CrashingStorage):
    """Calls interfere(), once, before the first call of `method` on a name that contains `text`.

    Methods are named as in CrashingStorage.calls; no call is made to fail.
    """

    def __init__(self, inner: Storage, method: str, text: str, interfere: Callable[[], object]) -> None:
        super().__init__(inner)
        self._method, self._text = method, text
        self._interfere = interfere
        self._turn = threading.Lock()
        self.interfered = False

    def run(self, method: str, name: str, call: Callable[[], Result], half: Callable[[], None] | None = None) -> Result:
        with self._turn:
            if not self.interfered and method == self._method and self._text in name:
                self.interfered = True
                self._interfere()
        return super().run(method, name, call, half)
