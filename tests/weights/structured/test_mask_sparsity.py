"""The penalty against autograd, marks against counting, and a cut that loses nothing."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.models.coupling import Coupling, trace
from sparseworks.models.zoo import CifarResNet
from sparseworks.weights.structured.mask_sparsity import MaskSparsity
from sparseworks.weights.structured.recovery import finetune
from sparseworks.weights.structured.scales import agreed, find_scales, press

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 4
INNER = ("bn1", "layer*.bn2")


def resnet(seed: int = 0) -> CifarResNet:
    torch.manual_seed(seed)
    model = CifarResNet(1, 4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 1.0)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return model.eval()


@functools.cache
def coupled() -> Coupling:
    return trace(resnet(), X)


def batches(epoch: int) -> list[tuple[Tensor, Tensor]]:
    return [(X, Y)]


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-3, 1.0))
def test_the_slope_is_that_of_the_penalty_on_marked_groups(seed: int, strength: float) -> None:
    model = resnet(seed)
    coupling = coupled()
    scales = find_scales(model, coupling)
    on = np.random.default_rng(seed).random(coupling.count) < 0.5
    on &= np.isin(np.arange(coupling.count), np.concatenate([s.family.roots for s in scales]))
    press(scales, strength, on)
    total = torch.zeros(())
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            marked = torch.as_tensor(on[coupling.axes[f"{name}.weight", 0]])
            total = total + strength * module.weight[marked].abs().sum()
    gammas = [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for gamma, slope in zip(gammas, torch.autograd.grad(total, gammas)):
        assert gamma.grad is not None and torch.allclose(gamma.grad, slope)


def test_near_zero_the_slope_is_that_of_the_square() -> None:
    model = resnet()
    scales = find_scales(model, coupled(), INNER)
    gamma = model.layer1[0].bn1.weight
    with torch.no_grad():
        gamma.copy_(torch.linspace(-0.02, 0.02, 16))
    press(scales, 0.5, None, near=0.01)
    expected = 0.5 * torch.where(gamma.abs() < 0.01, gamma, gamma.sign())
    assert gamma.grad is not None and torch.allclose(gamma.grad, expected)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@settings(max_examples=8, deadline=None)
@given(share=st.floats(0.05, 0.95))
def test_marks_are_the_smallest_scales(allocation: str, share: float) -> None:
    model = resnet()
    coupling = coupled()
    scales = find_scales(model, coupling, INNER)
    keep = MaskSparsity(keep=share, allocation=allocation).mark(coupling, scales)  # type: ignore[arg-type]
    values = [s.mean() for s in scales]
    stays = [torch.as_tensor(keep[s.family.roots]) for s in scales]
    for value, stay in zip(values, stays):
        assert stay.any() and (stay.all() or value[~stay].max() <= value[stay].min())
        if allocation == "uniform":
            assert int(stay.sum()) == max(1, round(share * len(value)))
    if allocation == "global":
        several = [(v, s) for v, s in zip(values, stays) if int(s.sum()) > 1]
        lines = [float(v[s].min()) for v, s in several]
        assert all(float(v[~s].max()) < line for v, s in several if not s.all() for line in lines)


@pytest.mark.parametrize(
    "wishes, gone",
    [
        (["110000", "011000", "010100"], "111100"),  # only one has two votes or more: all wishes
        (["110000", "110000", "111000"], "110000"),
        (["100000", "010000"], "110000"),  # nobody agrees: every wish
        (["111111", "111111"], "011111"),  # one stays
        (["000000", "110000"], "000000"),  # the first wants none
    ],
)
def test_norms_of_a_stream_agree(wishes: list[str], gone: str) -> None:
    table = torch.tensor([[c == "1" for c in row] for row in wishes])
    found = agreed(table, torch.ones_like(table))
    assert "".join("01"[int(v)] for v in found) == gone


def test_a_norm_that_does_not_hold_a_group_has_no_say() -> None:
    wishes = torch.tensor([[True, False, False], [False, False, False]])
    there = torch.tensor([[True, True, True], [False, True, True]])
    assert agreed(wishes, there).tolist() == [True, False, False]


def test_energy_marks_what_carries_a_ten_thousandth() -> None:
    model = resnet()
    gamma = model.layer1[0].bn1.weight
    with torch.no_grad():
        gamma.copy_(torch.tensor([1e-3, 2e-3, 3e-3, 0.02] + [1.0] * 12))
    scales = find_scales(model, coupled(), INNER)[:1]
    keep = MaskSparsity(allocation="ot").mark(coupled(), scales)
    assert keep[scales[0].family.roots].tolist() == [False] * 4 + [True] * 12
    with torch.no_grad():
        gamma[3] = 0.04  # 1.6e-3 of 12: above the share
    keep = MaskSparsity(allocation="ot").mark(coupled(), scales)
    assert keep[scales[0].family.roots].tolist() == [False] * 3 + [True] * 13


def test_a_residual_stream_is_marked_as_one() -> None:
    model = resnet()
    coupling = coupled()
    stream = next(s for s in find_scales(model, coupling) if "bn1.weight" in s.entries)
    assert {"bn1.weight", "layer1.0.bn2.weight", "layer3.0.bn2.weight"} <= set(stream.entries)
    by_hand = torch.stack([model.bn1.weight.abs(), model.layer1[0].bn2.weight.abs()]).amax(0)
    assert bool((stream.largest() >= by_hand.detach().double()).all())


def test_marked_channels_vanish_and_the_cut_loses_nothing() -> None:
    """What is left of a channel with scale 0 is act(beta), which the next bias takes exactly."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 12), nn.BatchNorm1d(12),
        nn.ReLU(), nn.Linear(12, 4),
    )  # fmt: skip
    nn.init.uniform_(model[1].weight, 0.3, 1.0)
    nn.init.uniform_(model[4].weight, 0.3, 1.0)
    x = torch.randn(64, 6)
    whole = copy.deepcopy(model)

    def watch(step: int) -> None:
        whole.load_state_dict(model.state_dict())

    method = MaskSparsity(keep=0.5, strength=0.2, lr=0.02, threshold=None)
    done = method.fit(
        model, x, lambda e: [(x, torch.arange(64) % 4)], epochs=200, steps_per_epoch=1,
        after_step=watch,
    )  # fmt: skip
    assert done.widths == {"1.weight": (20, 10), "4.weight": (12, 6)}
    assert done.marked == done.cut == 16 and done.largest_marked < 5e-3 < 0.1 < done.least_kept
    with torch.no_grad():
        before, after = whole.eval()(x), model(x)
        assert float((after - before).abs().max()) < 0.01 * float(before.abs().max())


