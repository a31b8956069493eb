"""Zarr groups from elsewhere that cannot be: an error of ours says so, whatever zarr makes of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distckpt import import_zarr
from distckpt.commit import list_commits
from distckpt.errors import CheckpointError, CorruptionError
from distckpt.testing import MemoryStorage
from tests.unit.stored_tensors import read_all

zarr = pytest.importorskip("zarr")

Document = dict[str, Any]
DEEP = "[" * 100_000 + "]" * 100_000


def sharded(inner: list[int]) -> list[Document]:
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
    configuration = {"chunk_shape": inner, "codecs": codecs, "index_codecs": codecs, "index_location": "end"}
    return [{"name": "sharding_indexed", "configuration": configuration}]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    array = zarr.create_group(tmp_path / "x").create_array("a", shape=(10, 7), chunks=(4, 2), dtype="float64")
    array[...] = 1.0
    return tmp_path / "x"


def refuse(path: Path, match: str, kind: type[Exception] = CheckpointError) -> None:
    root = MemoryStorage()
    with pytest.raises(kind, match=match):
        import_zarr(path, root)
    assert not list_commits(root)


@pytest.mark.parametrize(
    "edit",
    [
        lambda array: array["chunk_grid"]["configuration"].update(chunk_shape=[0, 2]),
        lambda array: array["chunk_grid"]["configuration"].update(chunk_shape=[2**62, 2**62]),
        lambda array: array.update(codecs=sharded([0, 2])),
        lambda array: array.update(codecs=[{"name": "zzz"}]),
        lambda array: array.update(attributes=[1]),
        lambda array: array.update(attributes="x"),
        lambda array: array.update(shape=[2**64, 2**64]),
        lambda array: array.update(data_type=None),
        lambda array: array.update(chunk_key_encoding={"name": "default", "configuration": {"separator": "../"}}),
        lambda array: array["codecs"].__setitem__(1, {"name": "gzip", "configuration": {"level": 1}}),
    ],
)
def test_an_array_that_cannot_be_is_refused(path: Path, edit: Callable[[Document], None]) -> None:
    document = json.loads((path / "a" / "zarr.json").read_text())
    edit(document)
    (path / "a" / "zarr.json").write_text(json.dumps(document))
    refuse(path, "array|opened|attributes")


@pytest.mark.parametrize("name", ["zarr.json", "a/zarr.json"])
def test_metadata_that_is_nested_deep_is_refused(path: Path, name: str) -> None:
    (path / name).write_text('{"zarr_format": 3, "node_type": "group", "attributes": {"x": ' + DEEP + "}}")
    refuse(path, "recursion")


@pytest.mark.parametrize("name", ["zarr.json", "a/zarr.json", "a/c/0/0"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_regular_file_is_neither_zeros_nor_waited_for(
    path: Path, name: str, make: Callable[[Path], None]
) -> None:
    (path / name).unlink()
    make(path / name)
    refuse(path, "is no regular file", CorruptionError)


def test_numbers_that_json_has_not_are_values(path: Path) -> None:
    """zarr writes them, in the metadata that it gathers at the root too."""
    group = zarr.open_group(path)
    group.attrs["fill"] = float("nan")
    group["a"].attrs["range"] = [0.0, float("inf")]
    with pytest.warns(UserWarning, match="[Cc]onsolidated"):
        zarr.consolidate_metadata(path)
    back = MemoryStorage()
    import_zarr(path, back)
    index, _, _ = read_all(back)
    assert bytes(index.values["fill"]) == b'{"%float":"nan"}'
    assert b'{"%float":"inf"}' in bytes(index.metadata)
