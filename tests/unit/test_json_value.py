"""JSON values: what is stored comes back as it was, type for type; what cannot is refused by name."""

from __future__ import annotations

import enum
import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict, namedtuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt import CorruptionError
from distckpt.errors import UnsupportedTypeError
from distckpt.json_value import ArrayValue, decode_value, encode_value

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(
    ["%", "%tuple", "%dict", "%k", ""]
)
NUMPY_SCALARS = [
    np.bool_(True),
    np.int8(-128),
    np.uint64(2**64 - 1),
    np.float16(0.1),
    np.float32(-0.0),
    np.float64(math.inf),
    np.complex64(1 - 2j),
    np.complex128(complex(math.nan, -0.0)),
]
ATOMS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**130), 2**130)
    | st.floats()
    | st.complex_numbers()
    | TEXT
    | st.binary(max_size=6)
    | st.binary(max_size=6).map(bytearray)
    | st.sampled_from(NUMPY_SCALARS)
)
KEYS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | TEXT
    | st.binary(max_size=3)
    | st.tuples(TEXT, st.integers())
)
VALUES = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.dictionaries(TEXT, st.integers(), max_size=3).map(Counter)
    ),
    max_leaves=8,
)


def round_trip(value: object) -> object:
    return decode_value(encode_value(value, "v"), "v")


def described(value: object) -> object:
    """A value with its types and bits, so that == means the same."""
    if isinstance(value, np.generic):
        return (value.dtype.str, value.tobytes())
    if type(value) is float:
        return (float, "nan" if math.isnan(value) else struct.pack("<d", value))
    if type(value) is complex:
        return (complex, described(value.real), described(value.imag))
    if isinstance(value, dict):
        return (type(value), [(described(k), described(v)) for k, v in value.items()])
    if isinstance(value, (list, tuple)):
        return (type(value), [described(v) for v in value])
    return (type(value), value)


@settings(deadline=None)
@given(VALUES)
def test_values_come_back_as_they_were(value: object) -> None:
    assert described(round_trip(value)) == described(value)


@settings(deadline=None)
@given(VALUES)
def test_encoding_is_plain_json_and_the_same_every_time(value: object) -> None:
    encoded = encode_value(value, "v")
    json.loads(encoded)
    assert encoded == encode_value(value, "v")
    assert encode_value(decode_value(encoded, "v"), "v") == encoded


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (None, "null"),
        (True, "true"),
        (-(2**63), "-9223372036854775808"),
        (2**63, '{"%int":"0x8000000000000000"}'),
        (1.0, "1.0"),
        (-0.0, "-0.0"),
        (math.nan, '{"%float":"nan"}'),
        (-math.inf, '{"%float":"-inf"}'),
        (1 + math.inf * 1j, '{"%complex":[{"%float":"nan"},{"%float":"inf"}]}'),
        ("a\n", '"a\\n"'),
        (b"\x00\xff", '{"%bytes":"AP8="}'),
        (bytearray(b"a"), '{"%bytearray":"YQ=="}'),
        ([1, (2,)], '[1,{"%tuple":[2]}]'),
        ({"a": {"b": 1}}, '{"a":{"b":1}}'),
        ({1: "x", "1": "y"}, '{"%dict":[[1,"x"],["1","y"]]}'),
        ({"%int": 1}, '{"%dict":[["%int",1]]}'),
        (Counter("aab"), '{"%counter":{"a":2,"b":1}}'),
        (np.float32(1.5), '{"%numpy":["float32","AADAPw=="]}'),
        (ArrayValue("int8", (2, 1), b"\x01\x02"), '{"%array":["int8",[2,1],"AQI="]}'),
    ],
)
def test_golden_encodings(value: object, encoded: str) -> None:
    assert encode_value(value, "v").decode() == encoded
    assert described(decode_value(encoded.encode(), "v")) == described(value)


class Colour(enum.IntEnum):
    RED = 1


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({1, 2}, "set"),
        (frozenset(), "frozenset"),
        (Colour.RED, "Colour"),
        (Point(1, 2), "Point"),
        (defaultdict(int), "collections.defaultdict"),
        (range(3), "range"),
        (object(), "object"),
        (len, "builtin_function_or_method"),
        (np.str_("a"), "numpy.str_"),
        (np.datetime64(0, "s"), "numpy.datetime64"),
        (np.longdouble(1), "numpy.longdouble"),
        (np.zeros(2), "numpy.ndarray"),
        (memoryview(b"a"), "memoryview"),
    ],
)
def test_what_would_not_come_back_is_refused_with_place_and_type(value: object, named: str) -> None:
    with pytest.raises(UnsupportedTypeError) as caught:
        encode_value({"a": [0, value]}, "options")
    assert "options/a[1]" in str(caught.value)
    assert named in str(caught.value)


@pytest.mark.parametrize("value", ["\ud800", {"\udfff": 1}, {("\ud800",): 1}])
def test_lone_surrogates_are_refused(value: object) -> None:
    with pytest.raises(UnsupportedTypeError, match="lone surrogate"):
        encode_value(value, "v")


@pytest.mark.parametrize("sign", [1, -1])
def test_integers_are_stored_up_to_the_length_that_is_read(sign: int) -> None:
    largest = sign * (16**3990 - 1)
    assert round_trip(largest) == largest
    with pytest.raises(UnsupportedTypeError, match="'v': an integer of 4153 hexadecimal digits"):
        encode_value(sign * 10**5000, "v")


