"""Export to zarr and back: bit by bit, whatever the tensors and their keys; read by zarr, xarray and tensorstore."""

from __future__ import annotations

import _thread
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distckpt import Checkpointer, export_zarr, import_zarr
from distckpt.commit import list_commits, newest_iteration
from distckpt.coordinator import Coordinator
from distckpt.errors import CheckpointError, CorruptionError
from distckpt.exchange import exporting, zarr_group
from distckpt.exchange.export_source import LEAST_MEMORY_BYTES, ExportSource
from distckpt.exchange.zarr_group import UninterruptedCalls
from distckpt.exchange.zarr_layout import PerRankFacts, RankValues, cut_array, dimension_names, node_paths, zarr_type
from distckpt.geometry import Box
from distckpt.index import Spec
from distckpt.shard_file import BLOCK_BYTES, DTYPES
from distckpt.storage import PosixStorage
from distckpt.tensor_source import TensorSource
from distckpt.testing import MemoryStorage, run_ranks
from tests.unit.damage import change, flip
from tests.unit.megatron_states import Layout, rank_state
from tests.unit.stored_tensors import HOSTILE_KEYS, Tensor, check_same, raw, read_all, stored, tensors

zarr = pytest.importorskip("zarr")


def saved_job(layout: Layout) -> MemoryStorage:
    storage = MemoryStorage()

    def save(coordinator: Coordinator) -> None:
        mesh = layout.place(coordinator.rank).mesh
        state = rank_state(layout, coordinator.rank).fill().state
        state["history"] = [1, (2, 3.5), {"%": float("nan")}, b"x", {}]
        state["tuple"] = (torch.ones(2), 1)
        state["array"] = np.arange(3)
        with Checkpointer(storage, mesh=mesh, coordinator=coordinator) as checkpointer:
            checkpointer.save(state, iteration=7, metrics={"loss": 2.5}, metadata={"run": ("a", 1)})

    run_ranks(layout.world_size, save)
    return storage


