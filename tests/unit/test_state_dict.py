"""Leaves of a state: each kind is saved and comes back as it was, or is refused by key and type."""

from __future__ import annotations

import math
import shutil
from collections import Counter, OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch

from distckpt import (
    Checkpointer,
    CheckpointError,
    InvalidShardingError,
    LoadReport,
    MismatchError,
    PerRank,
    ShardedTensor,
    UnsupportedTypeError,
)
from distckpt.json_value import encode_value
from distckpt.per_rank import OnChange
from distckpt.shard_file import DTYPES
from distckpt.state_dict import flatten, segment
from distckpt.testing import MemoryStorage, run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

State = dict[str, Any]


def saved(state: State, **options: Any) -> Checkpointer:
    """A checkpointer whose iteration 1 is `state`."""
    checkpointer = Checkpointer(MemoryStorage(), **options)
    checkpointer.save(state, iteration=1)
    return checkpointer


def load(state: State, target: State, **options: Any) -> LoadReport:
    return saved(state).load(target, **options)


def as_bytes(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert as_bytes(found) == as_bytes(expected)


# Values

VALUES: State = {
    "none": None,
    "true": True,
    "one": 1,
    "float": 1.0,
    "minus zero": -0.0,
    "infinities": [math.inf, -math.inf],
    "128 bits": 2**127 + 1,
    "text": "é\0\n",
    "bytes": b"\0\xff",
    "bytearray": bytearray(b"ab"),
    "complex": complex(-0.0, math.inf),
    "tuple": (1, (2.0, "x"), []),
    "empty": {"list": [], "tuple": (), "text": "", "bytes": b""},
    "in a list": [Counter("aab"), {1: "x", None: 0, (1, 2): b"", 2.5: True}, OrderedDict(b=1, a=2)],
    "counter": Counter("ab"),
    "numpy": [np.float32(0.1), np.int64(-1), np.bool_(True), np.complex64(1j)],
}


def described(value: object) -> object:
    if isinstance(value, dict):
        kind = dict if type(value) is OrderedDict else type(value)
        return kind.__name__, [(described(k), described(v)) for k, v in value.items()]
    if type(value) in (list, tuple):
        return type(value).__name__, [described(v) for v in value]  # type: ignore[attr-defined]
    return type(value).__name__, repr(value)


def emptied(value: object) -> Any:
    """The same containers with nothing but 0 in them."""
    return {k: emptied(v) for k, v in value.items()} if type(value) is dict else 0


def test_values_come_back_type_for_type() -> None:
    target = emptied(VALUES)
    load(VALUES, target)
    assert described(target) == described(VALUES)
    found = saved(VALUES).read()
    assert {key: described(value) for key, value in found.items() if key != "empty"} == {
        key: described(value) for key, value in VALUES.items() if key != "empty"
    }
    assert found["empty"] == VALUES["empty"]  # Containers come back sorted by key.


def test_nan_comes_back_as_nan() -> None:
    target = {"a": 0.0}
    load({"a": math.nan}, target)
    assert math.isnan(target["a"])


KEYS: list[Any] = [
    *(
        "a.b",
        "a/b",
        "a",
        "%",
        "%25",
        "%l0",
        "%e",
        "%k1",
        "%tuple",
        "@",
        "a@0,0",
        "__metadata__",
        "",
        " ",
        "é",
        "\n",
        ".",
    ),
    *("..", "1", "1.0", "True", "None", 1, 1.5, None, (1, "a"), (), -1, b"a", False),
]


@pytest.mark.parametrize("make", [lambda i: i, lambda i: torch.tensor(i), lambda i: {"x": torch.tensor(i), "y": i}])
def test_no_two_keys_collide(make: Callable[[int], Any]) -> None:
    state = {key: make(i) for i, key in enumerate(KEYS)}
    state["a"] = {"b": make(100), "": make(101), "b/c": make(102)}
    target = {key: make(-1) for key in KEYS}
    target["a"] = {"b": make(-1), "": make(-1), "b/c": make(-1)}
    checkpointer = saved(state)
    checkpointer.load(target)
    assert repr(target) == repr(state)
    found = checkpointer.read()
    assert {repr(key): repr(value) for key, value in found.items() if key != "a"} == {
        repr(key): repr(value) for key, value in state.items() if key != "a"
    }
    assert found["a"] == state["a"] or repr(sorted(found["a"])) == repr(sorted(state["a"]))


def test_lists_and_tuples_with_tensors_are_filled_and_keep_their_type() -> None:
    def make(n: int) -> State:
        return {
            "list": [torch.full((2,), n), {"x": torch.tensor(n)}, n, (n, torch.tensor(n))],
            "t": (torch.tensor(n), n),
        }

    target = make(0)
    inner = target["list"][0]
    checkpointer = saved(make(5))
    checkpointer.load(target)
    assert repr(target) == repr(make(5))
    assert target["list"][0] is inner
    assert repr(checkpointer.read()) == repr(make(5))


@pytest.mark.parametrize("other", [[torch.zeros(1)], [torch.zeros(1)] * 3, (torch.zeros(1), torch.zeros(1))])
def test_lists_of_another_length_or_type_do_not_match(other: Any) -> None:
    with pytest.raises(MismatchError, match=r"a: the state has .*, stored is"):
        load({"a": [torch.zeros(1), torch.zeros(1)]}, {"a": other})


def test_empty_containers_do_not_match_stored_lists_of_tensors() -> None:
    for stored, empty, title in (
        ([torch.ones(2)], [], "the state has \\[\\], stored is a list of tensors"),
        ([torch.ones(2)], (), "stored is a list of tensors"),
        ((torch.ones(2), 1), [], "stored is a list of tensors"),
        ([torch.ones(2)], {}, "stored below a container of the state, but not in it"),
        ({"a": torch.ones(2)}, {}, "stored below a container of the state, but not in it"),
        ([own_keyed(torch.ones(2))], [], "stored below a container of the state, but not in it"),
        ([], [torch.zeros(2)], r"the state has {\"%list\":1}, stored is \[\]"),
        ({}, [torch.zeros(2)], r"the state has {\"%list\":1}, stored is {}"),
    ):
        target = {"x": torch.zeros(2), "ema": empty}
        with pytest.raises(MismatchError, match=title):
            load({"x": torch.ones(2), "ema": stored}, target)
        assert target["x"].tolist() == [0, 0]  # type: ignore[attr-defined]


def own_keyed(data: torch.Tensor) -> ShardedTensor:
    return ShardedTensor("w", data, global_shape=data.shape, global_offset=(0,) * data.dim())


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({1}, "set"),
        (object(), "object"),
        (lambda: 1, "function"),
        (torch.float32, "torch.dtype"),
        (torch.device("cpu"), "torch.device"),
        (Point(torch.zeros(1), 2), "Point"),
        (Path("x"), "PosixPath"),
        (np.array(["text"]), "<U4"),
        (np.array([object()]), "object"),
        (np.zeros(2, "datetime64[s]"), "datetime64"),
        (np.zeros(2, "i4,f4"), "f4"),
        (np.zeros(2, np.longdouble), "float128|longdouble"),
        (np.ma.zeros(2), "MaskedArray"),
        pytest.param(2**40_000, "integer of 10001 hexadecimal digits", id="integer"),
        ("\ud800", "lone surrogate"),
        (torch.zeros([1] * 33), "33 dimensions, at most 32"),
        (np.zeros([1] * 33), "33 dimensions, at most 32|33-d arrays"),
    ],
)
def test_types_that_cannot_be_stored_are_named_with_their_key(value: object, named: str) -> None:
    for state in ({"model": {"x": value}}, {"model": {"x": PerRank(value)}}):
        with pytest.raises(UnsupportedTypeError, match=rf"model/x.*({named})"):
            saved(state)
    with pytest.raises(UnsupportedTypeError, match=rf"model/x.*({named})"):
        saved({"model": {"x": [value, torch.zeros(1)]}})


