"""The front against a plain search, intervals against SciPy."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseworks.core.errors import InvalidArgument
from sparseworks.diagnostics.tradeoffs import (
    AXES,
    best_within,
    mean_and_interval,
    pareto_front,
    present,
)

# few values, so that there are ties on one axis and on both
VALUES = st.one_of(st.integers(-3, 3).map(float), st.sampled_from([math.inf, -math.inf, 0.5]))
POINTS = st.lists(st.tuples(VALUES, VALUES), max_size=12)


def beats(a: tuple[float, float], b: tuple[float, float], up: tuple[bool, bool]) -> bool:
    """At least as good on both, and better on one."""
    better = [x > y if u else x < y for x, y, u in zip(a, b, up)]
    return all(w or x == y for w, x, y in zip(better, a, b)) and any(better)


@given(POINTS, st.tuples(st.booleans(), st.booleans()))
def test_the_front_is_what_no_other_beats(
    points: list[tuple[float, float]], up: tuple[bool, bool]
) -> None:
    assert pareto_front(points, up) == [not any(beats(b, a, up) for b in points) for a in points]


def test_equal_points_share_their_place() -> None:
    points = [(1.0, 1.0), (1.0, 1.0), (2.0, 1.0), (1.0, 0.5)]
    assert pareto_front(points, (False, True)) == [True, True, False, False]
    with pytest.raises(InvalidArgument, match="NaN"):
        pareto_front([(1.0, math.nan)], (False, True))


@pytest.mark.parametrize(
    "values", [[3.5], [1.0, 1.0], [0.1] * 3, [1.0, 2.0], [5.0, -3.0, 1e3, 0.25], [1e-6, 2e-6, 9e-6]]
)
def test_intervals_are_those_of_students_t(values: list[float]) -> None:
    stats = pytest.importorskip("scipy.stats")
    mean, low, high = mean_and_interval(values)
    assert mean == pytest.approx(math.fsum(values) / len(values), abs=1e-9)
    if len(values) == 1:
        assert low is None and high is None
    elif min(values) == max(values):
        assert low == high == mean
    else:
        told = stats.t.interval(0.95, len(values) - 1, mean, stats.sem(values))
        assert (low, high) == pytest.approx(told, rel=1e-6, abs=1e-9)


def test_an_axis_needs_a_value_of_every_row() -> None:
    rows = [{"acc": 1.0, "bytes": 3, "flops": 2.0}, {"acc": 0.5, "bytes": 2, "flops": None}]
    axes = present(rows, "acc", " %", True)
    assert list(axes) == ["quality", "size"]
    assert axes["quality"].column == "acc" and axes["quality"].label == "acc (%)"
    assert not present(rows, "acc", "", False)["quality"].higher_is_better


@pytest.mark.parametrize("higher", [True, False])
def test_the_best_within_a_loss(higher: bool) -> None:
    size = next(a for a in AXES if a.name == "size")
    sign = 1 if higher else -1
    points = [
        {"values": {"quality": (100 + sign * change, None, None), "size": (s, None, None)}}
        for change, s in ((-0.5, 7.0), (-1.0, 5.0), (-1.5, 1.0), (3.0, 6.0))
    ]
    best = best_within(points, size, 100.0, higher, 0.01)
    assert best is points[1]  # the smallest of those that lose 1 % at most
    assert best_within(points[2:3], size, 100.0, higher, 0.01) is None
