"""The layout of one shard file: what is written is ordinary safetensors, and what is wrong is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt import Checkpointer, CheckpointError, CorruptionError, PerRank
from distckpt.shard_file import (
    ALIGNMENT,
    BLOCK_BYTES,
    CHECKSUM_ENTRY,
    DTYPES,
    MAX_HEADER_BYTES,
    PER_RANK_ENTRY,
    Chunk,
    FileLayout,
    decode_header,
    file_name,
    key_of_entry,
    nested_json,
    plan_file,
    split_into_files,
)

# Making the first tensor of complex32 in a process warns that torch cannot compute with it.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@st.composite
def chunk_lists(draw: st.DrawFn) -> list[Chunk]:
    """Chunks as one rank may have them: some are parts of a tensor, some whole ones."""
    chunks = []
    for key in draw(st.lists(KEYS, max_size=6, unique=True)):
        shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        offsets = [tuple(0 for _ in shape)]
        if shape:
            offsets = draw(st.lists(st.tuples(*(st.integers(0, 2**40) for _ in shape)), min_size=1, unique=True))
        whole = len(offsets) == 1 and draw(st.booleans())
        chunks += [Chunk(key, dtype, offset, shape, whole or not shape) for offset in offsets[:3]]
    return chunks


def lay_out_one(chunks: list[Chunk], per_rank: bytes = b"{}", metadata: dict[str, str] | None = None) -> FileLayout:
    (order,) = split_into_files(chunks)
    return plan_file(chunks, order).lay_out(per_rank, metadata or {})


def read_back(layout: FileLayout) -> Any:
    return decode_header(layout.header, file_name="the file", file_bytes=layout.size_bytes)


# What is written


@settings(deadline=None)
@given(chunk_lists(), st.integers(0, 9), st.dictionaries(KEYS, KEYS, max_size=2))
def test_layout_round_trips_aligned_and_without_holes(
    chunks: list[Chunk], per_rank_bytes: int, metadata: dict[str, str]
) -> None:
    layout = lay_out_one(chunks, b"x" * per_rank_bytes, metadata)
    assert len(layout.header) % ALIGNMENT == 0
    end = len(layout.header)
    for i, start in zip(layout.order, layout.starts, strict=True):
        assert start == end
        assert start % DTYPES[chunks[i].dtype].item_bytes == 0
        end = start + chunks[i].size_bytes
    assert sorted(layout.order) == list(range(len(chunks)))
    assert layout.per_rank_start == end
    assert per_rank_bytes <= layout.per_rank_bytes < per_rank_bytes + 4
    assert layout.checksum_start == end + layout.per_rank_bytes
    assert layout.checksum_start % 4 == 0
    assert layout.block_count == -(-layout.checksum_start // BLOCK_BYTES)

    header = read_back(layout)
    assert header.metadata == metadata
    assert header.data_start == len(layout.header)
    assert sorted(header.keys()) == sorted(c.key for c in chunks)
    for i, start in zip(layout.order, layout.starts, strict=True):
        entry = header.entries[chunks[i].entry]
        dtype = DTYPES[chunks[i].dtype]
        assert header.start_of(chunks[i].entry) == start
        assert (entry.dtype, entry.shape) == (dtype.stored, (*chunks[i].shape, *dtype.trailing))
    assert header.start_of(PER_RANK_ENTRY) == layout.per_rank_start
    assert list(header.entries)[-1] == CHECKSUM_ENTRY
    assert header.start_of(CHECKSUM_ENTRY) == layout.checksum_start
    text = layout.header[8:].rstrip(b" ")
    assert text == msgspec.json.encode(msgspec.json.decode(text))  # as an encoder writes it


@settings(deadline=None)
@given(chunk_lists(), st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 9000)), min_size=2, max_size=4))
def test_one_plan_lays_out_what_differs_from_save_to_save(chunks: list[Chunk], saves: list[tuple[int, int]]) -> None:
    (order,) = split_into_files(chunks)
    plan = plan_file(chunks, order)
    for per_rank_bytes, note_bytes in saves:
        per_rank, metadata = b"x" * per_rank_bytes, {"note": "n" * note_bytes}
        layout, fresh = plan.lay_out(per_rank, metadata), lay_out_one(chunks, per_rank, metadata)
        assert layout.header == fresh.header
        assert layout.starts.tolist() == fresh.starts.tolist() == (plan.starts + len(layout.header)).tolist()
        assert layout.per_rank_start == len(layout.header) + plan.data_bytes
        assert (layout.per_rank, layout.checksum_start) == (fresh.per_rank, fresh.checksum_start)
        read_back(layout)


@given(st.dictionaries(KEYS, st.lists(KEYS, max_size=2), max_size=2))
def test_metadata_that_is_json_already_is_taken_as_it_is(value: dict[str, list[str]]) -> None:
    plan = plan_file([], [])
    text = msgspec.json.encode(value).decode()
    assert plan.lay_out(b"", {"v": msgspec.Raw(nested_json(value))}).header == plan.lay_out(b"", {"v": text}).header


@pytest.mark.parametrize("past_the_edge", [-4, 0, 4])
def test_checksum_table_counts_the_blocks_of_a_file_that_ends_near_a_block(past_the_edge: int) -> None:
    size = BLOCK_BYTES - ALIGNMENT - 4 + past_the_edge  # the per-rank JSON takes four bytes
    layout = lay_out_one([Chunk("w", "uint8", (0,), (size,), True)])
    assert layout.checksum_start == BLOCK_BYTES + past_the_edge
    assert layout.block_count == (1 if past_the_edge <= 0 else 2)
    read_back(layout)


@settings(deadline=None)
@given(KEYS, st.booleans())
def test_entry_names_give_the_key_back(key: str, whole: bool) -> None:
    entry = Chunk(key, "int8", (3, 14), (1, 1), whole).entry
    assert key_of_entry(entry) == key
    assert entry.isascii()
    assert not entry.startswith("__")
    assert entry.count("@") == (0 if whole else 1)


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        ("decoder.layers.0.mlp.fc1.weight", "decoder.layers.0.mlp.fc1.weight@8,0"),
        ("model/w b", "model/w b@8,0"),
        ("a@0,0", "a%400,0@8,0"),
        ("50%", "50%25@8,0"),
        ("__metadata__", "%5F%5Fmetadata__@8,0"),
        ('"\\\n', "%22%5C%0A@8,0"),
        ("é", "%C3%A9@8,0"),
    ],
)
def test_entry_names(key: str, entry: str) -> None:
    assert Chunk(key, "int8", (8, 0), (1, 1), False).entry == entry


def test_file_name_tells_rank_part_world_and_save() -> None:
    save_id = "5f" * 16
    assert file_name(3, 0, 16, save_id) == f"shard-00003-of-00016-{save_id}.safetensors"
    assert file_name(123456, 2, 200000, save_id) == f"shard-123456.2-of-200000-{save_id}.safetensors"


# Several files


def test_headers_that_would_pass_the_limit_are_split_and_none_does() -> None:
    limit = 100_000
    chunks = [
        Chunk(f"model/decoder.layers.{i}.{kind}", dtype, (i * 10**6, 0), (1, 7), False)
        for i in range(700)
        for kind, dtype in (("weight", "bfloat16"), ("exp_avg", "float32"), ('"quoted"', "float8_e5m2"))
    ]
    specs = [{c.key: {"dtype": c.dtype, "global_shape": [10**9, 7], "container": "optimizer"}} for c in chunks]
    shared = {"values": json.dumps({"note": "x" * 20_000})}
    files = split_into_files(
        chunks,
        metadata_bytes=[len(nested_json(spec)) for spec in specs],
        first_metadata_bytes=len(nested_json(shared)),
        max_header_bytes=limit,
    )
    assert len(files) > 3
    assert sorted(i for order in files for i in order) == list(range(len(chunks)))
    for number, order in enumerate(files):
        metadata = {"tensors": json.dumps({k: v for i in order for k, v in specs[i].items()}, separators=(",", ":"))}
        layout = plan_file(chunks, order).lay_out(b"{}", metadata | (shared if number == 0 else {}))
        assert len(layout.header) <= limit
        read_back(layout)


def test_a_header_that_readers_would_refuse_is_not_written() -> None:
    with pytest.raises(CheckpointError, match="more than the 67108864 that readers take"):
        plan_file([], []).lay_out(b"{}", {"note": "x" * (MAX_HEADER_BYTES + 1)})


def test_a_rank_with_several_files_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = split_into_files
    monkeypatch.setattr("distckpt.share_files.split_into_files", lambda c, **k: split(c, **k, max_header_bytes=20_000))
    state = {f"layer {i}": torch.full((3,), float(i)) for i in range(300)}
    target = {key: torch.zeros(3) for key in state}
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save({**state, "rng": PerRank([1, 2])}, iteration=1)
        assert len(list(tmp_path.glob("*/shard-00000.[1-9]-of-00001-*.safetensors"))) > 1
        rng = PerRank(None)
        ckpt.load({**target, "rng": rng})
    assert rng.value == [1, 2]
    assert all(torch.equal(target[key], state[key]) for key in state)


def test_values_too_long_for_a_header_are_saved_in_the_index_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distckpt.share_files._SHARED_METADATA_BYTES", 100)
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save({"history": [0.5] * 100, "w": torch.ones(2)}, iteration=1)
        assert ckpt.read()["history"] == [0.5] * 100
    (path,) = tmp_path.glob("*/shard-*")
    with safetensors.safe_open(path, framework="np") as file:
        assert "values" not in file.metadata()
        assert json.loads(file.metadata()["tensors"]) == {"w": {"dtype": "float32", "global_shape": [2]}}


# Other readers

SAFETENSORS_NUMPY = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}


def sample(dtype: str) -> torch.Tensor:
    if dtype == "bool":
        return torch.tensor([[True, False], [False, True]])
    data = torch.arange(4 * DTYPES[dtype].item_bytes, dtype=torch.uint8)
    return data.view(getattr(torch, dtype)).reshape(2, 2)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_safetensors_opens_files_of_every_dtype(tmp_path: Path) -> None:
    state = {dtype: sample(dtype) for dtype in DTYPES}
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(dict(state), iteration=1)
    (path,) = tmp_path.glob("*/shard-*")
    with safetensors.safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {*DTYPES, PER_RANK_ENTRY, CHECKSUM_ENTRY}
        for dtype, tensor in state.items():
            found = file.get_tensor(dtype)
            assert as_bytes(found) == as_bytes(tensor)
            assert tuple(found.shape) == (2, 2, *DTYPES[dtype].trailing)
            if DTYPES[dtype].stored not in ("U8", "F16", "F64") or DTYPES[dtype].trailing == ():
                assert found.dtype == tensor.dtype or DTYPES[dtype].stored == "U8"
    with safetensors.safe_open(path, framework="np") as file:
        for dtype, tensor in state.items():
            if DTYPES[dtype].stored in SAFETENSORS_NUMPY:
                array = file.get_tensor(dtype)
                assert array.dtype == SAFETENSORS_NUMPY[DTYPES[dtype].stored]
                assert array.tobytes() == as_bytes(tensor)


def test_every_dtype_of_torch_is_in_the_table_or_has_no_plain_elements() -> None:
    names = {str(d).removeprefix("torch.") for d in vars(torch).values() if isinstance(d, torch.dtype)}
    rest = names - set(DTYPES)
    # Sub-byte integers of torch are placeholders without storage; the others are quantized or opaque bits.
    assert all(name.startswith(("bits", "qint", "quint")) or name[-2:] in _SUB_BYTE for name in rest), rest


_SUB_BYTE = {f"t{n}" for n in range(1, 8)}


# What is refused

Edit = Callable[[dict[str, Any]], None]
LAYOUT = lay_out_one(
    [
        Chunk("b", "float32", (0,), (4,), True),
        Chunk("a", "float64", (0, 2), (2, 2), False),
        Chunk("c", "uint8", (), (), True),
    ],
    per_rank=b'{"rng": 1}',
    metadata={"format": "distckpt"},
)


def header_of(edit: Edit) -> bytes:
    entries = json.loads(LAYOUT.header[8:])
    edit(entries)
    return sealed(json.dumps(entries, separators=(",", ":")).encode())


def sealed(text: bytes) -> bytes:
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def decode(header: bytes, *, grown_by: int = 0) -> None:
    decode_header(
        header, file_name="the file", file_bytes=LAYOUT.size_bytes - len(LAYOUT.header) + len(header) + grown_by
    )


def put(name: str, **changes: object) -> Edit:
    return lambda entries: entries[name].update(changes)


def rename(old: str, new: str) -> Edit:
    return lambda entries: entries.update({new: entries.pop(old)})


def shift(by: int, *names: str) -> Edit:
    """Move entries by some bytes."""

    def edit(entries: dict[str, Any]) -> None:
        for name in names:
            entries[name]["data_offsets"] = [n + by for n in entries[name]["data_offsets"]]

    return edit


def test_the_header_that_the_hostile_ones_are_made_of_is_good() -> None:
    decode(header_of(lambda entries: None))


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (shift(8, "b", "c", PER_RANK_ENTRY, CHECKSUM_ENTRY), "'b' is at 40-56, expected to start at 32"),
        (shift(8, "a@0,2"), "'a@0,2' is at 8-40, expected to start at 0"),
        (shift(-8, "b"), "'b' is at 24-40, expected to start at 32"),
        (put("b", data_offsets=[32, 31]), "'b' is at 32-31"),
        (put("b", data_offsets=[-4, 48]), "'b' is at -4-48"),
        (put("b", shape=[5]), "F32 [5] does not take 16 bytes"),
        (put("b", shape=[-4]), "F32 [-4] does not take 16 bytes"),
        (put("b", shape=[-2, -2]), "F32 [-2, -2] does not take 16 bytes"),
        (put("b", shape=[2**62, 2**62, 0]), "does not take 16 bytes"),
        (put("b", shape=[2**70]), "does not take 16 bytes"),
        (put("b", dtype="F16"), "F16 [4] does not take 16 bytes"),
        (put("b", dtype="F31"), "F31 [4] does not take 16 bytes"),
        (put("b", shape=[1] * 100_000), "has 100000 dimensions, at most 33"),
        (put("b", shape=[2**63 - 1] * 100_000), "has 100000 dimensions, at most 33"),
        (put("b", shape="4"), "Expected `array`, got `str`"),
        (put("b", shape=[4.5]), "Expected `int`, got `float`"),
        (put("b", dtype=7), "Expected `str`, got `int`"),
        (put("b", data_offsets=[32]), "Expected `array` of"),
        (put("b", data_offsets=None), "Expected `array`, got `null`"),
        (lambda entries: entries["b"].pop("dtype"), "missing required field `dtype`"),
        (lambda entries: entries.update(b=[]), "Expected `object`, got `array`"),
        (lambda entries: entries.update(__metadata__={"format": 1}), "Expected `str`, got `int`"),
        (lambda entries: entries.pop("c"), "'__per_rank__' is at 49-60, expected to start at 48"),
        (rename("b", "b@"), "'b@' is not the name of a chunk"),
        (rename("b", "b@x"), "'b@x' is not the name of a chunk"),
        (rename("b", "b@1@2"), "'b@1@2' is not the name of a chunk"),
        (rename("b", "b@1,"), "'b@1,' is not the name of a chunk"),
        (rename("b", "b%FF"), "'b%FF' is not the name of a chunk"),
        (rename("b", "__b"), "'__b' is not the name of a chunk"),
        (rename(PER_RANK_ENTRY, "__rng__"), "'__rng__' is not the name of a chunk"),
        (lambda entries: entries.pop(CHECKSUM_ENTRY), "entries end at byte 4156, the file has 4160"),
        (rename(CHECKSUM_ENTRY, "d"), "the last entry is not __crc32c__"),
        (put(CHECKSUM_ENTRY, dtype="I32"), "the last entry is not __crc32c__"),
        (put(CHECKSUM_ENTRY, shape=[1, 1]), "__crc32c__ has shape [1, 1], not one checksum per block"),
    ],
)
def test_hostile_header(edit: Edit, why: str) -> None:
    with pytest.raises(CorruptionError) as caught:
        decode(header_of(edit))
    assert str(caught.value).startswith("the file: header: ")
    assert why in str(caught.value)


def test_header_whose_checksum_table_is_not_last() -> None:
    def edit(entries: dict[str, Any]) -> None:
        entries["c"]["data_offsets"] = [63, 64]
        shift(-1, PER_RANK_ENTRY, CHECKSUM_ENTRY)(entries)

    with pytest.raises(CorruptionError, match="the last entry is not __crc32c__"):
        decode(header_of(edit))


def test_header_with_a_checksum_table_of_the_wrong_length() -> None:
    with pytest.raises(CorruptionError, match="has shape \\[2\\], not one checksum per block"):
        decode(header_of(put(CHECKSUM_ENTRY, shape=[2], data_offsets=[60, 68])), grown_by=4)


@pytest.mark.parametrize("by", [-1, 1, 1 << 40])
def test_header_of_a_file_of_another_length(by: int) -> None:
    with pytest.raises(CorruptionError, match="entries end at byte 4160, the file has"):
        decode(LAYOUT.header, grown_by=by)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        LAYOUT.header[:7],
        LAYOUT.header[:-1],
        (0).to_bytes(8, "little") + LAYOUT.header[8:],
        (2**64 - 1).to_bytes(8, "little") + LAYOUT.header[8:],
    ],
)
def test_header_with_the_wrong_length_prefix(header: bytes) -> None:
    with pytest.raises(CorruptionError, match="length prefix"):
        decode(header)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff\xfe",
        b'{"\xff": 1}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}} trailing',
    ],
)
def test_header_that_is_not_json_of_a_header(text: bytes) -> None:
    with pytest.raises(CorruptionError, match="header"):
        decode(sealed(text))


def test_entry_that_comes_twice_leaves_a_hole() -> None:
    text = LAYOUT.header[8:].rstrip()
    again = b',"b":{"dtype":"F32","shape":[0],"data_offsets":[48,48]}}'
    with pytest.raises(CorruptionError, match="expected to start at 32"):
        decode(sealed(text[:-1] + again))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_changes_of_a_header_are_refused_or_harmless(data: st.DataObject) -> None:
    header = bytearray(LAYOUT.header)
    end = len(LAYOUT.header.rstrip())
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(0, end))] = data.draw(st.sampled_from(b'0123456789-,:{}[]"@_%\\ abU\xff\x00'))
    try:
        found = decode_header(bytes(header), file_name="the file", file_bytes=LAYOUT.size_bytes)
    except CorruptionError:
        return
    covered = sum(e.data_offsets[1] - e.data_offsets[0] for e in found.entries.values())
    assert covered == LAYOUT.size_bytes - len(header)
    assert all(math.prod(e.shape) >= 0 for e in found.entries.values())
    list(found.keys())
