"""Top-k of hidden units against a loop; what is counted; the gradient at initialisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.activations.lazy_neuron import first_gradient, unit_densities
from sparseworks.core.errors import ModelError
from sparseworks.models.zoo import FeedForward


@pytest.mark.parametrize("keep", [1, 5, 16])
def test_it_is_a_loop_over_tokens_with_gradients_through_kept_units_only(keep):
    torch.manual_seed(keep)
    model = nn.Sequential(FeedForward(8, 16, F.relu, bias=False), nn.Linear(8, 8)).double()
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    run = sw.sparse_activations(model, "lazy-neuron", sparsity=1 - keep / 16, data=[x])
    found = model(x)
    hidden = F.relu(x.flatten(0, 1) @ model[0].up.weight.T).detach().requires_grad_()
    parts = []
    for row in hidden:
        kept = sorted(range(16), key=lambda i: (-row[i].item(), i))[:keep]
        parts.append(sum(row[i] * model[0].down.weight[:, i] for i in kept))
    wanted = model[1](torch.stack(parts)).view_as(found)
    assert torch.allclose(found, wanted, atol=1e-12)
    wanted.square().sum().backward()
    seen = []
    model[0].up.register_full_backward_hook(lambda m, i, o: seen.append(o[0]))
    model(x.requires_grad_()).square().sum().backward()
    through_relu = hidden.grad * (hidden > 0)
    assert torch.allclose(seen[0].flatten(0, 1), through_relu, atol=1e-12)
    assert int((seen[0] != 0).sum(-1).max()) <= keep
    run.remove()


def test_a_model_without_mlps_is_refused():
    with pytest.raises(ModelError, match="ends an MLP"):
        sw.sparse_activations(nn.Linear(4, 4), "lazy-neuron", data=[torch.randn(2, 4)])


def test_dead_units_are_told_from_sparse_ones():
    model = FeedForward(2, 3, F.relu, bias=False)
    with torch.no_grad():
        model.up.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]))
    x = torch.tensor([[1.0, 0.0], [2.0, 1.0], [3.0, 0.0], [-1.0, 0.0]])
    [seen] = unit_densities(model, ["down"], [x[:3], x[3:]])
    assert seen.frequency.tolist() == [0.75, 0.25, 0.0]
    assert (seen.density, seen.dead, seen.live_density) == pytest.approx((1 / 3, 1 / 3, 0.5))


def test_the_first_gradient_is_its_monte_carlo_mean():
    """Over random V, with the part of mean 0 at p = 1/C taken out to see the rest."""
    g = torch.Generator().manual_seed(0)
    classes, units, deviation, draws = 10, 32, 0.02, 40_000
    a = torch.randn(units, generator=g, dtype=torch.float64).relu()
    v = deviation * torch.randn(draws, classes, units, generator=g, dtype=torch.float64)
    label = torch.randint(0, classes, (draws,), generator=g)
    hidden = a.expand(draws, units).clone().requires_grad_()
    logits = torch.einsum("ncu,nu->nc", v, hidden)
    F.cross_entropy(logits, label, reduction="sum").backward()
    chance = torch.full((draws, classes), 1 / classes, dtype=torch.float64)
    chance -= F.one_hot(label, classes)
    seen = (hidden.grad - torch.einsum("ncu,nc->nu", v, chance)).mean(0)
    wanted = first_gradient(a, deviation**2, classes)
    active = a > 0
    assert bool((seen[active] > 0).all())
    assert float(seen[active].sum() / wanted.sum()) == pytest.approx(1, abs=0.02)