def test_a_state_that_is_no_dict_is_refused() -> None:
    with pytest.raises(UnsupportedTypeError, match=r"the state is a list; expected a dict"):
        saved([torch.zeros(1)])  # type: ignore[arg-type]


def test_keys_that_are_no_text_are_refused() -> None:
    for state in ({"\ud800": 1}, {"a": {"\ud800": torch.zeros(1)}}, {("\ud800",): 1}):
        with pytest.raises(UnsupportedTypeError, match=r"surrogate"):
            saved(state)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedTypeError, match=r"surrogate"):
        saved({"a": ShardedTensor("\ud800", torch.zeros(1), global_shape=(1,), global_offset=(0,))})


def looped(kind: str) -> Any:
    plain: list[Any] = [1]
    plain.append(plain)
    mixed: list[Any] = [torch.zeros(1)]
    mixed.append((mixed,))
    mapping: State = {"a": 1}
    mapping["b"] = {"c": [mapping, torch.zeros(1)]}
    values: State = {}
    values["a"] = [values]

    class Module:
        def state_dict(self) -> State:
            return {"self": self}

        def load_state_dict(self, state: State) -> None: ...

    return {"list": plain, "mixed": mixed, "dict": mapping, "values": values, "object": Module()}[kind]


@pytest.mark.parametrize("kind", ["list", "mixed", "dict", "values", "object"])
@pytest.mark.parametrize("wrap", [lambda v: v, PerRank])
def test_containers_that_contain_themselves_are_refused(kind: str, wrap: Any) -> None:
    with pytest.raises(UnsupportedTypeError, match=r"'x.*(contains itself|containing itself)"):
        saved({"x": wrap(looped(kind))})


