"""Budgets add up exactly, and agree with their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseworks.core.budgets import (
    TensorSpec,
    by_sensitivity,
    erk,
    get_budget,
    global_,
    shortfall,
    uniform,
)
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.patterns import NM, Block, Unstructured, count_dropped

SHAPES = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 3])),
    min_size=1,
    max_size=5,
)
SPARSITY = st.integers(0, 99).map(lambda p: p / 100)


def specs_of(shapes, pattern=None):
    return [
        TensorSpec(f"t{i}", (o, c, k, k), (o, c * k * k), pattern or Unstructured())
        for i, (o, c, k) in enumerate(shapes)
    ]


@given(SHAPES, SPARSITY)
@settings(max_examples=200, deadline=None)
def test_erk_adds_up_and_follows_its_formula(shapes, sparsity):
    specs = specs_of(shapes)
    keep = erk(specs, sparsity)
    total = sum(s.weights for s in specs)
    assert sum(keep.values()) == total - count_dropped(total, sparsity)
    assert all(0 <= keep[s.name] <= s.weights for s in specs)
    open_ = [s for s in specs if keep[s.name] < s.weights - 1]
    raw = {s.name: sum(s.shape) / s.weights for s in specs}
    eps = [(keep[s.name] / s.weights) / raw[s.name] for s in open_]
    slack = [1.0 / s.weights / raw[s.name] for s in open_]
    for i in range(len(open_)):
        for j in range(len(open_)):
            assert abs(eps[i] - eps[j]) <= slack[i] + slack[j] + 1e-9


@given(SHAPES, SPARSITY, st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_global_is_one_threshold(shapes, sparsity, seed):
    specs = specs_of(shapes)
    generator = torch.Generator().manual_seed(seed)
    scores = {s.name: torch.randint(0, 9, s.view, generator=generator).float() for s in specs}
    keep = global_(specs, sparsity, scores)
    total = sum(s.weights for s in specs)
    assert sum(keep.values()) == total - count_dropped(total, sparsity)
    joined = torch.cat([scores[s.name].flatten() for s in specs])
    order = torch.sort(joined, descending=True, stable=True).indices[: sum(keep.values())]
    start = 0
    for spec in specs:
        assert keep[spec.name] == int(((order >= start) & (order < start + spec.weights)).sum())
        start += spec.weights


def test_global_blocks_of_different_sizes_do_not_exceed():
    specs = [
        TensorSpec("a", (8, 8), (8, 8), Block(2, 2)),
        TensorSpec("b", (8, 8), (8, 8), Block(4, 4)),
    ]
    scores = {n: torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) for n in "ab"}
    keep = global_(specs, 0.5, scores)
    kept = keep["a"] * 4 + keep["b"] * 16
    assert 48 <= kept <= 64 and shortfall(specs, keep, 0.5) == 64 - kept


@given(SHAPES, SPARSITY)
@settings(max_examples=50, deadline=None)
def test_uniform_is_the_same_everywhere(shapes, sparsity):
    for spec, kept in zip(specs_of(shapes), uniform(specs_of(shapes), sparsity).values()):
        assert kept == spec.weights - count_dropped(spec.weights, sparsity)


@given(SHAPES, SPARSITY)
@settings(max_examples=50, deadline=None)
def test_sensitivity_adds_up(shapes, sparsity):
    specs = specs_of(shapes)
    keep = by_sensitivity({s.name: i + 1.0 for i, s in enumerate(specs)})(specs, sparsity)
    total = sum(s.weights for s in specs)
    assert sum(keep.values()) == total - count_dropped(total, sparsity)


def test_more_sensitive_tensors_keep_more():
    specs = specs_of([(10, 10, 1), (10, 10, 1)])
    keep = by_sensitivity({"t0": 1.0, "t1": 3.0})(specs, 0.5)
    assert keep == {"t0": 25, "t1": 75}


def test_misuse_is_refused():
    nm = specs_of([(4, 4, 1)], NM(2, 4))
    for budget in ("erk", "global"):
        with pytest.raises(InvalidArgument, match="one density"):
            get_budget(budget)(nm, 0.5, {})
    with pytest.raises(InvalidArgument, match="unknown budget"):
        get_budget("fair")
    with pytest.raises(InvalidArgument, match="not pruned here"):
        get_budget({"other": 0.5})(specs_of([(4, 4, 1)]), 0.5)
    with pytest.raises(InvalidArgument, match="sensitivity"):
        by_sensitivity({"t0": math.nan})(specs_of([(4, 4, 1)]), 0.5)
