"""Frozen weights stay as they are: no gradient will say what of them to keep or grow."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument, ModelError

STEPS = 8
METHODS = ["static", "set", "rigl", "granet", "gradual", "iss-p", "dsl"]


def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 4)
    )
    model[0].requires_grad_(False)
    return model


def sgd(model, everything=False):
    held = [p for p in model.parameters() if everything or p.requires_grad]
    return torch.optim.SGD(held, 0.1, momentum=0.9, weight_decay=0.1)


def train(model, optimizer, steps=STEPS):
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, y = torch.randn(8, 10, generator=g), torch.randint(0, 4, (8,), generator=g)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_layer_keeps_every_bit_and_is_named_once(method, everything):
    model = net()
    before = copy.deepcopy(model[0].state_dict())
    optimizer = sgd(model, everything)
    run = sw.sparsify(model, optimizer, method, sparsity=0.8, steps=STEPS)
    train(model, optimizer)
    record = run.finish()
    assert all(torch.equal(v, before[k]) for k, v in model[0].state_dict().items())
    assert set(record) == set(sw.masks(model)) == {"2.weight"}
    assert record.sparsity() == pytest.approx(0.8, abs=2e-3)
    assert "frozen" in run.skipped["0.weight"] and "output head" in run.skipped["4.weight"]
    assert str(run).count("0.weight") == str(run).count("4.weight") == 1


def test_the_masks_that_a_frozen_layer_has_stay_in_the_record():
    model = net()
    pruned = sw.prune(model, "magnitude", sparsity=0.5).masks
    frozen = model[0].weight.detach().clone()
    run = sw.sparsify(model, sgd(model), "rigl", sparsity=0.8, steps=STEPS)
    train(model, run.optimizer)
    run.finish()
    record = sw.masks(model)
    assert torch.equal(record["0.weight"], pruned["0.weight"])
    assert torch.equal(record["2.weight"], run.masks["2.weight"])
    assert record.violations(model) == {} and torch.equal(model[0].weight, frozen)


def test_masks_of_a_tensor_that_trained_on_without_them_leave_the_record():
    model = net().requires_grad_(True)
    sw.prune(model, "magnitude", sparsity=0.5)
    run = sw.sparsify(model, sgd(model), "rigl", sparsity=0.8, steps=STEPS, exclude="0")
    train(model, run.optimizer)
    run.finish()
    assert set(sw.masks(model)) == {"2.weight"} and "excluded" in run.skipped["0.weight"]


def test_fixed_masks_hold_frozen_or_not():
    model = net()
    pruned = sw.prune(model, "magnitude", sparsity=0.5).masks
    run = sw.sparsify(model, sgd(model), "fixed")
    train(model, run.optimizer)
    assert set(run.finish()) == {"0.weight", "2.weight"} and run.step == STEPS
    assert all(torch.equal(sw.masks(model)[n], m) for n, m in pruned.items())
    assert sw.masks(model).violations(model) == {}


@pytest.mark.parametrize("include", ["0", "0.weight", ["2", "0"], "*"])
def test_a_frozen_layer_that_is_asked_for_is_refused(include):
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidArgument, match=r"`include` asks for '0\.weight', which is frozen"):
        sw.sparsify(model, sgd(model), "rigl", sparsity=0.8, steps=STEPS, include=include)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    given = {"sparsity": 0.8, "steps": STEPS, "include": include, "exclude": "0"}
    if include in ("*", ["2", "0"]):
        assert "0.weight" not in sw.sparsify(model, sgd(model), "rigl", **given).masks


def test_a_model_without_anything_to_train_is_refused_with_the_reasons():
    model = net()
    model[2].requires_grad_(False)
    with pytest.raises(ModelError, match=r"none of the tensors given \(.*0\.weight: frozen"):
        sw.sparsify(model, sgd(model), "static", sparsity=0.5)


def test_what_a_method_does_not_take_is_named():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
    model[2].requires_grad_(False)
    run = sw.sparsify(model, sgd(model), "fast-sparse-convnets", sparsity=0.5, steps=STEPS)
    assert set(run.masks) == {"1.weight"}
    assert "not of the kind" in run.skipped["0.weight"] and "frozen" in run.skipped["2.weight"]


def test_a_frozen_layer_cannot_be_enlarged():
    model = net()
    with pytest.raises(InvalidArgument, match=r"0\.weight is frozen"):
        sw.transform(model, "sparse-ift", member="doped", sparsity=0.5, steps=STEPS)
    assert isinstance(model[0], nn.Linear)


def test_a_run_that_cannot_begin_leaves_no_hooks():
    model = net()
    with pytest.raises(InvalidArgument, match="below that of the start"):
        sw.sparsify(model, sgd(model), "granet", sparsity=0.1, steps=STEPS)
    assert not model[2].weight._backward_hooks
    assert not model[2].weight._post_accumulate_grad_hooks
