"""Budgets add up exactly, and agree with their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseworks.core.budgets import (
    TensorSpec,
    by_masks,
    by_sensitivity,
    er,
    erk,
    erk_plus,
    get_budget,
    global_,
    shortfall,
    uniform,
    uniform_plus,
)
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.masks import MaskEntry, Masks
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


def test_global_over_units_of_different_sizes_goes_on_from_masks():
    specs = [
        TensorSpec("a", (4, 6), (4, 6), Block(2, 1)),
        TensorSpec("b", (4, 6), (4, 6), Unstructured()),
    ]
    scores = {n: torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) for n in "ab"}
    scores["b"][:, :5] = -torch.inf  # masked before
    keep = global_(specs, 0.5, scores)
    assert keep["b"] <= 4 and 23 <= 2 * keep["a"] + keep["b"] <= 24


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


def resnet20_specs():
    """Convolutions and classifier of ResNet-20, which has no convolutions in its shortcuts."""
    shapes = [(16, 3, 3, 3)] + [(16, 16, 3, 3)] * 6 + [(32, 16, 3, 3)] + [(32, 32, 3, 3)] * 5
    shapes += [(64, 32, 3, 3)] + [(64, 64, 3, 3)] * 5 + [(10, 64)]
    return [
        TensorSpec(f"t{i}", s, (s[0], math.prod(s[1:])), Unstructured())
        for i, s in enumerate(shapes)
    ]


def test_erk_of_resnet20_is_the_published_one():
    specs = resnet20_specs()
    keep = erk(specs, 0.9)
    density = [keep[s.name] / s.weights for s in specs]
    assert density[0] == density[-1] == 1.0  # the two small ones would exceed 1
    for found, wanted in ((density[1], 0.303), (density[8], 0.139), (density[14], 0.067)):
        assert found == pytest.approx(wanted, abs=1e-3)


@given(SHAPES, SPARSITY)
@settings(max_examples=100, deadline=None)
def test_er_ignores_kernels(shapes, sparsity):
    specs = specs_of(shapes)
    keep = er(specs, sparsity)
    total = sum(s.weights for s in specs)
    assert sum(keep.values()) == total - count_dropped(total, sparsity)
    flat = [(o, c, 1) for o, c, _ in shapes]
    if all(k == 1 for _, _, k in shapes):
        assert er(specs, sparsity) == er(specs_of(flat), sparsity)
    ratio = {s.name: (s.shape[0] + s.shape[1]) / (s.shape[0] * s.shape[1]) for s in specs}
    for a in specs:
        for b in specs:  # densities are ordered as the ratios, up to rounding
            if ratio[a.name] > ratio[b.name]:
                slack = 1 / a.weights + 1 / b.weights
                assert keep[a.name] / a.weights >= keep[b.name] / b.weights - slack


def test_the_held_tensors_of_the_plus_budgets():
    specs = resnet20_specs()
    total = sum(s.weights for s in specs)
    for budget in (uniform_plus, erk_plus):
        for sparsity in (0.5, 0.85, 0.9, 0.95):
            keep = budget(specs, sparsity)
            assert sum(keep.values()) == total - count_dropped(total, sparsity)
    keep = uniform_plus(specs, 0.9)
    first, last = specs[0], specs[-1]
    assert keep[first.name] == first.weights and keep[last.name] == 0.2 * last.weights
    middle = (0.1 * total - 432 - 128) / (total - 432 - 640)
    for spec in specs[1:-1]:
        assert abs(keep[spec.name] - middle * spec.weights) <= 1
    assert uniform_plus(specs, 0.5)[last.name] == last.weights // 2
    plus = erk_plus(specs, 0.9)
    rest = (0.1 * total - 640) / (total - 640)
    alone = erk(specs[:-1], 1 - rest)
    assert plus[last.name] == 640
    assert all(abs(plus[s.name] - alone[s.name]) <= 1 for s in specs[:-1])
    with pytest.raises(InvalidArgument, match="leaves nothing"):
        erk_plus(specs, 0.999)
    with pytest.raises(InvalidArgument, match="leaves nothing"):
        uniform_plus(specs, 0.999)


@given(SHAPES, st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_the_ratios_of_masks_are_reproduced(shapes, seed):
    specs = specs_of(shapes)
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for spec in specs:
        mask = torch.rand(spec.shape, generator=generator) < torch.rand((), generator=generator)
        mask.view(-1)[0] = True
        drawn[spec.name] = mask
    record = Masks({n: MaskEntry.of(m) for n, m in drawn.items()})
    kept = {n: int(m.sum()) for n, m in drawn.items()}
    total = sum(s.weights for s in specs)
    sparsity = (total - sum(kept.values()) + 0.5) / total  # half a weight off the rounding
    assert by_masks(record)(specs, sparsity) == kept


def test_a_tensor_that_the_record_empties_keeps_a_weight():
    specs = specs_of([(10, 10, 1), (10, 10, 1)])
    empty, half = torch.zeros(10, 10, 1, 1), torch.ones(10, 10, 1, 1)
    half[:5] = 0
    record = Masks({"t0": MaskEntry.of(empty.bool()), "t1": MaskEntry.of(half.bool())})
    assert by_masks(record)(specs, 0.745) == {"t0": 1, "t1": 50}


def test_misuse_is_refused():
    nm = specs_of([(4, 4, 1)], NM(2, 4))
    for budget in ("er", "erk", "erk+", "uniform+", "global"):
        with pytest.raises(InvalidArgument, match="one density"):
            get_budget(budget)(nm, 0.5, {})
    with pytest.raises(InvalidArgument, match="unknown budget"):
        get_budget("fair")
    with pytest.raises(InvalidArgument, match="not pruned here"):
        get_budget({"other": 0.5})(specs_of([(4, 4, 1)]), 0.5)
    with pytest.raises(InvalidArgument, match="sensitivity"):
        by_sensitivity({"t0": math.nan})(specs_of([(4, 4, 1)]), 0.5)
