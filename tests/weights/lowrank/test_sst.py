"""SST against its algorithm written plainly, and what its draws, rounds and pruning do."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument
from sparseworks.models.zoo import HyperbolicClassifier
from sparseworks.weights.lowrank.spectral import SpectralLinear
from sparseworks.weights.lowrank.sst import draw, kept_components


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(),
                         nn.Linear(16, 5)).double()  # fmt: skip


def batch(step, rows=8):
    g = torch.Generator().manual_seed(step)
    return torch.randn(rows, 12, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("enhanced", [True, False])
def test_gradients_are_the_closed_forms(enhanced):
    weight = torch.randn(9, 6, dtype=torch.float64)
    layer = SpectralLinear(weight, None, 3, enhanced)
    layer.choose(torch.tensor([0, 2, 5]))
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    dense = weight.clone().requires_grad_()
    dy = torch.randn(2, 7, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ weight.t())
    layer(x).backward(dy)
    [dx, gradient] = torch.autograd.grad(x @ dense.t(), (x, dense), dy)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    signs = torch.sign((layer.left_vectors * u).sum(0))
    u, v = u * signs, v * signs[:, None]
    chosen, factor = layer.chosen, 1.0 if enhanced else s[layer.chosen]
    torch.testing.assert_close(x.grad, dx)
    torch.testing.assert_close(layer.values.grad, (u.t() @ gradient @ v.t()).diag())
    torch.testing.assert_close(layer.left.grad, (gradient @ v.t())[:, chosen] * factor)
    torch.testing.assert_close(layer.right.grad, (gradient.t() @ u)[:, chosen] * factor)


def test_without_enhancement_autograd_agrees():
    layer = SpectralLinear(torch.randn(7, 5, dtype=torch.float64), None, 5, False)
    x = torch.randn(4, 5, dtype=torch.float64)
    plain = (x @ layer.right * layer.values) @ layer.left.t()
    mine = torch.autograd.grad(layer(x).sin().sum(), (layer.values, layer.left, layer.right))
    theirs = torch.autograd.grad(plain.sin().sum(), (layer.values, layer.left, layer.right))
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b)


def test_a_training_is_the_algorithm_written_plainly():
    """SGD, draws every 2 steps, a round of 4: U, s, V step by step from the dense gradient."""
    net = nn.Sequential(nn.Linear(12, 8, bias=False), nn.Tanh(), nn.Linear(8, 3)).double()
    job = sw.transform(net, "sst", rank=2, every=2, seed=5)
    optimizer = torch.optim.SGD(job.parameter_groups(), 0.1)
    job.attach(optimizer)
    layer, head = net[0], copy.deepcopy(net[2])
    u, s, v = (t.detach().clone() for t in (layer.left_vectors, layer.values, layer.right_vectors))
    for step in range(1, 21):
        x, chosen = batch(step), layer.chosen.clone()
        weight = (u @ torch.diag(s) @ v.t()).requires_grad_()
        loss = head(torch.tanh(x @ weight.t())).square().sum()
        grads = torch.autograd.grad(loss, (weight, *head.parameters()))
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
        gradient = grads[0]
        ds = torch.stack([u[:, i] @ gradient @ v[:, i] for i in range(8)])
        new_u, new_v = u.clone(), v.clone()
        for i in chosen.tolist():
            left, right = u[:, i] - 0.1 * gradient @ v[:, i], v[:, i] - 0.1 * gradient.t() @ u[:, i]
            new_u[:, i], new_v[:, i] = left / left.norm(), right / right.norm()
        u, v, s = new_u, new_v, (s - 0.1 * ds).clamp_min(0)
        with torch.no_grad():
            for p, g in zip(head.parameters(), grads[1:]):
                p -= 0.1 * g
        wanted = u @ torch.diag(s) @ v.t()
        torch.testing.assert_close(layer.weight_of(), wanted)
        if step % 8 == 0:  # vectors orthogonal again, the weight unchanged
            eye = torch.eye(8, dtype=torch.float64)
            torch.testing.assert_close(layer.left_vectors.t() @ layer.left_vectors, eye)
            now = (layer.left_vectors, layer.values, layer.right_vectors)
            u, s, v = (t.detach().clone() for t in now)
        if step % 2:
            assert torch.equal(layer.chosen, chosen)


def test_draws_are_without_replacement_and_as_likely_as_said():
    s = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0])
    counts = torch.zeros(5)
    for i in range(4000):
        one = draw(s, 1, torch.Generator().manual_seed(i))
        counts[one] += 1
    wanted = (0.2 + s / 8) / 2
    error = 4 * (wanted * (1 - wanted) / 4000).sqrt()
    assert ((counts / 4000 - wanted).abs() < error).all()
    many = draw(s, 4, torch.Generator())
    assert len(set(many.tolist())) == 4
    assert draw(torch.zeros(5), 5, torch.Generator()).tolist() == [0, 1, 2, 3, 4]


def test_the_smallest_number_of_components_that_has_the_mass():
    s = torch.tensor([5.0, 3.0, 1.0, 1.0])
    assert [kept_components(s, m) for m in (0.4, 0.5, 0.51, 0.8, 0.81, 1.0)] == [1, 1, 2, 2, 3, 4]


def train(net, job, steps=7):
    optimizer = torch.optim.AdamW(job.parameter_groups(), 0.01)
    job.attach(optimizer)
    for step in range(steps):
        optimizer.zero_grad()
        (net(batch(step)) - 1).square().mean().backward()
        optimizer.step()
    return optimizer


def test_optimizer_state_is_that_of_what_trains_and_is_fresh_after_a_draw():
    net = model()
    job = sw.transform(net, "sst", rank=3, every=4)
    optimizer = train(net, job, 7)
    layer = net[0]
    assert float(optimizer.state[layer.left]["step"]) == 3
    assert float(optimizer.state[layer.values]["step"]) == 7
    numbers = sum(v.numel() for p in (layer.left, layer.right, layer.values)
                  for v in optimizer.state[p].values() if v.ndim)  # fmt: skip
    assert numbers == 2 * (3 * (12 + 20) + 12)
    norms = torch.cat([layer.left_vectors.norm(dim=0), layer.right_vectors.norm(dim=0)])
    torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("after", ["parts", "thin", "merged", "factored"])
def test_finish_keeps_the_largest_components(after):
    net = model()
    job = sw.transform(net, "sst", rank=3, every=3, sparsity=0.75, after=after)
    train(net, job)
    weights = {n: m.weight_of() for n, m in net.named_modules() if isinstance(m, SpectralLinear)}
    record = job.finish()
    wanted = model()
    for name, weight in weights.items():
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        kept = len(s) if after == "factored" else math.ceil(len(s) / 4)
        layer = wanted.get_submodule(name)
        layer.weight.data, layer.bias = u[:, :kept] * s[:kept] @ v[:kept], None
    bare = copy.deepcopy(net)
    for name in weights:
        made = bare.get_submodule(name)
        made = getattr(made, "up", made)
        torch.nn.init.zeros_(made.bias)
    wanted[4] = copy.deepcopy(net[4])
    torch.testing.assert_close(bare(batch(1)), wanted(batch(1)))
    if after == "parts":
        assert record.sparsity() == pytest.approx(0.75) and record.violations(net) == {}
    if after == "thin":
        assert net[0].down.weight.shape == (3, 12) and net[0].up.weight.shape == (20, 3)


def test_resuming_is_bit_for_bit():
    def begun():
        net = model()
        job = sw.transform(net, "sst", rank=3, every=2)
        optimizer = torch.optim.AdamW(job.parameter_groups(), 0.01)
        return net, job.attach(optimizer), optimizer

    def steps(net, optimizer, first, last):
        for step in range(first, last):
            optimizer.zero_grad()
            (net(batch(step)) - 1).square().mean().backward()
            optimizer.step()

    net, job, optimizer = begun()
    steps(net, optimizer, 0, 9)
    kept = copy.deepcopy((net.state_dict(), optimizer.state_dict(), job.state_dict()))
    steps(net, optimizer, 9, 20)
    other, again, second = begun()
    other.load_state_dict(kept[0])
    second.load_state_dict(kept[1])
    again.load_state_dict(kept[2])
    steps(other, second, 9, 20)
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_hyperbolic_layers_train_on_the_hyperboloid():
    torch.manual_seed(0)
    net = HyperbolicClassifier(12, 3, width=16).double()
    x = batch(0, 60)
    target = (x @ torch.randn(12, 3, dtype=torch.float64)).argmax(1)
    points = []
    net.layers[-1].register_forward_hook(lambda m, i, o: points.append(o))
    before = nn.functional.cross_entropy(net(x), target)
    job = sw.transform(net, "sst", rank=4, every=10, include="layers")
    optimizer = torch.optim.AdamW(job.parameter_groups(), 0.02)
    job.attach(optimizer)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), target)
        loss.backward()
        optimizer.step()
    job.finish()
    assert nn.functional.cross_entropy(net(x), target) < 0.5 * before
    on = -points[-1][:, 0].square() + points[-1][:, 1:].square().sum(1)
    torch.testing.assert_close(on, -torch.ones_like(on))


def test_bad_options():
    for options, match in (
        ({"rank": 0}, "rank"), ({"every": 0}, "every"), ({"mass": 0}, "mass"),
        ({"sampling": "all"}, "sampling"), ({"rank": 99}, "rank=99"), ({"after": "x"}, "after"),
    ):  # fmt: skip
        net = model()
        with pytest.raises(InvalidArgument, match=match):
            sw.transform(net, "sst", **options)
        assert type(net[0]) is nn.Linear