def test_states_nested_too_deep_are_refused() -> None:
    state: State = {}
    for _ in range(5000):
        state = {"a": state}
    with pytest.raises(UnsupportedTypeError, match=r"nested too deep"):
        saved(state)


# Tensors


def all_views(dtype: str) -> dict[str, torch.Tensor]:
    item = DTYPES[dtype].item_bytes
    raw = torch.arange(24 * item, dtype=torch.int32).mul(37).remainder(251).to(torch.uint8)
    if dtype == "bool":
        raw = raw % 2
    data = raw.view(getattr(torch, dtype)).reshape(4, 6)
    return {
        "plain": data,
        "transposed": data.t(),
        "every other": data[:, ::2],
        "column": data[:, 1],
        "scalar": data[2, 3],
        "empty": data[:0],
        "empty 3-d": data.reshape(4, 6, 1)[:, :0],
        "view": data[1:3],
        "expanded": data[:1].expand(3, 6),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_every_dtype_and_stride(dtype: str) -> None:
    state = all_views(dtype)
    torch_dtype = getattr(torch, dtype)
    item = DTYPES[dtype].item_bytes

    def zeros(*shape: int) -> torch.Tensor:  # Some element types know no arithmetic.
        return torch.zeros(math.prod(shape) * item, dtype=torch.uint8).view(torch_dtype).reshape(shape)

    target = {name: zeros(*t.shape) for name, t in state.items()}
    load(state, target)
    for name, tensor in state.items():
        assert_same(target[name], tensor)
    strided = {
        "plain": zeros(6, 4).t(),
        "every other": zeros(4, 12)[:, ::4],
        "transposed": zeros(4, 6).t(),
    }
    load({name: state[name] for name in strided}, strided)
    for name, tensor in strided.items():
        assert_same(tensor, state[name])
    per_rank = PerRank(None)
    load({"x": PerRank(dict(state))}, {"x": per_rank})
    for name, tensor in state.items():
        assert_same(per_rank.value[name], tensor)


def test_thirty_two_dimensions() -> None:
    shape = [1] * 30 + [2, 3]
    for dtype in (torch.float32, torch.complex128):
        target = {"a": torch.zeros(shape, dtype=dtype)}
        load({"a": torch.arange(6).reshape(shape).to(dtype)}, target)
        assert target["a"].flatten().tolist() == list(range(6))


@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128])
def test_conjugate_and_negative_views(dtype: torch.dtype) -> None:
    data = torch.tensor([1 + 2j, -3 - 4j, 0j]).to(dtype)
    state = {"conj": data.conj(), "neg": torch._neg_view(data)}
    target = {"conj": torch.zeros(3, dtype=dtype), "neg": torch.zeros(3, dtype=dtype)}
    load(state, target)
    for name, tensor in target.items():
        assert_same(tensor, state[name])
    target = {"conj": torch.zeros(3, dtype=dtype).conj(), "neg": torch._neg_view(torch.zeros(3, dtype=dtype))}
    load(state, target)
    for name, tensor in target.items():
        assert_same(tensor, state[name])


@pytest.mark.parametrize("offset", [1, 3, 4])
def test_misaligned_tensors(offset: int) -> None:
    source = torch.frombuffer(bytearray(range(100)), dtype=torch.float64, count=8, offset=offset)
    target = torch.frombuffer(bytearray(100), dtype=torch.float64, count=8, offset=offset)
    load({"a": source, "b": source[1::2]}, {"a": target, "b": torch.zeros(4, dtype=torch.float64)})
    assert_same(target, source)


def test_an_expanded_target_is_refused() -> None:
    with pytest.raises(MismatchError, match=r"a: .*expanded"):
        load({"a": torch.zeros(3, 4)}, {"a": torch.zeros(1, 4).expand(3, 4)})


@pytest.mark.parametrize(
    ("size", "stride"), [((3, 2), (1, 1)), ((2, 3, 2), (2, 1, 0)), ((4, 4), (3, 2)), ((2, 2), (0, 5))]
)
def test_a_target_whose_elements_share_memory_is_refused(size: tuple[int, ...], stride: tuple[int, ...]) -> None:
    memory = torch.zeros(64)
    with pytest.raises(MismatchError, match=r"a: elements of the target share memory"):
        load({"a": torch.ones(size)}, {"a": memory.as_strided(size, stride)})
    assert not memory.any()


