"""Access: permission bits and group of what is written, whatever the umask says. Knows no storage."""

from __future__ import annotations

import grp
import operator
import os
from dataclasses import dataclass

_LEFT = -1  # as it is


@dataclass(frozen=True, slots=True)
class Access:
    """mode: permission bits of files. group_id: of files and directories. None leaves either to the system."""

    mode: int | None = None
    group_id: int | None = None

    @property
    def is_given(self) -> bool:
        return self.mode is not None or self.group_id is not None

    @property
    def file_mode(self) -> int:
        return _LEFT if self.mode is None else self.mode

    @property
    def directory_mode(self) -> int:
        """That of files, and who may read may enter."""
        return _LEFT if self.mode is None else self.mode | (self.mode & 0o444) >> 2

    @property
    def group(self) -> int:
        return _LEFT if self.group_id is None else self.group_id

    def apply(self, descriptor: int, *, is_directory: bool = False) -> None:
        """To an open file or directory that this process has just made. Raises OSError."""
        if self.group_id is not None:  # First: a change of it takes bits away.
            os.fchown(descriptor, _LEFT, self.group_id)
        if self.mode is not None:
            os.fchmod(descriptor, self.directory_mode if is_directory else self.file_mode)


def known_access(file_mode: int | None, group: str | int | None) -> Access:
    """file_mode: permission bits, of which the owner's must be read and write. group: name or number.

    Raises ValueError for a group that is not known here, or that this process may not give files to.
    """
    if file_mode is not None:
        mode = operator.index(file_mode)
        if not 0 <= mode <= 0o777 or mode & 0o600 != 0o600:
            raise ValueError(f"file_mode={mode:#o}: expected permission bits with which the owner may read and write")
    return Access(file_mode, None if group is None else _group_id(group))


def _group_id(group: str | int) -> int:
    try:
        found = grp.getgrnam(group).gr_gid if isinstance(group, str) else operator.index(group)
    except KeyError:
        raise ValueError(f"group={group!r}: this host knows no such group") from None
    if not 0 <= found < 2**32 - 1:
        raise ValueError(f"group={group!r}: expected a name, or a number from 0")
    if os.geteuid() != 0 and found not in (os.getegid(), *os.getgroups()):
        raise ValueError(f"group={group!r}: this process is not a member of it, and so may not give files to it")
    return found
