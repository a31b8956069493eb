"""Differences of values: the places at which two stored values are not the same, and what stands there."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt import CorruptionError
from distckpt.json_value import decode_value, encode_value
from distckpt.number_differences import Tolerance
from distckpt.value_differences import differing_paths

LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.binary(max_size=3))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.dictionaries(st.integers(), inner, max_size=2),
    ),
    max_leaves=8,
)


def places(a: object, b: object, tolerance: Tolerance | None = None) -> dict[str, tuple[object, object]]:
    found = differing_paths("k", encode_value(a, "a"), encode_value(b, "b"), tolerance)
    return {
        path: tuple("-" if raw is None else decode_value(bytes(raw), path) for raw in (one, other))  # type: ignore[misc]
        for path, one, other in found
    }


@given(VALUES, VALUES)
def test_values_differ_somewhere_unless_they_are_the_same(a: object, b: object) -> None:
    is_same = encode_value(a, "a") == encode_value(b, "b")
    if places(a, b) == {}:
        assert (
            is_same or (isinstance(a, dict) and a == b) or sorted(str(a)) == sorted(str(b))
        )  # Order is no difference.
    else:
        assert not is_same
    assert places(a, a) == {}


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (1, 1.0, {"k": (1, 1.0)}),
        ([1, 2], (1, 2), {"k": ([1, 2], (1, 2))}),
        ({"x": [1, {"y": 2}]}, {"x": [1, {"y": 3}]}, {"k/x[1]/y": (2, 3)}),
        ((1, 2), (1, 3), {"k[1]": (2, 3)}),
        ({"x": 1}, {"y": 1}, {"k/x": (1, "-"), "k/y": ("-", 1)}),
        ([1], [1, 2], {"k": ([1], [1, 2])}),
        (b"ab", b"ac", {"k": (b"ab", b"ac")}),
        ({1: 2}, {1: 3}, {"k": ({1: 2}, {1: 3})}),
        (math.inf, 1.0, {"k": (math.inf, 1.0)}),
        ({"x": 1, "y": 2}, {"y": 2, "x": 1}, {}),
        (math.nan, math.nan, {}),
    ],
)
def test_each_place_is_named(a: object, b: object, expected: dict[str, object]) -> None:
    assert places(a, b) == expected


def test_a_tolerance_is_for_numbers_that_are_no_integers() -> None:
    near = Tolerance(rtol=1e-3)
    assert places({"lr": 0.1}, {"lr": 0.10001}, near) == {}
    assert places(np.float32(0.1), np.float32(0.10001), near) == {}
    assert places(0.1, 0.2, near) == {"k": (0.1, 0.2)}
    assert places(1000, 1001, Tolerance(rtol=0.5)) == {"k": (1000, 1001)}
    assert places(math.inf, 1.0, Tolerance(rtol=10.0)) == {"k": (math.inf, 1.0)}
    assert places(0.1, np.float64(0.1), near) == {"k": (0.1, 0.1)}


def test_marks_of_lists_that_have_tensors_in_them_are_compared() -> None:
    (found,) = differing_paths("k", b'{"%list":2}', b'{"%list":3}', Tolerance(atol=1.0))
    assert (found[0], bytes(found[1] or b"")) == ("k", b'{"%list":2}')


@pytest.mark.parametrize("bad", [b"{", b'{"%nonsense":1}', b"[" * 1000 + b"]" * 1000, b'{"a":1,"%x":2}'])
def test_what_is_no_value_is_damage(bad: bytes) -> None:
    for pair in ((bad, b"1"), (b"1", bad)):
        with pytest.raises(CorruptionError, match="not a stored value"):
            list(differing_paths("k", *pair))
