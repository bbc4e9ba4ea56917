"""Distances, angles and barriers against their definitions on small cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.weights.tickets.stability import angle, barrier, distance, interpolated


def linear(*weights):
    model = nn.Linear(len(weights), 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weights]))
    return model


KEPT = {"weight": torch.tensor([[True, True, False]])}


def test_distance_and_angle_are_of_the_survivors_alone():
    a, b, origin = linear(3.0, 1.0, 9.0), linear(0.0, 5.0, -9.0), linear(0.0, 1.0, 0.0)
    assert distance(a, b, KEPT) == pytest.approx(math.sqrt((9 + 16) / 2))
    assert angle(a, b, origin, KEPT) == pytest.approx(90)  # (3, 0) and (0, 4)
    assert angle(a, a, origin, KEPT) == pytest.approx(0, abs=1e-5)
    assert angle(a, linear(-2.0, 1.0, 0.0), origin, KEPT) == pytest.approx(180)
    assert angle(origin, a, origin, KEPT) == 0
    with pytest.raises(InvalidArgument, match="nothing to compare"):
        distance(a, b, {"weight": torch.zeros(1, 3, dtype=torch.bool)})


def test_the_barrier_is_the_rise_above_the_line():
    def error(model):  # a double well between -1 and 1, tilted
        w = float(model.weight[0, 0].detach())
        return (w * w - 1) ** 2 + 0.5 * w

    assert barrier(linear(-1.0), linear(1.0), error, points=21) == pytest.approx(1.0)
    assert barrier(linear(1.0), linear(1.0), error) == pytest.approx(0.0)

    def bowl(model):
        return float(model.weight.detach().pow(2).sum())

    assert barrier(linear(-1.0), linear(2.0), bowl) == pytest.approx(0.0)
    with pytest.raises(InvalidArgument, match="points=2"):
        barrier(linear(1.0), linear(1.0), bowl, points=2)


def test_statistics_of_the_middle_are_interpolated_or_measured():
    def net(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        model(torch.randn(16, 4))
        return model.eval()

    a, b, x = net(0), net(1), torch.randn(32, 4)
    plain = interpolated(a, b, 0.25)
    torch.testing.assert_close(
        plain[1].running_mean, 0.75 * a[1].running_mean + 0.25 * b[1].running_mean
    )
    torch.testing.assert_close(plain[0].weight, 0.75 * a[0].weight + 0.25 * b[0].weight)
    measured = interpolated(a, b, 0.25, [x[:16], x[16:]])
    hidden = plain[0](x)
    torch.testing.assert_close(measured[1].running_mean, hidden.mean(0))
    assert torch.equal(measured[0].weight, plain[0].weight) and not measured[1].training
