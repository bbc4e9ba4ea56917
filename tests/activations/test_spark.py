"""Statistical top-k against scipy, finite differences and Gemma 3n; the layers; no look ahead."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import norm
from torch import nn

import sparseworks as sw
import tiny_models
from sparseworks.activations.spark import statistical_threshold, statistical_top_k
from sparseworks.activations.spark_layers import SparkAttention, SparkFeedForward
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.models.zoo import ByteDecoder


@pytest.mark.parametrize("k", [1, 80, 500, 999])
def test_the_threshold_is_a_normal_quantile(k):
    g = torch.Generator().manual_seed(k)
    x = 3 * torch.randn(5, 1000, generator=g, dtype=torch.float64) + 1
    values = x.numpy()
    wanted = values.mean(1) + values.std(1) * norm.ppf(1 - k / 1000)
    assert statistical_threshold(x, k).squeeze(1).tolist() == pytest.approx(wanted, rel=1e-12)
    visible = torch.arange(1000) < torch.tensor([[1], [k], [k + 1], [700], [1000]]).clamp(max=1000)
    found = statistical_threshold(x, k, visible).squeeze(1)
    for row, seen, theta in zip(values, visible.sum(1).tolist(), found.tolist(), strict=True):
        part = row[:seen]
        if seen <= k:
            assert theta == -math.inf
        else:
            assert theta == pytest.approx(part.mean() + part.std() * norm.ppf(1 - k / seen))


def test_about_k_of_normal_entries_are_left_and_all_where_k_is_large():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 1000, generator=g)
    count = float((statistical_top_k(x, 80) > 0).double().sum(1).mean())
    error = math.sqrt(1000 * 0.08 * 0.92 / 200)
    assert abs(count - 80) < 4 * error
    assert statistical_top_k(x, 1000) is x
    with pytest.raises(InvalidArgument, match="at least 1"):
        statistical_top_k(x, 0)


def test_gradients_pass_mean_and_deviation():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 12, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: statistical_top_k(t, 3), x)
    flat = torch.ones(2, 6, requires_grad=True)
    statistical_top_k(flat, 2).sum().backward()
    assert bool(torch.isfinite(flat.grad).all())


def test_it_is_the_mlp_of_gemma_3n():
    transformers = pytest.importorskip("transformers")
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

    torch.manual_seed(0)
    config = transformers.Gemma3nTextConfig(
        hidden_size=16, intermediate_size=[40], num_hidden_layers=1,
        activation_sparsity_pattern=[0.75],
    )  # fmt: skip
    theirs = Gemma3nTextMLP(config, layer_idx=0).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        wanted = theirs(x)
        theirs.activation_sparsity = 0.0
        model = nn.Sequential(theirs, nn.Linear(16, 16))
        run = sw.sparse_activations(model, "spark", sparsity=0.75, data=[x])
        found = theirs(x)
        run.remove()
        dense = theirs(x)
    assert torch.allclose(found, wanted, atol=1e-6) and not torch.allclose(dense, wanted, atol=1e-3)
    assert 0.1 < run.density < 0.4


def test_a_model_that_it_does_not_fit_is_refused():
    x = torch.randn(2, 1, 8, 8)
    with pytest.raises(ModelError, match="gated MLP"):
        sw.sparse_activations(tiny_models.net(), "spark", data=[x])
    with pytest.raises(ModelError, match="up_proj"):
        sw.sparse_activations(tiny_models.gated(), "spark", data=[x], include="*.down_proj")
    model = tiny_models.gated()
    model[2].act_fn = nn.Sigmoid()
    with pytest.raises(ModelError, match="at 0 is not 0"):
        sw.sparse_activations(model, "spark", data=[x])


def test_gathered_units_give_what_all_of_them_do():
    torch.manual_seed(0)
    layer = SparkFeedForward(12, 64, 6).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    assert torch.allclose(layer.gathered(x), layer(x), atol=1e-12)
    pre = x[..., :6] @ layer.gate.weight.T
    theta = pre.mean(-1) + pre.std(-1, correction=0) * norm.ppf(1 - 6 / 64)
    assert torch.equal(layer.gates(x) != 0, pre > theta[..., None])


def test_parameters_and_operations_are_counted():
    layer = SparkFeedForward(16, 96, 8)
    assert sum(p.numel() for p in layer.parameters()) == 2 * 16 * 96
    assert layer.flops(8) == 16 * 96 + 3 * 16 * 8
    with pytest.raises(InvalidArgument, match="split"):
        SparkFeedForward(16, 96, 8, split=16)


def test_attention_is_a_loop_over_queries():
    torch.manual_seed(0)
    layer = SparkAttention(8, 2, 3).double()
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    q, k, v = (layer.qkv.weight[i * 8 : i * 8 + 8] @ x[0].T for i in range(3))
    rows = []
    for t in range(9):
        heads = []
        for h in (slice(0, 4), slice(4, 8)):
            one, two = slice(h.start, h.start + 2), slice(h.start + 2, h.stop)
            s = [float(q[one, t] @ k[one, j]) / 2**0.5 for j in range(t + 1)]
            mean = sum(s) / len(s)
            std = (sum((a - mean) ** 2 for a in s) / len(s)) ** 0.5
            few = t + 1 <= 3
            theta = -math.inf if few else mean + std * norm.ppf(1 - 3 / (t + 1))
            kept = [j for j in range(t + 1) if s[j] > theta or s[j] == max(s)]
            total = sum(math.exp(s[j]) for j in kept)
            out = 0
            for j in kept:
                gate = math.log1p(math.exp(float(q[two, t] @ k[two, j]) / 2**0.5))
                out = out + math.exp(s[j]) / total * gate * v[h, j]
            heads.append(out)
        rows.append(layer.out.weight @ torch.cat(heads))
    assert torch.allclose(layer(x)[0], torch.stack(rows), atol=1e-12)


def test_a_later_token_changes_nothing_before_it():
    torch.manual_seed(0)
    model = ByteDecoder(
        16, 2, 2, context=24, mlp=lambda: SparkFeedForward(16, 32, 4),
        attention=lambda: SparkAttention(16, 2, 5),
    ).eval()  # fmt: skip
    ids = torch.randint(0, 256, (1, 24))
    other = ids.clone()
    other[0, 17:] = (other[0, 17:] + 100) % 256
    with torch.no_grad():
        a, b = model(ids), model(other)
    assert torch.equal(a[:, :17], b[:, :17]) and not torch.equal(a[:, 17:], b[:, 17:])
