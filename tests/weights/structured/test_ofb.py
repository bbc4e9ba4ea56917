"""The staircase and the one-hot term against plain formulas; the search ends in ordinary widths."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vit import TinyViT

from sparseworks.core.errors import InvalidArgument
from sparseworks.models.coupling import trace
from sparseworks.weights.structured.ofb import OFB
from sparseworks.weights.structured.pmim import Pmim, hide_patches, patch_pixels, standardised
from sparseworks.weights.structured.widths import (
    LearnedWidth,
    cost_table,
    expected_flops,
    one_hot,
    staircase,
)

torch.manual_seed(0)
VIT = TinyViT().eval()
X = torch.randn(6, 1, 8, 8)
COUPLING = trace(VIT, X)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 12))
def test_the_staircase_is_the_sum_over_widths(seed: int, k: int, units: int) -> None:
    g = torch.Generator().manual_seed(seed)
    p = torch.softmax(torch.randn(k, generator=g), 0)
    widths = torch.randint(1, units + 1, (k,), generator=g)
    u = staircase(p, widths, units)
    for rank in range(1, units + 1):
        expected = sum(float(p[i]) for i in range(k) if rank <= int(widths[i]))
        assert float(u[rank - 1]) == pytest.approx(expected, abs=1e-6)
    assert (u.diff() <= 1e-7).all()
    assert float(u.sum()) == pytest.approx(float((p * widths).sum()), rel=1e-5)


def test_the_one_hot_term_falls_towards_certainty_and_is_finite_everywhere() -> None:
    values = []
    for top in (0.25, 0.4, 0.6, 0.8, 0.95, 1.0):
        p = torch.tensor([top, *[(1 - top) / 3] * 3], requires_grad=True)
        value = one_hot(p)
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(p.grad).all()
        values.append(float(value.detach()))
    assert values == sorted(values, reverse=True)
    p = torch.tensor([0.6, 0.3, 0.1])
    s = sum((x - 1 / 3) ** 2 for x in p.tolist()) / (1 - 1 / 3)
    plain = -sum(x * math.log(x) for x in p.tolist()) + math.tan(math.pi / 2 - math.pi * s) / 3
    assert float(one_hot(p)) == pytest.approx(plain, rel=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_expected_flops_of_certain_widths_are_the_flops_of_the_cut(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    families = list(COUPLING.families)
    keep, shares = COUPLING.keep_all(), []
    for family in families:
        n = int(torch.randint(1, len(family) + 1, (), generator=g))
        keep[family.roots[n:]] = False
        shares.append(torch.tensor(n / len(family)))
    found = float(expected_flops(cost_table(COUPLING, families), shares))
    assert found == pytest.approx(COUPLING.flops(keep), rel=1e-6)


def test_dead_widths_close_the_units_of_least_score() -> None:
    layer = LearnedWidth(COUPLING.families[0], 4, 0.25, 1.0, 1e-4, torch.device("cpu"))
    with torch.no_grad():
        layer.z.copy_(torch.randperm(16).float())
        layer.a.copy_(torch.tensor([0.0, 2.0, 1.0, -6.0]))
    layer.kill(0.2)
    assert layer.living.tolist() == [True, True, True, False]
    assert torch.equal(layer.kept, layer.z > 3)
    with torch.no_grad():
        layer.z[layer.z <= 3] = 99.0  # what is dead stays dead
    layer.decide()
    assert int(layer.kept.sum()) == 8 and not layer.kept[layer.z == 99.0].any()
    mask = layer.mask(0.0)
    assert torch.equal(mask, layer.kept.float())


def test_the_search_ends_with_a_cut_model_near_its_flops() -> None:
    torch.manual_seed(0)
    model = copy.deepcopy(VIT)
    y = torch.randint(0, 3, (6,))
    method = OFB(
        flops=0.5,
        candidates=8,
        width_lr=0.1,
        score_lr=0.1,
        warmup=0.3,
        flops_weight=50.0,
        patches=("norm", 4),
    )
    found = method.fit(model, X, lambda epoch: [(X, y)] * 10, epochs=12, steps_per_epoch=10)
    assert found.flops[1] == trace(model, X).flops()
    assert 0.3 < found.flops[1] / found.flops[0] < 0.6
    assert found.certainty > 0.9
    assert model(X).shape == (6, 3) and not any(m._forward_hooks for m in model.modules())
    assert found.widths["blocks.0.fc1.weight"][0] == 24
    assert model.blocks[0].fc1.out_features == found.widths["blocks.0.fc1.weight"][1]


@pytest.mark.parametrize("w", [False, True])
def test_the_same_seed_gives_the_same_model(w: bool) -> None:
    y = torch.randint(0, 3, (6,), generator=torch.Generator().manual_seed(3))
    made = []
    for _ in range(2):
        torch.manual_seed(5)
        model = copy.deepcopy(VIT)
        OFB(candidates=4, decay_w=w, start=1.0).fit(
            model, X, lambda e: [(X, y)] * 3, epochs=2, steps_per_epoch=3, teacher=VIT
        )
        made.append(model.state_dict())
    assert all(torch.equal(made[0][n], made[1][n]) for n in made[0])


def test_hidden_patches_show_the_mask_and_others_stay() -> None:
    hidden = torch.tensor([[True, False, False, True]]).expand(6, 4)
    mask = torch.randn(1, 4, 4)
    shown = patch_pixels(hide_patches(X, 4, hidden, mask), 4)
    assert torch.equal(shown[:, 1:3], patch_pixels(X, 4)[:, 1:3])
    for patch in (0, 3):
        assert torch.equal(shown[:, patch], mask.flatten().expand(6, 16))
    assert torch.equal(patch_pixels(X, 4)[0, 1], X[0, :, :4, 4:].flatten())


def test_pixels_are_standardised_within_their_window() -> None:
    found = standardised(X, 5)
    for row, column in ((0, 0), (3, 4), (7, 2)):
        window = X[:, :, max(0, row - 2) : row + 3, max(0, column - 2) : column + 3].flatten(1)
        expected = (X[:, 0, row, column] - window.mean(1)) / (window.var(1) + 1e-6).sqrt()
        torch.testing.assert_close(found[:, 0, row, column], expected, rtol=1e-3, atol=1e-4)


def test_the_error_is_that_of_hidden_pixels_and_trains_the_mask() -> None:
    model = copy.deepcopy(VIT)
    hide = Pmim(model, X, "norm", 4)
    model(hide.hide(X, 0.5))
    hide.error().backward()
    mask, *decoder = hide.parameters()
    assert mask.shape == (1, 4, 4) and mask.grad is not None and mask.grad.abs().sum() > 0
    assert all(p.grad is not None for p in decoder)
    target = patch_pixels(standardised(X), 4)[hide._hidden]
    with torch.no_grad():
        for p in decoder:
            p.zero_()
    assert float(hide.error().detach()) == pytest.approx(float(target.abs().mean()), rel=1e-5)
    hide.close()


def test_a_decided_gate_trains_from_where_it_is() -> None:
    g = torch.Generator().manual_seed(0)
    layer = LearnedWidth(COUPLING.families[0], 4, 0.25, 0.0, 1e-4, torch.device("cpu"), g)
    z, a = layer.z.detach(), layer.a.detach()
    assert float(z.std()) == pytest.approx(0.2, rel=0.6) and 0 <= a.min() <= a.max() <= 1
    layer.decide()
    before = layer.mask(0.3).detach()
    free = layer.release(0.3)
    assert torch.equal(layer.mask(0.9), before)  # z and w no longer matter
    (layer.mask(0.9) * torch.arange(16.0)).sum().backward()
    assert torch.equal(free.grad != 0, layer.kept & (torch.arange(16) > 0)) and layer.z.grad is None


def test_bad_calls_are_refused_before_training() -> None:
    model = copy.deepcopy(VIT)
    state = copy.deepcopy(model.state_dict())
    for method, match in [
        (OFB(flops=1.5), "flops="),
        (OFB(flops=0.01), "cannot be reached"),
        (OFB(warmup=0.0), "warmup="),
    ]:
        with pytest.raises(InvalidArgument, match=match):
            method.fit(model, X, lambda e: [], epochs=1, steps_per_epoch=1)
    with pytest.raises(InvalidArgument, match="no module"):
        Pmim(model, X, "nowhere", 4)
    with pytest.raises(InvalidArgument, match="one token"):
        Pmim(model, X, "head", 4)
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
