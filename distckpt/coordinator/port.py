"""The Coordinator port: how ranks exchange small messages. It moves bytes and knows nothing of checkpoints.

A coordinator may be called from any one thread at a time, the main thread or a background one, while other
threads use torch.distributed or MPI for their own purposes. All ranks make the same sequence of calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class RankFailure(Exception):
    """Some ranks did not answer within the bound, or the connection to them is gone.

    failures: rank -> what is known ("no answer to 'commit' within 600 s").
    """

    def __init__(self, failures: dict[int, str]) -> None:
        super().__init__("; ".join(f"rank {rank}: {why}" for rank, why in sorted(failures.items())))
        self.failures = failures


class Coordinator(Protocol):
    """A fixed group of ranks 0..world_size-1."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def gather(self, tag: str, payload: bytes, *, timeout_s: float) -> Sequence[bytes] | None:
        """Bring every rank's payload to rank 0: there the payloads by rank, elsewhere None.

        Returns on the other ranks as soon as the payload is handed over. Raises RankFailure when a rank is
        silent for `timeout_s` seconds: on rank 0 it names all silent ranks.
        """

    def scatter(self, tag: str, payloads: Sequence[bytes] | None, *, timeout_s: float) -> bytes:
        """Give rank r payloads[r] of rank 0 (None elsewhere). Equal payloads (`is`) may travel once.

        Raises RankFailure when rank 0 is silent for `timeout_s` seconds or gone.
        """

    def close(self) -> None:
        """Free what the coordinator holds. Not collective; calling it twice does nothing."""
