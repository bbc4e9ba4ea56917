"""The layer of mixtures against a loop over tokens in fp64, and its laws."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import InvalidArgument
from sparseworks.experts.banks import ACTIVATIONS, Experts
from sparseworks.experts.layers import MoE, mixtures
from sparseworks.experts.losses import load_balance, z_loss
from sparseworks.experts.products import grouped, reference, segments
from sparseworks.experts.routers import TopK
from sparseworks.experts.routing import Routing, limit, rank_of, top

KINDS = [(True, False, "silu"), (False, True, "gelu"), (False, False, "relu"), (True, True, "silu")]


def layer(gated: bool = True, bias: bool = False, activation: str = "silu", **more) -> MoE:
    g = torch.Generator().manual_seed(1)
    experts = Experts(4, 6, 10, gated=gated, bias=bias, activation=activation, generator=g)
    made = MoE(TopK(4, 6, 2, generator=g), experts, **more).double()
    with torch.no_grad():
        made.gate.weight.mul_(50)
    return made


def expert(bank: Experts, i: int, x: Tensor) -> Tensor:
    w1, w2, b1, b2 = bank.weights
    act = ACTIVATIONS[bank.activation]
    hidden = x @ w1[i].T + (0 if b1 is None else b1[i])
    if bank.gated:
        hidden = act(hidden[: bank.hidden]) * hidden[bank.hidden :]
    else:
        hidden = act(hidden)
    return hidden @ w2[i].T + (0 if b2 is None else b2[i])


def by_token(made: MoE, x: Tensor, k: int = 2) -> Tensor:
    """Router, choice and combination as written in the papers, token by token."""
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        p = (made.gate.weight @ token).softmax(0)
        best = sorted(range(len(p)), key=lambda i: -p[i].item())[:k]
        total = sum(p[i] for i in best)
        rows.append(sum(p[i] / total * expert(made.experts, i, token) for i in best))
    return torch.stack(rows).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dense", [False, True])
def test_it_equals_a_loop_over_tokens_with_its_gradients(kind, dense):
    made = layer(kind[0], kind[1], kind[2], dense=dense)
    x = torch.randn(3, 7, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 7, 6, dtype=torch.float64)
    leaves = [x, *made.parameters()]
    ours = torch.autograd.grad((made(x) * weight).sum(), leaves)
    wanted = torch.autograd.grad((by_token(made, x) * weight).sum(), leaves)
    torch.testing.assert_close(made(x), by_token(made, x), rtol=1e-12, atol=1e-12)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@given(st.lists(st.integers(0, 5), min_size=4, max_size=4), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=25)
def test_segments_equal_the_reference_for_any_counts(counts, gated, bias):
    bank = Experts(4, 6, 5, gated=gated, bias=bias).double()
    x = torch.randn(sum(counts), 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *bank.parameters()]
    found = [f(x, counts, bank.weights, F.silu, gated) for f in (segments, reference)]
    torch.testing.assert_close(*found)
    ours, wanted = (torch.autograd.grad(y.sin().sum(), leaves, allow_unused=True) for y in found)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


@pytest.mark.parametrize("gated", [False, True])
def test_the_grouped_product_equals_the_reference(gated, monkeypatch):
    monkeypatch.setattr("sparseworks.experts.products._grouped_mm", lambda x, w: True)
    bank = Experts(4, 8, 16, gated=gated, bias=True)
    counts = [3, 0, 5, 8]
    x = torch.randn(16, 8, requires_grad=True)
    leaves = [x, *bank.parameters()]
    ours = grouped(x, torch.tensor(counts), bank.weights, F.silu, gated)
    wanted = reference(x, counts, bank.weights, F.silu, gated)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    grads = (torch.autograd.grad(y.sin().sum(), leaves) for y in (ours, wanted))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_training_and_evaluation_compute_the_same():
    made = layer()
    x = torch.randn(5, 6, dtype=torch.float64)
    assert torch.equal(made.train()(x), made.eval()(x))


def test_noise_is_on_in_training_only():
    made = layer()
    made.gate.noise = 10.0
    x = torch.randn(50, 6, dtype=torch.float64)
    assert not torch.equal(made.train()(x), made(x))
    assert torch.equal(made.eval()(x), made(x))


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.5])
@pytest.mark.parametrize("renormalize", [False, True])
def test_capacity_fills_first_choices_in_the_order_of_tokens(factor, renormalize):
    g = torch.Generator().manual_seed(3)
    p = torch.randn(20, 4, generator=g, dtype=torch.float64).mul(2).softmax(-1)
    chosen = top(p, 2)
    weights = p * chosen
    found = limit(Routing(weights, chosen, p, p.log()), factor, renormalize=renormalize)
    places, taken, kept = math.ceil(factor * 40 / 4), [0] * 4, [[False] * 4 for _ in range(20)]
    for choice in range(2):
        for t in range(20):
            i = sorted(range(4), key=lambda i: -float(p[t, i]))[choice]
            if taken[i] < places:
                kept[t][i], taken[i] = True, taken[i] + 1
    assert found.chosen.tolist() == kept
    assert torch.equal(found.wanted, chosen) and not (found.weights[~found.chosen]).any()
    left = found.chosen.any(-1)
    had = weights.sum(-1) if renormalize else (weights * found.chosen).sum(-1)
    torch.testing.assert_close(found.weights.sum(-1)[left], had[left])


def test_drops_are_counted_and_only_in_training():
    made = layer(capacity=0.5)
    x = torch.randn(40, 6, dtype=torch.float64)
    made.train()(x)
    assert made.load.dropped == 80 - int(made.load.counts.sum()) > 0
    made.load.reset()
    made.eval()(x)
    assert made.load.dropped == 0 and int(made.load.counts.sum()) == 80
    assert made.load.active == 2 and made.load.tokens == 40 and made.load.imbalance >= 1


def test_a_shared_expert_adds_its_output():
    made = layer(shared_expert=nn.Linear(6, 6), shared_gate=True)
    x = torch.randn(9, 6, dtype=torch.float64)
    gate = (x @ made.shared_expert_gate.weight.T).sigmoid()
    wanted = by_token(made, x) + gate * made.shared_expert(x)
    torch.testing.assert_close(made(x), wanted, rtol=1e-12, atol=1e-12)


def test_losses_are_their_formulas():
    z = torch.randn(30, 5, dtype=torch.float64)
    p = z.softmax(-1)
    chosen = top(p, 2)
    routing = Routing(p * chosen, chosen, p, z)
    both = sum(5 * chosen[:, i].double().mean() / 2 * p[:, i].mean() for i in range(5))
    firsts = sum(5 * (p.argmax(1) == i).double().mean() * p[:, i].mean() for i in range(5))
    torch.testing.assert_close(load_balance(routing), both)
    torch.testing.assert_close(load_balance(routing, first=True), firsts)
    torch.testing.assert_close(z_loss(routing), z.exp().sum(1).log().square().mean())
    even = Routing(*(torch.eye(5),) * 1, torch.eye(5) > 0, torch.eye(5), torch.eye(5))
    assert float(load_balance(even)) == pytest.approx(1.0)


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=5, max_size=5), st.integers(1, 5))
@settings(deadline=None, max_examples=20)
def test_top_and_rank_keep_the_lowest_index_of_ties(scores, k):
    s = torch.tensor(scores)
    order = sorted(range(5), key=lambda i: (-scores[i], i))
    assert set(top(s, k).nonzero().flatten().tolist()) == set(order[:k])
    assert [order.index(i) for i in range(5)] == rank_of(s).tolist()


def test_it_can_be_copied_after_a_call_and_runs_without_tokens():
    made = layer()
    made(torch.randn(4, 6, dtype=torch.float64))
    assert copy.deepcopy(made).routing is None and made.routing is not None
    assert made(torch.randn(0, 6, dtype=torch.float64)).shape == (0, 6)
    assert [n for n, _ in mixtures(nn.ModuleDict({"mlp": made}))] == ["mlp"]


def test_autocast_runs():
    made = layer().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made(torch.randn(8, 6))
    y.float().sum().backward()
    assert made.experts.down_proj.grad is not None


@pytest.mark.parametrize(
    "call",
    [
        lambda: TopK(4, 6, 5),
        lambda: TopK(4, 6, 0),
        lambda: Experts(0, 6, 4),
        lambda: Experts(2, 6, 4, activation="swish"),
        lambda: MoE(TopK(4, 6), Experts(3, 6, 4)),
        lambda: MoE(TopK(4, 6), Experts(4, 6, 4), capacity=0.0),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(InvalidArgument):
        call()
