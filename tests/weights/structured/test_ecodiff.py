"""Checkpointed chains against full backpropagation; gates learn what a chain does not need."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparseworks as sw
from sparseworks.core.errors import DataError, InvalidArgument
from sparseworks.models.coupling import trace
from sparseworks.models.zoo.diffusion import DDIM, TextToImage
from sparseworks.weights.structured.ecodiff import EcoDiff, chain_gradients, hard_concrete
from sparseworks.weights.structured.widths import entries


def model(seed: int = 0) -> TextToImage:
    torch.manual_seed(seed)
    made = TextToImage(width=16, depth=2, heads=2, text_depth=1).eval()
    for block in made.denoiser.blocks:  # as after training: the blocks say something
        nn.init.normal_(block.modulation.weight, std=0.2)
        nn.init.normal_(block.modulation.bias, std=0.5)
    return made


def chains(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(3, 1, 8, 8, generator=g), torch.randint(0, 27, (3, 5), generator=g))
        for _ in range(count)
    ]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7))
def test_gradients_of_a_chain_equal_full_backpropagation(seed: int, steps: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(4, 4, generator=g).double().requires_grad_()
    b = torch.randn(4, generator=g).double().requires_grad_()
    unused = torch.zeros(2).double().requires_grad_()
    x = torch.randn(3, 4, generator=g).double()
    step = lambda x, i: torch.tanh(x @ a) + b * (i + 1) / steps  # noqa: E731
    loss = lambda x: x.square().mean()  # noqa: E731
    value, found = chain_gradients(step, x, steps, loss, [a, b, unused])
    y = x
    for i in range(steps):
        y = step(y, i)
    expected = torch.autograd.grad(loss(y), [a, b])
    assert value == pytest.approx(float(loss(y).detach()))
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    assert not found[2].any()


def test_the_gradient_of_gates_through_sampling_equals_full_backpropagation() -> None:
    net, sampler = model(), DDIM(steps=5)
    noise, tokens = chains(1)[0]
    logit = torch.randn(64, requires_grad=True)
    block = net.denoiser.blocks[0]
    keys = [torch.rand(64, generator=torch.Generator().manual_seed(i)) for i in range(5)]

    def step(x: Tensor, i: int) -> Tensor:
        z = hard_concrete(logit, keys[i])
        hook = block.fc2.register_forward_pre_hook(lambda m, args: args[0] * z)
        try:
            return sampler.advance(x, sampler.predict(net, x, i, tokens), i)
        finally:
            hook.remove()

    loss = lambda x: x.square().sum()  # noqa: E731
    _, (found,) = chain_gradients(step, noise, 5, loss, [logit])
    x = noise
    for i in range(5):
        x = step(x, i)
    (expected,) = torch.autograd.grad(loss(x), logit)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_only_one_step_is_kept_for_the_backward_pass() -> None:
    alive, most = set(), 0

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w, key):  # type: ignore[no-untyped-def]
            ctx.key = key
            ctx.save_for_backward(x, w)
            if x.requires_grad:
                alive.add(key)
                nonlocal most
                most = max(most, len(alive))
            return x * w

        @staticmethod
        def backward(ctx, g):  # type: ignore[no-untyped-def]
            alive.discard(ctx.key)
            x, w = ctx.saved_tensors
            return g * w, (g * x).sum(0), None

    w = torch.ones(3, requires_grad=True)
    chain_gradients(lambda x, i: Watched.apply(x, w, i), torch.ones(2, 3), 20, torch.sum, [w])
    assert most == 1


def test_gates_are_closed_open_and_between_where_the_formula_says() -> None:
    logit = torch.linspace(-12, 12, 50)
    z = hard_concrete(logit, torch.full((50,), 0.5))
    s = 1 / (1 + torch.exp(-logit / 0.83))
    torch.testing.assert_close(z, (s * 1.2 - 0.1).clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert z[0] == 0 and z[-1] == 1 and (z.diff() >= 0).all()


def test_the_noise_is_bounded() -> None:
    """Whatever u is drawn, it moves the logit by at most ln((1 + e) / e)."""
    u = torch.linspace(0, 1, 1001)
    for e in (0.1, 0.5, 1.0):
        z = hard_concrete(torch.zeros(1001), u, noise=e)
        most = 1 / (1 + math.exp(-math.log((1 + e) / e) / 0.83))
        assert float(z.max()) == pytest.approx(min(1.0, 1.2 * most - 0.1), abs=1e-5)
        assert z.isfinite().all()


def test_heads_and_hidden_units_are_ranked_apart() -> None:
    net = model()
    noise, tokens = chains(1)[0]
    example = {"x": noise, "t": torch.full((3,), 0.5), "tokens": tokens}
    coupling = trace(net, example)
    within = [
        f for f in coupling.families if all(n.startswith("denoiser.blocks") for n, _ in f.axes)
    ]
    coupling = replace(coupling, families=tuple(within))
    method = EcoDiff(DDIM(steps=2), epochs=1, accumulate=1)
    scores = method.score(net, coupling, chains(1), None)
    together = replace(method, separate=False).score(net, coupling, chains(1), None)
    gated = [f for f in coupling.families if np.isfinite(scores[f.roots]).all()]
    kinds = {entries(coupling, f) > 1 for f in gated}
    assert kinds == {True, False}
    for kind in kinds:
        mine = [f.roots for f in gated if (entries(coupling, f) > 1) == kind]
        ranks, logits = (np.concatenate([v[r] for r in mine]) for v in (scores, together))
        assert sorted(ranks) == pytest.approx(np.arange(len(ranks)) / len(ranks))
        assert (np.diff(logits[np.argsort(ranks)]) >= 0).all()


class Plain:
    """A chain of one step of a two-layer network: some hidden units do nothing."""

    steps = 2

    def predict(self, net: nn.Module, x: Tensor, i: int, condition: object) -> Tensor:
        return net(x)

    def advance(self, x: Tensor, prediction: Tensor, i: int) -> Tensor:
        return 0.5 * x + prediction


@pytest.mark.parametrize("objective", ["final", "step"])
@pytest.mark.parametrize("penalty", ["l1", "sigmoid", "l0"])
def test_units_without_effect_score_least_and_are_cut(objective: str, penalty: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 4)).eval()
    dead = torch.tensor([1, 4, 5, 10])
    with torch.no_grad():
        net[2].weight[:, dead] = 0
        net[0].weight[dead] *= 50  # a norm would keep them
    before = copy.deepcopy(net.state_dict())
    data = [(torch.randn(8, 4), None) for _ in range(8)]
    made = sw.slim(
        net, data[0][0], params=0.7, method="ecodiff", sampler=Plain(), data=data, epochs=15,
        accumulate=4, regularisation=0.01, objective=objective, penalty=penalty, copy=True,
    )  # fmt: skip
    assert made.model[0].out_features == 8
    kept = [i for i in range(12) if i not in dead.tolist()]
    assert torch.equal(made.model[0].weight, net[0].weight[kept])
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())


def test_a_call_without_a_chain_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 4))
    with pytest.raises(InvalidArgument, match="sampler="):
        sw.slim(net, torch.randn(2, 4), params=0.7, method="ecodiff")
    with pytest.raises(DataError, match="chains"):
        sw.slim(net, torch.randn(2, 4), params=0.7, method="ecodiff", sampler=Plain())
    for options in ({"penalty": "l2"}, {"objective": "middle"}):
        with pytest.raises(InvalidArgument, match=next(iter(options))):
            sw.slim(
                net, torch.randn(2, 4), params=0.7, method="ecodiff", sampler=Plain(), **options
            )
    with pytest.raises(InvalidArgument, match="lr="):
        EcoDiff(sampler=Plain(), lr=0.0).score(net, trace(net, torch.randn(2, 4)), None, None)
