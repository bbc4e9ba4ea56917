"""The test of own-method: its masks and gradients by hand, and an ordinary model at the end."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import sparseworks as sw
from sparseworks.training.gates import StraightThroughMask

sw.load_plugin(Path(__file__).with_name("own_method.py"))


def largest(scores: Tensor, count: int) -> set[int]:
    values = scores.detach().reshape(-1).tolist()
    return set(sorted(range(len(values)), key=lambda i: -values[i])[:count])


def places(mask: Tensor) -> set[int]:
    return set(mask.reshape(-1).nonzero().view(-1).tolist())


def test_the_mask_follows_the_scores_and_the_end_is_an_ordinary_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 3))
    dense = model.get_parameter("0.weight").detach().clone()
    x, y = torch.randn(32, 10), torch.arange(32) % 3
    job = sw.transform(model, "own-method", sparsity=0.8, steps=20, include="0.weight", scale=0.1)
    assert places(job.masks["0.weight"]) == largest(dense.abs(), 20)

    optimizer = torch.optim.SGD(job.parameter_groups(), lr=0.5)
    job.attach(optimizer)
    before, first = job.part("0.weight", StraightThroughMask).scores.detach().clone(), dense
    mask = job.masks["0.weight"].clone()
    product = (first * mask).requires_grad_()  # the same step by hand
    hidden = torch.relu(x @ product.T + model.get_parameter("0.bias"))
    head = model.get_submodule("2")
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(head(hidden), y), product)
    for step in range(20):
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(x), y) + job.penalty())
        optimizer.step()
        scores = job.part("0.weight", StraightThroughMask).scores
        if step == 0:
            expected = before - 0.5 * gradient * first
            assert torch.allclose(scores, expected, atol=1e-6)
        assert places(job.masks["0.weight"]) == largest(scores, 20)
    assert places(job.masks["0.weight"]) != places(mask), "the mask never moved"

    job.finish()
    weight = model.get_parameter("0.weight")
    assert int((weight != 0).sum()) == 20
    masks = sw.masks(model)
    assert masks is not None and masks.violations(model) == {}
    assert type(model.get_submodule("0")) is nn.Linear