@pytest.mark.parametrize(
    ("size", "stride"), [((2, 3), (3, 2)), ((3, 2, 2), (4, 6, 1)), ((4, 1), (1, 0)), ((0, 3), (0, 0)), ((2, 2), (1, 9))]
)
def test_a_target_of_interleaved_elements_is_filled(size: tuple[int, ...], stride: tuple[int, ...]) -> None:
    memory = torch.zeros(64)
    source = torch.arange(1.0, torch.Size(size).numel() + 1).reshape(size)
    target = memory.as_strided(size, stride)
    load({"a": source}, {"a": target})
    assert torch.equal(target, source)
    assert int(memory.count_nonzero()) == source.numel()


def test_autograd_finds_out_that_a_load_changed_what_it_saved() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    data = torch.zeros(3, requires_grad=True)
    losses = [(tensor * tensor).sum() for tensor in (weight, data)]
    versions = [weight._version, data._version]
    load({"w": torch.ones(3), "s": own_keyed(torch.ones(3))}, {"w": weight, "s": own_keyed(data)})
    assert [weight._version > versions[0], data._version > versions[1]] == [True, True]
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_only_the_view_of_a_large_storage_is_stored(tmp_path: Path) -> None:
    large = torch.zeros(16 << 20, dtype=torch.uint8)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save({"a": large[5:105], "b": large[:: 1 << 20]}, iteration=1)
    (file,) = tmp_path.glob("*/shard-*")
    assert file.stat().st_size < 10_000


def test_tied_tensors_are_filled_once_more_each() -> None:
    weight = torch.arange(6.0)
    target = torch.zeros(6)
    load({"in": weight, "out": weight}, {"in": target, "out": target})
    assert_same(target, weight)


def test_tensors_that_require_gradients_are_filled_in_place() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    load({"p": torch.nn.Parameter(torch.ones(3))}, {"p": parameter})
    assert parameter.tolist() == [1, 1, 1]
    assert parameter.requires_grad
    assert parameter.is_leaf


def test_loading_another_dtype_or_shape_is_refused_and_changes_nothing() -> None:
    target = {"a": torch.zeros(3), "b": torch.zeros(2), "c": torch.zeros(2)}
    with pytest.raises(MismatchError, match=r"Nothing was changed") as caught:
        load({"a": torch.ones(3, dtype=torch.int32), "b": torch.ones(3), "c": torch.ones(2)}, target)
    assert caught.value.mismatched == ("a", "b")
    assert target["c"].tolist() == [0, 0]


# Tensors that are none of ours


class Pair(torch.Tensor):
    """A wrapper around two tensors, as quantized weights are."""

    data_part: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, data_part: torch.Tensor, scale: torch.Tensor) -> Pair:
        return torch.Tensor._make_wrapper_subclass(cls, data_part.shape, dtype=torch.float32)

    def __init__(self, data_part: torch.Tensor, scale: torch.Tensor) -> None:
        self.data_part, self.scale = data_part, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data_part", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} is not needed to store it")


class Opaque(torch.Tensor):
    pass


def test_wrapper_subclasses_are_stored_as_the_tensors_in_them() -> None:
    target = Pair(torch.zeros(4, dtype=torch.int8), torch.zeros(1))
    checkpointer = saved({"w": Pair(torch.arange(4, dtype=torch.int8), torch.tensor([0.5]))})
    checkpointer.load({"w": target})
    assert target.data_part.tolist() == [0, 1, 2, 3]
    assert target.scale.tolist() == [0.5]
    assert {"data_part", "scale"} <= set(checkpointer.read()["w"])  # type: ignore[call-overload]


class Scaled(Pair):
    """One whose scale is no tensor."""

    context: object

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["data_part"], self.context


def scaled(value: int, context: object) -> Scaled:
    tensor = Scaled(torch.full((2,), value, dtype=torch.int8), torch.zeros(1))
    tensor.context = context
    return tensor


def test_context_of_a_wrapper_subclass_must_be_the_stored_one() -> None:
    context = {"scale": 0.5, "block": (1, 32)}
    checkpointer = saved({"w": scaled(7, context), "x": torch.ones(1)})
    same = scaled(0, dict(context))
    checkpointer.load({"w": same, "x": torch.zeros(1)})
    assert same.data_part.tolist() == [7, 7]
    for other in ({"scale": 9.0, "block": (1, 32)}, {"scale": 0.5, "block": [1, 32]}, None):
        target = {"w": scaled(0, other), "x": torch.zeros(1)}
        with pytest.raises(MismatchError, match=r"w/%c: the state has .*, stored is {\"scale\":0\.5") as caught:
            checkpointer.load(target, strict=False)
        assert caught.value.mismatched == ("w/%c",)
        assert not target["w"].data_part.any()  # type: ignore[attr-defined]
        assert not target["x"].any()


def test_wrapper_subclass_where_none_was_stored_is_a_mismatch() -> None:
    with pytest.raises(MismatchError) as caught:
        load({"w": {"data_part": torch.ones(2, dtype=torch.int8)}}, {"w": scaled(0, 0.5)})
    assert caught.value.missing == ("w/%c",)


