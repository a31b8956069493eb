"""The errors users catch. All derive from `CheckpointError`; operating-system errors keep errno and file name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Committed = Literal["yes", "no", "unknown"]


class CheckpointError(Exception):
    """Something about a checkpoint is wrong; the message says what, which, expected, found and what to do."""


class InvalidShardingError(CheckpointError):
    """The ranks' shards of one key do not make one tensor: a hole, an overlap, two shapes, two dtypes, two values."""


class UnsupportedTypeError(CheckpointError, TypeError):
    """A leaf of the state is of a type that cannot be stored exactly."""


class MismatchError(CheckpointError):
    """What is asked for is not what is stored; lists every missing, unexpected and differently shaped key.

    `missing`, `unexpected` and `mismatched` are sorted tuples of keys, gathered from all ranks.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: tuple[str, ...] = (),
        unexpected: tuple[str, ...] = (),
        mismatched: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.missing = missing
        self.unexpected = unexpected
        self.mismatched = mismatched


class CorruptionError(CheckpointError):
    """Stored bytes are not the bytes that were written; names file, block and both checksums."""


class CheckpointNotFoundError(CheckpointError):
    """There is no committed checkpoint where one was asked for.

    candidates: paths of checkpoints that the given path leads past: of roots below it, the root above it, checkpoints
    of other programs in it. Where there are any, a job that starts afresh is most likely a mistake. Not among them:
    saves that were never committed, other runs beside the path; the message names those too.
    """

    def __init__(self, message: str, *, candidates: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.candidates = candidates


class FencedError(CheckpointError):
    """A newer job has claimed this root; the save of this one is void and nothing was changed."""


class DistributedError(CheckpointError):
    """Some rank failed, died or did not answer in time; raised on every rank that lives.

    failures: rank -> "ErrorType: message" of every rank known to have failed.
    committed: whether the save that was under way is a checkpoint: "yes", "no" or "unknown".
    """

    def __init__(self, message: str, *, failures: Mapping[int, str], committed: Committed = "no") -> None:
        super().__init__(message)
        self.failures = dict(failures)
        self.committed: Committed = committed
