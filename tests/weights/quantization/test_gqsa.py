"""GQSA: its score against the formula, what its stages keep and lower, what a file gives back."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import sparseworks as sw
import tiny_models
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.models.calls import default_loss
from sparseworks.weights.quantization.saliency import HessianSaliency


def quantized(**options):
    model = tiny_models.language_model()
    given = {"block_epochs": 1, "tune_epochs": 1, **options}
    return sw.quantize(model, "gqsa", data=tiny_models.texts(), **given)


def test_groups_are_those_of_the_largest_mean_saliency():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator, dtype=torch.float64)
    layer = nn.Sequential(nn.Linear(8, 6, bias=False))
    weight = layer[0].weight.detach().double()
    hessian = 2 / 64 * x.T @ x
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)
    score = torch.stack(
        [weight[:, j] ** 2 / inverse[j, j] ** 2 for j in range(8)], 1
    ).view(6, 2, 4).mean(2)  # fmt: skip
    best = score.flatten().topk(7).indices
    wanted = torch.zeros(12, dtype=torch.bool).index_fill(0, best, True).view(6, 2)
    sw.prune(
        layer, HessianSaliency(pattern="block1x4"), sparsity=5 / 12,
        data=[row[None] for row in x.float()], include="0",
    )  # fmt: skip
    found = sw.masks(layer)["0.weight"].view(6, 2, 4)
    assert torch.equal(found.any(2), wanted) and torch.equal(found.all(2), wanted)


def test_without_stages_kept_groups_are_rounded_and_the_others_are_zero():
    dense = tiny_models.language_model()
    done = quantized(block_epochs=0, tune_epochs=0, bits=3)
    before = dict(dense.named_parameters())
    for name, entry in done.grids.items():
        now, was = done.model.get_parameter(name).detach(), before[name].detach()
        for row in range(now.shape[0]):
            for first in range(0, now.shape[1], 16):
                group, old = now[row, first : first + 16], was[row, first : first + 16]
                if not entry.live[row, first // 16]:
                    assert not group.any()
                    continue
                low, high = min(0.0, float(old.min())), max(0.0, float(old.max()))
                step = float(torch.tensor((high - low) / 7).half())
                zero = round(-low / step)
                codes = [min(7, max(0, round(float(w) / step) + zero)) for w in old]
                wanted = torch.tensor([step * (q - zero) for q in codes])
                torch.testing.assert_close(group, wanted, rtol=0, atol=1e-6)
    assert done.sparsity == 0.5


def test_the_first_stage_lowers_the_error_of_blocks():
    done = quantized(block_epochs=8, tune_epochs=0, weight_lr=1e-3, bits=3)
    for before, after in done.figures["block errors before and after"].values():
        assert after < 0.95 * before


def test_the_second_stage_lowers_the_loss_and_moves_no_integer():
    texts = tiny_models.texts()
    first = quantized(tune_epochs=0)
    second = quantized(tune_epochs=20, tune_lr=1e-3)

    def loss(model):
        with torch.no_grad():
            return sum(float(default_loss(model, batch)) for batch in texts)

    assert loss(second.model) < loss(first.model) - 0.01
    for name, entry in second.grids.items():
        assert torch.equal(entry.grid.codes, first.grids[name].grid.codes)
        assert torch.equal(entry.grid.zero, first.grids[name].grid.zero)
    moved = [not torch.equal(e.grid.scale, first.grids[n].grid.scale)
             for n, e in second.grids.items()]  # fmt: skip
    assert all(moved)


@pytest.mark.parametrize("targets", ["compressed", "dense"])
def test_masks_stay_and_bits_are_those_of_the_formula(targets):
    done = quantized(sparsity=0.25, targets=targets)
    wanted = 0.75 * (4 + (16 + 4) / 16) + 1 / 16
    assert math.isclose(done.bits_per_weight, wanted, rel_tol=1e-3)
    assert sw.masks(done.model).method == "gqsa"
    assert math.isclose(sw.masks(done.model).sparsity(), 0.25)
    for name, mask in sw.masks(done.model).items():
        assert torch.equal(mask, done.grids[name].mask())


def test_two_of_four_inside_of_groups():
    done = quantized(within="2:4")
    for name, mask in sw.masks(done.model).items():
        kept = mask.view(-1, 4).sum(1)
        assert (kept == 2).all()
        assert not done.model.get_parameter(name).detach()[~mask].any()


def test_distillation_and_equal_calls_give_equal_weights():
    one, two = (quantized(distill=True, seed=3) for _ in range(2))
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [
    {"bits": 1}, {"group": 0}, {"sparsity": 1.0}, {"tune_epochs": -1}, {"tune_lr": 0.0},
    {"targets": "x"}, {"within": "unstructured"},
])  # fmt: skip
def test_bad_options_are_refused(options):
    with pytest.raises(InvalidArgument):
        quantized(**options)


def test_what_cannot_be_done_is_said_and_changes_nothing():
    model = tiny_models.language_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidArgument, match="data"):
        sw.quantize(model, "gqsa")
    with pytest.raises(ModelError, match="groups of 1000"):
        sw.quantize(model, "gqsa", data=tiny_models.texts(), group=1000)
    with pytest.raises(ModelError, match="learning rates"):
        sw.quantize(model, "gqsa", data=tiny_models.texts(), tune_lr=1e30)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert sw.masks(model) is None and sw.grids(model) is None
    sw.prune(model, "magnitude", sparsity=0.5)
    with pytest.raises(InvalidArgument, match="without masks"):
        sw.quantize(model, "gqsa", data=tiny_models.texts())
