"""Schedules: ends, monotony, examples in the docstrings."""

from __future__ import annotations

import doctest
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseworks.core import schedules
from sparseworks.core.errors import InvalidArgument


def test_docstring_examples():
    assert doctest.testmod(schedules).failed == 0


@given(st.integers(0, 50), st.integers(1, 50), st.floats(0, 0.99), st.floats(0, 0.99))
def test_ends_and_monotony(begin, length, a, b):
    for schedule in (schedules.linear, schedules.cubic, schedules.cosine):
        values = [
            schedule(s, begin=begin, end=begin + length, initial=a, final=b)
            for s in range(begin + length + 3)
        ]
        assert values[begin] == pytest.approx(a) and values[-1] == pytest.approx(b)
        steps = [y - x for x, y in itertools.pairwise(values)]
        assert all(d >= -1e-12 for d in steps) or all(d <= 1e-12 for d in steps)


@given(st.integers(1, 30), st.floats(0, 0.99))
def test_rounds_drop_equal_shares(rounds, final):
    ladder = schedules.exponential_rounds(rounds, final)
    assert len(ladder) == rounds and ladder[-1] == final
    densities = [1.0] + [1 - s for s in ladder]
    ratios = [y / x for x, y in itertools.pairwise(densities)]
    assert all(r == pytest.approx(ratios[0], rel=1e-6) for r in ratios)


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_an_interval_fits_into_any_training_and_grows_with_it(steps, more):
    found = schedules.interval(steps)
    assert 1 <= found <= min(100, steps)
    assert found <= schedules.interval(steps + more)
    assert found in (1, 100) or 20 <= steps / found < 40


def test_misuse():
    with pytest.raises(InvalidArgument):
        schedules.cubic(0, begin=5, end=3, final=0.5)
    with pytest.raises(InvalidArgument):
        schedules.periodic(0, every=0)
