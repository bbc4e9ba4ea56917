"""Fake-quantized weights: values and gradients against plain formulas, and what is exported."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.models.views import find_prunable
from sparseworks.training.fake_quantization import FakeQuantized, quantized_weights


def layer(seed=0, rows=3, columns=8):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(columns, rows, bias=False), nn.Linear(rows, 2))
    return model, find_prunable(model, include="0")[0]


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.sampled_from([2, 4, 8]), st.integers(0, 99), st.booleans())
def test_values_and_gradients_are_those_of_the_formula(bits, group, seed, masked):
    view = layer(seed)[1]
    kept = torch.rand(3, 8) < 0.7 if masked else torch.ones(3, 8, dtype=torch.bool)
    part = FakeQuantized(view, bits, group, kept)
    weight = (2 * torch.randn(3, 8)).requires_grad_()  # so that some codes are clamped
    out = torch.randn(3, 8)
    (part(weight) * out).sum().backward()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    d_weight, d_scale, d_zero = (
        torch.zeros(3, 8),
        torch.zeros(3, 8 // group),
        torch.zeros(3, 8 // group),
    )
    for i in range(3):
        for j in range(8):
            g = j // group
            s = float(part.scale[i, g].detach().half())
            z = float(part.zero[i, g].detach())
            x = float(weight[i, j].detach())
            code = round(float(torch.tensor(x) / torch.tensor(s))) + z
            inside = low <= code <= high
            code = min(high, max(low, code))
            value = s * (code - z) if kept[i, j] else 0.0
            assert abs(float(part(weight)[i, j].detach()) - value) < 1e-5
            up = float(out[i, j]) * float(kept[i, j])
            if inside:
                d_weight[i, j] = up  # s * 1 / s
                d_scale[i, g] += up * (code - z - x / s)
            else:
                d_scale[i, g] += up * (code - z)
                d_zero[i, g] -= up * s
    torch.testing.assert_close(weight.grad, d_weight, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(part.scale.grad, d_scale, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(part.zero.grad, d_zero, atol=1e-4, rtol=1e-3)


def test_what_is_exported_is_what_the_layer_computed_with():
    view = layer()[1]
    kept = torch.ones(3, 8, dtype=torch.bool)
    kept[1, :4] = False
    part = FakeQuantized(view, 4, 4, kept)
    with torch.no_grad():
        part.scale.mul_(1.1)
        part.zero.add_(0.4)
    raw = view.parameter.detach().clone()
    computed = part(raw)
    with pytest.raises(InvalidArgument, match="freeze"):
        part.quantized()
    part.freeze(raw)
    entry = part.quantized()
    assert torch.equal(entry.weight(), computed + 0.0)
    assert torch.equal(part(torch.full_like(raw, 9.0)), computed)
    assert not entry.live[1, 0] and entry.groups == 5
    assert entry.grid.scale[1, 0] == 0 and not entry.grid.codes[1, 0].any()


def test_layers_have_their_weights_back_afterwards_also_when_it_fails():
    model, view = layer()
    before, order = view.parameter, list(model[0]._parameters)
    with pytest.raises(ZeroDivisionError), quantized_weights(model, [FakeQuantized(view, 2, 4)]):
        assert model[0].weight.unique().numel() <= 24
        raise ZeroDivisionError
    assert view.parameter is before and list(model[0]._parameters) == order
    model[1].weight = nn.Parameter(torch.zeros(2, 8))
    tied = nn.ModuleDict({"a": nn.Linear(8, 3, bias=False), "b": nn.Linear(8, 3, bias=False)})
    tied["b"].weight = tied["a"].weight
    own = find_prunable(tied, include="a")[0]
    with (
        pytest.raises(ModelError, match="tied"),
        quantized_weights(tied, [FakeQuantized(own, 4, 4)]),
    ):
        pass


@pytest.mark.parametrize(("bits", "group"), [(1, 4), (9, 4), (4, 3)])
def test_bad_groups_are_refused(bits, group):
    with pytest.raises(InvalidArgument):
        FakeQuantized(layer()[1], bits, group)
