"""The envelope against a general convex solver, its proximal map against a minimiser."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.weights.structured.wgsef import WGSEF, envelope, proximal_scale


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


def test_training_ends_with_groups_cut_and_the_model_runs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 3))
    x, y = torch.randn(64, 8), torch.randint(0, 3, (64,))
    fitted = WGSEF(keep=0.3, strength=0.5).fit(
        model, x, lambda e: [(x, y)], epochs=60, steps_per_epoch=1
    )
    before, after = fitted.widths["0.weight"]
    assert before == 20 and 1 <= after < 20
    assert model[0].weight.shape == (after, 8) and model[2].weight.shape == (3, after)
    assert model(x).shape == (64, 3)


def test_bad_options_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="keep="):
        WGSEF(keep=1.5).fit(nn.Linear(2, 2), torch.zeros(1, 2), list, epochs=1, steps_per_epoch=1)
