"""Linear layers one by one: what is chosen, and what it computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.engine import layers
from sparseworks.engine.layers import by_layers
from sparseworks.engine.products import SparseLinear
from sparseworks.kernels.native import available

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels are not built")


@pytest.fixture
def always_sparse(monkeypatch):
    """Take the sparse kernel wherever there is one, as a fast machine would."""
    monkeypatch.setattr(layers, "_ADVANTAGE", float("inf"))


def test_other_sizes_run(always_sparse):
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20))
    sw.prune(model, "magnitude", sparsity=0.9, include="*")
    twin, _, _ = by_layers(model, torch.randn(8, 40), 2)
    assert sum(isinstance(m, SparseLinear) for m in twin.modules()) == 2
    for tokens in (1, 7, 300):
        x = torch.randn(tokens, 40)
        torch.testing.assert_close(twin(x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_dense_layers_stay_dense():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8))
    twin, plans, _ = by_layers(model, torch.randn(4, 32), 2)
    assert [p.kernel for p in plans] == ["dense", "dense"]
    assert all(type(m) is nn.Linear for m in twin)
    assert plans[0].reason == "below 40% zeros"


def test_a_slower_sparse_layer_is_not_taken(monkeypatch):
    monkeypatch.setattr(layers, "interleaved_ms", lambda *runs: [1.0, 2.0][: len(runs)])
    model = nn.Sequential(nn.Linear(32, 32))
    sw.prune(model, "magnitude", sparsity=0.9)
    _, (plan,), _ = by_layers(model, torch.randn(4, 32), 2)
    assert plan.kernel == "dense" and plan.milliseconds == 1.0
