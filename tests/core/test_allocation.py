"""Allocations add up, stay within bounds, and are what their formulas say."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseworks.core.allocation import by_groups, filled, rescaled, shifted, whole_units
from sparseworks.core.budgets import TensorSpec
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.patterns import NM, Block, Unstructured, count_dropped

GROUPS = st.lists(st.tuples(st.integers(1, 50), st.floats(0, 10)), min_size=1, max_size=6)
SPARSITY = st.integers(0, 99).map(lambda p: p / 100)


def sizes_of(groups):
    return {str(i): n for i, (n, _) in enumerate(groups)}


def values_of(groups):
    return {str(i): v for i, (_, v) in enumerate(groups)}


@given(GROUPS, SPARSITY)
@settings(max_examples=200, deadline=None)
def test_filling_adds_up_and_open_groups_get_in_proportion(groups, sparsity):
    sizes, shares = sizes_of(groups), values_of(groups)
    amount = sum(sizes.values()) - count_dropped(sum(sizes.values()), sparsity)
    least = {g: 0.3 * amount * n / sum(sizes.values()) for g, n in sizes.items()}
    found = filled(shares, sizes, amount, least)
    assert sum(found.values()) == pytest.approx(amount, abs=1e-6)
    assert all(least[g] - 1e-9 <= found[g] <= sizes[g] + 1e-9 for g in sizes)
    open_ = [g for g in sizes if found[g] < sizes[g] - 1e-6]
    if sum(shares[g] for g in open_) > 1e-3:
        total = sum(shares[g] for g in open_)
        rest = sum(found[g] - least[g] for g in open_)
        for g in open_:
            assert found[g] - least[g] == pytest.approx(rest * shares[g] / total, abs=1e-4)


@given(GROUPS, SPARSITY)
@settings(max_examples=200, deadline=None)
def test_shifting_keeps_differences_of_densities(groups, sparsity):
    sizes, wanted = sizes_of(groups), values_of(groups)
    found = shifted(wanted, sizes, sparsity)
    total = sum(sizes.values())
    assert sum(found.values()) == pytest.approx(total - count_dropped(total, sparsity), abs=1e-6)
    density = {g: found[g] / sizes[g] for g in sizes}
    inside = [g for g in sizes if 1e-6 < density[g] < 1 - 1e-6]
    for g in inside:
        for h in inside:
            assert density[g] - density[h] == pytest.approx(wanted[g] - wanted[h], abs=1e-6)


def test_more_than_there_is_cannot_be_given_first():
    with pytest.raises(InvalidArgument, match="given first"):
        filled({"a": 1.0}, {"a": 10}, 3, {"a": 5.0})
    assert filled({"a": 0.0, "b": 0.0}, {"a": 2, "b": 6}, 4) == {"a": 1.0, "b": 3.0}
    assert rescaled({"a": 1.0, "b": 3.0}, {"a": 10, "b": 10}, 12) == {"a": 3.0, "b": 9.0}


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1)), min_size=1,
             max_size=5),
    st.sampled_from([Unstructured(), Unstructured("row")]),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_whole_units_leave_less_than_one_more_step_would_take(tensors, pattern):
    specs = [TensorSpec(str(i), (r, c), (r, c), pattern) for i, (r, c, _) in enumerate(tensors)]
    wanted = {s.name: s.weights * d for s, (_, _, d) in zip(specs, tensors)}
    allowed = int(sum(wanted.values()) + 1e-6)
    keep = whole_units(specs, wanted, allowed)
    left = allowed - sum(keep.values())
    assert left >= 0
    for spec in specs:
        step = spec.view[0] if pattern.scope == "row" else 1
        assert keep[spec.name] % step == 0 and keep[spec.name] <= spec.weights
        assert keep[spec.name] == spec.weights or left < step


def test_a_group_has_one_density_in_units_of_any_pattern():
    specs = [TensorSpec(n, (8, 8), (8, 8), Block(2, 2)) for n in "abc"]
    budget = by_groups(
        {"a": "x", "b": "x", "c": "y"}, lambda sizes, s: {"x": 0.5 * 128, "y": 0.25 * 64}, "test"
    )
    assert budget(specs, 1 - 80 / 192, None) == {"a": 8, "b": 8, "c": 4}
    with pytest.raises(InvalidArgument, match="one density"):
        budget([TensorSpec("a", (8, 8), (8, 8), NM(2, 4))], 0.5, None)
