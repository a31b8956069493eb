"""Loads onto an accelerator: what goes through the ring, in how much memory, and what happens when it fails."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from distckpt import Checkpointer, CheckpointError, CorruptionError, LoadReport
from distckpt.commit import list_commits, read_index
from distckpt.geometry import Box
from distckpt.ring import Piece, fill_through_ring
from distckpt.shard_file import BLOCK_BYTES
from distckpt.storage.contract import read_all
from distckpt.testing import FakeAccelerator, MemoryStorage
from distckpt.transport import Transports
from distckpt.transport.contract import random_tensor


class Source:
    """Gives pieces of known tensors, and remembers what it was asked for."""

    def __init__(self, wholes: Sequence[Tensor]) -> None:
        self.wholes = wholes
        self.asked: list[list[Piece]] = []

    def read(self, pieces: Sequence[Piece]) -> None:
        self.asked.append(list(pieces))
        for piece in pieces:
            slices = tuple(slice(o, e) for o, e in zip(piece.box.offset, piece.box.end, strict=True))
            piece.data.copy_(self.wholes[piece.number][slices])

    @property
    def bytes_asked(self) -> list[int]:
        return [sum(piece.data.nbytes for piece in batch) for batch in self.asked]


def fill(
    accelerator: FakeAccelerator, source: Source, targets: Sequence[Tensor], ring_bytes: int = 64 << 20
) -> str | None:
    boxes = [Box.whole(target.shape) for target in targets]
    transports = accelerator.transports()
    return fill_through_ring(
        list(zip(boxes, targets, strict=True)), source.read, transports, timeout_s=1.0, ring_bytes=ring_bytes
    )


@pytest.mark.parametrize("ring_bytes", [128, 1000, 4096, 1 << 20])
def test_targets_of_all_sizes_are_filled_within_the_bound(ring_bytes: int) -> None:
    accelerator = FakeAccelerator()
    shapes = [(3,), (50, 7), (1, 1, 300), (), (2, 3, 4), (0, 5), (40, 40)]
    wholes = [random_tensor(shape, torch.int32, seed) for seed, shape in enumerate(shapes)]
    targets = [accelerator.put(torch.zeros_like(whole)) for whole in wholes]
    source = Source(wholes)
    fill(accelerator, source, targets, ring_bytes)
    for target, whole in zip(targets, wholes, strict=True):
        assert torch.equal(target, whole)
    assert max(source.bytes_asked) <= ring_bytes // 2
    assert accelerator.peak_in_flight_bytes <= ring_bytes
    assert accelerator.counts["bytes"] == sum(whole.nbytes for whole in wholes)


def test_reading_goes_on_while_a_slot_is_copied() -> None:
    accelerator = FakeAccelerator()
    wholes = [random_tensor((64,), torch.uint8, seed) for seed in range(6)]
    targets = [accelerator.put(torch.zeros_like(whole)) for whole in wholes]
    source, waits = Source(wholes), []

    def read(pieces: Sequence[Piece]) -> None:
        waits.append(accelerator.counts["wait"])
        source.read(pieces)

    boxes = [Box.whole(target.shape) for target in targets]
    copies = list(zip(boxes, targets, strict=True))
    fill_through_ring(copies, read, accelerator.transports(), timeout_s=1.0, ring_bytes=128)
    assert waits == [0, 0, 1, 2, 3, 4]
    assert accelerator.counts["wait"] == 6


def test_ring_is_page_locked_as_long_as_it_is_used() -> None:
    accelerator = FakeAccelerator()
    whole = random_tensor((1000,), torch.int64)
    fill(accelerator, Source([whole]), [accelerator.put(torch.zeros_like(whole))], 1024)
    assert accelerator.counts["register"] == accelerator.counts["release"] == 1
    assert accelerator.counts["pageable copies"] == 0


def test_ring_is_no_larger_than_what_goes_through_it() -> None:
    accelerator = FakeAccelerator()
    whole = random_tensor((16,), torch.int32)
    asked: list[int] = []

    class Measured(Transports):
        def register(self, memory, tensors):  # type: ignore[no-untyped-def]
            asked.append(len(memory))
            return super().register(memory, tensors)

    target = whole.clone().zero_()
    fill_through_ring([(Box.whole((16,)), target)], Source([whole]).read, Measured(), timeout_s=1.0)
    assert asked == [128]
    assert torch.equal(target, whole)
    assert accelerator.counts == {}


def test_nothing_to_fill_takes_no_memory_and_reads_nothing() -> None:
    accelerator, source = FakeAccelerator(), Source([])
    assert fill(accelerator, source, []) is None
    assert (source.asked, accelerator.counts) == ([], {})


def test_read_that_fails_leaves_nothing_under_way() -> None:
    accelerator = FakeAccelerator()
    whole = random_tensor((640,), torch.uint8)
    target = accelerator.put(torch.zeros_like(whole))
    source = Source([whole])

    def read(pieces: Sequence[Piece]) -> None:
        if len(source.asked) == 3:
            raise CorruptionError("block 3")
        source.read(pieces)

    with pytest.raises(CorruptionError, match="block 3"):
        fill_through_ring([(Box.whole((640,)), target)], read, accelerator.transports(), timeout_s=1.0, ring_bytes=128)
    assert accelerator.counts["copies"] == accelerator.counts["wait"] == 3
    assert accelerator.counts["release"] == 1


def test_device_that_does_not_answer_is_a_timeout() -> None:
    accelerator = FakeAccelerator()
    accelerator.wait_error = TimeoutError("copies are still under way")
    whole = random_tensor((10,), torch.uint8)
    with pytest.raises(TimeoutError, match="still under way"):
        fill(accelerator, Source([whole]), [accelerator.put(whole)])
    assert accelerator.counts["release"] == 0  # The device may still read the ring.


# Through a Checkpointer


def saved(*values: float) -> MemoryStorage:
    storage = MemoryStorage()
    with Checkpointer(storage) as checkpointer:
        for iteration, value in enumerate(values):
            checkpointer.save({"model": make_state(value)}, iteration=iteration)
    return storage


def make_state(value: float) -> dict[str, Tensor]:
    return {"w": torch.full((300, 2000), value), "b": torch.full((40,), value), "z": torch.full((9,), value + 1j)}


def load_onto(accelerator: FakeAccelerator, storage: MemoryStorage, state: dict[str, Tensor]) -> LoadReport:
    with Checkpointer(storage) as checkpointer:
        checkpointer._load_context.transports = accelerator.transports()
        return checkpointer.load({"model": state})


def test_state_that_is_partly_on_the_accelerator_is_loaded() -> None:
    accelerator, storage = FakeAccelerator(), saved(3.0)
    state = make_state(0.0)
    state["w"] = accelerator.put(state["w"])
    report = load_onto(accelerator, storage, state)
    assert all((tensor == value).all() for tensor, value in zip(state.values(), make_state(3.0).values(), strict=True))
    assert accelerator.counts["bytes"] == state["w"].nbytes < report.bytes
    assert report.warnings == ()


def test_module_on_the_accelerator_is_loaded() -> None:
    accelerator, storage = FakeAccelerator(), MemoryStorage()
    module = torch.nn.Linear(30, 20)
    with Checkpointer(storage) as checkpointer:
        checkpointer.save({"model": module}, iteration=1)
    other = torch.nn.Linear(30, 20)._apply(accelerator.put)
    with Checkpointer(storage) as checkpointer:
        checkpointer._load_context.transports = accelerator.transports()
        checkpointer.load({"model": other})
    assert accelerator.holds(other.weight)
    assert torch.equal(other.weight, module.weight)
    assert torch.equal(other.bias, module.bias)


def test_lazy_conjugate_on_the_host_is_loaded_through_the_ring() -> None:
    accelerator, storage = FakeAccelerator(), saved(3.0)
    state = make_state(0.0)
    memory = state["z"]
    state["z"] = memory.conj()
    load_onto(accelerator, storage, state)
    assert (state["z"] == 3 + 1j).all()
    assert (memory == 3 - 1j).all()


def test_load_onto_the_accelerator_changes_versions() -> None:
    """A backward through values from before the load must fail, wherever they lie."""
    accelerator, storage = FakeAccelerator(), saved(3.0)
    state = make_state(0.0)
    state["w"] = accelerator.put(state["w"])
    versions = {key: tensor._version for key, tensor in state.items()}
    load_onto(accelerator, storage, state)
    assert all(tensor._version > versions[key] for key, tensor in state.items())


def test_refused_page_locks_are_reported_and_the_load_goes_on() -> None:
    accelerator, storage = FakeAccelerator(refuses_registration=True), saved(3.0)
    state = {key: accelerator.put(tensor) for key, tensor in make_state(0.0).items()}
    report = load_onto(accelerator, storage, state)
    assert (state["w"] == 3.0).all()
    assert report.warnings == ("the accelerator was told to refuse page-locked memory",)


def test_damaged_checkpoint_is_passed_over_and_every_target_on_the_accelerator_filled_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distckpt.filling.fill_through_ring", partial(fill_through_ring, ring_bytes=256 << 10))
    accelerator, storage = FakeAccelerator(), saved(3.0, 4.0)
    commit = list_commits(storage)[0]
    name = f"{commit.directory}/{read_index(storage, commit)[0].files[0].name}"
    content = bytearray(read_all(storage, name))
    content[BLOCK_BYTES + 5] ^= 1
    storage.replace(name, bytes(content))
    state = {key: accelerator.put(tensor) for key, tensor in make_state(0.0).items()}
    report = load_onto(accelerator, storage, state)
    assert list(report.fell_back_from) == [1]
    assert accelerator.counts["bytes"] > report.bytes  # Some of the damaged one had been copied already.
    assert all((tensor == value).all() for tensor, value in zip(state.values(), make_state(3.0).values(), strict=True))


def test_device_that_fails_a_copy_fails_the_load() -> None:
    accelerator, storage = FakeAccelerator(), saved(3.0)
    state = {key: accelerator.put(tensor) for key, tensor in make_state(0.0).items()}
    accelerator.wait_error = RuntimeError("the device was lost")
    with pytest.raises((CheckpointError, RuntimeError), match="the device was lost"):
        load_onto(accelerator, storage, state)
