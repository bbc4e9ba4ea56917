"""Sparse connectivity learning: against a plain simulation, the proxies, and the laws."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.weights.dynamic.scl import PROXIES, SCL

STEPS = 24
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
}
QUICK = {"strength": 0.3, "rate": 0.1, "first": 0.2}


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 16),
        nn.ReLU(), nn.Linear(16, 5),
    )  # fmt: skip


def train(model, optimizer, first=0, last=STEPS, after=lambda: None, parts=1):
    for i in range(first, last):
        g = torch.Generator().manual_seed(i)
        x, y = torch.randn(16, 3, 6, 6, generator=g), torch.randint(0, 5, (16,), generator=g)
        optimizer.zero_grad()
        for a, b in zip(x.chunk(parts), y.chunk(parts)):
            (nn.functional.cross_entropy(model(a), b) / parts).backward()
        optimizer.step()
        after()


def start(optimizer="sgd", model=None, **options):
    model = net() if model is None else model
    job = sw.transform(model, "scl", steps=STEPS, **{**QUICK, **options})
    made = OPTIMIZERS[optimizer](job.parameter_groups())
    job.attach(made)
    return model, made, job


SLOPES = {  # written again, from the definitions of the proxies
    "identity": lambda m: 1.0,
    "leaky": lambda m: 1.0 if m > 0 else 0.1,
    "softplus": lambda m: math.exp(m) / (1 + math.exp(m)),
    "relu": lambda m: 1.0 if m > 0 else 0.0,
    "clipped": lambda m: 1.0 if 0 < m < 1 else 0.0,
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("proxy", sorted(PROXIES))
def test_a_linear_layer_equals_a_simulation(proxy, normalize):
    """Hand-written gradient, hand-written logits, element by element; SGD with weight decay."""
    torch.manual_seed(1)
    layer = nn.Linear(8, 4, bias=False).double()
    theta = layer.weight.detach().clone()
    steps, last, lr, decay, first = 12, 9, 0.2, 0.05, 0.25
    strength, rate = (0.4, 0.2) if normalize else (0.01, 4.0)
    job = sw.transform(
        layer, "scl", steps=steps, end=0.75, strength=strength, rate=rate, first=first,
        proxy=proxy, normalize=normalize, include="*",
    )  # fmt: skip
    optimizer = torch.optim.SGD(job.parameter_groups(), lr, weight_decay=decay)
    job.attach(optimizer)
    m = [[first] * 8 for _ in range(4)]
    on = torch.ones(4, 8, dtype=torch.float64)
    sizes = []
    for t in range(1, steps + 1):
        g = torch.Generator().manual_seed(t)
        x = torch.randn(10, 8, generator=g, dtype=torch.float64)
        y = torch.randn(10, 4, generator=g, dtype=torch.float64)
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()
        gradient = (2 * (x @ (theta * on).T - y) / y.numel()).T @ x
        heard = gradient * theta
        masked = theta if t <= last else theta * (1 - lr * decay)  # held while masks are learned
        theta = torch.where(on > 0, theta - lr * (gradient + decay * theta), masked)
        if t <= last:
            now = rate * 0.5 * (1 + math.cos(math.pi * t / last))
            for i in range(4):
                slopes = [SLOPES[proxy](v) for v in m[i]]
                row = [float(heard[i, j]) * slopes[j] for j in range(8)]
                scale = math.sqrt(sum(v * v for v in row) / 8) if normalize else 1.0
                for j in range(8):
                    part = row[j] / scale if scale else row[j]
                    m[i][j] -= now * (part + strength * slopes[j])
            on = torch.tensor([[float(v > 0) for v in row] for row in m], dtype=torch.float64)
        assert torch.equal(job.masks["weight"], on.bool()), t
        sizes.append(int(on.sum()))
    record = job.finish()
    torch.testing.assert_close(layer.weight.detach(), theta * on)
    assert torch.equal(record["weight"], on.bool())
    assert 0 < min(sizes) < 32


def quadratic(proxy, target):
    """theta = 1, a noisy quadratic, known support; was it found, and how many came back?"""
    support = torch.rand(5, 12, generator=torch.Generator().manual_seed(0)) < 0.3
    layer = nn.Linear(12, 5, bias=False)
    nn.init.ones_(layer.weight)
    job = sw.transform(
        layer, "scl", steps=160, include="*", proxy=proxy, strength=0.3, rate=0.1, first=0.5,
        sparsity=1 - float(support.float().mean()) if target else None,
    )  # fmt: skip
    optimizer = torch.optim.SGD(job.parameter_groups(), 0.0)
    job.attach(optimizer)
    g = torch.Generator().manual_seed(1)
    revived, before = 0, job.masks["weight"].clone()
    for _ in range(120):
        x = torch.randn(4, 12, generator=g)
        optimizer.zero_grad()
        (layer(x) - x @ support.float().T).square().sum().backward()
        optimizer.step()
        revived += int((job.masks["weight"] & ~before).sum())
        before = job.masks["weight"].clone()
    return torch.equal(job.finish()["weight"], support), revived


@pytest.mark.parametrize("proxy", ["identity", "leaky", "softplus"])
def test_open_proxies_find_the_support_of_a_quadratic(proxy):
    assert quadratic(proxy, target=True)[0]
    assert quadratic(proxy, target=False)[1] > 0


@pytest.mark.parametrize("proxy", ["relu", "clipped"])
def test_closed_proxies_lose_the_support_and_nothing_comes_back(proxy):
    assert not quadratic(proxy, target=True)[0]
    assert quadratic(proxy, target=False) == (False, 0)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_never_more_than_the_target_and_exactly_it_after_the_freeze(optimizer):
    model, made, job = start(optimizer, sparsity=0.7)
    total = sum(m.numel() for m in job.masks.values())
    seen, frozen = [], {}

    def check():
        off = sum(int((~m).sum()) for m in job.masks.values())
        seen.append(off)
        assert off <= int(0.7 * total)
        if job.step == 18:
            frozen.update({n: m.clone() for n, m in job.masks.items()})
        if job.step >= 18:
            assert off == int(0.7 * total)
            assert all(torch.equal(m, frozen[n]) for n, m in job.masks.items())

    train(model, made, after=check)
    record = job.finish()
    assert seen[0] < int(0.7 * total)
    assert sum(int((~m).sum()) for m in record.values()) == int(0.7 * total)
    assert sw.masks(model).violations(model) == {}
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in net().named_parameters()]


def test_finishing_early_still_meets_the_target():
    model, made, job = start(sparsity=0.7)
    train(model, made, 0, 5)
    record = job.finish()
    assert record.sparsity() == pytest.approx(0.7, abs=1e-3)
    assert sw.masks(model).violations(model) == {}


def test_a_stronger_penalty_keeps_fewer_connections():
    kept = []
    for strength in (0.0, 0.3, 3.0):
        model, made, job = start(strength=strength)
        train(model, made)
        kept.append(1 - job.finish().sparsity())
    assert kept[0] > kept[1] > kept[2]


def test_costs_are_factors_of_the_penalty_on_one_tensor():
    costs = {"0.weight": 3.0, "4.weight": 0.0}
    _, made, job = start(costs=costs, normalize=False)
    before = {n: job.part(n).logits.clone() for n in job.views}
    rate = 0.1 * 0.5 * (1 + math.cos(math.pi / 18))
    made.zero_grad()
    made.step()  # no backward pass: the penalty alone
    for name, logits in before.items():
        moved = logits - job.part(name).logits
        expected = torch.full_like(moved, rate * 0.3 * costs.get(name, 1.0))
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)

    def kept(costs):
        model, made, job = start(costs=costs)
        train(model, made)
        record = job.finish()
        return {n: 1 - record.sparsity(n) for n in record}

    plain, dear = kept({}), kept({"0.weight": 10.0})
    assert dear["0.weight"] < plain["0.weight"]


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_masked_weights_hold_their_value_while_connections_are_learned(optimizer):
    model, made, job = start(optimizer)
    before = {n: (m.clone(), job.parameters[n].detach().clone()) for n, m in job.masks.items()}
    held = 0

    def check():
        nonlocal held
        for name, mask in job.masks.items():
            old, value = before[name]
            theta = job.parameters[name].detach()
            if job.step <= 18:
                assert torch.equal(theta[~old], value[~old])
                held += int((~old).sum())
            before[name] = mask.clone(), theta.clone()

    train(model, made, after=check)
    assert held > 0


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_sparsity_zero_is_plain_training(optimizer):
    model, made, job = start(optimizer, sparsity=0.0)
    plain = net()
    train(plain, OPTIMIZERS[optimizer](plain.parameters()))
    train(model, made)
    job.finish()
    for (a, x), (b, y) in zip(model.state_dict().items(), plain.state_dict().items()):
        assert a == b and torch.equal(x, y)


def test_gradients_add_up_over_accumulated_batches():
    found = []
    for parts in (1, 4):
        model, made, job = start(model=net().eval())  # no batch statistics
        train(model, made, 0, 3, parts=parts)
        found.append([job.part(n).logits.clone() for n in job.views])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stop", [7, 21])
def test_the_same_run_twice_and_resumed(stop):
    model, made, job = start("adamw", sparsity=0.8)
    train(model, made, 0, stop)
    saved = copy.deepcopy((model.state_dict(), made.state_dict(), job.state_dict()))
    train(model, made, stop, STEPS)
    job.finish()
    again, other, resumed = start("adamw", sparsity=0.8)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    train(again, other, stop, STEPS)
    resumed.finish()
    twice, other, job = start("adamw", sparsity=0.8)
    train(twice, other)
    job.finish()
    for a, b, c in zip(model.parameters(), again.parameters(), twice.parameters()):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_a_step_with_overflow_moves_no_logit_by_the_loss():
    model, made, job = start(strength=0.0)
    before = {n: job.part(n).logits.clone() for n in job.views}
    made.zero_grad()
    (model(torch.ones(2, 3, 6, 6)).sum() * float("inf")).backward()
    for p in model.parameters():
        p.grad = None  # what a gradient scaler's skipped step amounts to
    made.step()
    for name, logits in before.items():
        assert torch.equal(job.part(name).logits, logits)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"proxy": "step"}, "proxy='step'"),
        ({"strength": -1.0}, "strength=-1"),
        ({"first": 0.0}, "first=0"),
        ({"end": 1.5}, "end=1.5"),
        ({"end": 0.0}, "before the first step"),
        ({"steps": None}, "give `steps`"),
        ({"pattern": "rows"}, "single connections"),
        ({"costs": {"9.weight": 1.0}}, "costs="),
        ({"costs": {"0.weight": -1.0}}, "costs="),
    ],
)
def test_misuse_changes_nothing(options, message):
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidArgument, match=message):
        sw.transform(model, "scl", **{"steps": STEPS, **options})
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in after.items())


def test_frozen_weights_are_refused():
    model = net()
    model[0].weight.requires_grad_(False)
    with pytest.raises(ModelError, match=r"0\.weight does not train"):
        sw.transform(model, SCL(), steps=STEPS)
    assert list(model.state_dict()) == list(net().state_dict())
