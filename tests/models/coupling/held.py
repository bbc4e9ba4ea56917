"""Blocks that hold the sizes of their own tensors as numbers, `[n, 8, 6, 6]` -> `[n, c, 6, 6]`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Scales(nn.Module):
    """Res2Net: pieces of one width, each through its own convolution."""

    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.width, self.residual = 6, residual
        self.first, self.norm = nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.convs = nn.ModuleList([nn.Conv2d(6, 6, 3, padding=1) for _ in range(3)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(6) for _ in range(3)])
        self.last = nn.Conv2d(24, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.split(F.relu(self.norm(self.first(x))), self.width, 1)
        done: list[Tensor] = []
        for piece, conv, norm in zip(pieces, self.convs, self.norms):
            y = done[-1] + piece if self.residual and done else piece
            done.append(F.relu(norm(conv(y))))
        return self.last(torch.cat([*done, pieces[-1]], 1))


class Branches(nn.Module):
    """InceptionNeXt, MixNet: pieces of widths in a tuple, each on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.widths = (5, 3, 8)
        self.first = nn.Conv2d(8, 16, 1)
        self.a, self.b = nn.Conv2d(5, 5, 3, padding=1, groups=5), nn.Conv2d(3, 4, 1)
        self.last = nn.Conv2d(17, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = torch.split(self.first(x), self.widths, 1)
        return self.last(torch.cat([self.a(a), self.b(b), c], 1))


class Partial(nn.Module):
    """FasterNet: only the first channels are convolved; the rest pass."""

    def __init__(self) -> None:
        super().__init__()
        self.active, self.rest = 4, 12
        self.first, self.conv = nn.Conv2d(8, 16, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(16, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).split([self.active, self.rest], 1)
        return self.last(torch.cat([self.conv(a), b], 1))


class Dual(nn.Module):
    """DPN: slices before and after a bound, a part of another width narrowed beside."""

    def __init__(self) -> None:
        super().__init__()
        self.bound, self.start, self.length = 10, 3, 5
        self.first, self.second = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 12, 1)
        self.a, self.b, self.c = nn.Conv2d(10, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(5, 6, 1)
        self.last = nn.Conv2d(6, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        a, b = y[:, : self.bound], y[:, self.bound :, :, :]
        c = self.second(x).narrow(1, self.start, self.length)
        return self.last(torch.tanh(self.a(a)) + self.b(b) + self.c(c))


class Tail(nn.Module):
    """The last channels alone, by a negative bound, of a mean over space."""

    def __init__(self) -> None:
        super().__init__()
        self.tail = 5
        self.first, self.last = nn.Conv2d(8, 16, 1), nn.Conv2d(5, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x)[..., -self.tail :, :, :])


class Stages(nn.Module):
    """CSPNet: halves of a held width."""

    def __init__(self) -> None:
        super().__init__()
        self.expanded = 12
        self.first, self.conv = nn.Conv2d(8, 12, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Conv2d(12, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).split(self.expanded // 2, 1)
        return self.last(torch.cat([a, self.conv(b)], 1))


class Own(nn.Module):
    """Functional layers with sizes of their own: depthwise, group and layer norm, a token."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.groups, self.shape = 12, 4, [12]
        self.first = nn.Conv2d(8, 12, 1)
        self.weight = nn.Parameter(torch.randn(12, 1, 3, 3))
        self.gain, self.token = nn.Parameter(torch.rand(12)), nn.Parameter(torch.randn(1, 1, 1, 1))
        self.last = nn.Conv2d(12, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(self.first(x), self.weight, None, 1, 1, 1, self.channels)
        y = F.group_norm(y, self.groups, self.gain)
        y = y + self.token.expand(1, self.channels, 1, 1) * torch.ones(self.channels, 1, 1)
        return self.last(y)


class Shuffle(nn.Module):
    """ShuffleNet: channels as groups of a held number, exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.groups, self.per = 3, 4
        self.first, self.last = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        n, _, h, w = y.shape
        y = y.view(n, self.groups, self.per, h, w).transpose(1, 2)
        return self.last(y.reshape(n, self.groups * self.per, h, w))


class Heads(nn.Module):
    """Attention by names that no list knows."""

    def __init__(self) -> None:
        super().__init__()
        self.amount, self.per = 4, 3
        self.inner = self.amount * self.per
        self.qkv, self.last = nn.Linear(8, 36), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        packed = self.qkv(x.flatten(2).transpose(1, 2))
        parts = packed.unflatten(2, (3, self.amount, self.per)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*parts.unbind(0)).transpose(1, 2)
        y = self.last(y.reshape(n, h * w, self.inner))
        return y.transpose(1, 2).view(n, -1, h, w)


BLOCKS = {
    "scales": (lambda: Scales(False), {"first", "convs.0", "last"}),
    "residual scales": (lambda: Scales(True), {"first", "convs.2", "last"}),
    "branches": (Branches, {"first", "b", "last"}),
    "partial": (Partial, {"first", "conv", "last"}),
    "dual": (Dual, {"first", "second", "a", "last"}),
    "tail": (Tail, {"first", "last"}),
    "stages": (Stages, {"first", "conv", "last"}),
    "own": (Own, {"first", "last"}),
    "shuffle": (Shuffle, {"first", "last"}),
    "heads": (Heads, {"qkv", "last"}),
}


class Between(nn.Module):
    """A stem, a block and a head of four classes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.block = nn.Conv2d(3, 8, 3, padding=1), BLOCKS[kind][0]()
        self.head = nn.Linear(10, 4)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, 0, 0.3)
                nn.init.normal_(module.bias)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.block(F.gelu(self.stem(x)))).mean((2, 3)))
