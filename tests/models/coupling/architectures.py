"""Random networks with residuals, concatenations, splits and grouped convolutions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

KINDS = (
    "conv",
    "residual",
    "concat",
    "chunk",
    "split",
    "depthwise",
    "grouped",
    "shuffle",
    "gate",
    "pad",
    "pixel",
    "groupnorm",
    "tied",
)


@dataclass(frozen=True)
class Plan:
    """What a network is built from: a width, then blocks by name."""

    width: int
    blocks: tuple[str, ...]
    head: str
    seed: int


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    return Plan(
        draw(st.sampled_from([4, 8, 12])),
        tuple(draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=5))),
        draw(st.sampled_from(["pool", "flatten", "attention"])),
        draw(st.integers(0, 10_000)),
    )


class Block(nn.Module):
    """One block `[n, width, h, w]` -> `[n, outputs, h', w']` of a given kind."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.other = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.outputs = width
        if kind == "concat":
            self.outputs = 2 * width
        elif kind in ("chunk", "split"):
            self.outputs = width // 2
        elif kind == "depthwise":
            self.conv = nn.Conv2d(width, 2 * width, 3, padding=1, groups=width)
            self.outputs = 2 * width
            self.bn = nn.BatchNorm2d(2 * width)
        elif kind in ("grouped", "shuffle"):
            self.conv = nn.Conv2d(width, width, 3, padding=1, groups=2)
        elif kind == "gate":
            self.other = nn.Conv2d(width, width, 1)
        elif kind == "pad":
            self.outputs = width + 4
        elif kind == "pixel":
            self.conv = nn.Conv2d(width, 4 * width, 1)
        elif kind == "groupnorm":
            self.bn = nn.GroupNorm(4, width)
        elif kind == "tied":
            self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "depthwise":
            return F.relu(self.bn(self.conv(x)))
        if self.kind == "pixel":
            return F.avg_pool2d(F.pixel_shuffle(self.conv(x), 2), 2)
        y = F.gelu(self.bn(self.conv(x)))
        if self.kind == "residual":
            return F.relu(x + self.other(y))
        if self.kind == "concat":
            return torch.cat([y, self.other(x)], 1)
        if self.kind == "chunk":
            a, b = self.other(y).chunk(2, 1)
            return a * torch.sigmoid(b)
        if self.kind == "split":
            z = self.other(y)
            a, b = torch.split(z, [1, z.shape[1] - 1], 1)
            return (a + b)[:, : self.outputs]
        if self.kind == "shuffle":
            n, c, h, w = y.shape
            return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w) + 1
        if self.kind == "gate":
            return y * torch.sigmoid(self.other(x.mean((2, 3), keepdim=True)))
        if self.kind == "pad":
            return F.pad(y, (0, 0, 0, 0, 1, 3)) + 0.5
        return self.other(y) if self.kind in ("groupnorm", "tied") else y


class Network(nn.Module):
    """A stem, the blocks of a plan, and a head of four classes."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        torch.manual_seed(plan.seed)
        self.stem = nn.Conv2d(3, plan.width, 3, padding=1)
        width, blocks = plan.width, []
        for kind in plan.blocks:
            if width % 4 or width > 48:
                blocks.append(nn.Conv2d(width, 8, 1))
                width = 8
            blocks.append(Block(kind, width))
            width = blocks[-1].outputs
        self.blocks = nn.ModuleList(blocks)
        self.kind = plan.head
        if plan.head == "attention":
            self.heads = 2
            self.qkv = nn.Linear(width, 3 * 16)
            self.out = nn.Linear(16, 6)
            self.head = nn.Linear(6, 4)
        else:
            self.head = nn.Linear(width * (25 if plan.head == "flatten" else 1), 4)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, 0, 0.3)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.normal_(module.bias)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        if self.kind == "pool":
            return self.head(x.mean((2, 3)))
        if self.kind == "flatten":
            return self.head(x.flatten(1))
        n, _, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        packed = self.qkv(tokens).reshape(n, h * w, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = packed.unbind(0)
        attention = ((q @ k.transpose(-2, -1)) * 0.3).softmax(-1)
        y = (attention @ v).transpose(1, 2).reshape(n, h * w, -1)
        return self.head(self.out(y).mean(1))
