"""The search for models under goals: what it finds is what trying all finds, in few tries."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseworks.core.errors import InvalidArgument
from sparseworks.diagnostics.goals import (
    Goal,
    Rung,
    best_of,
    parse_goals,
    search,
    seconds_of,
    shares,
)


def ladder(name, count):
    return [Rung(name, name, (("sparsity", i),), "fp32") for i in range(count)]


def falling(count):
    return st.lists(st.floats(0.01, 1), min_size=count, max_size=count).map(
        lambda v: sorted(v, reverse=True)
    )


@given(st.data(), st.integers(4, 12), st.floats(0.05, 1), st.sampled_from(["latency", "quality"]))
def test_finds_what_trying_all_of_a_ladder_finds(data, count, share, name):
    rungs = ladder("a", count)
    times, quality = data.draw(falling(count)), data.draw(falling(count))
    table = {r: {"latency": t, "quality": q} for r, t, q in zip(rungs, times, quality)}
    goals = [Goal(name, share)]
    tried, left = search([rungs], goals, table.__getitem__, 1e9)
    assert set(tried) | set(left) == set(rungs) and not set(tried) & set(left)
    assert len(tried) <= math.ceil(math.log2(count + 1)) + 1
    found, wanted = best_of(tried, goals), best_of(table, goals)
    assert (found is None) == (wanted is None)
    if found is not None:
        other = "quality" if name == "latency" else "latency"
        assert table[found][other] == table[wanted][other]


def test_time_is_kept_but_for_the_first():
    now = [0.0]

    def measure(rung):
        now[0] += 10
        return {"latency": 1.0, "quality": 1.0}

    tried, left = search([ladder("a", 3), ladder("b", 3)], [], measure, 25, clock=lambda: now[0])
    assert len(tried) == 2 and now[0] == 20
    assert set(left.values()) == {"no time was left"} and len(left) == 4
    tried, _ = search([ladder("a", 3)], [], measure, 5, clock=lambda: now[0])
    assert len(tried) == 1


def test_what_is_not_possible_is_told():
    def measure(rung):
        raise InvalidArgument("no kernel")

    tried, left = search([ladder("a", 2)], [], measure, 5)
    assert not tried and set(left.values()) == {"not possible: no kernel"}


def test_the_first_rung_ends_a_ladder_where_it_is_cheap_enough():
    rungs = ladder("a", 8)
    tried, left = search(
        [rungs], [Goal("latency", 0.5)], lambda r: {"latency": 0.4, "quality": 1.0}, 5
    )
    assert set(tried) == {rungs[0]}
    assert set(left.values()) == {"its neighbours tell"}


def test_a_goal_of_quality_asks_for_the_fastest():
    a, b, c = ladder("a", 3)
    table = {a: {"latency": 0.9, "quality": 1.0}, b: {"latency": 0.5, "quality": 0.99},
             c: {"latency": 0.3, "quality": 0.9}}  # fmt: skip
    assert best_of(table, [Goal("quality", 0.99)]) == b
    assert best_of(table, [Goal("latency", 0.5)]) == b
    assert best_of(table, [Goal("latency", 0.5), Goal("quality", 0.9)]) == c
    assert best_of(table, [Goal("latency", 0.2)]) is None
    assert best_of(table, []) == a


def test_shares_of_the_dense_model():
    dense = {"quality": 20.0, "bytes": 100}
    row = {"quality": 25.0, "speedup": 4.0, "bytes": 50, "flops": 3.0}
    assert shares(row, dense, higher=False) == {"latency": 0.25, "size": 0.5, "quality": 0.8}
    assert shares(row, dense, higher=True)["quality"] == 1.25
    assert shares({**row, "quality": math.nan}, dense, higher=True)["quality"] == 0.0


@pytest.mark.parametrize("text", ["latency", "speed=2", "latency=0", "size=1.5", "quality=nan"])
def test_goals_that_are_none(text):
    with pytest.raises(InvalidArgument, match="share"):
        parse_goals([text])
    with pytest.raises(InvalidArgument, match="once"):
        parse_goals(["size=0.5", "size=0.4"])


def test_times():
    assert [seconds_of(t) for t in ("90s", "1.5m", "2h")] == [90, 90, 7200]
    for text in ("", "5", "m", "0s", "-1m", "infh", "3d"):
        with pytest.raises(InvalidArgument, match="30m"):
            seconds_of(text)
