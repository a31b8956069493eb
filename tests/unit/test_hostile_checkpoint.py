"""Whole checkpoints that were damaged or forged: all ranks refuse or fall back, and nothing wrong is returned as good.

Damage is any change under unchanged checksums. A forgery has checksums that fit it, so that the rules behind
them are what is tested.
"""

from __future__ import annotations

import contextlib
import json
import random
import tracemalloc
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from distckpt import (
    Checkpointer,
    CheckpointError,
    CheckpointNotFoundError,
    CorruptionError,
    LoadReport,
    PerRank,
    ShardedTensor,
    filling,
)
from distckpt._C import crc32c, crc32c_blocks
from distckpt.chunk_table import page_checksums
from distckpt.commit import TRACKER
from distckpt.shard_file import BLOCK_BYTES
from distckpt.testing import MemoryStorage, run_ranks

Files = dict[str, bytes]
State = dict[str, Any]


def rows(iteration: int) -> torch.Tensor:
    return torch.arange(48.0).reshape(8, 6) + 1000 * iteration


def make_state(rank: int, iteration: int) -> State:
    """Two ranks: a tensor cut by rows and columns, one of irregular boxes, shared and rank-wise values."""
    w = rows(iteration)
    at = 4 * rank
    uneven = torch.arange(9, dtype=torch.int64).reshape(3, 3) + iteration
    boxes = [((0, 0), (2, 2)), ((0, 2), (1, 1)), ((1, 2), (2, 1)), ((2, 0), (1, 2))]
    return {
        "model": {
            "w0": ShardedTensor("w", w[at : at + 4, :3].clone(), global_shape=(8, 6), global_offset=(at, 0)),
            "w1": ShardedTensor("w", w[at : at + 4, 3:].clone(), global_shape=(8, 6), global_offset=(at, 3)),
            "bias": torch.full((5,), iteration, dtype=torch.bfloat16),
            "uneven": [
                ShardedTensor(
                    "u",
                    uneven[o[0] : o[0] + s[0], o[1] : o[1] + s[1]].clone(),
                    global_shape=(3, 3),
                    global_offset=o,
                )
                for o, s in boxes[2 * rank : 2 * rank + 2]
            ],
        },
        "step": iteration,
        "history": [{"loss": 0.5}, (1, 2)],
        "rng": PerRank({"seed": 10 * iteration + rank}),
    }


def make_target(rank: int) -> State:
    state = make_state(rank, 0)
    for leaf in (state["model"]["w0"], state["model"]["w1"], *state["model"]["uneven"]):
        leaf.data.fill_(-1)
    state["model"]["bias"].fill_(-1)
    return state


@cache
def pristine() -> tuple[tuple[str, bytes], ...]:
    """All files of a root with the iterations 1 and 2, each saved by two ranks."""
    storage = MemoryStorage()

    def save(coordinator: Any) -> None:
        with Checkpointer(storage, coordinator=coordinator) as ckpt:
            for iteration in (1, 2):
                ckpt.save(make_state(coordinator.rank, iteration), iteration=iteration)

    run_ranks(2, save)
    names = [TRACKER, "writer-000001"]
    names += [f"{d}/{n}" for d in ("iter_0000001", "iter_0000002") for n in storage.list(d)]
    return tuple((name, content(storage, name)) for name in names)


def content(storage: MemoryStorage, name: str) -> bytes:
    file = storage.open(name)
    data = bytearray(file.size_bytes)
    file.read_into(0, data)
    return bytes(data)


@pytest.fixture
def files() -> Files:
    return dict(pristine())


def find(files: Files, part: str, iteration: int = 2) -> str:
    """The name of the one file of an iteration that has `part` in its name."""
    (name,) = [n for n in files if n.startswith(f"iter_{iteration:07d}/") and part in n]
    return name


