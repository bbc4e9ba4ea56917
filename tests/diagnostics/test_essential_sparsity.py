"""Essential sparsity: s* by its definition, the kink by brute force, the overlap by sets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import DataError, InvalidArgument
from sparseworks.diagnostics.essential_sparsity import (
    Curve,
    EssentialSparsity,
    near_zero,
    one_breakpoint,
    overlap,
)
from sparseworks.diagnostics.metrics import Metric


def energy(model):
    """Share of the weights' squared norm that is left, of a net whose dense norm is 1."""
    return float(sum(p.detach().square().sum() for p in model.parameters() if p.ndim == 2))


def net(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 12))
    with torch.no_grad():
        model[0].weight.mul_(3.0)  # a global threshold must differ from one per tensor
        norm = math.sqrt(energy(model))
        for p in model.parameters():
            p.div_(norm)
    return model


def test_the_curve_is_that_of_sorted_magnitudes():
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    curve = EssentialSparsity()(model, energy, include="*")
    weights = np.sort(
        np.concatenate([model[i].weight.detach().numpy().ravel() ** 2 for i in (0, 2)])
    )
    for s, value, drop in zip(curve.sparsities, curve.values, curve.drops):
        gone = weights[: round(s * len(weights))].sum()
        assert value == pytest.approx(1 - gone, abs=1e-5)
        assert drop == pytest.approx(gone, abs=1e-5)
    free = [s for s in curve.sparsities if weights[: round(s * len(weights))].sum() <= 0.01]
    assert curve.essential == max(free)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert sw.masks(model) is None


def test_random_pruning_is_not_free():
    """A random mask at s removes about s of the energy, the smallest weights far less."""
    by_size = EssentialSparsity()(net(), energy, include="*")
    drawn = EssentialSparsity(method="random")(net(), energy, include="*")
    assert drawn.essential == 0.0
    for s, drop in list(zip(drawn.sparsities, drawn.drops))[1:]:
        assert drop == pytest.approx(s, abs=0.1)
    assert by_size.breakpoint.sharpness > 2 * drawn.breakpoint.sharpness


def test_lower_is_better_reads_the_inverse():
    rising = Metric("energy", "", True, energy)
    falling = Metric("inverse", "", False, lambda m: 1 / energy(m))
    up, down = (EssentialSparsity()(net(), m, include="*") for m in (rising, falling))
    assert up.drops == pytest.approx(down.drops, abs=1e-6)
    assert up.essential == down.essential


def test_the_dense_point_is_tuned_too_and_masks_are_there_before():
    seen = []

    def tune(model):
        seen.append(None if sw.masks(model) is None else sw.masks(model).sparsity())

    EssentialSparsity(sparsities=(0.2, 0.5, 0.8))(net(), energy, tune=tune, include="*")
    assert seen[0] is None
    assert seen[1:] == pytest.approx([0.2, 0.5, 0.8], abs=1e-3)


@given(
    st.lists(st.integers(-50, 200), min_size=3, max_size=9),
    st.floats(0, 1),
)
def test_essential_is_the_end_of_the_free_stretch(percents, tolerance):
    drops = (0.0, *(p / 100 for p in percents))
    grid = tuple(i / 10 for i in range(len(drops)))
    found = Curve("m", grid, drops, drops, tolerance).essential
    assert all(d <= tolerance for s, d in zip(grid, drops) if s <= found)
    after = [d for s, d in zip(grid, drops) if s > found]
    assert not after or after[0] > tolerance


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(5, 10))
def test_the_kink_is_the_best_of_a_fine_search(seed, n):
    g = np.random.default_rng(seed)
    x = np.sort(g.choice(np.arange(40), n, replace=False)) / 40
    y = np.maximum(0, x - g.uniform(x[1], x[-2])) * g.uniform(-5, 5) + 0.1 * g.normal(size=n)
    found = one_breakpoint(x.tolist(), y.tolist())
    best = math.inf
    for k in np.linspace(x[1], x[-2], 400):
        design = np.stack([np.ones(n), x, np.maximum(0, x - k)], 1)
        w = np.linalg.lstsq(design, y, rcond=None)[0]
        best = min(best, float(((design @ w - y) ** 2).sum()))
    assert found.residual <= best + 1e-9
    assert x[1] <= found.at <= x[-2]
    line = found.start + found.before * x
    fitted = line + (found.after - found.before) * np.maximum(0, x - found.at)
    assert float(((fitted - y) ** 2).sum()) == pytest.approx(found.residual, abs=1e-9)


def test_a_true_kink_is_found_exactly():
    x = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    y = [1 + 0.2 * v + 3 * max(0.0, v - 0.63) for v in x]
    found = one_breakpoint(x, y)
    assert (found.at, found.before, found.after) == pytest.approx((0.63, 0.2, 3.2), abs=1e-9)
    assert found.sharpness == pytest.approx(16)


def test_near_zero_does_not_see_the_scale():
    model = net()
    plain = near_zero(model, 0.3, include="*")
    weight = model[0].weight.detach().numpy()
    assert plain["0.weight"] == pytest.approx((np.abs(weight) < 0.3 * weight.std()).mean())
    with torch.no_grad():
        model[0].weight.mul_(64.0)
    assert near_zero(model, 0.3, include="*") == plain


@given(st.integers(0, 999), st.floats(0.05, 0.95))
def test_overlap_counts_sets(seed, density):
    g = torch.Generator().manual_seed(seed)
    a, b = ({n: torch.rand(6, 5, generator=g) < density for n in "uv"} for _ in range(2))
    first, second = (
        {(n, i) for n in "uv" for i, on in enumerate(r[n].flatten().tolist()) if on} for r in (a, b)
    )
    if not first or not second:
        with pytest.raises(InvalidArgument, match="keeps no weight"):
            overlap(a, b)
        return
    found = overlap(a, b)
    assert found["iou"] == pytest.approx(len(first & second) / len(first | second))
    cosine = len(first & second) / math.sqrt(len(first) * len(second))
    assert found["cosine"] == pytest.approx(cosine)
    assert overlap(a, a) == pytest.approx({"iou": 1.0, "cosine": 1.0})


def test_what_is_refused():
    with pytest.raises(InvalidArgument, match="unknown method"):
        EssentialSparsity(method="magnitud")
    with pytest.raises(InvalidArgument, match="not one-shot"):
        EssentialSparsity(method="rigl")
    with pytest.raises(InvalidArgument, match="rise"):
        EssentialSparsity(sparsities=(0.5, 0.4, 0.9))
    with pytest.raises(InvalidArgument):
        EssentialSparsity(sparsities=(0.5, 0.7, 1.2))
    with pytest.raises(InvalidArgument, match="tolerance"):
        EssentialSparsity(tolerance=-0.1)
    with pytest.raises(DataError, match="positive"):
        EssentialSparsity()(net(), lambda m: 0.0, include="*")
    with pytest.raises(InvalidArgument, match="4 points"):
        one_breakpoint([0, 1, 2], [0, 1, 2])
    with pytest.raises(InvalidArgument, match="rise"):
        one_breakpoint([0, 1, 1, 2], [0, 1, 2, 3])
    with pytest.raises(InvalidArgument, match="different weights"):
        overlap({"a": torch.ones(2, dtype=torch.bool)}, {"b": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(InvalidArgument, match="epsilon"):
        near_zero(net(), 0.0)


def test_it_is_in_the_catalogue():
    from sparseworks.report.catalogue import catalogue_markdown

    assert sw.methods.EssentialSparsity is EssentialSparsity
    assert "`sw.methods.EssentialSparsity()(model, metric)`" in catalogue_markdown()
