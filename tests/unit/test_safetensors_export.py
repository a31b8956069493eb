"""Export to safetensors and back: what Hugging Face's libraries write and read; hostile files are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distckpt import Checkpointer, export_safetensors, import_safetensors
from distckpt.commit import list_commits
from distckpt.errors import CheckpointError, CorruptionError
from distckpt.exchange.export_source import LEAST_MEMORY_BYTES, ExportSource
from distckpt.exchange.safetensors_files import rename_keys
from distckpt.geometry import Box
from distckpt.index import Spec
from distckpt.reader import Wanted
from distckpt.shard_file import BLOCK_BYTES, DTYPES
from distckpt.tensor_source import TensorSource
from distckpt.testing import MemoryStorage
from tests.unit.stored_tensors import Tensor, raw, read_all, stored, tensors

WITHOUT_A_WORD = {
    name for name, dtype in DTYPES.items() if dtype.trailing or (dtype.stored == "U8" and name != "uint8")
}


def check_comes_back(made: dict[str, Tensor], directory: Path, **options: int) -> None:
    back = MemoryStorage()
    export_safetensors(stored(made), directory, **options)
    import_safetensors(directory, back)
    index, data, _ = read_all(back)
    assert data == {key: tensor.data for key, tensor in made.items()}
    found = {key: (entry.dtype, entry.global_shape) for key, entry in index.tensors.items()}
    assert found == {key: (tensor.spec.dtype, tensor.spec.global_shape) for key, tensor in made.items()}


@settings(max_examples=40, deadline=None)
@given(made=tensors())
def test_any_tensors_under_any_keys_come_back(
    made: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_comes_back(made, tmp_path_factory.mktemp("any") / "x", max_file_bytes=200)


def test_the_library_reads_the_bits_of_every_dtype(tmp_path: Path) -> None:
    made = {dtype: Tensor.of(dtype, (2, 3), seed=i) for i, dtype in enumerate(DTYPES)}
    check_comes_back(made, tmp_path / "x")
    assert os.listdir(tmp_path / "x") == ["model.safetensors"]
    with safe_open(tmp_path / "x" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        for dtype in DTYPES:
            found = file.get_tensor(dtype)
            assert found.contiguous().view(torch.uint8).numpy().tobytes() == made[dtype].data
            if dtype not in WITHOUT_A_WORD:
                assert (found.dtype, tuple(found.shape)) == (getattr(torch, dtype), (2, 3))


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(30 + i, 31 + i) for i in range(6)))


def test_transformers_loads_what_is_split_as_it_would_split_it(tmp_path: Path) -> None:
    trainer_utils = pytest.importorskip("transformers.trainer_utils")
    hub = pytest.importorskip("huggingface_hub")
    model = make_model()
    with Checkpointer(tmp_path / "root") as checkpointer:
        checkpointer.save({"model": model.state_dict(), "step": 3}, iteration=1)
    limit = 4_000  # Two of them are larger.
    options = {"select": ["model/*"], "strip": "model/", "max_file_bytes": limit}
    report = export_safetensors(tmp_path / "root", tmp_path / "x", **options)
    assert report.left_out == 1
    empty = make_model()
    for parameter in empty.parameters():
        parameter.data.zero_()
    trainer_utils.load_sharded_checkpoint(empty, tmp_path / "x")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), empty.parameters(), strict=True))
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    source = ExportSource.open(tmp_path / "root", select=["model/*"])
    in_order = {key.removeprefix("model/"): model.state_dict()[key.removeprefix("model/")] for key in source.keys}
    split = hub.split_torch_state_dict_into_shards(in_order, max_shard_size=limit)
    assert index == {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    assert sorted(os.listdir(tmp_path / "x")) == sorted([*split.filename_to_tensors, "model.safetensors.index.json"])
    expected = json.dumps(index, indent=2, sort_keys=True) + "\n"
    assert (tmp_path / "x" / "model.safetensors.index.json").read_text() == expected


def test_files_of_the_library_become_a_checkpoint_that_loads(tmp_path: Path) -> None:
    model = make_model()
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    for source in (tmp_path, tmp_path / "model.safetensors"):
        root = MemoryStorage()
        report = import_safetensors(source, root, prefix="model/", iteration=3)
        empty = make_model()
        for parameter in empty.parameters():
            parameter.data.zero_()
        with Checkpointer(root) as checkpointer:
            assert checkpointer.load({"model": empty}).iteration == report.iteration == 3
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), empty.parameters(), strict=True))


def test_a_directory_is_the_files_of_its_index_or_all(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    for source, keys in ((tmp_path, ["one", "two"]), (tmp_path / "two.safetensors", ["two"])):
        root = MemoryStorage()
        import_safetensors(source, root)
        assert sorted(read_all(root)[0].tensors) == keys
    index = {"metadata": {}, "weight_map": {"one": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    root = MemoryStorage()
    import_safetensors(tmp_path, root)
    assert list(read_all(root)[0].tensors) == ["one"]


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ({"one": "two.safetensors"}, "'one' is said to be in two.safetensors, and is not"),
        ({"one": "../two.safetensors"}, "no safetensors file beside it"),
        ({"one": "/etc/passwd"}, "no safetensors file beside it"),
        ({"one": 3}, "weight_map"),
        ({}, "it names no tensors"),
        (["one"], "weight_map"),
    ],
)
def test_an_index_that_cannot_be_is_refused(tmp_path: Path, weight_map: object, match: str) -> None:
    save_file({"two": torch.ones(2)}, tmp_path / "two.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    refuse(path, match)
    refuse(tmp_path, match)


def test_an_index_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    refuse(tmp_path, "not a regular file", OSError)


def test_targets_that_cannot_be_leave_nothing(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "root") as checkpointer:
        checkpointer.save({"w": torch.ones(3)}, iteration=1)
    before = sorted(tmp_path.rglob("*"))
    for name in ("iter_0000001/x", "iter_0000002"):
        with pytest.raises(CheckpointError, match=r"lies in iteration . of .*Give another path"):
            export_safetensors(tmp_path / "root", tmp_path / "root" / name)

    def make_target(_: int) -> None:
        (tmp_path / "x" / "theirs").mkdir(parents=True)

    with pytest.raises(FileExistsError, match="made meanwhile"):
        export_safetensors(tmp_path / "root", tmp_path / "x", on_bytes=make_target)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "x", tmp_path / "x" / "theirs"])


def test_a_target_may_have_the_longest_name_that_there_is(tmp_path: Path) -> None:
    name = "\N{CJK UNIFIED IDEOGRAPH-8A9E}" * 85  # 255 bytes.
    export_safetensors(stored({"w": Tensor.of("int8", (3,))}), tmp_path / name)
    assert os.listdir(tmp_path) == [name]


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"w": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    refuse(tmp_path, "'w' is in two.safetensors, and in another file too")


def test_a_directory_without_files_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path, "holds no safetensors file", CheckpointError)


def refuse(path: Path, match: str, kind: type[Exception] = CorruptionError) -> None:
    root = MemoryStorage()
    with pytest.raises(kind, match=match):
        import_safetensors(path, root)
    assert root.list("") == []


def entry(dtype: str = "F32", shape: Sequence[int] = (2,), at: Sequence[int] = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": at}


@pytest.mark.parametrize(
    ("header", "data_bytes", "match"),
    [
        ({"w": entry()}, 7, "its tensors end at byte"),
        ({"w": entry()}, 9, "its tensors end at byte"),
        ({"w": entry(at=(4, 12))}, 12, "expected to start at 0"),
        ({"a": entry(), "b": entry(at=(4, 12))}, 12, "expected to start at 8"),
        ({"a": entry(), "b": entry(at=(12, 20))}, 20, "expected to start at 8"),
        ({"w": entry(at=(8, 0))}, 8, "expected to start at 0"),
        ({"w": entry(shape=(3,))}, 8, "does not take 8 bytes"),
        ({"w": entry(shape=(-1, -2))}, 8, "has the shape"),
        ({"w": entry(shape=[1] * 40 + [2])}, 8, "has the shape"),
        ({"w": entry(shape=(2**62, 4))}, 8, "does not take 8 bytes"),
        ({"w": {"dtype": "F32", "shape": [2]}}, 8, "data_offsets"),
        ({"w": entry(shape=("2",))}, 8, "header"),
        (["w"], 0, "header"),
        ({"__metadata__": {"a": 1}}, 0, "header"),
        ({"__metadata__": {"distckpt.dtypes": '{"w": "complex128"}'}, "w": entry()}, 8, "is said to be complex128"),
        ({"__metadata__": {"distckpt.dtypes": '{"w": "nonsense"}'}, "w": entry()}, 8, "is said to be nonsense"),
        ({"__metadata__": {"distckpt.dtypes": "{"}, "w": entry()}, 8, "header"),
    ],
)
def test_a_header_that_cannot_be_is_refused(tmp_path: Path, header: object, data_bytes: int, match: str) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data_bytes))
    refuse(path, match)


@pytest.mark.parametrize(
    "start", [b"", b"\x01" * 7, (1 << 40).to_bytes(8, "little"), (9).to_bytes(8, "little") + b"{}"]
)
def test_a_file_that_is_too_short_for_its_header_is_refused(tmp_path: Path, start: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(start)
    refuse(tmp_path / "x.safetensors", "too few|its header would have")


def test_what_no_checkpoint_can_hold_is_refused(tmp_path: Path) -> None:
    text = json.dumps({"w": entry("F4", (16,))}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    refuse(tmp_path, "'w' is F4; known are", CheckpointError)


def test_a_shard_file_is_no_whole_tensors(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save({"a": torch.ones(2)}, iteration=1)
    refuse(tmp_path / "iter_0000001", "is a shard file of a checkpoint", CheckpointError)


def test_floats_are_rounded_and_others_left(tmp_path: Path) -> None:
    numbers = torch.tensor([1.0, 1.00390625, -0.0, float("inf"), float("nan")])
    made = {
        "w": Tensor(
            Spec(dtype="float32", global_shape=(5,)), numbers.numpy().tobytes(), [Box((0,), (2,)), Box((2,), (3,))]
        ),
        "i": Tensor.of("int64", (3,)),
    }
    export_safetensors(stored(made), tmp_path / "x", dtype="bfloat16")
    found = load_file(tmp_path / "x" / "model.safetensors")
    assert torch.equal(found["w"].view(torch.int16)[:4], numbers.bfloat16().view(torch.int16)[:4])
    assert found["w"][4].isnan()
    assert found["i"].numpy().tobytes() == made["i"].data
    large = Tensor(Spec(dtype="float32", global_shape=(1,)), np.float32(1e6).tobytes(), [Box.whole((1,))])
    with pytest.raises(CheckpointError, match=r"'w', elements .*larger than a float16 can hold"):
        export_safetensors(stored({"w": large}), tmp_path / "y", dtype="float16")
    with pytest.raises(ValueError, match="expected a floating-point type"):
        export_safetensors(stored(made), tmp_path / "y", dtype="int8")
    assert os.listdir(tmp_path) == ["x"]


def test_names_are_keys_without_a_prefix_and_with_texts_replaced() -> None:
    keys = ["model/layers.0.w", "model/embed", "step"]
    assert rename_keys(keys, "model/", [("layers.", "h."), ("w", "weight")]) == {
        "model/layers.0.w": "h.0.weight",
        "model/embed": "embed",
        "step": "step",
    }
    with pytest.raises(ValueError, match="'a/w' and 'w' would both be named 'w'"):
        rename_keys(["a/w", "w"], "a/", [])
    with pytest.raises(ValueError, match="'a' would be named '__metadata__'"):
        rename_keys(["a"], "", [("a", "__metadata__")])
    for strip, rename in (("model.", []), ("", [("lyers", "h")])):
        with pytest.raises(ValueError, match="in no key; keys are such as 'model/a', 'b'"):
            rename_keys(["model/a", "b"], strip, rename)


def test_memory_does_not_grow_with_a_tensor_and_each_byte_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of one that is stored in columns, is larger than a file may be, and goes to two files at once."""
    rows = 16 << 10
    boxes = [Box((0, column), (rows, 128)) for column in (0, 128)]
    made = {"w": Tensor.of("float32", (rows, 256), boxes=boxes), "v": Tensor.of("float32", (1 << 20,))}
    largest, read = dict[int, int](), dict[int, int]()

    def watched(self: ExportSource, tensors: TensorSource, parts: list[tuple[str, Box]]) -> object:
        elements = reading(self, tensors, parts)
        largest[id(tensors)] = max(largest.get(id(tensors), 0), sum(part.nbytes for part in elements))
        read[id(tensors)] = tensors.bytes_read
        return elements

    reading = ExportSource.read
    monkeypatch.setattr(ExportSource, "read", watched)
    options = {"memory_bytes": LEAST_MEMORY_BYTES, "max_file_bytes": 8 << 20, "jobs": 1}
    check_comes_back(made, tmp_path / "x", **options)
    assert sorted(os.listdir(tmp_path / "x"))[0] == "model-00001-of-00002.safetensors"
    assert 0 < next(iter(largest.values())) <= LEAST_MEMORY_BYTES // 8  # The first to read is the export.
    assert 0 < next(iter(read.values())) < (20 << 20) + 2 * BLOCK_BYTES


