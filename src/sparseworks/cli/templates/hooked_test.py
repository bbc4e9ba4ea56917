"""The test of own-method: its schedule, its choice, and that masked weights stay exactly 0."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import sparseworks as sw

sw.load_plugin(Path(__file__).with_name("own_method.py"))
STEPS = 20


def test_it_follows_its_schedule_and_takes_the_smallest() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 3))
    x, y = torch.randn(32, 10), torch.arange(32) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = sw.sparsify(
        model, optimizer, "own-method", sparsity=0.8, steps=STEPS, every=2, include="0.weight"
    )
    kept = list(range(100))
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(x), y))
        weight = model.get_parameter("0.weight")
        assert weight.grad is not None
        stepped = (weight - 0.1 * weight.grad).detach().abs().view(-1).tolist()
        optimizer.step()
        moved = min(step // 2 * 2, STEPS // 2)  # the last step at which masks moved
        count = 100 - round(100 * 0.8 * moved / (STEPS // 2))
        if step == moved:
            kept = sorted(kept, key=stepped.__getitem__, reverse=True)[:count]
        mask = run.masks["0.weight"]
        assert mask.view(-1).nonzero().view(-1).tolist() == sorted(kept)
        assert not weight.detach()[~mask].any()
    run.finish()
    masks = sw.masks(model)
    assert masks is not None and masks.violations(model) == {}
    assert masks.sparsity() == 0.8
