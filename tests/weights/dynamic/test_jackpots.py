"""Lottery jackpots: against a plain simulation, and the laws of the search."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument
from sparseworks.weights.dynamic.jackpots import Jackpots, moved


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 16),
        nn.ReLU(), nn.Linear(16, 5),
    )  # fmt: skip


def train(model, job, count, lr=0.5, seed=1, check=lambda: None):
    optimizer = torch.optim.SGD(job.parameter_groups(), lr=lr, momentum=0.9)
    job.attach(optimizer)
    g = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x, y = torch.randn(16, 3, 6, 6, generator=g), torch.randint(0, 5, (16,), generator=g)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        check()


def plain_trade(mask, scores, rate):
    """The rule of the paper in lists."""
    m, s = mask.flatten().tolist(), scores.flatten().tolist()
    order = sorted(range(len(s)), key=lambda i: (-s[i], not m[i], i))
    top = set(order[: sum(m)])
    come = sorted((i for i in top if not m[i]), key=lambda i: (-s[i], i))
    go = sorted((i for i in range(len(s)) if m[i] and i not in top), key=lambda i: (s[i], i))
    for i in come[: math.ceil(rate * len(come))]:
        m[i] = True
    for i in go[: math.ceil(rate * len(come))]:
        m[i] = False
    return torch.tensor(m).view(mask.shape)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.booleans())
def test_trades_are_those_of_the_plain_rule(seed, rate, ties):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(5, 7, generator=g) < 0.4
    scores = torch.randn(5, 7, generator=g)
    if ties:
        scores = scores.round()
    after = moved(mask, scores, rate)
    assert torch.equal(after, plain_trade(mask, scores, rate))
    assert int(after.sum()) == int(mask.sum())
    if rate == 1.0:  # every kept score at least every masked one
        kept, masked = scores[after], scores[~after]
        assert not len(kept) or not len(masked) or kept.min() >= masked.max()


@pytest.mark.parametrize("restrict", [True, False])
def test_a_linear_search_equals_a_simulation(restrict):
    torch.manual_seed(3)
    layer = nn.Linear(12, 6, bias=False)
    weight = layer.weight.detach().double().clone()
    job = sw.transform(
        layer.double(), "jackpots", sparsity=0.75, steps=8, restrict=restrict, include="*"
    )
    threshold = weight.abs().flatten().sort().values[-18]
    mask = weight.abs() >= threshold
    scores = torch.where(mask, 1.0, 0.99).double()
    optimizer = torch.optim.SGD(job.parameter_groups(), lr=0.3)
    job.attach(optimizer)
    g = torch.Generator().manual_seed(0)
    changed = False
    for step in range(8):
        x = torch.randn(20, 12, generator=g, dtype=torch.float64)
        y = torch.randn(20, 6, generator=g, dtype=torch.float64)
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()
        error = 2 * (x @ (weight * mask).T - y) / y.numel()
        scores = scores - 0.3 * (error.T @ x) * weight
        before = mask
        mask = plain_trade(mask, scores.float(), (1 - step / 8) ** 4 if restrict else 1.0)
        changed = changed or not torch.equal(before, mask)
        assert torch.equal(job.masks["weight"], mask)
    assert changed
    job.finish()
    assert torch.equal(layer.weight, torch.where(mask, weight, 0.0))


def test_no_weight_changes_and_densities_hold():
    model, plain = net(), net()
    job = sw.transform(model, "jackpots", sparsity=0.8, steps=12)
    kept = {n: int(m.sum()) for n, m in job.masks.items()}
    magnitude = sw.prune(net(), "magnitude", sparsity=0.8, budget="global").masks
    assert all(torch.equal(job.masks[n], magnitude[n]) for n in magnitude)

    def check():
        assert {n: int(m.sum()) for n, m in job.masks.items()} == kept

    train(model, job, 12, check=check)
    record = job.finish()
    assert "6.weight" not in record
    assert any(not torch.equal(record[n], magnitude[n]) for n in record)
    for name, value in plain.named_parameters():
        now = model.get_parameter(name)
        assert now.requires_grad
        expected = torch.where(record[name], value, 0.0) if name in record else value
        assert torch.equal(now, expected), name
    assert not torch.equal(model[1].running_mean, plain[1].running_mean)


def test_the_search_lowers_the_loss_it_follows():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 6, 6, generator=g)
    y = net(seed=9)(x).argmax(1).detach()  # a task that the model can learn by mask alone
    model = net()
    job = sw.transform(model, "jackpots", sparsity=0.5, steps=60)
    optimizer = torch.optim.SGD(job.parameter_groups(), lr=1.0, momentum=0.9)
    job.attach(optimizer)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_random_first_masks_have_the_same_densities():
    by_size = sw.transform(net(), "jackpots", sparsity=0.8, restrict=False)
    at_random = sw.transform(net(), "jackpots", sparsity=0.8, restrict=False, first="random")
    for name, mask in by_size.masks.items():
        other = at_random.masks[name]
        assert int(mask.sum()) == int(other.sum()) and not torch.equal(mask, other)


def test_half_precision_keeps_fine_scores():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).bfloat16()
    job = sw.transform(model, "jackpots", sparsity=0.8, steps=4, budget="uniform", include="*")
    optimizer = torch.optim.SGD(job.parameter_groups(), lr=0.1)
    job.attach(optimizer)
    assert all(p.dtype == torch.float32 for p in job.added.values())
    before = {n: p.detach().clone() for n, p in job.added.items()}
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 16).bfloat16()).float().square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in job.added.items())
    job.finish()
    assert model[0].weight.dtype == torch.bfloat16 and sw.masks(model).violations(model) == {}


def test_misuse_is_refused():
    with pytest.raises(InvalidArgument, match="give `steps`"):
        sw.transform(net(), "jackpots", sparsity=0.5)
    with pytest.raises(InvalidArgument, match="first="):
        Jackpots(first="big")
    with pytest.raises(InvalidArgument, match="one by one"):
        sw.transform(net(), "jackpots", sparsity=0.5, steps=3, pattern="2:4", include="4")
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    with pytest.raises(InvalidArgument, match="would keep nothing"):
        sw.transform(model, "jackpots", sparsity=0.9, steps=3)
    assert all(p.requires_grad for p in model.parameters())