@pytest.mark.parametrize(
    ("layout", "compression"),
    [(Layout(), "none"), (Layout(tp=2, pp=2, dp=2), "zstd"), (Layout(tp=2, dp=2, ep=2), "none")],
)
def test_a_job_comes_back_bit_by_bit_and_loads_on_another_layout(
    layout: Layout, compression: str, tmp_path: Path
) -> None:
    saved = saved_job(layout)
    exported = export_zarr(saved, tmp_path / "x.zarr", compression=compression, jobs=2)
    back = MemoryStorage()
    imported = import_zarr(tmp_path / "x.zarr", back, jobs=2)
    check_same(saved, back)
    assert (exported.iteration, imported.iteration, exported.left_out) == (7, 7, 0)
    other = Layout(tp=1, pp=4, dp=1)
    shapes = {key: entry.global_shape for key, entry in read_all(back)[0].tensors.items()}

    def load(coordinator: Coordinator) -> None:
        loaded = rank_state(other, coordinator.rank)
        with Checkpointer(back, mesh=other.place(coordinator.rank).mesh, coordinator=coordinator) as checkpointer:
            checkpointer.load(loaded.state, allow=("history*", "tuple*", "array"))
        loaded.check(shapes)

    run_ranks(other.world_size, load)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    made=tensors(), memory=st.sampled_from([LEAST_MEMORY_BYTES, 1 << 28]), compression=st.sampled_from(["zstd", "none"])
)
def test_any_tensors_under_any_keys_come_back(
    made: dict[str, Tensor], memory: int, compression: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("any") / "x"
    saved, back = stored(made), MemoryStorage()
    export_zarr(saved, path, memory_bytes=memory, compression=compression, jobs=1)
    import_zarr(path, back, memory_bytes=memory, jobs=1)
    check_same(saved, back)


def test_values_that_differ_by_rank_come_back_with_their_policies() -> None:
    """Held by ranks of which one is not the first of its coordinates; and with nothing on rank 0."""
    per_rank = {"rng": PerRankFacts((("tp", 2),), "reseed"), "seen": PerRankFacts((), "skip")}
    ranks = [
        RankValues(1, {"dp": 1, "tp": 0}, {"rng": raw({"%tuple": [1]}), "seen": raw(9)}),
        RankValues(2, {"dp": 0, "tp": 1}, {"rng": raw({"a": {"%list": 0}})}),
    ]
    saved = stored(
        {"w": Tensor.of("float32", (4,))},
        values={"list": raw({"%list": 2}), "step": raw(1.0), "empty": raw({})},
        per_rank=per_rank,
        ranks=ranks,
        mesh={"dp": 2, "tp": 2},
        world_size=4,
    )
    index, _, found = read_all(saved)
    assert found == {"rng": {(0,): b'{"%tuple":[1]}', (1,): b'{"a":{"%list":0}}'}, "seen": {(): b"9"}}
    assert [file.rank for file in index.files] == [0, 1, 2]


def test_all_of_a_checkpoint_comes_back_but_a_selection_is_one(tmp_path: Path) -> None:
    facts = {"values": {"a/step": raw(3), "b/step": raw(4)}, "metadata": raw({"%bytes": "eA=="})}
    saved = stored(
        {"a/x": Tensor.of("int8", (3,)), "b/x": Tensor.of("int8", (3,)), "a": Tensor.of("int8", ())}, **facts
    )
    back = MemoryStorage()
    report = export_zarr(saved, tmp_path / "x", select=["a*"], drop=["a"])
    import_zarr(tmp_path / "x", back)
    index, _, _ = read_all(back)
    assert (list(index.tensors), list(index.values), report.left_out) == (["a/x"], ["a/step"], 1)
    with pytest.raises(ValueError, match="no tensor of iteration 5 matches 'z'"):
        export_zarr(saved, tmp_path / "y", select=["z"])


WHOLE = [Box.whole((2, 3))]
NUMBERS = [0.0, -0.0, 1.5, -2.0, 0.25, 4.0]


def of_dtype(dtype: str) -> torch.Tensor:
    if dtype == "complex32":  # torch warns of tensors of it.
        return torch.tensor([[number, 1.0] for number in NUMBERS], dtype=torch.float16)
    if dtype == "float4_e2m1fn_x2":
        return torch.arange(6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    kind = getattr(torch, dtype)
    if kind.is_floating_point or kind.is_complex:
        numbers = torch.tensor(NUMBERS)
        return (numbers.abs() + 0.5 if dtype == "float8_e8m0fnu" else numbers).to(kind)
    return torch.arange(6).to(kind)


@pytest.fixture(scope="module")
def every_dtype(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dtypes") / "x.zarr"
    made = {f"of/{dtype}": Tensor(Spec(dtype=dtype, global_shape=(2, 3)), bits_of(dtype), WHOLE) for dtype in DTYPES}
    export_zarr(stored(made, iteration=1), path)
    return path


def bits_of(dtype: str) -> bytes:
    return of_dtype(dtype).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_zarr_and_tensorstore_read_the_bits_of_every_dtype(every_dtype: Path, dtype: str) -> None:
    array = zarr.open_group(every_dtype, mode="r")[f"of/{dtype}"]
    assert array[...].tobytes() == bits_of(dtype)
    assert array.attrs["distckpt"] == {"key": f"of/{dtype}", "dtype": dtype}
    if zarr_type(dtype).data_type == dtype:
        assert np.array_equal(array[...], of_dtype(dtype).reshape(2, 3).numpy())
    tensorstore = pytest.importorskip("tensorstore")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(every_dtype / "of" / dtype)}}
    assert tensorstore.open(spec).result().read().result().tobytes() == bits_of(dtype)


def test_xarray_reads_it_as_datasets(every_dtype: Path) -> None:
    xarray = pytest.importorskip("xarray")
    with xarray.open_datatree(every_dtype, engine="zarr") as tree:
        found = tree["of/float32"]
        assert np.array_equal(found.values, of_dtype("float32").reshape(2, 3).numpy())
        assert found.dims == ("size_2", "size_3")
        assert tree.attrs["distckpt"]["iteration"] == 1
    with xarray.open_zarr(every_dtype, group="of") as dataset:
        assert len(dataset) == len(DTYPES)


def test_each_array_is_sharded_as_it_is_stored_and_nothing_is_left_to_be_zero(tmp_path: Path) -> None:
    """Zeros are written too: a file that is missing was lost."""
    shape = (2 * 1024, 1024)
    boxes = [Box((0, column), (2048, 512)) for column in (0, 512)]
    zeros = Tensor(Tensor.of("float32", shape).spec, bytes(4 * 2048 * 1024), boxes)
    export_zarr(stored({"w": zeros}), tmp_path / "x", compression="none", memory_bytes=1 << 28, jobs=1)
    array = zarr.open_group(tmp_path / "x", mode="r")["w"]
    assert (array.shards, array.chunks) == ((2048, 512), (512, 512))
    files = sorted(
        str(path.relative_to(tmp_path / "x" / "w")) for path in (tmp_path / "x" / "w").rglob("*") if path.is_file()
    )
    assert files == ["c/0/0", "c/0/1", "zarr.json"]
    assert (tmp_path / "x" / "w" / "c" / "0" / "1").stat().st_size > 4 << 20


@given(
    shape=st.lists(st.integers(0, 3000), max_size=4),
    item=st.sampled_from([1, 4, 16]),
    shard=st.sampled_from([1 << 20, 1 << 23]),
    data=st.data(),
)
def test_cuts_are_whole_chunks_of_bounded_size(
    shape: Sequence[int], item: int, shard: int, data: st.DataObject
) -> None:
    cell = None
    if 0 not in shape and data.draw(st.booleans()):
        cell = [data.draw(st.integers(1, extent)) for extent in shape]
    cut = cut_array(shape, item, cell, shard)
    assert all(s % c == 0 and c >= 1 for s, c in zip(cut.shard, cut.chunk, strict=True))
    assert int(np.prod(cut.chunk)) * item <= 1 << 20
    assert int(np.prod(cut.shard)) * item <= 2 * shard
    if cell is not None and int(np.prod(cell)) * item in range(1 << 20, shard):
        assert all(s in (n, -(-n // c) * c) for s, n, c in zip(cut.shard, cell, cut.chunk, strict=True))


@given(st.sets(st.one_of(st.sampled_from(HOSTILE_KEYS), st.text("a%/._c", max_size=6))))
def test_paths_are_safe_and_of_one_key_each(keys: set[str]) -> None:
    paths = node_paths(keys)
    names = {name for path in paths.values() for name in path.split("/")}
    assert all(name.isascii() and 0 < len(name) <= 210 and not name.startswith((".", "__")) for name in names)
    assert not names & {"zarr.json", "c"}
    assert len(set(paths.values())) == len(keys)
    assert not any(other.startswith(f"{path}/") for path in paths.values() for other in paths.values())


def test_dimensions_of_one_name_have_one_size() -> None:
    assert dimension_names((4, 4, 2)) == ["size_4", "size_4_2", "size_2"]
    assert dimension_names(()) == []


def test_memory_does_not_grow_with_a_tensor_and_each_byte_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 40 << 10
    boxes = [Box((0, column), (rows, 64)) for column in range(0, 256, 64)]
    saved = stored({"w": Tensor.of("float32", (rows, 256), boxes=boxes)})
    largest, read = [0], [0]

    def watched(self: ExportSource, tensors: TensorSource, parts: list[tuple[str, Box]]) -> object:
        elements = reading(self, tensors, parts)
        largest[0] = max(largest[0], sum(part.nbytes for part in elements))
        read[0] = tensors.bytes_read
        return elements

    reading = ExportSource.read
    monkeypatch.setattr(ExportSource, "read", watched)
    export_zarr(saved, tmp_path / "x", memory_bytes=LEAST_MEMORY_BYTES, compression="none", jobs=1)
    assert 0 < largest[0] <= LEAST_MEMORY_BYTES // 8
    assert read[0] < (41 << 20) + BLOCK_BYTES


def exported(tmp_path: Path) -> Path:
    made = {"w": Tensor.of("bfloat16", (1 << 10, 1 << 10)), "s": Tensor.of("float32", ())}
    export_zarr(stored(made, values={"step": raw(3)}), tmp_path / "x", compression="none")
    return tmp_path / "x"


def refuse(path: Path, match: str, kind: type[Exception] = CorruptionError) -> None:
    root = MemoryStorage()
    with pytest.raises(kind, match=match):
        import_zarr(path, root)
    assert not list_commits(root)
    assert not any("shard-" in name for name in root.list("iter_0000005"))


def test_a_shard_that_is_missing_is_no_zeros(tmp_path: Path) -> None:
    path = exported(tmp_path)
    (path / "w" / "c" / "0" / "0").unlink()
    refuse(path, "array 'w' of tensor 'w': .*c/0/0 is missing")


@pytest.mark.parametrize("at", [100, (1 << 20) + 100])
def test_a_flipped_bit_is_found(tmp_path: Path, at: int) -> None:
    change(PosixStorage(exported(tmp_path)), "w/c/0/0", flip(at))
    refuse(tmp_path / "x", "zarr array 'w', elements ")


def test_an_array_that_is_missing_or_another_is_refused(tmp_path: Path) -> None:
    path = exported(tmp_path)
    (path / "s" / "zarr.json").write_bytes((path / "w" / "zarr.json").read_bytes())
    refuse(path, r"array 's' of tensor 's' is uint16 \(1024, 1024\), expected float32 \(\)")
    (path / "s" / "zarr.json").unlink()
    refuse(path, "array 's' of tensor 's': it cannot be opened")


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('"version": 1', '"version": 2', "layout version 2"),
        ('"dtype": "bfloat16"', '"dtype": "float99"', "unknown dtype 'float99'"),
        ('"iteration": 5', '"iteration": -5', "iteration"),
        ('"iteration": 5', '"iteration": "5"', "iteration"),
        ('"save_id": "', '"save_id": "../', "save_id"),
        ('"ranks": []', '"ranks": [{"rank": 0, "mesh": {}, "values": {"rng": 1}}]', "by which mesh axes 'rng' differs"),
        ('"ranks": []', '"ranks": [{"rank": 0, "mesh": {"tp": 0}, "values": {}}]', "not inside"),
        ('"step": 3', '"w": 3', "'w' is a tensor and a value"),
        ('"global_shape": []', '"global_shape": [9223372036854775807]', "too large"),
    ],
)
def test_attributes_that_say_what_cannot_be_are_refused(tmp_path: Path, old: str, new: str, match: str) -> None:
    path = exported(tmp_path) / "zarr.json"
    text = path.read_text()
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new))
    refuse(tmp_path / "x", match, CheckpointError)


