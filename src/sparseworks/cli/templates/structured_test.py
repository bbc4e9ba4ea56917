"""The test of own-method: the units of a small net by hand, and a smaller model that still runs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import sparseworks as sw

sw.load_plugin(Path(__file__).with_name("own_method.py"))


def test_it_cuts_the_units_that_the_formula_says() -> None:
    for power in (1.0, 4.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        names = ("0.weight", "0.bias", "2.weight")
        first, bias, last = (model.get_parameter(n).tolist() for n in names)
        scores = [
            sum(abs(w) ** power for w in [*first[i], bias[i], *(row[i] for row in last)])
            for i in range(8)
        ]
        kept = sorted(sorted(range(8), key=scores.__getitem__)[4:])
        dense = model.get_parameter("0.weight").detach().clone()
        sw.slim(model, torch.randn(4, 6), params=0.55, method="own-method", power=power)
        assert torch.equal(model.get_parameter("0.weight"), dense[kept])
        assert model(torch.randn(4, 6)).shape == (4, 3)


def test_channels_go_with_their_batch_norm_and_their_readers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(),
        nn.Linear(64, 5),
    ).eval()  # fmt: skip
    example = torch.randn(2, 1, 8, 8)
    result = sw.slim(model, example, flops=0.6, method="own-method")
    before, after = result.parameters
    assert after < before and model(example).shape == (2, 5)
    width = model.get_parameter("0.weight").shape[0]
    assert width == len(model.get_parameter("1.weight")) == model.get_parameter("3.weight").shape[1]