def nested(wrap: object, depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = wrap(value)  # type: ignore[operator]
    return value


WRAPS = [
    lambda v: [v],
    lambda v: (v,),
    lambda v: {"a": v},
    lambda v: {1: v},
    lambda v: Counter({"a": v}),
]


@pytest.mark.parametrize("wrap", WRAPS)
def test_whatever_is_stored_is_not_too_deep_to_be_read(wrap: object) -> None:
    deep = nested(wrap, 200)
    assert described(round_trip(deep)) == described(deep)
    with pytest.raises(UnsupportedTypeError, match="nested more than 200 deep"):
        encode_value(nested(wrap, 201), "v")


def test_containers_that_contain_themselves_are_refused() -> None:
    loop: list[object] = []
    loop += [loop, loop]
    with pytest.raises(UnsupportedTypeError, match="containing itself"):
        encode_value(loop, "v")


def test_ordered_dicts_are_stored_as_dicts() -> None:
    assert round_trip(OrderedDict(b=1, a=2)) == {"b": 1, "a": 2}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1",
        "{'a': 1}",
        "nan",
        '{"%tuple":[1],"%tuple2":[]}',
        '{"%tuple":[1],"a":1}',
        '{"a":1,"%tuple":[1]}',
        '{"%unknown":1}',
        '{"%":1}',
        '{"%int":12}',
        '{"%int":"0xg"}',
        '{"%int":""}',
        '{"%int":"0x' + "f" * 5000 + '"}',
        '{"%float":"1.5"}',
        '{"%float":1.5}',
        '{"%bytes":[1]}',
        '{"%bytes":"A"}',
        '{"%bytes":"A?=="}',
        '{"%bytearray":null}',
        '{"%counter":[1]}',
        '{"%counter":{"%tuple":[]}}',
        '{"%tuple":{}}',
        '{"%tuple":"ab"}',
        '{"%dict":{}}',
        '{"%dict":[1]}',
        '{"%dict":[[1]]}',
        '{"%dict":[[1,2,3]]}',
        '{"%dict":[[[1],2]]}',
        '{"%dict":[[{"a":1},2]]}',
        '{"%complex":[1.0]}',
        '{"%complex":[1.0,2]}',
        '{"%complex":[1.0,"2"]}',
        '{"%complex":[1.0,2.0,3.0]}',
        '{"%numpy":["float32"]}',
        '{"%numpy":["float32","AADAPw==",1]}',
        '{"%numpy":["float32","AADA"]}',
        '{"%numpy":["no such dtype","AADA"]}',
        '{"%numpy":["longdouble","AAAAAAAAAAAAAAAAAAAAAA=="]}',
        '{"%numpy":["O","AADAPwAAwD8="]}',
        '{"%numpy":["V4","AADAPw=="]}',
        '{"%numpy":["a4","AADAPw=="]}',
        '{"%numpy":["datetime64[s]","AADAPwAAwD8="]}',
        '{"%numpy":["i4,i4","AADAPwAAwD8="]}',
        '{"%numpy":[",(","AADAPwAAwD8="]}',
        '{"%numpy":[null,"AADAPwAAwD8="]}',
        '{"%numpy":[{"names":["a"],"formats":["i4"]},"AADAPw=="]}',
        '{"%numpy":[["a"],"AADAPw=="]}',
        '{"%numpy":["float32",7]}',
        '{"%array":["int8",[1]]}',
        '{"%array":["int8",1,"AA=="]}',
        '{"%array":["int8",[-1],"AA=="]}',
        '{"%array":["int8",[true],"AA=="]}',
        '{"%array":["int8",[1.0],"AA=="]}',
        '{"%array":["int8",["1"],"AA=="]}',
        '{"%array":["int8",[4611686018427387904],""]}',
        '{"%array":["int8",[2147483648,2147483648],""]}',
        '{"%array":["int8",[' + ",".join(["4294967296"] * 20000) + '],""]}',
        '{"%array":["int8",[1],5]}',
        '{"%array":[5,[1],"AA=="]}',
        "[" * 210 + "]" * 210,
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"%tuple":[' * 210 + "]}" * 210,
    ],
)
def test_hostile_text(text: str) -> None:
    with pytest.raises(CorruptionError, match="rng: not a stored value"):
        decode_value(text.encode(), "rng")


def test_hostile_bytes() -> None:
    with pytest.raises(CorruptionError, match="not a stored value"):
        decode_value(b'"\xff\xfe"', "v")


TAGS = ["%int", "%float", "%bytes", "%bytearray", "%counter", "%tuple", "%dict", "%complex", "%numpy", "%array", "%no"]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
    | st.sampled_from(["AAAA", "float32", "0x1f", "int8", "nan"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(TEXT, inner, max_size=2)
        | st.builds(lambda tag, body: {tag: body}, st.sampled_from(TAGS), inner | st.lists(inner, max_size=3))
    ),
    max_leaves=10,
)


@settings(max_examples=500, deadline=None)
@given(JSON)
def test_random_json_is_a_value_or_refused(text: object) -> None:
    try:
        value = decode_value(json.dumps(text).encode(), "v")
    except CorruptionError:
        return
    assert described(round_trip(value)) == described(value)