def load(files: Files, iteration: int | None = None) -> list[tuple[State, LoadReport]]:
    """Load on two ranks; what they got."""
    storage = MemoryStorage()
    for name, data in files.items():
        storage.make_directory(name.rpartition("/")[0])
        storage.replace(name, data)

    def run(coordinator: Any) -> tuple[State, LoadReport]:
        state = make_target(coordinator.rank)
        with Checkpointer(storage, coordinator=coordinator) as ckpt:
            report = ckpt.load(state, iteration)
        return state, report

    return run_ranks(2, run)


def read(files: Files) -> State:
    storage = MemoryStorage()
    for name, data in files.items():
        storage.make_directory(name.rpartition("/")[0])
        storage.replace(name, data)
    with Checkpointer(storage) as ckpt:
        return ckpt.read(2)


def assert_tensors(state: State, expected: State) -> None:
    for name in ("w0", "w1"):
        assert torch.equal(state["model"][name].data, expected["model"][name].data)
    assert torch.equal(state["model"]["bias"], expected["model"]["bias"])
    for found, wanted in zip(state["model"]["uneven"], expected["model"]["uneven"], strict=True):
        assert torch.equal(found.data, wanted.data)


def assert_loads(files: Files, iteration: int, asked: int | None = None) -> LoadReport:
    for rank, (state, report) in enumerate(load(files, asked)):
        assert report.iteration == iteration
        expected = make_state(rank, iteration)
        assert_tensors(state, expected)
        assert (state["step"], state["history"]) == (iteration, expected["history"])
        assert state["rng"].value == expected["rng"].value
    return report


def assert_refused(files: Files, why: str = "", error: type[CheckpointError] = CorruptionError) -> None:
    """Iteration 2 is refused when asked for, and passed over when the newest is wanted."""
    with pytest.raises(error, match=why):
        load(files, 2)
    report = assert_loads(files, 1)
    if error is CorruptionError:
        assert list(report.fell_back_from) == [2]


def test_undamaged_checkpoints_load(files: Files) -> None:
    assert_loads(files, 1, asked=1)
    report = assert_loads(files, 2)
    assert not report.fell_back_from
    assert not report.warnings


# Damage