def test_what_is_no_group_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path / "nothing", "no zarr group can be opened there", CheckpointError)
    zarr.create_array(tmp_path / "array", shape=(2,), dtype="int8")
    refuse(tmp_path / "array", "no zarr group can be opened there", CheckpointError)


def test_a_group_from_elsewhere_becomes_tensors_and_values(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "x", attributes={"title": "a", "n%": [1, 2.5], "of/it": {"%x": None}})
    for path, shards in (("a", None), ("sub/b", (8, 4))):
        array = group.create_array(path, shape=(10, 7), chunks=(4, 2), shards=shards, dtype="float64")
        array[...] = np.arange(70.0).reshape(10, 7)
    group.create_array("sub/holes", shape=(4,), chunks=(2,), dtype="int32", fill_value=7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It is not specified yet.
        group.create_array("words", shape=(2,), dtype="<U4")
    group["a"].attrs["units"] = "m"
    group["sub"].attrs["level"] = 3
    refuse(tmp_path / "x", "array 'words' is .*leave it out with --drop 'words'", CheckpointError)
    back = MemoryStorage()
    import_zarr(tmp_path / "x", back, iteration=12, prefix="data/", drop=["words"])
    with Checkpointer(back) as checkpointer:
        state = checkpointer.read()
    data = state["data"]
    assert isinstance(data, dict)
    assert np.array_equal(data["a"].numpy(), np.arange(70.0).reshape(10, 7))
    assert np.array_equal(data["sub"]["b"].numpy(), np.arange(70.0).reshape(10, 7))
    assert data["sub"]["holes"].tolist() == [7] * 4
    assert (data["title"], data["n%"], data["of/it"], data["sub"]["level"]) == ("a", [1, 2.5], {"%x": None}, 3)
    index, _, _ = read_all(back)
    assert (index.iteration, bytes(index.metadata)) == (12, b'{"array_attributes":{"a":{"units":"m"}}}')


def test_a_chunk_larger_than_the_memory_is_refused(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "x")
    group.create_array("a", shape=(1 << 22,), chunks=(1 << 22,), dtype="float64")
    with pytest.raises(CheckpointError, match="array 'a': one chunk of it"):
        import_zarr(tmp_path / "x", MemoryStorage(), memory_bytes=LEAST_MEMORY_BYTES)


def test_an_array_of_more_chunks_than_can_be_is_refused(tmp_path: Path) -> None:
    """None of which is there."""
    zarr.create_group(tmp_path / "x").create_array("a", shape=(1 << 50,), chunks=(1,), dtype="int8")
    refuse(tmp_path / "x", "array 'a' .* parts, at most 4194304 are taken", CheckpointError)


def test_call_of_zarr_ends_before_who_is_interrupted_goes_on() -> None:
    done = []

    def work() -> None:
        _thread.interrupt_main()
        time.sleep(0.2)
        done.append(1)

    with UninterruptedCalls() as zarr_calls:
        with pytest.raises(KeyboardInterrupt):
            zarr_calls.call(work)
        assert done == [1]
        with pytest.raises(ZeroDivisionError):
            zarr_calls.call(lambda: 1 // 0)


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    saved = stored({"w": Tensor.of("int8", (3,))})
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()  # rename() would replace it.
    for name in ("file", "link", "empty", "."):
        with pytest.raises(FileExistsError, match="something is there already"):
            export_zarr(saved, tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    export_zarr(saved, tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"holds checkpoints already .* a root of its own"):
        import_zarr(tmp_path / "x", saved)
    assert len(list_commits(saved)) == 1


def test_all_is_durable_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and directory, then the name; and that at last."""
    done: list[str] = []

    def sync(path: str) -> None:
        done.append(os.path.relpath(path, tmp_path))
        syncing(path)

    def rename(old: str, new: str) -> None:
        done.append("renamed")
        renaming(old, new)

    syncing, renaming = zarr_group.sync_path, os.rename
    monkeypatch.setattr(zarr_group, "sync_path", sync)
    monkeypatch.setattr(exporting, "sync_path", sync)
    monkeypatch.setattr(exporting.os, "rename", rename)
    export_zarr(stored({"a/w": Tensor.of("int8", (3,)), "s": Tensor.of("int8", ())}), tmp_path / "x")
    last = len(done) - 1 - done[::-1].index("renamed")
    assert done[last:] == ["renamed", "."]
    synced = {path.partition("/")[2] for path in done[:last] if path.startswith(".x.tmp-")}
    assert synced == {""} | {str(path.relative_to(tmp_path / "x")) for path in (tmp_path / "x").rglob("*")}


class GivenUp(Exception):
    pass


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_is_given_up_leaves_nothing(tmp_path: Path, jobs: int) -> None:
    made = {str(i): Tensor.of("int8", (100,)) for i in range(5)}
    saved = stored(made)
    told = []

    def give_up(size: int) -> None:
        told.append(size)
        if len(told) == 3:
            raise GivenUp

    with pytest.raises(GivenUp):
        export_zarr(saved, tmp_path / "x", jobs=jobs, on_bytes=give_up)
    assert os.listdir(tmp_path) == []
    export_zarr(saved, tmp_path / "x")
    told.clear()
    root = MemoryStorage()
    with pytest.raises(GivenUp):
        import_zarr(tmp_path / "x", root, jobs=jobs, on_bytes=give_up)
    assert not list_commits(root)
    assert root.list("iter_0000005") == []
    import_zarr(tmp_path / "x", root)
    check_same(saved, root)


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distckpt.storage import FreeSpace

    saved = stored({"w": Tensor.of("int8", (1000,))})
    export_zarr(saved, tmp_path / "x")
    monkeypatch.setattr(PosixStorage, "free_space", lambda _: FreeSpace("here", 999))
    with pytest.raises(CheckpointError, match="not enough space: the tensors take 1000 bytes"):
        export_zarr(saved, tmp_path / "y")
    with pytest.raises(CheckpointError, match="not enough space: the checkpoint takes"):
        import_zarr(tmp_path / "x", tmp_path / "root")
    assert sorted(os.listdir(tmp_path)) == ["x"]


KILLED = """
import sys
from pathlib import Path
from distckpt import export_zarr, import_zarr
source, target, kind, jobs = sys.argv[1:]
def wait(size):
    print("moving", flush=True)
    sys.stdin.read()
(export_zarr if kind == "export" else import_zarr)(source, target, jobs=int(jobs), on_bytes=wait)
"""


@pytest.mark.parametrize("kind", ["export", "import"])
@pytest.mark.parametrize(("how", "jobs"), [(signal.SIGKILL, 1), (signal.SIGINT, 1), (signal.SIGINT, 2)])
def test_killed_in_the_middle_there_is_no_whole_one(tmp_path: Path, kind: str, how: signal.Signals, jobs: int) -> None:
    with Checkpointer(tmp_path / "root") as checkpointer:
        checkpointer.save({"a": torch.ones(100), "b": torch.ones(100)}, iteration=5)
    export_zarr(tmp_path / "root", tmp_path / "x")
    source, target = ("root", "y") if kind == "export" else ("x", "back")
    script = [sys.executable, "-c", KILLED, str(tmp_path / source), str(tmp_path / target), kind, str(jobs)]
    with subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"moving\n"
        process.send_signal(how)
        time.sleep(0.2)  # A thread is in the middle of its step when the other is told.
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == -how
    if kind == "export":
        assert not (tmp_path / "y").exists()
        export_zarr(tmp_path / "root", tmp_path / "y")
        assert how == signal.SIGKILL or not list(tmp_path.glob(".y.tmp-*"))
    else:
        back = PosixStorage(tmp_path / "back")
        assert newest_iteration(back) is None
        assert how == signal.SIGKILL or back.list("iter_0000005") == []
        import_zarr(tmp_path / "x", tmp_path / "back")
        check_same(PosixStorage(tmp_path / "root"), back)


def test_without_zarr_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(CheckpointError, match=r"pip install 'distckpt\[zarr\]'"):
        export_zarr(stored({"w": Tensor.of("int8", (3,))}), tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"pip install 'distckpt\[zarr\]'"):
        import_zarr(tmp_path / "x", MemoryStorage())
    assert os.listdir(tmp_path) == []
