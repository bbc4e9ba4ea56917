"""The envelope against a general convex solver, its proximal map against a minimiser."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.models.coupling import trace
from sparseworks.weights.structured.wgsef import (
    WGSEF,
    Level,
    envelope,
    group_norms,
    proximal_scale,
)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 7))
def test_the_value_is_the_minimum_over_u(seed: int, k: int, m: int) -> None:
    g = torch.Generator().manual_seed(seed)
    norms = torch.rand(m, generator=g, dtype=torch.float64) + 0.05
    d = torch.rand(m, generator=g, dtype=torch.float64) + 0.5
    weight = (0.5 * d * norms.square()).numpy()
    solved = minimize(
        lambda u: (weight / u).sum(), [min(1.0, k / m)] * m, jac=lambda u: -weight / u**2,
        bounds=[(1e-6, 1.0)] * m, constraints={"type": "ineq", "fun": lambda u: k - u.sum()},
        method="SLSQP", options={"ftol": 1e-12, "maxiter": 500},
    )  # fmt: skip
    found = envelope(norms, k, d)
    assert found == pytest.approx(solved.fun, rel=1e-6)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.floats(0.01, 2.0))
def test_the_map_minimises_its_objective(seed: int, k: int, strength: float) -> None:
    g = torch.Generator().manual_seed(seed)
    v = torch.rand(6, generator=g, dtype=torch.float64) * 2
    scale = proximal_scale(v, k, strength)

    def objective(w: Tensor) -> float:
        return float(0.5 * (w - v).square().sum() + strength * envelope(w.clamp_min(0), k))

    best = objective(scale * v)
    for _ in range(15):
        for size in (1e-1, 1e-2, 1e-3):
            other = (scale * v + size * torch.randn(6, generator=g, dtype=torch.float64)).clamp(0)
            assert objective(other) >= best - 1e-7


@given(st.integers(1, 9))
@settings(max_examples=9, deadline=None)
def test_a_strong_map_keeps_exactly_k_groups(k: int) -> None:
    norms = torch.linspace(0.1, 1.0, 10, dtype=torch.float64) ** 4
    kept = int((proximal_scale(norms, k, 50.0) > 0).sum())
    assert k <= kept <= 10
    weak = proximal_scale(norms, k, 1e-6)
    assert weak[-1] == pytest.approx(1.0, abs=1e-4)


def test_a_weak_map_leaves_more_than_its_level() -> None:
    """Why the strength has to rise: sum u = k, but each u may be small and not 0."""
    norms = torch.linspace(0.5, 1.0, 40, dtype=torch.float64)
    left = [int((proximal_scale(norms, 5, 1e-3 * 4.0**i) > 0).sum()) for i in range(12)]
    assert left[0] > 5 and left[-1] == 5
    assert all(a >= b for a, b in pairwise(left))


def test_the_strength_rises_until_the_level_then_the_support_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2))
    coupling = trace(model, torch.zeros(1, 6))
    level = Level(model, coupling, coupling.families[0], 4)
    weight = model[0].weight
    strength, seen = 1e-3, []
    while level.support is None:
        level.step(strength, last=False)
        strength *= 1.5
        seen.append(int((weight.abs().sum(1) > 0).sum()))
    assert seen[0] == 12 and seen[-1] <= 4 and strength < 1e3
    kept = level.support.clone()
    with torch.no_grad():
        weight += 1.0
    before = weight.detach().clone()
    level.step(1e6, last=True)
    assert torch.equal(weight[kept], before[kept])  # fitted without the regulariser
    assert not weight[~kept].any() and torch.equal(level.support, kept)


def test_the_last_step_of_the_search_keeps_the_largest() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2))
    coupling = trace(model, torch.zeros(1, 6))
    norms = group_norms(model, coupling, coupling.families[0])
    level = Level(model, coupling, coupling.families[0], 4)
    level.step(1e-6, last=True)
    assert set(level.support.nonzero().flatten().tolist()) == set(norms.topk(4).indices.tolist())


def test_training_ends_at_the_level_and_the_model_runs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 3))
    x, y = torch.randn(64, 8), torch.randint(0, 3, (64,))
    fitted = WGSEF(keep=0.3).fit(model, x, lambda e: [(x, y)], epochs=60, steps_per_epoch=1)
    before, after = fitted.widths["0.weight"]
    assert before == 20 and 1 <= after <= 6
    assert model[0].weight.shape == (after, 8) and model[2].weight.shape == (3, after)
    assert model(x).shape == (64, 3)


@pytest.mark.parametrize(
    "options", [{"keep": 1.5}, {"search": 1.0}, {"strength": 0.0}, {"rise": 0.5}]
)
def test_bad_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument, match=f"{next(iter(options))}="):
        WGSEF(**options).fit(nn.Linear(2, 2), torch.zeros(1, 2), list, epochs=1, steps_per_epoch=1)
