"""The penalties against plain formulas on recomputed attention; what they do to it; the laws."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.models.zoo.vit import ViT
from sparseworks.weights.dynamic.sparse_regularization import AttentionProbabilities

X = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 3


def vit():
    torch.manual_seed(0)
    model = ViT(8, 4, 1, dim=8, depth=2, heads=2, classes=3)
    with torch.no_grad():
        for block in model.blocks:  # away from uniform attention
            block.attention.query.weight.mul_(6)
            block.attention.key.weight.mul_(6)
    return model


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = x.flatten(1).view(len(x), 8, 8)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def plain_attention(model, x):
    """Attention probabilities by hand, in torch's functions only."""
    found = []
    if isinstance(model, ViT):
        t = model.patches(x).flatten(2).transpose(1, 2)
        t = torch.cat([model.token.expand(len(x), -1, -1), t], 1) + model.positions
        for block in model.blocks:
            h = block.norm1(t)
            q, k = block.attention.query(h), block.attention.key(h)
            found.append([q, k])
            t = block(t)
    else:
        t = x.flatten(1).view(len(x), 8, 8)
        for layer in model.layers:
            w, b = layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias
            q, k, _ = (t @ w.T + b).chunk(3, -1)
            found.append([q, k])
            t = layer(t)
    return [
        torch.stack([torch.softmax(a @ c.mT / 2.0, -1) for a, c in
                     zip(q.split(4, -1), k.split(4, -1))], 1)
        for q, k in found
    ]  # fmt: skip


@pytest.mark.parametrize("layers", ["last", "mean"])
@pytest.mark.parametrize("kind", ["log", "entropy"])
@pytest.mark.parametrize("make", [vit, Encoder])
def test_attention_penalties_and_gradients_are_their_formulas(make, kind, layers):
    torch.manual_seed(1)
    model = make()
    plain = copy.deepcopy(model)
    job = sw.transform(
        model, "sparse-then-prune", sparsity=0.5, penalty_kind=kind, strength=3.0, layers=layers
    )
    model(X)
    ours = job.penalty()
    maps = plain_attention(plain, X)
    if layers == "last":
        maps = maps[-1:]
    total = torch.zeros(())
    for a in maps:
        rows = a.reshape(-1, a.shape[-1])
        value = (1 + rows**2).log() if kind == "log" else -rows * rows.log() * rows.shape[1]
        total = total + value.mean() / len(maps)
    torch.testing.assert_close(ours, 3.0 * total, rtol=1e-4, atol=1e-6)
    ours.backward()
    (3.0 * total).backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters()):
        if b.grad is not None and float(b.grad.abs().max()) > 1e-9:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_watching_changes_no_output_of_multihead_attention():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(3, 5, 8)
    calls = [{}, {"need_weights": False}, {"average_attn_weights": False}]
    before = [attention(x, x, x, **c) for c in calls]
    recorder = AttentionProbabilities(attention)
    after = [attention(x, x, x, **c) for c in calls]
    for (a, p), (b, q) in zip(before, after):
        torch.testing.assert_close(a, b)
        assert (p is None) == (q is None)
        if p is not None:
            torch.testing.assert_close(p, q)
    recorder.remove()
    assert not attention._forward_hooks and not attention._forward_pre_hooks


def test_hugging_face_eager_attention_is_seen_and_fused_attention_is_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        image_size=8, patch_size=4, num_channels=1, num_labels=3,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.ViTForImageClassification(config).train()
    job = sw.transform(model, "sparse-then-prune", sparsity=0.5, layers="mean")
    seen = model(X, output_attentions=True).attentions
    expected = torch.stack([torch.log(1 + a**2).mean() for a in seen]).mean()
    torch.testing.assert_close(job.penalty(), 0.01 * expected)
    config._attn_implementation = "sdpa"
    model = transformers.ViTForImageClassification(config).train()
    job = sw.transform(model, "sparse-then-prune", sparsity=0.5)
    model(X)
    with pytest.raises(ModelError, match="eager"):
        job.penalty()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12))
