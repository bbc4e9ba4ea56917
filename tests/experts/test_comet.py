"""Trees against a recursive walk, the arrangement against brute force, zeros of the gate."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument
from sparseworks.experts.comet import TreeRouter, reach, smooth_step
from sparseworks.experts.local_search import LocalSearch, assignment, sinkhorn
from sparseworks.models.zoo import ByteDecoder, FeedForward

D = torch.float64


def router(experts=8, trees=2, gamma=1.0, scale=1.0, search=None):
    torch.manual_seed(0)
    made = TreeRouter(experts, 5, trees=trees, gamma=gamma, dtype=D, search=search)
    with torch.no_grad():
        for p in (made.weight, made.bias, made.split, made.split_bias):
            p.normal_(std=scale)
    return made


def walked(r: TreeRouter, x, tree, low, high, node=0, p=1.0):
    """{leaf: pi} of the leaves from low to high below a node."""
    if high - low == 1:
        return {low: p}
    t = float(r.split[tree, node] @ x + r.split_bias[tree, node])
    half = r.gamma / 2
    h = 0.0 if t <= -half else 1.0 if t >= half else (
        -2 * t**3 / r.gamma**3 + 3 * t / (2 * r.gamma) + 0.5
    )  # fmt: skip
    middle = (low + high) // 2
    return walked(r, x, tree, low, middle, 2 * node + 1, p * h) | walked(
        r, x, tree, middle, high, 2 * node + 2, p * (1 - h)
    )


@pytest.mark.parametrize("scale", [0.1, 1.0])
@torch.no_grad()
def test_the_gate_is_a_walk_down_every_tree(scale):
    r = router(scale=scale)
    x = torch.randn(6, 5, dtype=D)
    found = r(x)
    entropies = []
    for row, g in zip(x, found.probabilities, strict=True):
        pairs = {}
        for j in range(2):
            for i, p in walked(r, row, j, 0, 8).items():
                pairs[j, i] = (p, float(r.weight[j, i] @ row + r.bias[j, i]))
        total = sum(math.exp(a) * (p + 1e-8) for p, a in pairs.values() if p > 0)
        for i in range(8):
            wanted = sum(
                math.exp(a) * (p + 1e-8) / total for (_, k), (p, a) in pairs.items()
                if k == i and p > 0
            )  # fmt: skip
            assert float(g[i]) == pytest.approx(wanted, abs=1e-12)
        entropies.append(sum(-p * math.log(p + 1e-6) for p, _ in pairs.values()))
    assert float(r.entropy) == pytest.approx(sum(entropies) / 6)


def test_hard_paths_leave_at_most_one_expert_a_tree():
    found = router(scale=50.0)(torch.randn(100, 5, dtype=D))
    assert int(found.chosen.sum(-1).max()) <= 2 and int(found.chosen.sum(-1).min()) == 1
    assert bool((found.weights[~found.chosen] == 0).all())
    assert torch.allclose(found.weights.sum(-1), torch.ones(100, dtype=D))


@pytest.mark.parametrize("experts", [2, 5, 8])
def test_paths_share_out_one(experts):
    h = torch.rand(4, 3, experts - 1, dtype=D, requires_grad=True)
    assert torch.allclose(reach(h).sum(-1), torch.ones(4, 3, dtype=D))
    assert torch.autograd.gradcheck(reach, h)


def test_the_smooth_step_and_its_slope():
    t = torch.tensor([-3.0, -1.0, 0.0, 0.3, 1.0, 9.0], dtype=D)
    assert smooth_step(t, 2.0)[[0, 1, 2, 4, 5]].tolist() == [0, 0, 0.5, 1, 1]
    inside = torch.tensor([-0.9, -0.2, 0.3, 0.8], dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: smooth_step(t, 2.0), inside)


def test_gradients_of_the_gate():
    r = router(scale=0.1)
    x = torch.randn(3, 5, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: r(x).probabilities, x)


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_the_assignment_is_the_best_of_all(n):
    g = torch.Generator().manual_seed(n)
    for _ in range(20):
        s = torch.randn(n, n, generator=g)
        found = assignment(s).tolist()
        every = itertools.permutations(range(n))
        best = max(every, key=lambda p: sum(s[i, p[i]] for i in range(n)))
        assert sorted(found) == list(range(n))
        assert float(sum(s[i, found[i]] for i in range(n))) == pytest.approx(
            float(sum(s[i, best[i]] for i in range(n)))
        )


def test_sinkhorn_gives_sums_of_one_and_gates_keep_theirs():
    g = torch.Generator().manual_seed(0)
    p = sinkhorn(torch.randn(2, 6, 6, generator=g, dtype=D), 100)
    for axis in (-1, -2):
        assert torch.allclose(p.sum(axis), torch.ones(2, 6, dtype=D))
    search = LocalSearch(6, generator=g, dtype=D).train()
    gates = torch.rand(5, 2, 6, generator=g, dtype=D)
    soft = search(gates)
    assert torch.allclose(soft.sum(-1), gates.sum(-1), atol=0.05)  # 20 turns
    soft.square().sum().backward()
    assert float(search.logits.grad.abs().sum()) > 0 and float(search.entropy()) > 0
    hard = search.eval()(gates)
    search.advance(1.0)
    assert torch.equal(search.train()(gates), hard) and not bool(search.searching)
    to = search.fixed[0]
    for i in range(6):
        assert torch.equal(hard[..., to[i]], gates[..., i])
    assert float(search.entropy()) == pytest.approx(0, abs=1e-6)


def test_it_searches_first_then_keeps_what_it_found():
    model = ByteDecoder(16, 1, 2, mlp=lambda: FeedForward(16, 24))
    run = sw.upcycle(model, "comet", experts=4, steps=10, search=0.5, entropy_start=0.01)
    gate = run.layers["blocks.0.mlp"].gate
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    run.attach(optimizer)
    ids = torch.randint(0, 256, (2, 12))
    for step in range(10):
        assert bool(gate.search.searching) == (step < 5)
        optimizer.zero_grad()
        (model.train()(ids).square().mean() + run.penalty()).backward()
        optimizer.step()
    run.finish()
    again = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(again.eval()(ids), model.eval()(ids))


@pytest.mark.parametrize(
    "wrong", [{"top_k": 9}, {"gamma": 0.0}, {"search": 2.0}, {"entropy_start": 0.5}]
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(InvalidArgument):
        sw.upcycle(ByteDecoder(16, 1, 2, mlp=lambda: FeedForward(16, 24)), "comet", **wrong)
