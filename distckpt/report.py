"""What a save, a load or a copy did, in numbers. Plain records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReport:
    """One committed save. Seconds are this rank's own; `bytes` is of all ranks' files.

    plan_s: agreeing on who writes what. stage_s: copying the state. stall_s: the time that training stood still: the
    call itself, and the steps that waited for a lazy snapshot. write_s: checksums, writing, fsync. commit_s: waiting
    for all ranks and making the checkpoint exist. slowest: phase -> (rank, seconds). backend: what moved the bytes.
    degraded: what was slower than it could be on this rank, and why, or could not be done. verified: whether all was
    read back, past the page cache, and is what was written. parity_bytes: of the parity files. protect_s: those two.
    peak_rss_bytes, device_bytes: the most memory that any rank had resident, or allocated on its accelerator, since it
    began and until its files were written.
    """

    iteration: int
    save_id: str
    bytes: int
    plan_s: float
    stage_s: float
    stall_s: float
    write_s: float
    commit_s: float
    total_s: float
    slowest: Mapping[str, tuple[int, float]]
    backend: str
    degraded: tuple[str, ...] = ()
    verified: bool = False
    parity_bytes: int = 0
    protect_s: float = 0.0
    peak_rss_bytes: int = 0
    device_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """One load. `bytes` is what this rank's state took in, bytes_read what it read from storage for it.

    missing: keys the state has and the checkpoint has not; unexpected: stored keys below a container of the state
    that nobody asked for (both empty unless strict=False). fell_back_from: iteration -> why it was passed over.
    reseeded, skipped: PerRank keys left alone because the layout changed. warnings: whatever else was odd.
    rebuilt: shard files that were damaged and were made again from parity, by any rank of this load. copy_used: the
    second root (copy_to), if it was read from that.
    not_shared: why ranks of one host could not read for each other what several of them need; None if nothing was in
    the way. converted: keys of tensors that are stored with another floating-point type (this rank's).
    slowest: phase (match, read, apply) -> (rank, seconds). peak_rss_bytes, device_bytes: the most memory that
    any rank had resident, or allocated on its accelerator, since it began and until the state was filled.
    """

    iteration: int
    save_id: str
    bytes: int
    bytes_read: int
    read_s: float
    total_s: float
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    fell_back_from: Mapping[int, str] = field(default_factory=dict)
    reseeded: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    rebuilt: tuple[str, ...] = ()
    copy_used: str | None = None
    not_shared: str | None = None
    converted: tuple[str, ...] = ()
    slowest: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    device_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyReport:
    """One checkpoint that was copied to another root.

    source, target: where the roots are. bytes: of all its files; bytes_copied: of those, what was not there already.
    total_s: of the try that succeeded. tries: how many there were.
    """

    iteration: int
    save_id: str
    source: str
    target: str
    bytes: int
    bytes_copied: int
    total_s: float
    tries: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshardReport:
    """One checkpoint that was rewritten for another mesh.

    source, target: where the roots are. mesh: axis -> size of the target. bytes, files: of the new checkpoint.
    bytes_written, bytes_read: by this run, of all processes; less than all where it went on from an earlier one
    (is_resumed). is_there: the target had it already, and nothing was done. notes: what a reader should know, such as
    per-rank values that were left out. peak_rss_bytes: of the process that took most.
    """

    iteration: int
    save_id: str
    source: str
    target: str
    mesh: Mapping[str, int]
    world_size: int
    files: int
    bytes: int
    bytes_written: int
    bytes_read: int
    total_s: float
    is_resumed: bool = False
    is_there: bool = False
    notes: tuple[str, ...] = ()
    peak_rss_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """One checkpoint that was exported.

    target: where it is. tensors, bytes: what was exported, as it is there. files: that hold elements. left_out: values,
    and what differs by rank, that the target does not have.
    """

    iteration: int
    save_id: str
    target: str
    tensors: int
    bytes: int
    files: int
    left_out: int
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """One checkpoint that was made of something else.

    source, target: where that is, and the root. tensors, values: how many (values that differ by rank among them).
    bytes: of all its files.
    """

    iteration: int
    save_id: str
    source: str
    target: str
    tensors: int
    values: int
    bytes: int
    total_s: float


def slowest_ranks(phases: Iterable[str], seconds: Sequence[Mapping[str, float]]) -> dict[str, tuple[int, float]]:
    """Phase -> (rank, seconds) of the rank that took longest. seconds: of each rank, by phase."""
    return {
        phase: max(((rank, own.get(phase, 0.0)) for rank, own in enumerate(seconds)), key=lambda item: item[1])
        for phase in phases
    }