@pytest.mark.parametrize("context", [object(), {"dtype": torch.float32}, [torch.Size([2])]])
def test_context_that_cannot_be_stored_is_refused(context: object) -> None:
    with pytest.raises(UnsupportedTypeError, match=r"'w \(the context of a Scaled\).*cannot be stored"):
        saved({"w": scaled(1, context)})


class Keeper:
    """An object around one tensor; without it, it is fresh."""

    def __init__(self, tensor: torch.Tensor | None) -> None:
        self.state: State = {} if tensor is None else {"t": tensor}

    def state_dict(self) -> State:
        return dict(self.state)

    def load_state_dict(self, state: State) -> None:
        self.state = state


def test_wrapper_subclass_in_the_state_of_an_object_is_filled_in_place() -> None:
    checkpointer = saved({"o": Keeper(scaled(7, 0.5))})
    tensor = scaled(0, 0.5)
    keeper = Keeper(tensor)
    checkpointer.load({"o": keeper})
    assert keeper.state["t"] is tensor
    assert tensor.data_part.tolist() == [7, 7]
    fresh = Keeper(None)
    with pytest.raises(MismatchError, match=r"the object has no state for o/t/.*: 'o/t' is a tensor subclass"):
        checkpointer.load({"o": fresh})
    assert fresh.state == {}


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: torch.zeros(3).as_subclass(Opaque), "Opaque has no __tensor_flatten__"),
        (lambda: torch.eye(3).to_sparse(), "torch.sparse_coo tensor"),
        (lambda: torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)]), "nested tensor"),
        (lambda: torch.nn.UninitializedParameter(), "not initialised"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_are_no_block_of_elements_are_refused(make: Callable[[], torch.Tensor], named: str) -> None:
    with pytest.raises(UnsupportedTypeError, match=rf"model/w.*({named})"):
        saved({"model": {"w": make()}})


@pytest.mark.filterwarnings("ignore:.*[qQ]uantiz")
def test_quantized_tensors_are_refused() -> None:
    quantized = torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)
    with pytest.raises(UnsupportedTypeError, match=r"w.*quantized"):
        saved({"w": quantized})


# The meta device


def test_meta_targets_are_replaced_on_the_device_asked_for() -> None:
    def shard(data: torch.Tensor) -> ShardedTensor:
        return ShardedTensor("s", data, global_shape=(2, 2), global_offset=(0, 0))

    state = {
        "t": torch.arange(3.0),
        "p": torch.nn.Parameter(torch.ones(2)),
        "s": shard(torch.eye(2)),
        "l": [torch.ones(1)],
    }
    part = shard(torch.zeros(2, 2, device="meta"))
    target: State = {
        "t": torch.zeros(3, device="meta"),
        "p": torch.nn.Parameter(torch.zeros(2, device="meta"), requires_grad=False),
        "s": part,
        "l": [torch.zeros(1, device="meta")],
    }
    load(state, target, device="cpu")
    assert target["t"].tolist() == [0, 1, 2]
    assert type(target["p"]) is torch.nn.Parameter
    assert not target["p"].requires_grad
    assert target["p"].tolist() == [1, 1]
    assert target["s"] is part
    assert part.data.tolist() == [[1, 0], [0, 1]]
    assert target["l"][0].tolist() == [1]


def test_meta_modules_get_real_parameters() -> None:
    source = torch.nn.Linear(2, 3)
    with torch.device("meta"):
        target = torch.nn.Linear(2, 3)
    load({"model": source}, {"model": target})
    assert_same(target.weight, source.weight)
    assert isinstance(target.weight, torch.nn.Parameter)


def test_meta_tensors_cannot_be_saved() -> None:
    with pytest.raises(UnsupportedTypeError, match=r"'a'.* meta device"):
        saved({"a": torch.zeros(1, device="meta")})


# NumPy


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3),
        np.array(2.5),
        np.arange(6, dtype=">i4"),
        np.arange(6, dtype=">c16"),
        np.zeros((0, 3), np.float16),
        np.arange(24, dtype=np.uint16).reshape(4, 6)[::2, 1::3],
        np.arange(6, dtype=np.int64)[::-1],
        np.frombuffer(bytes(range(33)), np.float64, offset=1),
        np.array([True, False]),
        np.asfortranarray(np.arange(6, dtype=np.uint64).reshape(2, 3)),
    ],
)
def test_numpy_arrays_of_every_kind_are_saved_and_filled(array: np.ndarray[Any, Any]) -> None:
    per_rank = PerRank(None)
    target = {"a": np.zeros_like(array), "x": per_rank}
    kept = target["a"]
    load({"a": array, "x": PerRank(array)}, target)
    assert target["a"] is kept
    assert kept.dtype == array.dtype
    assert np.array_equal(kept, array)
    assert per_rank.value.dtype == array.dtype.newbyteorder("=")
    assert np.array_equal(per_rank.value, array)


