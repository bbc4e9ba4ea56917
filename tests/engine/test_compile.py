"""A compiled model computes what its model computes, whatever was chosen for its layers."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.engine import compiling
from sparseworks.engine.compiling import SparseLinear
from sparseworks.models.calls import call

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from families import FAMILIES, make


@pytest.fixture
def always_sparse(monkeypatch):
    """Take the sparse kernel wherever there is one, as a fast machine would."""
    monkeypatch.setattr(compiling, "_ADVANTAGE", float("inf"))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_computes_the_same(name, always_sparse):
    model, batches = make(name)
    sw.prune(model, "magnitude", sparsity=0.8)
    before = copy.deepcopy(model.state_dict())
    compiled = sw.compile(model, batches[0])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for batch in batches:  # the second is another batch of the same kind
        with torch.no_grad():
            expected = compiling._tensors(call(model, batch))
            inputs = batch if isinstance(batch, dict) else {"": batch}
            got = compiled(**inputs) if isinstance(batch, dict) else compiled(batch)
        for a, b in zip(expected, compiling._tensors(got)):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)
    assert compiled.error <= 1e-4
    assert str(len(compiled.layers)) and compiled.explain().count("\n") == len(compiled.layers) + 1


def test_other_sizes_run(always_sparse):
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20))
    sw.prune(model, "magnitude", sparsity=0.9, include="*")
    compiled = sw.compile(model, torch.randn(8, 40))
    assert sum(isinstance(m, SparseLinear) for m in compiled.model.modules()) == 2
    for tokens in (1, 7, 300):
        x = torch.randn(tokens, 40)
        torch.testing.assert_close(compiled(x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_the_mask_decides_what_is_kept(always_sparse):
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    sw.prune(model, "magnitude", sparsity=0.5)
    with torch.no_grad():  # a kept weight that is 0 stays part of the layer
        model[0].weight[sw.masks(model)["0.weight"]] = 0.0
    compiled = sw.compile(model, torch.randn(2, 16))
    assert compiled.model[0].value.numel() == 128


def test_dense_models_stay_dense():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8))
    compiled = sw.compile(model, torch.randn(4, 32))
    assert [p.kernel for p in compiled.layers] == ["dense", "dense"]
    assert all(type(m) is nn.Linear for m in compiled.model)
    assert "below 40% zeros" in compiled.explain()


def test_a_slower_sparse_layer_is_not_taken(monkeypatch):
    monkeypatch.setattr(compiling, "_interleaved_ms", lambda *runs: [1.0, 2.0][: len(runs)])
    model = nn.Sequential(nn.Linear(32, 32))
    sw.prune(model, "magnitude", sparsity=0.9)
    (plan,) = sw.compile(model, torch.randn(4, 32)).layers
    assert plan.kernel == "dense" and plan.milliseconds == 1.0


def test_misuse_is_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(InvalidArgument, match="does not fit"):
        sw.compile(model, torch.randn(2, 9))
    with pytest.raises(ModelError, match="not on the CPU"):
        sw.compile(nn.Linear(2, 2, device="meta"), torch.randn(1, 2))
    with torch.no_grad():
        model[0].weight[0, 0] = float("inf")
    with pytest.raises(ModelError, match=r"0\.weight"):
        sw.compile(model, torch.randn(2, 8))
