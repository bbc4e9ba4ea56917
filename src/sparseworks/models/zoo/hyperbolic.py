"""Layers on the hyperboloid (Chen et al. 2022, Fully Hyperbolic Neural Networks).

A point is `[..., 1 + width]` with -t^2 + |x|^2 = -1, its time t first. Euclidean features come in
by `lift`, the exponential map at the origin.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["HyperbolicClassifier", "LorentzLinear", "lift", "lorentz_distance"]


def with_time(space: Tensor) -> Tensor:
    """The point of the hyperboloid over this `[..., width]`: t = sqrt(1 + |x|^2)."""
    return torch.cat([(1 + space.square().sum(-1, keepdim=True)).sqrt(), space], -1)


def lift(x: Tensor) -> Tensor:
    """exp_0: (cosh |x|, sinh |x| x / |x|)."""
    size = x.norm(dim=-1, keepdim=True).clamp_min(1e-7)
    return torch.cat([torch.cosh(size), torch.sinh(size) * x / size], -1)


def lorentz_distance(a: Tensor, b: Tensor) -> Tensor:
    """-2 - 2 <a, b>, the squared Lorentzian distance of `[n, d]` and `[m, d]` as `[n, m]`."""
    time, space = a[:, :1] * b[:, 0], a[:, 1:] @ b[:, 1:].t()
    return 2 * (time - space) - 2


class LorentzLinear(nn.Module):
    """A linear map of the ambient space, brought back onto the hyperboloid by its time.

    Args:
        width, out: of the points without their time.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width + 1, out)

    def forward(self, point: Tensor) -> Tensor:
        return with_time(self.linear(point))


class HyperbolicClassifier(nn.Module):
    """Features -> hyperboloid -> Lorentz layers -> minus the distances to one point per class.

    Args:
        features: of the input.
        classes: of the output.
        width: of the hidden points.
        layers: Lorentz layers.
    """

    def __init__(self, features: int, classes: int, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        widths = [features, *[width] * layers]
        self.layers = nn.ModuleList(LorentzLinear(a, b) for a, b in pairwise(widths))
        self.centres = nn.Parameter(0.1 * torch.randn(classes, width))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=-1, keepdim=True).clamp_min(1e-7)
        point = lift(x / size * torch.tanh(size))
        for i, layer in enumerate(self.layers):
            point = layer(point)
            if i + 1 < len(self.layers):
                point = with_time(torch.relu(point[..., 1:]))
        return -lorentz_distance(point, lift(self.centres))
