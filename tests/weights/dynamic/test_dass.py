"""DASS against a plain loop over its three stages; whose turn it is; exact zeros and resumption."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.models.zoo.supernet import SuperNetwork
from sparseworks.weights.dynamic.dass import DASS

STEPS = 20
LR = 0.1


class Mixed(nn.Module):
    """softmax(alpha)_0 W_0 x + softmax(alpha)_1 W_1 x."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Linear(6, 4, bias=False) for _ in range(2))
        self.alpha = nn.Parameter(torch.tensor([0.1, -0.2]))

    def forward(self, x):
        a = self.alpha.softmax(0)
        return a[0] * self.first(x) + a[1] * self.second(x)


def batch(step):
    g = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=g), torch.randint(0, 4, (8,), generator=g)


def start(**options):
    model = Mixed()
    job = sw.transform(
        model, "dass", sparsity=0.75, steps=STEPS, include=["first", "second"], **options
    )
    optimizer = torch.optim.SGD(job.parameter_groups(), LR, momentum=0.5)
    return model, optimizer, job.attach(optimizer)


def train(model, optimizer, job, steps, seen=None):
    for step in steps:
        if seen is not None:
            seen.append(job.method.turn(job))
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("cycles", [1, 2])
def test_the_three_stages_are_those_of_a_plain_loop(cycles):
    model, optimizer, job = start(warmup=0.4, scoring=0.5, cycles=cycles)
    seen = []
    train(model, optimizer, job, range(STEPS), seen)

    plain = Mixed()
    w = {n: getattr(plain, n).weight.detach().clone() for n in ("first", "second")}
    alpha = plain.alpha.detach().clone()
    mask = {n: torch.ones_like(t) for n, t in w.items()}
    score = {}
    speed = {}

    def top(t):
        flat = t.abs().flatten()
        kept = sorted(range(len(flat)), key=lambda k: -float(flat[k]))[:6]
        return torch.tensor([float(k in kept) for k in range(len(flat))]).view_as(t)

    def move(key, value, gradient):
        speed[key] = 0.5 * speed[key] + gradient if key in speed else gradient
        return value - LR * speed[key]

    cycle = 12 // cycles
    turns = []
    for step in range(STEPS):
        inside = (step - 8) % cycle if step >= 8 else None
        scoring = inside is not None and inside < cycle // 2
        if inside == 0:
            for n in w:
                score[n] = w[n] / w[n].abs().max()
                mask[n] = top(score[n])
                speed.pop(("score", n), None)
        used = {n: (w[n] * mask[n]).requires_grad_() for n in w}
        a = alpha.clone().requires_grad_()
        x, y = batch(step)
        p = a.softmax(0)
        out = p[0] * x @ used["first"].T + p[1] * x @ used["second"].T
        nn.functional.cross_entropy(out, y).backward()
        if scoring:
            turns.append("scores")
            for n in w:
                score[n] = move(("score", n), score[n], used[n].grad * w[n])
                mask[n] = top(score[n])
        elif step % 2 == 0:
            turns.append("weights")
            for n in w:
                w[n] = move(n, w[n], used[n].grad * mask[n])
        else:
            turns.append("architecture")
            alpha = move("alpha", alpha, a.grad)
    assert seen == turns and {"weights", "architecture", "scores"} == set(turns)
    torch.testing.assert_close(model.alpha.detach(), alpha)
    for n in w:
        name = f"{n}.weight"
        torch.testing.assert_close(job.parameters[name].detach(), w[n])
        assert torch.equal(job.masks[name], mask[n].bool())
    record = job.finish()
    for n in w:
        torch.testing.assert_close(getattr(model, n).weight.detach(), w[n] * mask[n])
        assert record.sparsity(f"{n}.weight") == 0.75
    assert sw.masks(model).violations(model) == {}
    assert all(p.requires_grad for p in model.parameters())


def test_only_what_has_its_turn_moves():
    model, optimizer, job = start()
    for step in range(STEPS):
        turn = job.method.turn(job)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        train(model, optimizer, job, [step])
        moved = {
            "scores" if "scores" in n else "architecture" if "alpha" in n else "weights"
            for n, p in model.named_parameters()
            if not torch.equal(p.detach(), before[n])
        }
        after = job.method.turn(job)
        fresh = {"scores"} if after == "scores" and turn != "scores" else set()
        assert moved - fresh == {turn}


def test_a_dense_search_is_pruned_by_magnitude():
    model, optimizer, job = start(warmup=1.0)
    train(model, optimizer, job, range(STEPS))
    assert job.current_sparsity == 0.0
    weight = job.parameters["first.weight"].detach().clone()
    record = job.finish()
    edge = weight.abs().flatten().sort(descending=True).values[5]
    assert torch.equal(record["first.weight"], weight.abs() >= edge)


def test_without_a_warm_up_the_first_step_is_sparse():
    model, optimizer, job = start(warmup=0.0)
    assert job.current_sparsity == 0.75 and job.method.turn(job) == "scores"
    train(model, optimizer, job, range(STEPS))
    assert job.finish().sparsity() == 0.75


@pytest.mark.parametrize("stop", [5, 11, 17])
def test_resuming_is_exact_in_every_stage(stop):
    whole = start()
    train(*whole, range(stop))
    saved = copy.deepcopy([part.state_dict() for part in whole])
    train(*whole, range(stop, STEPS))
    again = start()
    for part, state in zip(again, saved):
        part.load_state_dict(state)
    train(*again, range(stop, STEPS))
    whole[2].finish(), again[2].finish()
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), again[0].parameters()))


def test_a_super_network_is_searched_sparse():
    def search():
        torch.manual_seed(0)
        net = SuperNetwork(("skip", "sep3", "conv3"), cells=1, channels=4, in_channels=1)
        job = sw.transform(net, "dass", sparsity=0.8, steps=10)
        optimizer = torch.optim.Adam(job.parameter_groups(), 0.01)
        job.attach(optimizer)
        for step in range(10):
            g = torch.Generator().manual_seed(step)
            x = torch.randn(4, 1, 8, 8, generator=g)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), torch.arange(4)).backward()
            optimizer.step()
        job.finish()
        return net

    net, twin = search(), search()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters()))
    assert sw.masks(net).violations(net) == {}
    assert sw.masks(net).sparsity() == pytest.approx(0.8, abs=0.02)
    assert not torch.equal(net.alpha_normal.std(), torch.zeros(()))
    assert net.derive() == twin.derive()


def test_misuse_is_refused_before_anything_changes():
    plain = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = copy.deepcopy(plain.state_dict())
    with pytest.raises(ModelError, match="architecture"):
        sw.transform(plain, "dass", sparsity=0.5, steps=9)
    with pytest.raises(InvalidArgument, match="give `steps`"):
        sw.transform(Mixed(), "dass", sparsity=0.5)
    for options in ({"warmup": 1.5}, {"scoring": -0.1}, {"cycles": 0}):
        with pytest.raises(InvalidArgument):
            DASS(**options)
    assert list(plain.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items())
