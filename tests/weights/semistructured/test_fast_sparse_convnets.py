"""Which layers become sparse, how much, and in which blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument, ModelError


def separable():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 24, 1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1, groups=24),
        nn.Conv2d(24, 32, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def train(model, steps, **options):
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    run = sw.sparsify(
        model, optimizer, "fast-sparse-convnets", steps=steps, include="*", every=2, **options
    )
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.randint(0, 10, (4,))).backward()
        optimizer.step()
    return run.finish()


def test_only_pointwise_convolutions_become_sparse_and_the_last_in_blocks():
    model = separable()
    record = train(model, 12, sparsity=0.75, last=0.5, block=4)
    assert set(record) == {"2.weight", "5.weight"}
    for name in record:
        weight = model.get_parameter(name)
        assert int((weight == 0).sum()) == round(0.75 * weight.numel())
    for i in (0, 1, 4, 8):
        assert int((model[i].weight == 0).sum()) == 0
    late = model[5].weight[:, :, 0, 0] != 0
    blocks = late.view(8, 4, 24)
    assert bool((blocks.all(1) | ~blocks.any(1)).all())
    early = (model[2].weight[:, :, 0, 0] != 0).view(6, 4, 16)
    assert not bool((early.all(1) | ~early.any(1)).all())


def test_the_schedule_is_cubic():
    model = separable()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    run = sw.sparsify(
        model, optimizer, "fast-sparse-convnets", steps=20, sparsity=0.8, every=1, end=1.0,
        include="*", last=0.0,
    )  # fmt: skip
    for step in range(1, 21):
        optimizer.step()
        wanted = 0.8 * (1 - (1 - step / 20) ** 3)
        assert run.current_sparsity == pytest.approx(wanted, abs=2e-3)


def test_refused():
    with pytest.raises(InvalidArgument, match="block=0"):
        train(separable(), 4, sparsity=0.5, block=0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(ModelError, match="takes none"):
        sw.sparsify(model, torch.optim.SGD(model.parameters(), 0.1), "fast-sparse-convnets",
                    sparsity=0.5, steps=4, include="*")  # fmt: skip