def test_the_papers_penalty_is_least_for_uniform_and_most_for_one_hot_rows(seed, n):
    g = torch.Generator().manual_seed(seed)
    a = torch.softmax(3 * torch.randn(5, n, generator=g, dtype=torch.float64), -1)
    r = torch.log1p(a.square()).mean()
    assert math.log(1 + 1 / n**2) - 1e-12 <= float(r) <= math.log(2) / n + 1e-12


@pytest.mark.parametrize("kind,rises", [("log", True), ("entropy", False)])
def test_the_papers_penalty_flattens_attention_and_entropy_sharpens_it(kind, rises):
    model = vit()
    job = sw.transform(
        model, "sparse-then-prune", sparsity=0.5, penalty_kind=kind, strength=100.0, layers="mean"
    )
    optimizer = torch.optim.SGD(job.parameter_groups(), 0.005)
    job.attach(optimizer)

    def entropy():
        maps = plain_attention(model, X)
        return float(sum(torch.special.entr(a).sum(-1).mean() for a in maps).detach())

    before = entropy()
    for _ in range(20):
        optimizer.zero_grad()
        model(X)
        job.penalty().backward()
        optimizer.step()
    assert (entropy() > before) == rises


@pytest.mark.parametrize("kind", ["log", "l1", "log-weights"])
def test_finish_prunes_the_smallest_of_all_tensors_together(kind):
    model = vit()
    job = sw.transform(
        model, "sparse-then-prune", sparsity=0.7, include="*", penalty_kind=kind, strength=0.1
    )
    optimizer = torch.optim.SGD(job.parameter_groups(), 0.05)
    job.attach(optimizer)
    if kind == "log-weights":
        w = torch.cat([p.detach().flatten() for p in job.parameters.values()])
        expected = 0.1 * torch.log(1 + (w / 0.01) ** 2).mean()
        torch.testing.assert_close(job.penalty().detach(), expected)
    for _ in range(3):
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(X), Y) + job.penalty()).backward()
        optimizer.step()
    trained = {n: p.detach().clone() for n, p in job.parameters.items()}
    record = job.finish()
    assert "head.weight" in record and sw.masks(model).violations(model) == {}
    values = torch.cat([t.abs().flatten() for t in trained.values()])
    number = len(values) - round(0.7 * len(values))
    edge = values.sort(descending=True).values[number - 1]
    for name, t in trained.items():
        mask = t.abs() >= edge
        assert torch.equal(record[name], mask)
        assert torch.equal(model.get_parameter(name).detach(), t * mask)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_resuming_is_exact():
    def make():
        model = vit()
        job = sw.transform(model, "sparse-then-prune", sparsity=0.6, strength=1.0, steps=8)
        optimizer = torch.optim.AdamW(job.parameter_groups(), 0.01)
        job.attach(optimizer)
        return model, optimizer, job

    def train(model, optimizer, job, steps):
        for step in steps:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(X.roll(step, 0)), Y.roll(step, 0))
            (loss + job.penalty()).backward()
            optimizer.step()

    whole = make()
    train(*whole, range(5))
    saved = copy.deepcopy([part.state_dict() for part in whole])
    train(*whole, range(5, 8))
    again = make()
    for part, state in zip(again, saved):
        part.load_state_dict(state)
    train(*again, range(5, 8))
    whole[2].finish(), again[2].finish()
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), again[0].parameters()))


def test_misuse_is_refused_before_anything_changes():
    plain = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = copy.deepcopy(plain.state_dict())
    with pytest.raises(ModelError, match="no attention"):
        sw.transform(plain, "sparse-then-prune", sparsity=0.5)
    for options in ({"penalty_kind": "l3"}, {"layers": "first"}, {"strength": -1.0}):
        with pytest.raises(InvalidArgument, match="sparse-then-prune"):
            sw.transform(vit(), "sparse-then-prune", sparsity=0.5, **options)
    assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items())
