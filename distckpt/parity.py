"""Parity: of a group of shard files, one more, from which any one of them can be made again. No torch.

A parity file is the XOR of its group's files, each as if zeros followed it up to the length of the longest, and then a
CRC32C of each MiB, as shard files have them. It is made once the checkpoint exists, from the files as they are stored
and while their checksums are checked: a fault in one of them is found then, not copied. `parity-<save_id>.json`, put
after the parity files are durable, says which files are of which group; without it there is no parity.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial

import msgspec
import numpy as np

from distckpt._C import Memory, crc32c
from distckpt.checked_json import checked_body, decode_body, encode_record
from distckpt.checkpoint_files import BlockFile, CheckedFile, OnBytes
from distckpt.commit import read_file
from distckpt.errors import CheckpointError, CorruptionError
from distckpt.index import Index, Natural, SaveId, ShardFile, UInt32
from distckpt.shard_file import BLOCK_BYTES, FORMAT, FORMAT_VERSION
from distckpt.storage import Storage, new_file, write_checked

_WINDOW_BYTES = 8 << 20
_PIECE_BYTES = 256 << 20  # between two words to on_bytes
_MAX_RECORD_BYTES = 64 << 20
_TEMPORARY = ".tmp-"  # a sweep removes what is left of it


class ParityGroup(msgspec.Struct, frozen=True, kw_only=True):
    """One parity file. members: names of the shard files that it is of. data_bytes: without the checksums, of which
    table_crc is the checksum."""

    name: str
    members: tuple[str, ...]
    data_bytes: Natural
    table_crc: UInt32

    @property
    def size_bytes(self) -> int:
        return self.data_bytes + 4 * -(-self.data_bytes // BLOCK_BYTES)


class ParityRecord(msgspec.Struct, frozen=True, kw_only=True):
    """All parity files of one save."""

    format: str
    version: int
    save_id: SaveId
    groups: tuple[ParityGroup, ...]


def group_files(files: Sequence[ShardFile], group_size: int) -> list[list[ShardFile]]:
    """Files cut into groups, as even as can be, of at most `group_size`; of one file alone the parity is a copy."""
    count = -(-len(files) // group_size)
    return [[files[i] for i in part.tolist()] for part in np.array_split(np.arange(len(files)), count)]


def write_parity(
    storage: Storage, directory: str, save_id: str, number: int, files: Sequence[ShardFile], *, max_bytes_per_s: float
) -> ParityGroup:
    """Make the parity file of a group, the save's number-th. Raises CorruptionError if one of the files is damaged."""
    name = f"parity-{number:05d}-{save_id}.bin"
    data_bytes = max(file.size_bytes for file in files)
    table = np.empty(-(-data_bytes // BLOCK_BYTES), np.uint32)
    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(CheckedFile(storage, directory, file)) for file in files]
            with new_file(storage, f"{directory}/{name}", data_bytes + table.nbytes) as out:
                pieces = partial(_xor, opened, data_bytes)
                write_checked(out, [pieces], BLOCK_BYTES, table, max_bytes_per_s=max_bytes_per_s)
    except BaseException:
        with suppress(OSError):
            storage.remove(f"{directory}/{name}")
        raise
    return ParityGroup(
        name=name, members=tuple(file.name for file in files), data_bytes=data_bytes, table_crc=crc32c(table)
    )


def put_record(storage: Storage, directory: str, save_id: str, groups: Sequence[ParityGroup]) -> None:
    """After all parity files: from now on they count."""
    storage.sync_directory(directory)
    record = ParityRecord(format=FORMAT, version=FORMAT_VERSION, save_id=save_id, groups=tuple(groups))
    storage.put_if_absent(f"{directory}/{_record_name(save_id)}", encode_record(record))


def read_record(storage: Storage, directory: str, index: Index) -> ParityRecord | None:
    """The parity of a checkpoint; None if it has none. Raises CorruptionError or OSError."""
    name = f"{directory}/{_record_name(index.save_id)}"
    try:
        data = read_file(storage, name, _MAX_RECORD_BYTES)
    except FileNotFoundError:
        return None
    record = decode_body(checked_body(data, name=name), ParityRecord, name=name)
    if record.format == FORMAT and record.version != FORMAT_VERSION:
        raise CheckpointError(f"{name}: format version {record.version}; this package reads version {FORMAT_VERSION}")
    members = [member for group in record.groups for member in group.members]
    names = [f"parity-{number:05d}-{index.save_id}.bin" for number in range(len(record.groups))]
    if (
        (record.format, record.save_id) != (FORMAT, index.save_id)
        or sorted(members) != sorted(file.name for file in index.files)
        or [group.name for group in record.groups] != names
    ):
        raise CorruptionError(f"{name}: it is not the parity of the files of {index.save_id}")
    return record


def _record_name(save_id: str) -> str:
    return f"parity-{save_id}.json"


def find_rebuildable(record: ParityRecord | None, damaged: Collection[str]) -> dict[str, ParityGroup]:
    """Those of the damaged files, parity files among them, that are the only one of their group; with their groups."""
    rebuildable = {}
    for group in () if record is None else record.groups:
        lost = [name for name in (*group.members, group.name) if name in damaged]
        if len(lost) == 1 and lost[0] != group.name:
            rebuildable[lost[0]] = group
    return rebuildable


def rebuild_file(
    storage: Storage,
    directory: str,
    index: Index,
    name: str,
    group: ParityGroup,
    on_bytes: OnBytes = lambda _: None,
) -> None:
    """Make a shard file of the group again that is damaged or gone.

    What is made is read back and compared with the index before it takes the place of what lay under the name.
    on_bytes: told of what has been written, and then of what has been read back; it may raise, to give up. Raises
    CorruptionError if a file that is needed is damaged too; OSError.
    """
    lost = next(file for file in index.files if file.name == name)
    others = [file for file in index.files if file.name in group.members and file.name != name]
    temporary = msgspec.structs.replace(lost, name=f"{_TEMPORARY}{secrets.token_hex(16)}")
    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(open_parity(storage, directory, group))]
            opened += [stack.enter_context(CheckedFile(storage, directory, file)) for file in others]
            with new_file(storage, f"{directory}/{temporary.name}", lost.size_bytes) as out:
                position = 0
                for piece in _xor(opened, lost.size_bytes):
                    out.write(position, piece)
                    position += len(piece)
                    on_bytes(len(piece))
        with CheckedFile(storage, directory, temporary, past_cache=True) as made:
            for begin in range(0, lost.checksum_start, _PIECE_BYTES):
                storage.touch(f"{directory}/{temporary.name}")  # A sweep takes it for left behind if it is old.
                end = min(begin + _PIECE_BYTES, lost.checksum_start)
                for problem in made.faults([(begin, end)]):
                    raise CorruptionError(f"what parity makes of {lost.name} is not what the index names: {problem}")
                on_bytes(end - begin)
        storage.move(f"{directory}/{temporary.name}", f"{directory}/{lost.name}")
    except BaseException:
        with suppress(OSError):
            storage.remove(f"{directory}/{temporary.name}")
        raise
    storage.sync_directory(directory)


def _xor(files: Sequence[BlockFile], size_bytes: int) -> Iterator[memoryview]:
    """The XOR of files, up to size_bytes, a window at a time; each is gone with the next."""
    total, part = _window(), _window()
    sums, parts = np.frombuffer(total, np.uint8), np.frombuffer(part, np.uint8)
    for begin in range(0, size_bytes, _WINDOW_BYTES):
        size = min(_WINDOW_BYTES, size_bytes - begin)
        sums[:size] = 0
        for file in files:
            got = min(size, file.read_window(begin, part))
            np.bitwise_xor(sums[:got], parts[:got], out=sums[:got])
        yield total[:size]


def _window() -> memoryview:
    return memoryview(Memory(_WINDOW_BYTES))


def open_parity(storage: Storage, directory: str, group: ParityGroup) -> BlockFile:
    """A parity file, checked against its record. Raises as BlockFile does."""
    name = f"{directory}/{group.name}"
    size = group.size_bytes
    return BlockFile(storage, name, size, group.data_bytes, group.table_crc, "its record", past_cache=True)
