"""Permission bits and group of what is written are those that were asked for, whatever the umask says."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import distckpt
from distckpt import Checkpointer, Copy, label
from distckpt.commit import TRACKER
from distckpt.storage import PosixStorage
from distckpt.storage.access import Access, known_access
from distckpt.testing import MemoryStorage

GROUP = 54321
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to any group")


@pytest.fixture(params=[0o000, 0o022, 0o077, 0o027])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def access_of(root: Path) -> dict[str, tuple[int, int]]:
    """Permission bits and group of everything, the root included; symbolic links apart."""
    found = {}
    for path in (root, *root.rglob("*")):
        status = path.lstat()
        if not stat.S_ISLNK(status.st_mode):
            found[str(path.relative_to(root))] = (stat.S_IMODE(status.st_mode), status.st_gid)
    return found


def run_job(root: Path, **options: object) -> None:
    options = {"parity": 2, "verify_after_save": True, "keep_last": 2, "removal_grace_s": 0} | options
    with Checkpointer(root, io_backend="threads", **options) as checkpointer:  # type: ignore[arg-type]
        for iteration in (1, 2, 3):
            checkpointer.save({"w": torch.zeros(3000)}, iteration=iteration)


@as_root
@pytest.mark.usefixtures("umask")
def test_everything_has_the_mode_and_group_that_were_asked_for(tmp_path: Path) -> None:
    root, second = tmp_path / "above" / "root", tmp_path / "copies"
    run_job(root, file_mode=0o640, group=GROUP, copy_to=Copy(second))
    for found in (access_of(root), access_of(second)):
        iterations = {f"iter_{iteration:07d}" for iteration in (1, 2, 3)}
        directories = {name: bits for name, bits in found.items() if name in iterations | {"."}}
        assert set(directories.values()) == {(0o750, GROUP)}
        files = {name: bits for name, bits in found.items() if name not in directories}
        assert set(files.values()) == {(0o640, GROUP)}
        kinds = {name.rpartition("/")[2].partition("-")[0] for name in files}
        assert kinds >= {"shard", "chunks", "index", "parity", "writer", TRACKER}
    assert "history.jsonl" in access_of(root)
    assert distckpt.verify(root).is_sound


def test_mode_alone_leaves_the_group_and_the_reverse(tmp_path: Path) -> None:
    own = os.getegid()
    run_job(tmp_path / "a", file_mode=0o600)
    assert {bits for name, bits in access_of(tmp_path / "a").items() if "." in name[1:]} == {(0o600, own)}
    assert access_of(tmp_path / "a")["."] == (0o700, own)
    run_job(tmp_path / "b", group=own)
    run_job(tmp_path / "c")
    assert set(access_of(tmp_path / "b").values()) == set(access_of(tmp_path / "c").values())


def test_directory_that_was_there_keeps_its_access(tmp_path: Path) -> None:
    tmp_path.chmod(0o711)
    run_job(tmp_path, file_mode=0o664)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o711
    assert access_of(tmp_path)["iter_0000003"][0] == 0o775


@pytest.mark.parametrize(("mode", "directory"), [(0o640, 0o750), (0o600, 0o700), (0o664, 0o775), (0o666, 0o777)])
def test_who_may_read_may_enter(mode: int, directory: int) -> None:
    assert Access(mode).directory_mode == directory


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"group": "no-such-group"}, "group='no-such-group': this host knows no such group"),
        ({"group": -1}, "group=-1: expected a name"),
        ({"file_mode": 0o440}, "file_mode=0o440: expected permission bits with which the owner may read and write"),
        ({"file_mode": 0o1640}, "file_mode=0o1640"),
        ({"file_mode": -1}, "file_mode=-0o1"),
    ],
)
def test_what_cannot_be_given_is_an_error_at_once(tmp_path: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Checkpointer(tmp_path / "root", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=said):
        PosixStorage(tmp_path / "root", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "root").exists()


def test_group_that_this_process_is_not_in_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "getegid", lambda: 1000)
    monkeypatch.setattr(os, "getgroups", lambda: [1001])
    with pytest.raises(ValueError, match="group=54321: this process is not a member of it"):
        known_access(None, GROUP)
    assert known_access(None, 1001) == Access(None, 1001)


def test_storage_that_is_given_has_its_own_access() -> None:
    with pytest.raises(ValueError, match="a Storage is made with its own"):
        Checkpointer(MemoryStorage(), file_mode=0o640)


@pytest.mark.parametrize("mode", [0o664, 0o640, 0o600])
def test_labels_have_the_access_of_the_index_that_they_stand_beside(tmp_path: Path, mode: int) -> None:
    root = tmp_path / "run"
    group = max([os.getegid(), *os.getgroups()])
    with Checkpointer(root, file_mode=mode, group=group) as checkpointer:
        checkpointer.save({"w": torch.ones(2)}, iteration=1)
    before = os.umask(0o077)
    try:
        label(root, 1, add_tags=["good"])
    finally:
        os.umask(before)
    (labels,) = root.glob("iter_0000001/labels-*")
    assert (stat.S_IMODE(labels.stat().st_mode), labels.stat().st_gid) == (mode, group)
