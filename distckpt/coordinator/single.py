"""The coordinator of a job that is one process."""

from __future__ import annotations

from collections.abc import Sequence


class SingleProcess:
    """A group of one rank: what it gathers and scatters is its own."""

    @property
    def rank(self) -> int:
        return 0

    @property
    def world_size(self) -> int:
        return 1

    def gather(self, tag: str, payload: bytes, *, timeout_s: float) -> Sequence[bytes] | None:
        return [payload]

    def scatter(self, tag: str, payloads: Sequence[bytes] | None, *, timeout_s: float) -> bytes:
        if payloads is None or len(payloads) != 1:
            raise ValueError(f"scatter {tag!r}: rank 0 of 1 must give one payload")
        return payloads[0]

    def close(self) -> None:
        """Nothing is held."""