def test_without_strength_it_is_plain_training() -> None:
    one, two = resnet(), resnet()
    method = MaskSparsity(strength=0.0, threshold=0.0)
    done = method.fit(one, X, batches, epochs=3, steps_per_epoch=1)
    finetune(two, batches, epochs=3, steps_per_epoch=1, lr=method.lr)
    assert done.cut == 0
    for a, b in zip(one.state_dict().values(), two.state_dict().values()):
        assert torch.equal(a, b)


def test_a_given_mask_is_taken_as_it_is() -> None:
    model = resnet()
    coupling = coupled()
    keep = coupling.keep_all()
    family = find_scales(model, coupling, INNER)[0].family
    keep[family.roots[[1, 5, 9]]] = False
    weight = model.layer1[0].conv2.weight
    done = MaskSparsity(threshold=None).fit(
        model, X, batches, epochs=1, steps_per_epoch=1, keep=keep
    )
    assert done.cut == 3 and weight.shape[1] - model.layer1[0].conv2.weight.shape[1] == 3


def test_what_cannot_be_done_changes_nothing() -> None:
    model = resnet()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidArgument, match="keep= lies"):
        MaskSparsity(keep=1.5).fit(model, X, batches, epochs=1, steps_per_epoch=1)
    with pytest.raises(InvalidArgument, match="group numbers"):
        MaskSparsity().fit(
            model, X, batches, epochs=1, steps_per_epoch=1, keep=np.ones(3, dtype=bool)
        )
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    with pytest.raises(ModelError, match="batch norm"):
        plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        MaskSparsity().fit(plain, torch.randn(2, 4), batches, epochs=1, steps_per_epoch=1)
