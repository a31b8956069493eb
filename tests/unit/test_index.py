"""The index: it round-trips, its bytes are pinned, and every way to be wrong is refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, SupportsIndex

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt import CheckpointError, CorruptionError
from distckpt._C import crc32c
from distckpt.chunk_table import Hits
from distckpt.index import (
    ChunkTable,
    Index,
    PerRankEntry,
    ShardFile,
    TensorEntry,
    check_locations,
    decode_index,
    encode_index,
)

SAVE_ID = "0123456789abcdef" * 2
OTHER_ID = "f" * 32


def shard_file(rank: int) -> ShardFile:
    return ShardFile(
        name=f"shard-{rank:05d}-of-00002-{SAVE_ID}.safetensors",
        size_bytes=4096 + 72 + 8 + 4,
        header_bytes=4096,
        header_crc=0xDEADBEEF,
        checksum_start=4096 + 72 + 8,
        table_crc=7,
        per_rank=(4096 + 72, 8),
        rank=rank,
        mesh={"tp": rank},
    )


INDEX = Index(
    format="distckpt",
    version=1,
    save_id=SAVE_ID,
    epoch=3,
    commit_seq=17,
    iteration=1000,
    parent=None,
    created_unix_s=1.5e9,
    world_size=2,
    mesh={"tp": 2},
    tensors={
        "w": TensorEntry(
            dtype="float32",
            global_shape=(4, 6),
            partition=("tp", None),
            owner="pp",
            blocks=(2, 1),
            container="model",
            record=(0, 40),
        ),
        "model/b": TensorEntry(dtype="int64", global_shape=(), record=(40, 20)),
    },
    values={"step": msgspec.Raw(b"1000")},
    metadata=msgspec.Raw(b'{"note":"x"}'),
    per_rank={"rng": PerRankEntry(axes=(("tp", 2),), on_change="exact", holders=(((0,), 0), ((1,), 1)))},
    files=(shard_file(0), shard_file(1)),
    chunk_table=ChunkTable(name=f"chunks-{SAVE_ID}.bin", size_bytes=64, records_bytes=60, trailer_crc=5),
)

GOLDEN = (
    b'{"format":"distckpt","version":1,"save_id":"0123456789abcdef0123456789abcdef","epoch":3,"commit_seq":17,'
    b'"iteration":1000,"parent":null,"created_unix_s":1500000000.0,"world_size":2,"mesh":{"tp":2},"tensors":{"w":{'
    b'"dtype":"float32","global_shape":[4,6],"partition":["tp",null],"owner":"pp","blocks":[2,1],'
    b'"container":"model","record":[0,40]},"model/b":{"dtype":"int64","global_shape":[],"record":[40,20]}},'
    b'"values":{"step":1000},"metadata":{"note":"x"},"per_rank":{"rng":{"axes":[["tp",2]],"on_change":"exact",'
    b'"holders":[[[0],0],[[1],1]]}},"files":[{"name":"shard-00000-of-00002-0123456789abcdef0123456789abcdef.'
    b'safetensors","size_bytes":4180,"header_bytes":4096,"header_crc":3735928559,"checksum_start":4176,'
    b'"table_crc":7,"per_rank":[4168,8],"rank":0,"mesh":{"tp":0}},{"name":"shard-00001-of-00002-'
    b'0123456789abcdef0123456789abcdef.safetensors","size_bytes":4180,"header_bytes":4096,"header_crc":3735928559,'
    b'"checksum_start":4176,"table_crc":7,"per_rank":[4168,8],"rank":1,"mesh":{"tp":1}}],"chunk_table":{"name":'
    b'"chunks-0123456789abcdef0123456789abcdef.bin","size_bytes":64,"records_bytes":60,"trailer_crc":5}}\n'
    b'{"crc32c":"6856411b"}\n'
)


def sealed(body: bytes) -> bytes:
    body += b"\n"
    return body + b'{"crc32c":"%08x"}\n' % crc32c(body)


def test_golden_bytes() -> None:
    assert encode_index(INDEX) == GOLDEN
    assert decode_index(GOLDEN, name="index") == INDEX


def test_second_line_is_the_checksum_of_the_first() -> None:
    body, trailer = encode_index(INDEX).splitlines(keepends=True)
    assert json.loads(trailer) == {"crc32c": f"{crc32c(body):08x}"}


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
VALUE_NAMES = NAMES.filter(lambda name: name not in INDEX.tensors)  # A key is a tensor or a value.
NATURALS = st.integers(0, 2**63 - 1)


@settings(deadline=None)
@given(
    st.dictionaries(VALUE_NAMES, st.sampled_from([b"1", b'{"%tuple":[]}', b'"a"']).map(msgspec.Raw), max_size=3),
    st.dictionaries(NAMES, st.integers(1, 2**40), max_size=3),
    NATURALS,
    st.none() | st.just(OTHER_ID),
)
def test_indexes_round_trip(
    values: dict[str, msgspec.Raw], mesh: dict[str, int], iteration: int, parent: str | None
) -> None:
    index = msgspec.structs.replace(
        INDEX, values=values, mesh=mesh, iteration=iteration, parent=parent, metadata=msgspec.Raw(b"null")
    )
    assert decode_index(encode_index(index), name="index") == index


# What is refused

Edit = Callable[[dict[str, Any]], object]


def edited(edit: Edit) -> bytes:
    """The index as JSON, changed, with a checksum that fits."""
    fields = json.loads(GOLDEN.splitlines()[0])
    edit(fields)
    return sealed(json.dumps(fields, separators=(",", ":")).encode())


def put(*path: object) -> Edit:
    """put("files", 0, "name", value) sets a field."""
    *parents, last, value = path

    def edit(fields: Any) -> None:
        for name in parents:
            fields = fields[name]
        fields[last] = value

    return edit


def drop(*path: object) -> Edit:
    *parents, last = path

    def edit(fields: Any) -> None:
        for name in parents:
            fields = fields[name]
        del fields[last]

    return edit


def test_the_index_that_the_hostile_ones_are_made_of_is_good() -> None:
    assert decode_index(edited(lambda fields: None), name="index") == INDEX


@pytest.mark.parametrize("path", [(), ("files", 0), ("tensors", "w"), ("chunk_table",), ("per_rank", "rng")])
def test_unknown_fields_are_ignored(path: tuple[object, ...]) -> None:
    assert decode_index(edited(put(*path, "added later", {"a": [1]})), name="index") == INDEX


@pytest.mark.parametrize("version", [0, 2, 999, 10**30])
def test_another_version_is_refused_as_such_whatever_else_it_says(version: int) -> None:
    data = sealed(json.dumps({"format": "distckpt", "version": version, "tensors": 5}).encode())
    with pytest.raises(CheckpointError, match=f"format version {version}; this package reads version 1") as caught:
        decode_index(data, name="index")
    assert not isinstance(caught.value, CorruptionError)


NATURAL_FIELDS = [
    ("epoch",),
    ("commit_seq",),
    ("iteration",),
    ("world_size",),
    ("tensors", "w", "global_shape", 0),
    ("tensors", "w", "record", 0),
    ("tensors", "w", "record", 1),
    ("files", 0, "size_bytes"),
    ("files", 0, "header_bytes"),
    ("files", 0, "header_crc"),
    ("files", 0, "checksum_start"),
    ("files", 0, "table_crc"),
    ("files", 0, "per_rank", 0),
    ("files", 0, "per_rank", 1),
    ("files", 0, "rank"),
    ("chunk_table", "size_bytes"),
    ("chunk_table", "records_bytes"),
    ("chunk_table", "trailer_crc"),
    ("per_rank", "rng", "axes", 0, 1),
    ("per_rank", "rng", "holders", 0, 0, 0),
    ("per_rank", "rng", "holders", 0, 1),
]


@pytest.mark.parametrize("path", NATURAL_FIELDS)
@pytest.mark.parametrize("value", [-1, 2**63, 10**100, 1.5, "1", None, True, []])
def test_numbers_that_are_no_natural_numbers_are_refused(path: tuple[object, ...], value: object) -> None:
    with pytest.raises(CorruptionError, match=r"^index: "):
        decode_index(edited(put(*path, value)), name="index")


@pytest.mark.parametrize(
    "path",
    [
        ("format",),
        ("version",),
        ("save_id",),
        ("epoch",),
        ("commit_seq",),
        ("iteration",),
        ("parent",),
        ("created_unix_s",),
        ("world_size",),
        ("mesh",),
        ("tensors",),
        ("values",),
        ("metadata",),
        ("per_rank",),
        ("files",),
        ("chunk_table",),
        ("tensors", "w", "dtype"),
        ("tensors", "w", "global_shape"),
        ("tensors", "w", "record"),
        *(("files", 0, name) for name in msgspec.structs.asdict(shard_file(0))),
        *(("chunk_table", name) for name in msgspec.structs.asdict(INDEX.chunk_table)),
        *(("per_rank", "rng", name) for name in msgspec.structs.asdict(INDEX.per_rank["rng"])),
    ],
)
def test_every_field_must_be_there_and_of_its_type(path: tuple[object, ...]) -> None:
    with pytest.raises(CorruptionError, match=r"^index: "):
        decode_index(edited(drop(*path)), name="index")
    if path not in {("metadata",)}:
        for value in ({"a": {}}, [[[]]], False):
            if path in {("mesh",), ("values",), ("files", 0, "mesh")} and isinstance(value, dict):
                continue
            with pytest.raises(CorruptionError, match=r"^index: "):
                decode_index(edited(put(*path, value)), name="index")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../shard-00000-of-00002-ID.safetensors",
        "/etc/passwd",
        "a/shard-00000-of-00002-ID.safetensors",
        "shard-00000-of-00002-ID.safetensors/..",
        "shard-00000-of-00002-ID.safetensors\n",
        "shard-00000-of-00002-ID.safetensors\x00",
        "shard-00000-of-00002-../ID.safetensors",
        "shard-0-of-2-ID.safetensors",
        "shard-00000-of-00002-" + OTHER_ID + ".safetensors",
        "index-000001-000001.json",
        "latest_checkpointed_iteration.txt",
        "chunks-ID.bin",
    ],
)
def test_file_names_that_a_save_does_not_write_are_refused(name: str) -> None:
    name = name.replace("ID", SAVE_ID)
    with pytest.raises(CorruptionError, match=r"file name|two files of one name"):
        decode_index(edited(put("files", 0, "name", name)), name="index")


@pytest.mark.parametrize(
    "name", ["../chunks-ID.bin", "chunks-" + OTHER_ID + ".bin", "shard-00001-of-00002-ID.safetensors"]
)
def test_chunk_table_names_that_a_save_does_not_write_are_refused(name: str) -> None:
    with pytest.raises(CorruptionError, match=r"file name|two files of one name"):
        decode_index(edited(put("chunk_table", "name", name.replace("ID", SAVE_ID))), name="index")


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (put("format", "other"), "format is 'other', expected 'distckpt'"),
        (put("save_id", "0" * 31), "save_id"),
        (put("save_id", SAVE_ID.upper()), "save_id"),
        (put("save_id", SAVE_ID + "\n"), "save_id"),
        (put("save_id", OTHER_ID), "is not one that save f+ writes"),
        (put("parent", "../.."), "parent"),
        (put("files", 1, "name", shard_file(0).name), "two files of one name"),
        (put("files", []), "per-rank value 'rng' is in file 0 of 0|more bytes"),
        (put("chunk_table", "records_bytes", 65), "chunk table: records of 65 bytes in a file of 64"),
        (put("files", 0, "header_bytes", 7), "its parts do not lie in order"),
        (put("files", 0, "header_bytes", 4169), "its parts do not lie in order"),
        (put("files", 0, "per_rank", [4168, 9]), "its parts do not lie in order"),
        (put("files", 0, "per_rank", [4168, 2**63 - 1]), "its parts do not lie in order"),
        (put("files", 0, "checksum_start", 4175), "its parts do not lie in order"),
        (put("files", 0, "checksum_start", 4181), "its parts do not lie in order"),
        (put("files", 0, "size_bytes", 4175), "its parts do not lie in order"),
        (put("tensors", "w", "dtype", "float31"), "tensor 'w': unknown dtype 'float31'"),
        (put("tensors", "w", "dtype", "F32"), "tensor 'w': unknown dtype 'F32'"),
        (put("tensors", "w", "global_shape", [2**40, 2**40]), "is too large"),
        (put("tensors", "w", "global_shape", [2**63 - 1, 1]), "is too large"),
        (put("tensors", "w", "global_shape", [0, 2**63 - 1]), "is too large"),
        (put("tensors", "w", "global_shape", [1] * 33), "33 dimensions, at most 32"),
        (put("tensors", "w", "global_shape", [2**63 - 1] * 200_000), "200000 dimensions, at most 32"),
        (put("tensors", "w", "global_shape", [4, 9]), "take more bytes than the 144 that the files hold"),
        (put("tensors", "w", "record", [21, 40]), "its record 21\\+40 is outside the chunk table's 60 bytes"),
        (put("tensors", "w", "record", [2**63 - 1, 2**63 - 1]), "is outside the chunk table"),
        (put("tensors", "w", "record", [1]), "record"),
        (put("tensors", "w", "partition", ["tp"]), "partition \\('tp',\\) for 2 dimensions"),
        (put("tensors", "w", "partition", [1, 2]), "partition"),
        (put("tensors", "w", "blocks", [2]), "blocks \\(2,\\) for 2 dimensions"),
        (put("tensors", "w", "blocks", [0, 1]), "blocks \\(0, 1\\) do not divide"),
        (put("tensors", "w", "blocks", [-2, 1]), "blocks \\(-2, 1\\) do not divide"),
        (put("tensors", "w", "blocks", [3, 1]), "blocks \\(3, 1\\) do not divide"),
        (put("values", "w", 1), "'w' is a tensor and a value"),
        (put("tensors", "w", "owner", 1), "owner"),
        (put("tensors", "w", "container", 1), "container"),
        (put("mesh", {"tp": "2"}), "mesh"),
        (put("files", 0, "header_crc", 2**32), "header_crc"),
        (put("chunk_table", "trailer_crc", 2**32), "trailer_crc"),
        (put("per_rank", "rng", "on_change", "pickle"), "on_change"),
        (put("per_rank", "rng", "holders", [[[2], 0]]), "coordinates \\(2,\\) are not inside \\[2\\]"),
        (put("per_rank", "rng", "holders", [[[0, 0], 0]]), "coordinates \\(0, 0\\) are not inside \\[2\\]"),
        (put("per_rank", "rng", "holders", [[[0], 2]]), "'rng' is in file 2 of 2"),
        (put("per_rank", "rng", "holders", [[[0], 0], [[0], 1]]), "coordinates come twice"),
        (put("per_rank", "rng", "axes", [["tp", 2], ["tp", 2]]), "axis comes twice"),
    ],
)
def test_hostile_index(edit: Edit, why: str) -> None:
    with pytest.raises(CorruptionError, match=why) as caught:
        decode_index(edited(edit), name="index")
    assert str(caught.value).startswith("index: ")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b'{"format":"distckpt"}',
        b"[" * 1_000_000,
        b'{"a":' * 100_000,
        b'{"format":"distckpt","version":1,"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"format":"\xff","version":1}',
        GOLDEN.splitlines()[0] + GOLDEN.splitlines()[0],
    ],
)
def test_bodies_that_are_no_index_are_refused(body: bytes) -> None:
    with pytest.raises(CorruptionError, match=r"^index: "):
        decode_index(sealed(body), name="index")


BODY = GOLDEN.splitlines(keepends=True)[0]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "checksum line is missing"),
        (b"\n", "checksum line is missing"),
        (BODY, "checksum line is missing"),
        (BODY[:-1], "checksum line is missing"),
        (GOLDEN[:-1], "checksum line is missing"),
        (GOLDEN[:-4], "checksum line is missing"),
        (GOLDEN[:-9] + b"\n", "checksum line is damaged"),
        (BODY + b"\n", "checksum line is damaged"),
        (BODY + b"{}\n", "checksum line is damaged"),
        (BODY + b'{"crc32c":1}\n', "checksum line is damaged"),
        (BODY + b'{"crc32c":"\xff"}\n', "checksum line is damaged"),
        (BODY + b'{"crc32c":"00000000"}\n', "crc32c is 6856411b, its last line says 00000000"),
        (GOLDEN + GOLDEN, "crc32c is"),
        (b"\n" + GOLDEN, "crc32c is"),
        (GOLDEN + b"\n", "checksum line is damaged"),
    ],
)
def test_index_whose_checksum_line_is_missing_torn_or_wrong(data: bytes, why: str) -> None:
    with pytest.raises(CorruptionError, match=why):
        decode_index(data, name="index")


def test_every_flipped_bit_is_found() -> None:
    for position in range(len(GOLDEN)):
        data = bytearray(GOLDEN)
        data[position] ^= 1 << position % 8
        with pytest.raises(CorruptionError):
            decode_index(bytes(data), name="index")


def test_every_truncation_is_found() -> None:
    for size in range(len(GOLDEN)):
        with pytest.raises(CorruptionError):
            decode_index(GOLDEN[:size], name="index")


def test_an_index_that_is_too_large_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distckpt.index.MAX_INDEX_BYTES", 1000)
    with pytest.raises(CorruptionError, match=r"more than an index may have"):
        decode_index(GOLDEN, name="index")


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_random_changes_of_the_text_are_refused_or_give_a_sound_index(data: st.DataObject) -> None:
    body = bytearray(BODY[:-1])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at : at + data.draw(st.integers(0, 2))] = data.draw(
            st.sampled_from([b"9", b"0", b"-", b'"', b"[", b"]", b"{}", b",", b"e9", b"..", b"/", b"null", b"\xff"])
        )
    try:
        decode_index(sealed(bytes(body)), name="index")
    except CheckpointError:
        return


# Where chunks lie


def check_places(files: list[int], starts: list[int]) -> None:
    """Check two chunks of w: rows 0-1 and rows 2-3, 48 bytes each."""
    both, shapes = np.arange(2), np.array([[2, 6], [2, 6]])
    chunks = Hits(both, both, np.array(files), np.array(starts), np.array([[0, 0], [2, 0]]), shapes)
    check_locations(INDEX, ["model/b", "w"], np.array([1, 1]), chunks)


def test_only_the_tensors_of_the_chunks_are_looked_at() -> None:
    """Whoever goes through a checkpoint asks once for each of a million tensors."""
    looked_at = []

    class Keys(list[str]):
        def __getitem__(self, at: SupportsIndex) -> str:  # type: ignore[override]
            looked_at.append(at)
            return "w"

        def __iter__(self) -> Iterator[str]:
            raise AssertionError

    one = np.zeros(1, np.int64)
    hits = Hits(one, one, one, one + 4096, np.array([[0, 0]]), np.array([[2, 6]]))
    check_locations(INDEX, Keys(["w"] * 1000), np.array([500]), hits)
    assert looked_at == [500]


def test_chunks_inside_the_data_of_their_files_are_good() -> None:
    check_places([0, 1], [4096, 4120])


@pytest.mark.parametrize(
    ("files", "starts", "why"),
    [
        ([0, 2], [4096, 4096], "a chunk is in file 2 of 2"),
        ([2**32 - 1, 0], [4096, 4096], "a chunk is in file 4294967295 of 2"),
        ([0, 1], [4092, 4096], "a chunk of 48 bytes at 4092 of shard-00000"),
        ([0, 1], [4096, 0], "at 0 of shard-00001.*, whose data lies at 4096-4168"),
        ([0, 1], [4096, 4124], "at 4124 of shard-00001"),
        ([0, 1], [4096, 4168], "at 4168 of shard-00001"),
        ([0, 1], [4096, 2**62], "at 4611686018427387904 of"),
        ([0, 1], [4096, -(2**63)], "at -9223372036854775808 of"),
        ([0, 1], [4098, 4096], "at 4098 of shard-00000"),
    ],
)
def test_hostile_locations(files: list[int], starts: list[int], why: str) -> None:
    with pytest.raises(CorruptionError, match=f"tensor 'w': .*{why}" if "chunk of" in why else why):
        check_places(files, starts)
