"""Weights that read the same tensor share their sums, and nothing else changes by it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.evidence import Hessian, InputMoments, InputNorm
from sparseworks.models.calibration import Calibration, collect
from sparseworks.models.sharing import Sharing
from sparseworks.models.views import find_prunable
from sparseworks.weights.oneshot import obs, sparsegpt

sys.path.insert(0, str(Path(__file__).parent))
from families import FAMILIES, make


def _all(view, device):
    return [k(view.groups, view.shape[1], device) for k in (InputNorm, InputMoments, Hessian)]


def _seen(model, batches, monkeypatch, share=True):
    with monkeypatch.context() as patch:
        if not share:
            patch.setattr(Sharing, "covers", lambda *_: False)
        return collect(model, list(find_prunable(model)), Calibration(batches), _all)


def _sharers(found):
    """Names by the sums they share."""
    groups = {}
    for name, (_, _, hessian) in found.items():
        groups.setdefault(hessian.gram.data_ptr(), []).append(name)
    return [g for g in groups.values() if len(g) > 1]


def _same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        for one, other in zip(a[name], b[name], strict=True):
            assert one.samples == other.samples and torch.equal(one.tokens, other.tokens), name
            for x, y in zip(one.tensors(), other.tensors(), strict=True):
                assert torch.equal(x, y), name


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_sums_of_every_family_are_those_gathered_for_each(name, monkeypatch):
    model, batches = make(name)
    _same(_seen(model, batches, monkeypatch), _seen(model, batches, monkeypatch, share=False))


def test_query_key_value_share_and_gate_up(monkeypatch):
    model, batches = make("llama")
    found = _sharers(_seen(model, batches, monkeypatch))
    kinds = {tuple(n.rpartition(".weight")[0].rpartition(".")[2] for n in g) for g in found}
    assert kinds == {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}
    assert len(found) == 2 * model.config.num_hidden_layers


class Two(nn.Module):
    """Two layers on one tensor, or on what `between` makes of it."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 2)
        self.between = between

    def forward(self, x):
        x = x * 1
        y = self.a(x)
        return self.head(y + self.b(self.between(x)))


def _changed(x):
    return x.add_(1)


def _freed(x):
    return x.clone()


def _turned(x):
    return x.t().contiguous().t()


def _later(x):
    return x if float(x[0, 0]) < 0 else x + 1  # the same in the first batch only


@pytest.mark.parametrize("between", [_changed, _freed, _turned, _later])
def test_other_numbers_are_other_inputs(between, monkeypatch):
    torch.manual_seed(0)
    model = Two(between).eval()
    batches = [torch.randn(7, 6).abs() for _ in range(3)]
    batches[0].neg_()
    found = _seen(model, batches, monkeypatch)
    assert not _sharers(found)
    _same(found, _seen(model, batches, monkeypatch, share=False))
    x = torch.cat(batches).double()
    torch.testing.assert_close(found["a.weight"][2].gram[0].double(), x.t() @ x, rtol=1e-5, atol=0)


def test_memory_that_is_used_again_is_not_taken_for_the_same_inputs(monkeypatch):
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 2)

        def forward(self, x):
            y = self.a(x + 0)  # freed after it
            return self.head(self.b(y + 0))

    torch.manual_seed(0)
    model = Chain().eval()
    batches = [torch.randn(300, 64) for _ in range(2)]
    found = _seen(model, batches, monkeypatch)
    assert not _sharers(found)
    _same(found, _seen(model, batches, monkeypatch, share=False))


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_pruned_bit_for_bit_as_without(method, pattern, monkeypatch):
    pruned = []
    for share in (True, False):
        model, batches = make("llama")
        with monkeypatch.context() as patch:
            if not share:
                patch.setattr(Sharing, "covers", lambda *_: False)
            sw.prune(model, method, sparsity=0.5, pattern=pattern, data=batches)
        pruned.append(model.state_dict())
    assert all(torch.equal(pruned[0][n], pruned[1][n]) for n in pruned[0])


def test_a_shared_hessian_is_factored_once(monkeypatch):
    model, batches = make("llama")
    sizes = []

    def counted(hessian, **options):
        sizes.append(len(hessian))
        return obs.upper_factor(hessian, **options)

    monkeypatch.setattr(sparsegpt, "upper_factor", counted)
    sw.prune(model, "sparsegpt", sparsity=0.5, data=batches)
    assert len(sizes) == 4 * model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "mixtral"])
def test_the_error_is_that_of_the_hessian(name, monkeypatch):
    """Where outputs were seen (no bias, one matrix) their squares stand for 1/2 tr(W H W^T)."""
    if name not in FAMILIES:
        pytest.skip("no such family")
    errors = []
    for seen in (True, False):
        model, batches = make(name)
        with monkeypatch.context() as patch:
            if not seen:
                patch.setattr(Hessian, "reads_power", False)
            result = sw.prune(model, "sparsegpt", sparsity=0.5, data=batches)
        errors.append([t.error for t in result.tensors])
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)
    assert (errors[0] != errors[1]) == (name in ("llama", "mixtral"))