def test_numpy_targets_of_any_strides_are_filled() -> None:
    base = np.zeros((6, 4))
    reversed_target, swapped, frozen = base[::-2, ::-1], np.zeros(3, ">f4"), np.zeros(3)
    frozen.flags.writeable = False
    source = {"r": np.arange(12.0).reshape(3, 4), "s": np.arange(3, dtype="f4"), "f": np.arange(3.0)}
    target = {"r": reversed_target, "s": swapped, "f": frozen}
    load(source, target)
    assert np.array_equal(base[::-2, ::-1], source["r"])
    assert base[0].sum() == 0
    assert swapped.tolist() == [0, 1, 2]
    assert target["f"] is not frozen
    assert target["f"].tolist() == [0, 1, 2]


# Objects


class Scheduler:
    """An object with a nested object in its state."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.inner = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(self.inner.weight, float(n))
        self.history = [torch.full((2,), n), n]

    def state_dict(self) -> State:
        return {"n": self.n, "inner": self.inner, "history": self.history}

    def load_state_dict(self, state: State) -> None:
        self.n, self.history = state["n"], state["history"]


def test_objects_and_objects_in_them_are_loaded() -> None:
    target = Scheduler(0)
    load({"scheduler": Scheduler(7)}, {"scheduler": target})
    assert target.n == 7
    assert target.inner.weight.item() == 7
    assert repr(target.history) == repr([torch.full((2,), 7), 7])


def trained(steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    return model, optimizer


def in_order(value: object) -> str:
    if isinstance(value, dict):
        return str(sorted((repr(k), in_order(v)) for k, v in value.items()))
    return repr(value)


def test_a_fresh_optimizer_gets_the_whole_stored_state() -> None:
    model, optimizer = trained(3)
    new_model, new_optimizer = trained(0)
    report = load({"model": model, "optimizer": optimizer}, {"model": new_model, "optimizer": new_optimizer})
    assert not report.missing
    assert not report.unexpected
    assert in_order(new_optimizer.state_dict()) == in_order(optimizer.state_dict())
    assert repr(new_model.state_dict()) == repr(model.state_dict())


def test_a_trained_optimizer_is_filled_from_another() -> None:
    model, optimizer = trained(3)
    new_model, new_optimizer = trained(1)
    load({"model": model, "optimizer": optimizer}, {"model": new_model, "optimizer": new_optimizer})
    assert repr(new_optimizer.state_dict()) == repr(optimizer.state_dict())


def test_optimizer_state_that_the_checkpoint_has_not_is_missing() -> None:
    _, optimizer = trained(0)
    _, target = trained(1)
    with pytest.raises(MismatchError) as caught:
        load({"optimizer": optimizer}, {"optimizer": target})
    assert "optimizer/state/%k0/exp_avg" in caught.value.missing


def test_the_plain_state_of_a_fresh_optimizer_is_not_enough() -> None:
    _, optimizer = trained(1)
    _, fresh = trained(0)
    with pytest.raises(MismatchError) as caught:
        load({"optimizer": optimizer.state_dict()}, {"optimizer": fresh.state_dict()})
    assert "optimizer/state/%k0/exp_avg" in caught.value.unexpected


# Strict and not


def stored_state() -> State:
    return {
        "model": {"a": torch.ones(2), "b": torch.ones(2), "deep": {"c": torch.ones(2), "n": 5}},
        "other": {"x": torch.ones(1)},
        "top": 3,
        "rng": PerRank(7),
    }


def test_missing_and_unexpected_keys_are_listed_exactly() -> None:
    def make_target() -> State:
        return {"model": {"a": torch.zeros(2), "new": torch.zeros(2), "deep": {"n": 0, "m": 0}}, "gone": PerRank(0)}

    target = make_target()
    with pytest.raises(MismatchError) as caught:
        load(stored_state(), target)
    assert caught.value.missing == ("gone", "model/deep/m", "model/new")
    assert caught.value.unexpected == ("model/b", "model/deep/c", "rng", "top")
    assert repr(target) == repr(make_target())

    report = load(stored_state(), target, strict=False)
    assert report.missing == caught.value.missing
    assert report.unexpected == caught.value.unexpected
    assert target["model"]["a"].tolist() == [1, 1]
    assert target["model"]["deep"] == {"n": 5, "m": 0}


def test_leaves_of_the_root_are_wanted_only_if_the_state_has_one_there() -> None:
    target: State = {"other": {"x": torch.zeros(1)}}
    assert load(stored_state(), target).unexpected == ()
    assert target["other"]["x"].item() == 1
    with pytest.raises(MismatchError) as caught:
        load(stored_state(), {"top": 0})
    assert caught.value.unexpected == ("rng",)


def test_a_value_where_a_tensor_is_stored_is_a_mismatch() -> None:
    for state, target in (({"a": 1}, {"a": torch.zeros(1)}), ({"a": torch.zeros(1)}, {"a": 1})):
        with pytest.raises(MismatchError) as caught:
            load(state, target, strict=False)
        assert caught.value.mismatched == ("a",)


def test_two_leaves_of_one_key_are_refused() -> None:
    part = ShardedTensor("w", torch.zeros(1), global_shape=(1,), global_offset=(0,))
    with pytest.raises(InvalidShardingError, match=r"'w'"):
        saved({"a": part, "w": 5})
    with pytest.raises(InvalidShardingError, match=r"'w'"):
        saved({"a": part, "w": torch.ones(1)})


def test_two_things_that_read_would_put_in_one_place_are_an_error_of_read_alone() -> None:
    part = ShardedTensor("x", torch.ones(1), global_shape=(1,), global_offset=(0,))
    checkpointer = saved({"model": {"w": part, "x": 5}})
    target: State = {"model": {"w": ShardedTensor("x", torch.zeros(1), global_shape=(1,), global_offset=(0,)), "x": 0}}
    checkpointer.load(target)
    assert (target["model"]["w"].data.item(), target["model"]["x"]) == (1, 5)
    with pytest.raises(CheckpointError, match=r"two things are stored under 'model/x'; read them by keys"):
        checkpointer.read()
    assert checkpointer.read(keys=["model/x"]) == {"model": {"x": 5}}


# read()


def test_read_gives_all_or_what_the_keys_name() -> None:
    checkpointer = saved(stored_state())
    everything = stored_state()
    del everything["rng"]
    assert repr(sorted(checkpointer.read().items())) == repr(sorted(everything.items()))
    assert repr(checkpointer.read(keys=["model/deep", "top"])) == repr(
        {"model": {"deep": everything["model"]["deep"]}, "top": 3}
    )
    assert list(checkpointer.read(keys=["model/a"])["model"]) == ["a"]  # type: ignore[call-overload]
    with pytest.raises(MismatchError) as caught:
        checkpointer.read(keys=["model/a", "mode", "model/z"])
    assert caught.value.missing == ("mode", "model/z")


def test_read_puts_sharded_tensors_under_their_key_where_they_stood() -> None:
    part = ShardedTensor("layers.0/w", torch.ones(2), global_shape=(2,), global_offset=(0,))
    state = saved({"model": {"anything": part}, "step": 1}).read()
    assert repr(state) == repr({"model": {"layers.0/w": torch.ones(2)}, "step": 1})


# PerRank


def meshed(storage: MemoryStorage, tp: tuple[int, int], dp: tuple[int, int] = (0, 1)) -> Checkpointer:
    return Checkpointer(storage, mesh={"tp": tp, "dp": dp})


@pytest.mark.parametrize("axes", [None, ("tp",), ("tp", "dp"), ()])
def test_per_rank_values_return_on_an_equal_mesh(axes: tuple[str, ...] | None) -> None:
    storage = MemoryStorage()
    value = {"rng": torch.arange(5, dtype=torch.uint8), "n": (1, np.arange(2)), "c": Counter("ab")}
    meshed(storage, (0, 1)).save({"x": PerRank(value, axes)}, iteration=1)
    target = PerRank(None, axes)
    meshed(storage, (0, 1)).load({"x": target})
    assert repr(target.value) == repr(value)
    assert target.seed is None


def test_per_rank_values_on_a_mesh_that_changed() -> None:
    storage = MemoryStorage()
    kinds: tuple[OnChange, ...] = ("exact", "reseed", "skip")
    meshed(storage, (0, 1)).save({kind: PerRank(1, ("tp",), kind) for kind in kinds}, iteration=1)

    def load_on_two(coordinator: Any) -> int | None:
        target = {kind: PerRank(2, ("tp",), kind) for kind in kinds[1:]}
        checkpointer = Checkpointer(storage, mesh={"tp": (coordinator.rank, 2)}, coordinator=coordinator)
        report = checkpointer.load(target, strict=False)
        assert (report.reseeded, report.skipped, report.unexpected) == (("reseed",), ("skip",), ("exact",))
        assert (target["reseed"].value, target["skip"].value, target["skip"].seed) == (2, 2, None)
        with pytest.raises(MismatchError, match=r"saved for mesh axes {'tp': 1}, now they are {'tp': 2}") as caught:
            checkpointer.load({"exact": PerRank(2, ("tp",), "exact")}, strict=False)
        assert caught.value.mismatched == ("exact",)
        return target["reseed"].seed

    seeds = run_ranks(2, load_on_two)
    assert None not in seeds
    assert seeds[0] != seeds[1]
    assert run_ranks(2, load_on_two) == seeds


def test_per_rank_values_ignore_axes_that_do_not_key_them() -> None:
    storage = MemoryStorage()
    meshed(storage, (0, 1), (0, 1)).save({"x": PerRank(1, ("tp",))}, iteration=1)

    def load_on_two(coordinator: Any) -> object:
        target = PerRank(0, ("tp",))
        mesh = {"tp": (0, 1), "dp": (coordinator.rank, 2)}
        Checkpointer(storage, mesh=mesh, coordinator=coordinator).load({"x": target})
        return target.value

    assert run_ranks(2, load_on_two) == [1, 1]


def test_per_rank_objects_are_loaded_and_not_replaced() -> None:
    generator = Scheduler(0)
    target = PerRank(generator)
    load({"x": PerRank({"n": 4, "history": [1]})}, {"x": target})
    assert target.value is generator
    assert (generator.n, generator.history) == (4, [1])


def test_per_rank_values_may_not_hold_shards() -> None:
    part = ShardedTensor("w", torch.zeros(1), global_shape=(1,), global_offset=(0,))
    for value in (part, [PerRank(1)], {"a": Pair(torch.zeros(1), torch.zeros(1))}):
        with pytest.raises(UnsupportedTypeError, match=r"'x': a PerRank may not hold"):
            saved({"x": PerRank(value)})
    with pytest.raises(CheckpointError, match=r"axes \['ep'\] are not in the mesh"):
        saved({"x": PerRank(1, ("ep",))})


# Size


@pytest.mark.large
def test_a_tensor_above_four_gib(tmp_path: Path) -> None:
    size = (4 << 30) + 4096 + 3
    if shutil.disk_usage(tmp_path).free < 6 << 30:
        pytest.skip("needs 6 GiB of disk")
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save({"a": torch.tensor([7], dtype=torch.uint8).expand(size), "b": torch.arange(3)}, iteration=1)
        target = {"a": torch.zeros(size, dtype=torch.uint8), "b": torch.zeros(3, dtype=torch.int64)}
        checkpointer.load(target)
    assert target["b"].tolist() == [0, 1, 2]
    assert bool((target["a"] == 7).all())
    shutil.rmtree(tmp_path)


# How a state is flattened


def test_adapters_see_neither_plain_tensors_nor_sharded_ones() -> None:
    seen: list[str] = []

    def adapter(path: str, value: object) -> None:
        seen.append(path)

    part = ShardedTensor("part", torch.zeros(2), global_shape=(2,), global_offset=(0,))
    state: State = {
        "w": torch.zeros(2),
        "p": torch.nn.Parameter(torch.zeros(2)),
        "part": part,
        "list": [torch.zeros(1)],
    }
    flatten({**state, "array": np.zeros(1), "step": 3, "below": {"w": torch.zeros(3)}}, [adapter])
    assert seen == ["list", "array", "step", "below"]


def test_tensors_of_one_dtype_and_shape_share_what_describes_them() -> None:
    alike = [torch.zeros(2, 3), torch.nn.Parameter(torch.zeros(2, 3)), torch.zeros(3, 2).T]
    other = [torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int32), torch.zeros(6)]
    leaves = flatten({"alike": alike, "other": other}, ()).tensors
    assert len({id(leaf.spec) for leaf in leaves[:3]}) == len({id(leaf.shards[0].box) for leaf in leaves[:3]}) == 1
    for leaf, tensor in zip(leaves, alike + other, strict=True):
        assert (leaf.spec.dtype, leaf.spec.global_shape) == (str(tensor.dtype)[len("torch.") :], tuple(tensor.shape))
        assert leaf.shards[0].box.shape == tuple(tensor.shape)


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_flattened_tensors_keep_the_memory_that_they_had(is_sharded: bool, requires_grad: bool) -> None:
    tensor = torch.ones(2, requires_grad=requires_grad)
    part = ShardedTensor("w", tensor, global_shape=(1, 2), global_offset=(0, 0))
    (leaf,) = flatten({"w": part if is_sharded else tensor}, ()).tensors
    tensor.data = torch.zeros(2)
    assert leaf.shards[0].data.flatten().tolist() == [1, 1]
    assert not leaf.shards[0].data.requires_grad


@pytest.mark.parametrize("key", [0, 7, -7, 2**63 - 1, 2**63, -(2**63) - 1, True, 1.0, (1, 2)])
def test_segment_of_a_key_that_is_no_text_is_its_tagged_json(key: object) -> None:
    assert segment(key, "") == "%k" + quote(encode_value(key, "a key"), safe="")