def test_with_more_memory_more_blocks_are_kept_that_are_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """48 columns of a block and a half: all blocks are begun at once."""
    rows = 24 << 10
    boxes = [Box((0, column), (rows, 16)) for column in range(0, 48 * 16, 16)]
    saved = stored({"w": Tensor.of("float32", (rows, 48 * 16), boxes=boxes)})
    read = []

    def watched(self: TensorSource, wanted: Sequence[Wanted]) -> None:
        filling(self, wanted)
        read.append(self.bytes_read)

    filling = TensorSource.fill
    monkeypatch.setattr(TensorSource, "fill", watched)
    export_safetensors(saved, tmp_path / "x", memory_bytes=512 << 20, jobs=1)
    assert len(read) > 1
    assert read[-1] < (72 << 20) + 2 * BLOCK_BYTES


def test_small_tensors_are_planned_and_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    def fill(self: TensorSource, wanted: Sequence[Wanted]) -> None:
        counts.append(len(wanted))
        filling(self, wanted)

    filling = TensorSource.fill
    saved = stored({str(i): Tensor.of("int8", (3,)) for i in range(1000)})
    monkeypatch.setattr(TensorSource, "fill", fill)
    export_safetensors(saved, tmp_path / "x", jobs=1)
    assert counts == [1000]


class GivenUp(Exception):
    pass


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_is_given_up_leaves_nothing(tmp_path: Path, jobs: int) -> None:
    saved = stored({str(i): Tensor.of("int8", (100,)) for i in range(5)}, values={"step": raw(1)})
    told = []

    def give_up(size: int) -> None:
        told.append(size)
        if len(told) == 3:
            raise GivenUp

    with pytest.raises(GivenUp):
        export_safetensors(saved, tmp_path / "x", max_file_bytes=100, jobs=jobs, on_bytes=give_up)
    assert os.listdir(tmp_path) == []
    export_safetensors(saved, tmp_path / "x", max_file_bytes=100)
    told.clear()
    root = MemoryStorage()
    with pytest.raises(GivenUp):
        import_safetensors(tmp_path / "x", root, jobs=jobs, on_bytes=give_up)
    assert not list_commits(root)
    with pytest.raises(FileExistsError):
        export_safetensors(saved, tmp_path / "x")
