"""Averages of the weights beside a sparse run: dense by themselves, sparse by `run.apply_to`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparseworks as sw
from sparseworks.core.errors import ModelError

STEPS = 10
AVERAGES = {"ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.8)}, "swa": {}}


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 16),
        nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip


def averaged_run(average, method="rigl", steps=STEPS, wrap=lambda model: model):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    run = sw.sparsify(model, optimizer, method, sparsity=0.8, steps=STEPS)
    averaged = AveragedModel(wrap(model), **AVERAGES[average])
    for i in range(steps):
        g = torch.Generator().manual_seed(i)
        x, y = torch.randn(8, 3, 5, 5, generator=g), torch.randint(0, 4, (8,), generator=g)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        averaged.update_parameters(model)
    return model, run, averaged


def zeros(model, names):
    named = dict(model.named_parameters())
    return sum(int((named[n] == 0).sum()) for n in names)


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("method", ["rigl", "gradual", "set"])
@pytest.mark.parametrize("average", sorted(AVERAGES))
def test_the_average_has_the_masks_of_the_run_and_keeps_the_rest(average, method, ended, tmp_path):
    _, run, averaged = averaged_run(average, method)
    if ended:
        run.finish()
    dropped = sum(int((~m).sum()) for m in run.masks.values())
    before = copy.deepcopy(averaged.module.state_dict())
    assert zeros(averaged.module, run.masks) < dropped  # the mix of many masks
    record = run.apply_to(averaged)
    for name, value in averaged.module.state_dict().items():
        mask = run.masks.get(name)
        wanted = before[name] if mask is None else before[name].masked_fill(~mask, 0.0)
        assert torch.equal(value, wanted), name
    attached = sw.masks(averaged.module)
    assert all(torch.equal(attached[n], m) and torch.equal(record[n], m)
               for n, m in run.masks.items())  # fmt: skip
    sw.save(averaged.module, tmp_path / "average.safetensors")
    again = net()
    sw.load(tmp_path / "average.safetensors", again)
    assert zeros(again, run.masks) >= dropped
    assert all(torch.equal(sw.masks(again)[n], m) for n, m in run.masks.items())


def test_the_run_goes_on_as_if_nothing_had_been():
    plain = averaged_run("ema")
    model, run, averaged = averaged_run("ema", steps=5)
    run.apply_to(averaged)
    for i in range(5, STEPS):
        g = torch.Generator().manual_seed(i)
        x, y = torch.randn(8, 3, 5, 5, generator=g), torch.randint(0, 4, (8,), generator=g)
        run.optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        run.optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(plain[0].parameters(), model.parameters()))
    assert sw.masks(model) is None  # only the copy has a record so far


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrappers_inside_the_average_are_looked_through(wrap):
    _, run, averaged = averaged_run("swa", wrap=wrap)
    run.apply_to(averaged)
    inner = getattr(averaged.module, "module", getattr(averaged.module, "_orig_mod", None))
    assert sw.masks(inner).violations(inner) == {}
    assert set(sw.masks(inner)) == set(run.masks)


def test_a_plain_copy_and_the_model_itself_fit():
    model, run, _ = averaged_run("swa")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied[0].weight.fill_(float("nan"))
    run.apply_to(copied)
    assert bool((copied[0].weight[~run.masks["0.weight"]] == 0).all())
    before = copy.deepcopy(model.state_dict())
    run.apply_to(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert sw.masks(model).violations(model) == {}


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda m: m.append(nn.Linear(4, 4)), r"7\.bias.*none.*\[4\]"),
        (lambda m: m.pop(6), r"6\.bias.*\[4\].*none"),
        (lambda m: m.__setitem__(4, nn.Linear(72, 16, bias=False)), r"4\.bias"),
        (lambda m: m.__setitem__(0, nn.Conv2d(3, 8, (3, 1))), r"0\.weight.*\[8, 3, 3, 1\]"),
    ],
)
def test_another_model_is_refused_as_it_was(change, message):
    _, run, _ = averaged_run("swa", steps=2)
    other = net()
    change(other)
    averaged = AveragedModel(other)
    before = copy.deepcopy(averaged.state_dict())
    with pytest.raises(ModelError, match=message):
        run.apply_to(averaged)
    assert all(torch.equal(v, before[k]) for k, v in averaged.state_dict().items())
    assert sw.masks(averaged.module) is None