def regions_of_shard(data: bytes) -> Iterator[tuple[str, int]]:
    """A byte of everything in a shard file, by name."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    yield from (("length prefix", i) for i in range(8))
    text = len(data[: 8 + size].rstrip())
    yield from (("header", i) for i in range(8, text, 29))
    yield from (("padding of the header", i) for i in (text, 8 + size - 1))
    del header["__metadata__"]
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        yield from ((name, i) for i in sorted({8 + size + start, 8 + size + stop - 1}))


def flipped(data: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    return bytes(changed)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_flipped_bit_anywhere_in_a_shard_file(rank: int) -> None:
    files = dict(pristine())
    name = find(files, f"shard-0000{rank}")
    for region, position in regions_of_shard(files[name]):
        damaged = files | {name: flipped(files[name], position, position % 8)}
        with pytest.raises(CorruptionError, match=name.rpartition("/")[2]):
            load(damaged, 2)
        assert list(assert_loads(damaged, 1).fell_back_from) == [2], region


def test_a_flipped_bit_anywhere_in_the_chunk_table(files: Files) -> None:
    name = find(files, "chunks-")
    for position in range(0, len(files[name]), 7):
        assert_refused(files | {name: flipped(files[name], position, position % 8)}, "chunks-")


def test_a_flipped_bit_anywhere_in_the_index(files: Files) -> None:
    name = find(files, "index-")
    for position in [*range(0, len(files[name]) - 30, 97), *range(len(files[name]) - 24, len(files[name]))]:
        assert_refused(files | {name: flipped(files[name], position, position % 8)}, "index-")


def test_a_flipped_bit_in_any_block_of_a_large_file_names_the_block() -> None:
    storage = MemoryStorage()
    big = torch.arange(3 * BLOCK_BYTES // 4, dtype=torch.int32)
    with Checkpointer(storage) as ckpt:
        ckpt.save({"a": big}, iteration=1)
        ckpt.save({"a": big + 1}, iteration=2)
        (name,) = [f"iter_0000002/{n}" for n in storage.list("iter_0000002") if n.startswith("shard")]
        good = content(storage, name)
        for block in range(3):
            storage.replace(name, flipped(good, block * BLOCK_BYTES + 5000, 3))
            with pytest.raises(CorruptionError, match=rf"{name}, block {block} \(bytes {block * BLOCK_BYTES}-"):
                ckpt.load({"a": torch.zeros_like(big)}, 2)
            target = torch.zeros_like(big)
            assert list(ckpt.load({"a": target}).fell_back_from) == [2]
            assert torch.equal(target, big)


@pytest.mark.parametrize("part", ["shard-00000", "shard-00001", "chunks-", "index-"])
def test_truncated_and_extended_files(part: str) -> None:
    files = dict(pristine())
    name = find(files, part)
    good = files[name]
    for size in (0, 1, 7, 8, 9, len(good) // 2, len(good) - 4, len(good) - 1):
        assert_refused(files | {name: good[:size]}, part)
    for more in (b"\0", b"\n", bytes(4), bytes(4096)):
        assert_refused(files | {name: good + more}, part)


@pytest.mark.parametrize("part", ["shard-00000", "shard-00001", "chunks-"])
def test_a_deleted_file(part: str) -> None:
    files = dict(pristine())
    del files[find(files, part)]
    assert_refused(files, part)


def test_a_deleted_index_is_no_checkpoint(files: Files) -> None:
    del files[find(files, "index-")]
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint of iteration 2 .* it has iterations \[1\]"):
        load(files, 2)
    report = assert_loads(files, 1)
    assert report.warnings == (f"{TRACKER} says 2; the newest committed checkpoint is 1",)


def test_files_swapped_between_ranks(files: Files) -> None:
    a, b = find(files, "shard-00000"), find(files, "shard-00001")
    assert_refused(files | {a: files[b], b: files[a]}, "shard-0000[01]-of")


def test_a_file_in_the_place_of_another_rank(files: Files) -> None:
    assert_refused(files | {find(files, "shard-00001"): files[find(files, "shard-00000")]}, "shard-00001")


@pytest.mark.parametrize("part", ["shard-00000", "shard-00001", "index-"])
def test_a_file_of_another_iteration(part: str) -> None:
    files = dict(pristine())
    assert_refused(files | {find(files, part): files[find(files, part, 1)]}, part)


def test_chunk_table_of_another_iteration_is_refused_or_the_same(files: Files) -> None:
    files[find(files, "chunks-")] = files[find(files, "chunks-", 1)]
    assert_loads(files, 2)  # The layout is the same, and so are the bytes.


def test_swapped_iteration_directories(files: Files) -> None:
    swapped = {
        name.replace("iter_0000001", "#").replace("iter_0000002", "iter_0000001").replace("#", "iter_0000002"): data
        for name, data in files.items()
    }
    with pytest.raises(CorruptionError, match=r"no good checkpoint .*iter_0000002/.*it is the index of iter_0000001/"):
        load({n: d for n, d in swapped.items() if n.startswith("iter_0000002")}, 2)
    with pytest.raises(CorruptionError):
        load(swapped)


def test_damage_of_everything_says_so_for_each_checkpoint(files: Files) -> None:
    for iteration in (1, 2):
        name = find(files, "shard-00000", iteration)
        files[name] = flipped(files[name], 5000 % len(files[name]), 0)
    with pytest.raises(CorruptionError, match="values are now undefined") as caught:
        load(files)
    assert "iter_0000002/index-" in str(caught.value)
    assert "iter_0000001/index-" in str(caught.value)


# The tracker


@pytest.mark.parametrize(
    ("tracker", "says"),
    [
        (None, "is missing or damaged"),
        (b"", "is missing or damaged"),
        (b"\0\0\0\0", "is missing or damaged"),
        (b"two", "is missing or damaged"),
        (b"-2", "is missing or damaged"),
        (b"2.0", "is missing or damaged"),
        (b"2 1", "is missing or damaged"),
        ("\N{FULLWIDTH DIGIT TWO}".encode(), "is missing or damaged"),
        (b"2" * 60, "is missing or damaged"),
        (b"2" * 1_000_000, "is missing or damaged"),
        (b"1", "says 1"),
        (b"0000003\n", "says 3"),
    ],
)
def test_a_bad_tracker_is_said_and_the_newest_checkpoint_used(tracker: bytes | None, says: str) -> None:
    files = dict(pristine())
    if tracker is None:
        del files[TRACKER]
    else:
        files[TRACKER] = tracker
    assert assert_loads(files, 2).warnings == (f"{TRACKER} {says}; the newest committed checkpoint is 2",)


@pytest.mark.parametrize("name", ["iter_2/x", "iter_00000002/x", "iter_0000002x/y", "iter_-000002/x", "other/x"])
def test_strange_names_in_the_root_are_left_alone(name: str) -> None:
    files = dict(pristine())
    assert_loads(files | {name: b"x"}, 2)


@pytest.mark.parametrize(
    "name", ["index-1-1.json", "index-000001.json", "index-000009-000009.json~", ".tmp-abc", "core"]
)
def test_strange_names_in_an_iteration_are_left_alone(name: str) -> None:
    files = dict(pristine())
    assert_loads(files | {f"iter_0000002/{name}": b"x"}, 2)


def test_a_newer_index_that_is_damaged_is_passed_over(files: Files) -> None:
    files["iter_0000002/index-000009-000009.json"] = files[find(files, "index-")]
    report = assert_loads(files, 2)
    assert "it is the index of" in report.fell_back_from[2]


# Forgeries


def seal_index(fields: Any) -> bytes:
    body = json.dumps(fields, separators=(",", ":")).encode() + b"\n"
    return body + b'{"crc32c":"%08x"}\n' % crc32c(body)


def forge_index(files: Files, edit: Callable[[Any], object]) -> Files:
    name = find(files, "index-")
    fields = json.loads(files[name].splitlines()[0])
    edit(fields)
    return files | {name: seal_index(fields)}


def forge_table(files: Files, edit: Callable[[bytearray], object]) -> Files:
    """Change the records of the chunk table."""
    name = find(files, "chunks-")
    size = json.loads(files[find(files, "index-")].splitlines()[0])["chunk_table"]["records_bytes"]
    records = bytearray(files[name][:size])
    edit(records)
    trailer = page_checksums(bytes(records))

    def seal(fields: Any) -> None:
        fields["chunk_table"].update(
            size_bytes=len(records) + len(trailer), records_bytes=len(records), trailer_crc=crc32c(trailer)
        )

    return forge_index(files, seal) | {name: bytes(records) + trailer}


def forge_header(files: Files, edit: Callable[[Any], object], rank: int = 0) -> Files:
    """Change the header of a shard file, its length the same."""
    name = find(files, f"shard-0000{rank}")
    data = bytearray(files[name])
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    edit(header)
    data[8 : 8 + size] = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    return forge_shard(files, bytes(data), rank)


def forge_shard(files: Files, data: bytes, rank: int = 0, table: bytes | None = None) -> Files:
    """Any content of a shard file of the same length; its checksum table is made anew, or `table`."""
    name = find(files, f"shard-0000{rank}")

    def seal(fields: Any) -> None:
        file = fields["files"][rank]
        start = file["checksum_start"]
        nonlocal data
        if table is None:
            sums = np.empty(-(-start // BLOCK_BYTES), np.uint32)
            crc32c_blocks(data[:start], BLOCK_BYTES, sums)
            data = data[:start] + sums.tobytes()
        else:
            data = data[:start] + table
        file["header_crc"] = crc32c(data[: file["header_bytes"]])
        file["table_crc"] = crc32c(data[start:])

    forged = forge_index(files, seal)
    return forged | {name: data}


def swap_names(header: Any, a: str, b: str) -> None:
    header[a], header[b] = header[b], header[a]


def record_of(files: Files, key: str) -> int:
    return int(json.loads(files[find(files, "index-")].splitlines()[0])["tensors"][key]["record"][0])


def test_forgeries_that_change_nothing_load(files: Files) -> None:
    assert_loads(forge_index(files, lambda fields: None), 2)
    assert_loads(forge_table(files, lambda records: None), 2)
    assert_loads(forge_header(files, lambda header: None), 2)


def test_header_and_chunk_table_disagree_on_where_chunks_lie(files: Files) -> None:
    start = record_of(files, "w") + 8 + 16 + 4 + 4 * 4  # head, lengths, cuts, file numbers: four chunks

    def swap(records: bytearray) -> None:
        first, second = records[start : start + 8], records[start + 8 : start + 16]
        assert first != second
        records[start : start + 8], records[start + 8 : start + 16] = second, first

    assert_refused(forge_table(files, swap), r"the index and chunk table have F32 \[4, 3\] 'w@0,3' .* 'w@0,0'")


def test_header_and_chunk_table_disagree_on_the_file(files: Files) -> None:
    start = record_of(files, "w") + 8 + 16 + 4

    def swap(records: bytearray) -> None:
        numbers = np.frombuffer(records, "<u4", 4, start)
        assert numbers.tolist() == [0, 0, 1, 1]
        numbers[:] = [1, 1, 0, 0]

    assert_refused(forge_table(files, swap), "a chunk of 48 bytes at|'w@0,0' at byte|'w@4,0' at byte")


def test_header_and_chunk_table_disagree_on_names(files: Files) -> None:
    forged = forge_header(files, lambda header: swap_names(header, "w@0,0", "w@0,3"))
    assert_refused(forged, r"have F32 \[4, 3\] 'w@0,0' at byte \d+, the file's own header F32 \[4, 3\] 'w@0,3'")


def test_header_and_index_disagree_on_shapes(files: Files) -> None:
    forged = forge_header(files, lambda header: header["w@0,0"].update(shape=[3, 4]))
    assert_refused(forged, r"F32 \[4, 3\] 'w@0,0' at byte \d+, the file's own header F32 \[3, 4\]")


def test_header_and_index_disagree_on_the_dtype(files: Files) -> None:
    forged = forge_header(files, lambda header: header["w@0,0"].update(dtype="I32"))
    assert_refused(forged, r"F32 \[4, 3\] 'w@0,0' at byte \d+, the file's own header I32 \[4, 3\]")
    storage_dtype = forge_index(files, lambda fields: fields["tensors"]["w"].update(dtype="int32"))
    with pytest.raises(CorruptionError, match=r"have I32 \[4, 3\] 'w@0,0' at byte \d+, the file's own header F32"):
        read(storage_dtype)


def test_no_memory_is_taken_for_tensors_that_the_files_cannot_hold(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def enlarge(fields: Any) -> None:
        file = fields["files"][1]
        file["per_rank"] = [1 << 42, 0]
        file["checksum_start"] = 1 << 42
        file["size_bytes"] = (1 << 42) + 4 * ((1 << 42) // BLOCK_BYTES)
        fields["tensors"]["model/bias"]["global_shape"] = [1 << 40]

    def fail(*_: object) -> None:
        raise AssertionError("memory was taken")

    monkeypatch.setattr(filling, "empty_tensors", fail)
    with pytest.raises(CorruptionError, match=r"shard-00001.*: \d+ bytes, the index says 4398063288320"):
        read(forge_index(files, enlarge))


def test_header_and_index_disagree_on_the_key(files: Files) -> None:
    def rename(fields: Any) -> None:
        fields["tensors"]["v"] = fields["tensors"].pop("w")

    with pytest.raises(CorruptionError, match="'v@0,0' at byte"):
        read(forge_index(files, rename))


def test_header_and_index_disagree_on_the_per_rank_values(files: Files) -> None:
    def move(fields: Any) -> None:
        start, size = fields["files"][0]["per_rank"]
        fields["files"][0]["per_rank"] = [start + 4, size - 4]

    assert_refused(forge_index(files, move), "__per_rank__ is not where the index says")


def test_records_of_other_tensors(files: Files) -> None:
    def swap(fields: Any) -> None:
        a, b = fields["tensors"]["w"], fields["tensors"]["u"]
        a["record"], b["record"] = b["record"], a["record"]

    assert_refused(forge_index(files, swap), "chunk table record")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"not json", "per-rank values"),
        (b"[]", "per-rank values"),
        (b"{}", "per-rank value 'rng' is not in it"),
        (b'{"rng":{"%int":5}}', "rng"),
        (b'{"rng":' + b"[" * 5, "per-rank values"),
    ],
)
def test_per_rank_values_that_are_none(text: bytes, why: str) -> None:
    files = dict(pristine())
    data = bytearray(files[find(files, "shard-00000")])
    start, size = json.loads(files[find(files, "index-")].splitlines()[0])["files"][0]["per_rank"]
    data[start : start + size] = text.ljust(size)[:size]
    assert len(text) <= size
    with pytest.raises(CheckpointError, match=why):
        load(forge_shard(files, bytes(data)), 2)


def test_a_checksum_table_that_does_not_fit_its_file(files: Files) -> None:
    data = files[find(files, "shard-00000")]
    assert_refused(
        forge_shard(files, data, table=(1).to_bytes(4, "little")),
        r"shard-00000.*, block 0 \(bytes 0-\d+\): crc32c is [0-9a-f]{8}, checksum table says 00000001",
    )


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("size_bytes", 1 << 50, "the index gives it|bytes, the index says 1125899906842624"),
        ("header_crc", 1, "header: crc32c is .*, the index says 00000001"),
        ("table_crc", 1, "checksum table: crc32c is .*, the index says 00000001"),
        ("header_bytes", 8, "header"),
        ("header_bytes", 4000, "header"),
        ("checksum_start", None, "header or checksum table of impossible size|parts do not lie in order"),
    ],
)
def test_an_index_that_says_something_else_of_a_file(name: str, value: int | None, why: str) -> None:
    def edit(fields: Any) -> None:
        file = fields["files"][0]
        file[name] = file["checksum_start"] + 1 if value is None else value

    assert_refused(forge_index(dict(pristine()), edit), why)


def test_a_chunk_table_whose_trailer_has_another_length(files: Files) -> None:
    forged = forge_table(files, lambda records: None)
    name = find(forged, "chunks-")

    def seal(fields: Any) -> None:
        trailer = forged[name][fields["chunk_table"]["records_bytes"] :] + bytes(4)
        fields["chunk_table"].update(size_bytes=len(forged[name]) + 4, trailer_crc=crc32c(trailer))

    assert_refused(
        forge_index(forged, seal) | {name: forged[name] + bytes(4)}, "the index gives it a trailer of impossible size"
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"%int":5}', "%int of a int"),
        ('{"%unknown":[]}', "unknown tag"),
        ("[" * 300 + "]" * 300, "nested too deep"),
    ],
)
def test_values_that_are_none(text: str, why: str) -> None:
    files = dict(pristine())
    forged = forge_index(files, lambda fields: fields["values"].update(step=json.loads(text)))
    with pytest.raises(CheckpointError, match=why):
        load(forged, 2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step/below", 1),
        ("model/bias/x", 1),
        ("w", 1),
        ("model/w", 1),
        ("%k[1]/x", 1),
        ("%k%5B%5B1%5D%5D", 1),
        ("%knot json", 1),
        ("list/%lx", 1),
        ("list/%l", 1),
        ("list/%l" + "9" * 5000, 1),
        ("list/%l-1", 1),
        ("/".join("a" * 100_000), 1),
        ("/", 1),
        ("", 1),
        ("a//b", 1),
        ("%zz", 1),
        ("%", 1),
        ("list", {"%list": 3}),
        ("list", {"%list": "x"}),
        ("list", {"%list": 10**18}),
        ("history", {"%list": 10**18}),
    ],
)
def test_keys_that_make_no_state_are_refused_or_harmless(key: str, value: object) -> None:
    forged = forge_index(dict(pristine()), lambda fields: fields["values"].update({key: value}))
    try:
        state = read(forged)
    except CheckpointError:
        return
    model = state["model"]
    assert isinstance(model, dict)
    assert torch.equal(model["w"], rows(2))


def test_a_tensor_too_large_for_any_host_is_refused(files: Files) -> None:
    def edit(fields: Any) -> None:
        fields["tensors"]["w"]["global_shape"] = [2**44, 6]
        fields["files"][0].update(size_bytes=2**62 + 4, checksum_start=2**62, per_rank=[2**62 - 4, 4])

    with pytest.raises(CheckpointError, match=r"'w': .* bytes cannot be allocated|no good checkpoint"):
        read(forge_index(files, edit))


INTERESTING: list[Any] = [
    *(-1, 0, 1, 2, 3, 4, 7, 8, 4096, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, 10**40),
    *(0.5, 1e300, True, None, "", "a", "..", "../x", "w", "u", "%l0", "int8", "complex128", "bool", "\n"),
    *([], {}, [0], [0, 0], [8, 6], [6, 8], [[0], 0], {"a": 1}, {"%list": 2}),
]


def mutate(rng: random.Random, fields: Any) -> None:
    """Change one thing somewhere in a JSON value."""
    node, parent, at = fields, None, None
    while isinstance(node, (dict, list)) and node and (parent is None or rng.random() < 0.85):
        parent = node
        at = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        node = parent[at]
    assert parent is not None
    kind = rng.random()
    if kind < 0.6:
        parent[at] = rng.choice(INTERESTING)
    elif kind < 0.75 and isinstance(node, int):
        parent[at] = node + rng.choice([-4, -1, 1, 4, 8, 4096])
    elif kind < 0.85:
        del parent[at]
    elif isinstance(parent, list):
        parent.insert(at, rng.choice([node, *parent]))
    else:
        other = rng.choice(list(parent))
        parent[at], parent[other] = parent[other], parent[at]


def assert_refused_or_right(forged: Files) -> bool:
    """Load and read; True if the load went well."""
    tracemalloc.start()
    try:
        with contextlib.suppress(CheckpointError):
            read(forged)
        try:
            results = load(forged, 2)
        except CheckpointError:
            return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 64 << 20
    for rank, (state, _) in enumerate(results):
        assert_tensors(state, make_state(rank, 2))
    return True


@pytest.mark.parametrize("seed", range(5))
def test_forged_indexes_are_refused_or_right(seed: int) -> None:
    files, rng = dict(pristine()), random.Random(seed)
    for _ in range(100):
        forged = forge_index(files, lambda fields: [mutate(rng, fields) for _ in range(rng.choice([1, 1, 2, 3]))])
        assert_refused_or_right(forged)


@pytest.mark.parametrize("seed", range(5))
def test_forged_chunk_tables_are_refused_or_right(seed: int) -> None:
    files, rng = dict(pristine()), random.Random(seed)

    def edit(records: bytearray) -> None:
        for _ in range(rng.choice([1, 1, 2, 4])):
            at = rng.randrange(len(records))
            if rng.random() < 0.3:
                records[at] = rng.randrange(256)
            elif rng.random() < 0.5:
                records[at] = max(0, min(255, records[at] + rng.choice([-4, -1, 1, 4])))
            else:
                other = rng.randrange(len(records) - 8)
                records[at : at + 8] = records[other : other + min(8, len(records) - at)]

    for _ in range(100):
        assert_refused_or_right(forge_table(files, edit))


@pytest.mark.parametrize("seed", range(3))
def test_forged_headers_are_refused_or_right(seed: int) -> None:
    files, rng = dict(pristine()), random.Random(seed)
    for _ in range(40):
        try:
            forged = forge_header(files, lambda header: mutate(rng, header), rng.randrange(2))
        except (ValueError, TypeError, msgspec.DecodeError):
            continue
        assert_refused_or_right(forged)
