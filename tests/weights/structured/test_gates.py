"""Gates of 0 and 1 compute what the cut model computes; gates between scale activations."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vit import TinyViT
from torch import nn
from torch.nn import functional as F

from sparseworks.core.errors import ModelError
from sparseworks.models.coupling import trace
from sparseworks.weights.structured.cutting import cut
from sparseworks.weights.structured.gates import Gates

torch.manual_seed(0)
VIT = TinyViT().eval()
X = torch.randn(3, 1, 8, 8)
COUPLING = trace(VIT, X)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000))
def test_binary_gates_equal_the_cut_model_for_every_family(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    families = list(COUPLING.families)
    keep = COUPLING.keep_all()
    gates = Gates(VIT, COUPLING, families)
    for i, family in enumerate(families):
        on = torch.rand(len(family), generator=g) < 0.6
        on[int(torch.randint(len(family), (), generator=g))] = True
        gates.values[i] = on.float()
        keep[family.roots[~on.numpy()]] = False
    with torch.no_grad(), gates:
        gated = VIT(X)
    smaller = copy.deepcopy(VIT)
    cut(smaller, COUPLING, keep)
    assert smaller.head.weight.shape[1] < 16 or keep.all()
    torch.testing.assert_close(gated, smaller(X), rtol=1e-4, atol=1e-5)


def test_a_gate_scales_the_activation_before_its_consumer() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 2)).double()
    x = torch.randn(4, 5).double()
    coupling = trace(net, x)
    z = torch.rand(7).double()
    gates = Gates(net, coupling, coupling.families)
    gates.values[0] = z
    with gates:
        found = net(x)
    torch.testing.assert_close(found, net[2](F.gelu(net[0](x)) * z))


def test_the_context_leaves_the_model_as_it_was_and_gradients_reach_gates_and_weights() -> None:
    model = copy.deepcopy(VIT)
    before = dict(model.named_parameters())
    state = copy.deepcopy(model.state_dict())
    kinds = [type(m) for m in model.modules()]
    gates = Gates(model, trace(model, X), COUPLING.families)
    learned = [torch.full_like(v, 0.7, requires_grad=True) for v in gates.values]
    gates.values = list(learned)
    with gates:
        model(X).square().sum().backward()
    assert all(v.grad is not None and v.grad.abs().sum() > 0 for v in learned)
    assert all(p.grad is not None for p in before.values())
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[n] is before[n] for n in before)
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    assert [type(m) for m in model.modules()] == kinds
    assert not any(m._forward_hooks for m in model.modules())


def test_fused_gates_compute_the_same() -> None:
    model = copy.deepcopy(VIT)
    exact = [f for f in COUPLING.families if f.exact]
    gates = Gates(model, COUPLING, exact)
    for i, v in enumerate(gates.values):
        gates.values[i] = torch.rand_like(v)
    with torch.no_grad(), gates:
        gated = model(X)
    gates.fuse()
    torch.testing.assert_close(model(X), gated)


def test_a_statistic_that_cannot_be_weighted_is_refused_by_name() -> None:
    norm = nn.LayerNorm(8, elementwise_affine=False)
    net = nn.Sequential(nn.Linear(4, 8), norm, nn.Linear(8, 2))
    coupling = trace(net, torch.randn(3, 4))
    inexact = [f for f in coupling.families if not f.exact]
    assert inexact
    with pytest.raises(ModelError, match="statistic"):
        Gates(net, coupling, inexact)
