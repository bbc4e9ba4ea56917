"""A UNet with skip concatenations and a DiT, as users write them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(t))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(y)))


class UNet(nn.Module):
    """Two levels; the way up reads the way down by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 24), nn.SiLU(), nn.Linear(24, 24))
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down1, self.down2 = ResBlock(16, 16, 24), ResBlock(16, 32, 24)
        self.pool = nn.Conv2d(16, 16, 3, 2, 1)
        self.middle = ResBlock(32, 32, 24)
        self.up2, self.up1 = ResBlock(64, 32, 24), ResBlock(48, 16, 24)
        self.norm, self.out = nn.GroupNorm(4, 16), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(torch.arange(4) * -math.log(100.0) / 4)
        emb = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        one = self.down1(self.stem(x), emb)
        two = self.down2(self.pool(one), emb)
        up = self.up2(torch.cat([self.middle(two, emb), two], 1), emb)
        up = F.interpolate(up, scale_factor=2.0, mode="nearest")
        return self.out(F.silu(self.norm(self.up1(torch.cat([up, one], 1), emb))))


class DiTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
        self.ada = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        n, t, _ = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(F.silu(c))[:, None].chunk(6, -1)
        y = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = self.qkv(y).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1)
        x = x + gate1 * self.proj(y)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """Adaptive layer norm, packed attention, patches in and out."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.1)
        self.time = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList([DiTBlock(width, 4) for _ in range(2)])
        self.out = nn.Linear(width, 12)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(torch.arange(4) * -math.log(100.0) / 4)
        c = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        y = self.patch(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            y = block(y, c)
        y = self.out(y).reshape(len(x), 4, 4, 2, 2, 3)
        return y.permute(0, 5, 1, 3, 2, 4).reshape(len(x), 3, 8, 8)


def diffusion_batch() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {"x": torch.randn(2, 3, 8, 8, generator=g), "t": torch.rand(2, generator=g) * 10}
