"""Bits by sensitivity: laws of the allocation."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseworks.core.bits import bits_by_sensitivity
from sparseworks.core.errors import InvalidArgument

LEVELS = (8, 6, 4)
LAYERS = st.lists(
    st.tuples(st.floats(0, 10), st.integers(1, 1000)), min_size=1, max_size=8
)  # fmt: skip


@given(LAYERS, st.floats(4, 9))
def test_the_mean_is_kept_and_one_step_less_would_break_it(layers, mean):
    names = [str(i) for i in range(len(layers))]
    s, n = ({k: v[i] for k, v in zip(names, layers)} for i in (0, 1))
    found = bits_by_sensitivity(s, n, LEVELS, mean)
    total, spent = sum(n.values()), sum(n[k] * found[k] for k in names)
    assert spent <= mean * total * (1 + 1e-9)
    steps = [k for k in names if found[k] < 8]
    last = max(
        (s[k] / (2 * n[k]), names.index(k), k) for k in steps
    )[2] if steps else None  # fmt: skip
    if last is not None:
        assert spent + 2 * n[last] > mean * total


@given(st.lists(st.floats(0, 10), min_size=2, max_size=8), st.floats(4, 8))
def test_of_equal_layers_the_more_sensitive_has_no_fewer_bits(values, mean):
    s = {str(i): v for i, v in enumerate(values)}
    found = bits_by_sensitivity(s, dict.fromkeys(s, 10), LEVELS, mean)
    for a in s:
        for b in s:
            if s[a] > s[b]:
                assert found[a] >= found[b]


def test_larger_layers_pay_first_and_levels_in_their_order():
    even = {"a": 1.0, "b": 1.0}
    assert bits_by_sensitivity(even, {"a": 10, "b": 30}, LEVELS, 5) == {"a": 8, "b": 4}
    assert bits_by_sensitivity(even, {"a": 10, "b": 30}, (4, 16), 16) == {"a": 16, "b": 16}
    assert bits_by_sensitivity({"a": -1.0, "b": 0.5}, {"a": 1, "b": 1}, LEVELS, 6) == {
        "a": 4, "b": 8,
    }  # fmt: skip


@pytest.mark.parametrize(("value", "mean"), [(1.0, 3.9), (math.nan, 6), (math.inf, 6)])
def test_what_cannot_be_is_refused(value, mean):
    with pytest.raises(InvalidArgument):
        bits_by_sensitivity({"a": value}, {"a": 3}, LEVELS, mean)
