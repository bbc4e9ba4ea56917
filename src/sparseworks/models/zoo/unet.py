"""A small U-Net that removes noise: two levels, attention on the way up.

Ronneberger, Fischer, Brox 2015, U-Net: Convolutional Networks for Biomedical Image Segmentation;
with times and attention as Ho, Jain, Abbeel 2020, Denoising Diffusion Probabilistic Models. It is
called as the other denoisers are, (x, t, condition) with t in [0, 1], and needs no condition.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["UNet"]


class Residual(nn.Module):
    """x + two convolutions, shifted by the time."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, inputs), nn.GroupNorm(4, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[..., None, None]
        out: Tensor = self.skip(x) + self.conv2(F.silu(self.norm2(y)))
        return out


class SpatialAttention(nn.Module):
    """x + attention over all positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.size = nn.GroupNorm(4, width), width // heads
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.v, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        b, n, _ = tokens.shape
        q, k, v = (
            p(tokens).view(b, n, -1, self.size).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        y = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = x + y.transpose(1, 2).view(x.shape)
        return out


class UpBlock(nn.Module):
    """What comes from below and what was put by on the way down, joined; then attention."""

    def __init__(self, inputs: int, outputs: int, time: int, heads: int) -> None:
        super().__init__()
        self.residual = Residual(inputs, outputs, time)
        self.attention = SpatialAttention(outputs, heads)

    def forward(self, x: Tensor, skip: Tensor, time: Tensor) -> Tensor:
        y: Tensor = self.attention(self.residual(torch.cat([x, skip], 1), time))
        return y


class UNet(nn.Module):
    """Noisy images `[batch, inputs, side, side]`, times `[batch]` -> the noise in them.

    Args:
        inputs: channels of the images.
        channels: of the two levels; multiples of 4 and of `heads`.
        heads: of the attentions.
        time: width of the embedding of t.
    """

    frequencies: Tensor

    def __init__(
        self, inputs: int = 1, channels: tuple[int, int] = (16, 32), heads: int = 2, time: int = 32
    ) -> None:
        super().__init__()
        high, low = channels
        self.time = nn.Sequential(nn.Linear(32, time), nn.SiLU(), nn.Linear(time, time))
        self.inlet = nn.Conv2d(inputs, high, 3, padding=1)
        self.down_blocks = nn.ModuleList([Residual(high, high, time), Residual(high, low, time)])
        self.middle = Residual(low, low, time)
        self.up_blocks = nn.ModuleList(
            [UpBlock(2 * low, low, time, heads), UpBlock(low + high, high, time, heads)]
        )
        self.norm, self.outlet = nn.GroupNorm(4, high), nn.Conv2d(high, inputs, 3, padding=1)
        frequencies = torch.exp(torch.linspace(0.0, math.log(1000.0), 16))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        angles = t[:, None] * self.frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        first = self.down_blocks[0](self.inlet(x), time)
        second = self.down_blocks[1](F.avg_pool2d(first, 2), time)
        y = self.up_blocks[0](self.middle(second, time), second, time)
        y = self.up_blocks[1](F.interpolate(y, scale_factor=2.0), first, time)
        out: Tensor = self.outlet(F.silu(self.norm(y)))
        return out
