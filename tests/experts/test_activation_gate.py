"""Flat directions of gates with a temperature, their likelihood by hand, and the router."""

from __future__ import annotations

import math

import pytest
import torch

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument
from sparseworks.experts.activation_gate import ActivatedRouter
from sparseworks.experts.gaussian_mixtures import (
    GATES,
    GaussianMixture,
    fisher,
    fit,
    total_variation,
    voronoi,
)
from sparseworks.models.zoo import ByteDecoder, FeedForward

D = torch.float64


def truth(gate: str) -> GaussianMixture:
    """The mixture of claim 136."""
    return GaussianMixture(
        torch.tensor([[2.0]], dtype=D), torch.tensor([-0.5], dtype=D), torch.tensor(0.5, dtype=D),
        torch.tensor([[1.0], [-1.0]], dtype=D), torch.tensor([1.0, -1.0], dtype=D),
        torch.tensor([0.25, 0.25], dtype=D), gate,
    )  # fmt: skip


def data(gate: str, n: int):
    g = torch.Generator().manual_seed(n)
    x = 1.5 * torch.randn(n, 1, generator=g, dtype=D)
    return x, truth(gate).sample(x, g)


@pytest.mark.parametrize("gate", GATES)
def test_only_homogeneous_gates_have_a_flat_direction(gate):
    found = torch.linalg.eigh(fisher(truth(gate), *data(gate, 4000)))
    least = float(found.eigenvalues[0])
    if gate not in ("identity", "relu"):
        assert least > 1e-5
        return
    assert abs(least) < 1e-12 < float(found.eigenvalues[1])
    flat = torch.zeros(9, dtype=D)
    flat[:3] = torch.tensor([2.0, -0.5, 0.5])
    assert float((found.eigenvectors[:, 0] @ flat).abs() / flat.norm()) == pytest.approx(1)


@pytest.mark.parametrize("gate", GATES)
def test_the_density_is_the_sum_over_experts_and_integrates_to_one(gate):
    m = truth(gate)
    for x, y in ((0.7, 1.9), (-1.2, 0.3)):
        sigma = [float(GATES[gate](torch.tensor(z, dtype=D))) for z in (2 * x, 0.0)]
        e = [math.exp((sigma[0] - 0.5) / 0.5), math.exp(sigma[1] / 0.5)]
        normal = [
            math.exp(-((y - a * (x + 1)) ** 2) / 0.5) / math.sqrt(2 * math.pi * 0.25)
            for a in (1, -1)
        ]
        wanted = sum(p * n for p, n in zip(e, normal)) / sum(e)
        found = m.log_density(torch.tensor([[x]], dtype=D), torch.tensor([y], dtype=D)).exp()
        assert float(found) == pytest.approx(wanted, rel=1e-12)
    x = torch.tensor([[0.3]], dtype=D)
    y = torch.linspace(-8, 8, 4001, dtype=D)
    whole = m.log_density(x.expand(4001, 1), y).exp().sum() * (y[1] - y[0])
    assert float(whole) == pytest.approx(1, abs=1e-9)


def test_a_fit_comes_back_and_the_losses_are_zero_at_the_truth():
    m = truth("tanh")
    x, y = data("tanh", 8000)
    found = fit(m.with_vector(m.vector() * 1.1), x, y)
    assert float(found.log_density(x, y).mean()) >= float(m.log_density(x, y).mean())
    assert total_variation(found, m, x[:20]) < 0.03
    assert 0 < voronoi(found, m) < voronoi(m.with_vector(m.vector() * 1.5), m)
    assert voronoi(m, m) == 0 and total_variation(m, m, x[:3]) == 0


def test_the_voronoi_loss_of_a_split_component():
    """Two fitted components for the first true one, by hand."""
    m = truth("identity")
    three = GaussianMixture(
        torch.tensor([[2.1], [1.9]], dtype=D), torch.tensor([-0.8, -0.9], dtype=D), m.tau,
        torch.tensor([[1.0], [1.2], [-1.0]], dtype=D), torch.tensor([1.1, 1.0, -1.0], dtype=D),
        torch.tensor([0.25, 0.35, 0.25], dtype=D),
    )  # fmt: skip
    mass = [math.exp(-1.6), math.exp(-1.8)]
    wanted = abs(sum(mass) - math.exp(-1.0))
    wanted += mass[0] * (0.1**2 + 0.1**4) + mass[1] * (0.1**2 + 0.2**2 + 0.1**2)
    assert voronoi(three, m) == pytest.approx(wanted)


def test_the_router_is_its_equation_and_copies_leave_the_function():
    torch.manual_seed(0)
    router = ActivatedRouter(4, 6, activation="tanh", tau=0.3, least=0.05)
    with torch.no_grad():
        router.weight.normal_()
        router.bias.normal_()
    x = torch.randn(7, 6)
    found = router(x)
    for row, weights, chosen in zip(x, found.weights, found.chosen):
        p = ((torch.tanh(router.weight @ row) + router.bias) / 0.3).softmax(0)
        kept = p > 0.05
        assert torch.equal(kept, chosen) and int(kept.sum()) > 0
        assert torch.allclose(weights, p * kept / p[kept].sum(), atol=1e-6)
    assert not bool(found.chosen.all())
    found.weights.square().sum().backward()
    assert float(router.log_tau.grad.abs()) > 0
    model = ByteDecoder(16, 1, 2, mlp=lambda: FeedForward(16, 24))
    ids = torch.randint(0, 256, (2, 10))
    with torch.no_grad():
        before = model(ids)
        sw.upcycle(model, "activation-gate", experts=3)
        assert torch.allclose(model(ids), before, atol=1e-5)
    for wrong in ({"activation": "sine"}, {"tau": 0.0}, {"least": 1.0}):
        with pytest.raises(InvalidArgument):
            sw.upcycle(ByteDecoder(16, 1, 2, mlp=lambda: FeedForward(16, 24)), "activation-gate",
                       **wrong)  # fmt: skip
