"""Densities against their optimum, shares against exact factors, and what a crop leaves."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.models.coupling import trace
from sparseworks.models.zoo import CifarResNet
from sparseworks.weights.oneshot.synflow import SynFlow
from sparseworks.weights.structured import crop
from sparseworks.weights.structured.precrop import (
    PreCrop,
    expected_densities,
    is_stream,
    layer_densities,
    width_shares,
)

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def short_synflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SynFlow, "rounds", 10)  # only that both sides do the same matters here


def resnet(seed: int = 0) -> CifarResNet:
    torch.manual_seed(seed)
    return CifarResNet(1)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=8), st.floats(0.01, 0.99), st.integers())
def test_expected_densities_maximise_the_flow(sizes: list[int], d: float, seed: int) -> None:
    named = {str(i): n for i, n in enumerate(sizes)}
    p = np.array(list(expected_densities(named, d).values()))
    n = np.array(sizes)
    goal = d * n.sum()
    assert (p <= 1).all() and n @ p == pytest.approx(goal)
    g = np.random.default_rng(abs(seed))
    for _ in range(20):  # any other densities within the budget carry no more
        other = np.minimum(1.0, p * np.exp(0.3 * g.standard_normal(len(n))))
        other *= min(1.0, goal / (n @ other))
        assert np.log(other).sum() <= np.log(p).sum() + 1e-9


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.05, 1.0), min_size=1, max_size=6), st.integers(0, 9))
def test_densities_of_a_chain_give_its_widths_back(shares: list[float], seed: int) -> None:
    """Layer l lies between widths l - 1 and l; the first input is fixed."""
    g = np.random.default_rng(seed)
    names = [f"l{i}" for i in range(len(shares))]
    widths = {n: (i - 1, i) if i else (0,) for i, n in enumerate(names)}
    densities = {n: math.prod(shares[w] for w in widths[n]) for n in names}
    sizes = {n: int(g.integers(10, 1000)) for n in names}
    assert width_shares(densities, sizes, widths, len(shares)) == pytest.approx(shares, rel=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_shares_are_the_bounded_least_squares(seed: int) -> None:
    g = np.random.default_rng(seed)
    widths = {str(i): tuple(g.choice(3, size=2, replace=False)) for i in range(6)}
    densities = {n: float(g.uniform(0.05, 1)) for n in widths}
    sizes = {n: int(g.integers(1, 100)) for n in widths}

    def cost(r: np.ndarray) -> float:
        each = (
            sizes[n] * (sum(np.log(r[w]) for w in widths[n]) - np.log(densities[n])) ** 2
            for n in widths
        )
        return float(sum(each))

    best = width_shares(densities, sizes, widths, 3)
    assert (best <= 1).all()
    for size in (0.3, 0.03, 0.003):
        for _ in range(20):
            other = np.minimum(1.0, best * np.exp(size * g.standard_normal(3)))
            assert cost(other) >= cost(best) - 1e-6


def test_two_layers_of_a_block_keep_its_parameters() -> None:
    shares = width_shares({"a": 0.2, "b": 0.8}, {"a": 30, "b": 10}, {"a": (0,), "b": (0,)}, 1)
    assert shares[0] == pytest.approx((30 * 0.2 + 10 * 0.8) / 40)


@pytest.mark.parametrize("densities", ["synflow", "expected"])
def test_a_crop_meets_its_budget_and_keeps_the_streams(densities: str) -> None:
    model = resnet()
    done = crop(model, X, params=0.3, densities=densities)
    assert 0.27 * done.parameters[0] < done.parameters[1] <= 0.3 * done.parameters[0]
    assert model.bn1.weight.shape == (16,) and model.linear.weight.shape == (10, 64)
    model.train()
    loss = nn.functional.cross_entropy(model(X), torch.tensor([0, 1]))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_widths_follow_the_shares_up_to_one_factor() -> None:
    model = resnet()
    method = PreCrop(0.4, "expected")
    coupling = trace(model, X)
    scores = method.score(model, coupling, None, None)
    inner = [f for f in coupling.families if not is_stream(model, f) and len(f) > 1]
    densities = layer_densities(model, 0.4, "expected")
    done = crop(model, X, params=0.4, densities="expected")
    cut = {w.name.split(" ")[0]: w for w in done.widths}
    lows, highs = [], []  # the factor t lies between these, for every width
    for family in inner:
        first = float(scores[family.roots].max()) / 2  # m r
        name = family.axes[0][0]
        width = cut.get(name)
        kept = len(family) if width is None else width.after
        lows.append((kept - 0.5) / first)
        if kept < len(family):
            highs.append((kept + 0.5) / first)
    assert max(lows) <= min(highs) + 1e-9
    assert densities["layer3.0.conv2.weight"] < densities["layer2.0.conv1.weight"]


def test_only_shares_of_the_masks_count() -> None:
    model = resnet()
    before = copy.deepcopy(model.state_dict())
    found = layer_densities(model, 0.25, "synflow", [X])
    masks = sw.masks(sw.prune(model, "synflow", sparsity=0.75, data=[X], copy=True).model)
    for name, density in found.items():
        assert density == pytest.approx(float(masks[name].float().mean()))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))


def test_the_variance_is_that_of_the_new_fan_in() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 400), nn.ReLU(), nn.Linear(400, 300), nn.ReLU(),
                          nn.Linear(300, 5))  # fmt: skip
    crop(model, torch.randn(2, 64), params=0.3, densities="uniform")
    for layer in (model[0], model[2], model[4]):
        fan = layer.weight.shape[1]
        bound = 1 / math.sqrt(fan)
        assert float(layer.weight.detach().abs().max()) == pytest.approx(bound, rel=0.05)
        assert float(layer.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(InvalidArgument, match="params= or flops="):
        crop(resnet(), X)
    with pytest.raises(InvalidArgument, match="between 0 and 1"):
        layer_densities(resnet(), 1.0, "expected")
    with pytest.raises(ModelError, match="streams"):
        model = resnet()
        coupling = trace(model, X)
        only = [f for f in coupling.families if is_stream(model, f)]
        whole = type(coupling)(
            model, coupling.axes, tuple(only), coupling.costs, coupling.count, coupling.unreached
        )
        PreCrop(densities="uniform").score(model, whole, None, None)
