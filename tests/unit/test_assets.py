"""Files of a tokenizer come back byte for byte, every change is named, and no stored name leads elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distckpt import Checkpointer, CheckpointError, CorruptionError
from distckpt.coordinator import SingleProcess
from distckpt.storage.faults import Moment
from distckpt.testing import Crash, CrashingStorage, MemoryStorage
from distckpt.training.assets import digest_assets, read_assets, write_assets

FILES = {"vocab.json": b"{}", "deep/er/merges.txt": b"a b\r\n", "empty": b"", "all": bytes(range(256)), ".hidden": b"x"}


def tensor(data: bytes) -> torch.Tensor:
    return torch.tensor([*data], dtype=torch.uint8)


def make(directory: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def test_files_and_directories_come_back_byte_for_byte(tmp_path: Path) -> None:
    source = make(tmp_path / "tokenizer", FILES)
    stored = read_assets({"tokenizer": source, "config": source / "vocab.json"})
    assert {path: bytes(one.numpy()) for path, one in stored["tokenizer"].items()} == FILES
    names = write_assets(stored, tmp_path / "out")
    expected = {f"tokenizer/{path}": data for path, data in FILES.items()} | {"config/vocab.json": b"{}"}
    assert contents(tmp_path / "out") == expected
    assert {*names} == expected.keys()
    assert read_assets({"tokenizer": tmp_path / "out" / "tokenizer"})["tokenizer"].keys() == FILES.keys()


def test_assets_go_through_a_checkpoint(tmp_path: Path) -> None:
    stored = read_assets({"tokenizer": make(tmp_path / "tokenizer", FILES)})
    with Checkpointer(MemoryStorage(), coordinator=SingleProcess()) as checkpointer:
        checkpointer.save({"assets": stored}, iteration=1)
        again = checkpointer.read()["assets"]
    write_assets(again, tmp_path / "out")  # type: ignore[arg-type]
    assert contents(tmp_path / "out" / "tokenizer") == FILES


def test_existing_file_is_replaced_and_nothing_temporary_stays(tmp_path: Path) -> None:
    make(tmp_path, {"tokenizer/vocab.json": b"old", "tokenizer/other": b"kept"})
    write_assets({"tokenizer": {"vocab.json": tensor(b"new")}}, tmp_path)
    assert contents(tmp_path) == {"tokenizer/vocab.json": b"new", "tokenizer/other": b"kept"}


@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_crash_at_any_call_leaves_each_file_old_or_new_and_success_is_durable(moment: Moment) -> None:
    old = {"a": tensor(b"old a"), "b/c": tensor(b"old c")}
    new = {"a": tensor(b"new a"), "b/c": tensor(b"new c")}
    for call in range(1, 100):
        memory = MemoryStorage()
        write_assets({"t": old}, memory)
        crashing = CrashingStorage(memory, fail_at=call, error=Crash(), moment=moment)
        try:
            write_assets({"t": new}, crashing)
        except Crash:
            is_done = False
        else:
            is_done = True
        left = memory.power_cut(seed=call)
        for path in old:
            allowed = [new[path]] if is_done else [old[path], new[path]]
            assert read(left, f"t/{path}") in [bytes(one.numpy()) for one in allowed]
        if is_done:
            assert call == len(crashing.calls) + 1 > 3
            return
    raise AssertionError("never done")


def read(storage: MemoryStorage, name: str) -> bytes:
    file = storage.open(name)
    data = bytearray(file.size_bytes)
    file.read_into(0, data)
    return bytes(data)


HOSTILE = ["/etc/passwd", "../x", "a/../../x", "a//b", "", ".", "..", "a/.", "a\0b", "a/", "..\\x", "\\x"]


@pytest.mark.parametrize("path", HOSTILE)
def test_stored_path_that_leads_elsewhere_is_refused_before_anything_is_written(tmp_path: Path, path: str) -> None:
    with pytest.raises(CorruptionError):
        write_assets({"good": {"file": tensor(b"x")}, "t": {path: tensor(b"x")}}, tmp_path / "out")
    if "/" in path or path in ("", ".", "..") or "\\" in path or "\0" in path:
        with pytest.raises(CorruptionError):
            write_assets({"good": {"file": tensor(b"x")}, path: {"x": tensor(b"x")}}, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@given(
    st.dictionaries(
        st.text(max_size=6),
        st.dictionaries(st.text("ab./\\\0", max_size=6), st.binary(max_size=3), max_size=4),
        max_size=3,
    )
)
def test_whatever_names_are_stored_what_is_written_has_these_names_or_nothing_is(
    stored: dict[str, dict[str, bytes]],
) -> None:
    storage = MemoryStorage()
    try:
        names = write_assets(
            {name: {path: tensor(data) for path, data in files.items()} for name, files in stored.items()}, storage
        )
    except CorruptionError:
        assert storage.list("") == []
    else:
        expected = {f"{name}/{path}": data for name, files in stored.items() for path, data in files.items()}
        assert {name: read(storage, name) for name in names} == expected


@pytest.mark.parametrize(
    "content", [torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(3), torch.tensor(1, dtype=torch.uint8)]
)
def test_content_that_is_not_bytes_is_refused(tmp_path: Path, content: torch.Tensor) -> None:
    with pytest.raises(CorruptionError, match="dimensions"):
        write_assets({"t": {"x": content}}, tmp_path / "out")


def test_file_that_is_also_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptionError, match="and a directory of others"):
        write_assets({"t": {"a": tensor(b""), "a/b/c": tensor(b"")}}, tmp_path / "out")
    (tmp_path / "out" / "t" / "a").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="is a directory"):
        write_assets({"t": {"a": tensor(b"")}}, tmp_path / "out")


def test_link_in_the_target_directory_is_not_followed_out_of_it(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "t").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="leads out of"):
        write_assets({"t": {"a/b": tensor(b"x")}}, tmp_path / "out")
    assert not any((tmp_path / "elsewhere").iterdir())


def test_links_count_as_the_files_they_lead_to_but_not_outside(tmp_path: Path) -> None:
    source = make(tmp_path / "tokenizer", {"vocab.json": b"{}"})
    (source / "link").symlink_to("vocab.json")
    assert bytes(read_assets({"t": source})["t"]["link"].numpy()) == b"{}"
    (source / "out").symlink_to(make(tmp_path, {"secret": b"x"}) / "secret")
    with pytest.raises(CheckpointError, match="is a link to"):
        read_assets({"t": source})


@pytest.mark.parametrize("target", ["..", "deep"])
def test_links_to_directories_are_refused(tmp_path: Path, target: str) -> None:
    source = make(tmp_path / "tokenizer", {"deep/vocab.json": b"{}"})
    (source / "link").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"is a link to|neither a file"):
        read_assets({"t": source})


def test_snapshot_of_the_hugging_face_cache_is_read_through_its_links(tmp_path: Path) -> None:
    repository = make(tmp_path / "models--gpt2", {"blobs/5f3a": b"{}"})
    snapshot = repository / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "vocab.json").symlink_to("../../blobs/5f3a")
    assert bytes(read_assets({"t": snapshot})["t"]["vocab.json"].numpy()) == b"{}"


def test_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="neither a file"):
        read_assets({"t": tmp_path})
    with pytest.raises(CheckpointError, match="neither a file"):
        read_assets({"t": tmp_path / "pipe"})


def test_too_much_is_refused_before_it_is_read(tmp_path: Path) -> None:
    huge = tmp_path / "weights.bin"
    with open(huge, "wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(CheckpointError, match=r"2147483648 bytes in 1 files, and may be 1073741824"):
        read_assets({"t": tmp_path})
    with pytest.raises(CheckpointError, match="may be 5 bytes"):
        read_assets({"t": make(tmp_path / "t", FILES)}, max_bytes=5)
    with pytest.raises(CheckpointError, match="in 3 files"):
        read_assets({"t": tmp_path / "t"}, max_files=2)


def test_what_is_not_there_or_empty_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_assets({"t": tmp_path / "nothing"})
    with pytest.raises(CheckpointError, match="there is no file in"):
        read_assets({"t": tmp_path})
    for name in ("a/b", "..", ""):
        with pytest.raises(CheckpointError, match="expected a name"):
            read_assets({name: make(tmp_path / "t", FILES)})


def test_name_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9")).write_bytes(b"")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        read_assets({"t": tmp_path})


def test_digest_is_that_of_the_bytes() -> None:
    assert digest_assets({"t": {"empty": tensor(b"")}})["t"]["empty"] == {
        "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "size_bytes": 0,
    }
