"""A small vision transformer (Dosovitskiy et al. 2021, An Image is Worth 16x16 Words).

Patch embedding, a class token, learned positions, pre-norm blocks, the classifier on the class
token. The softmax of every attention is a module of its own, so that what it puts out, the
attention probabilities `[batch, heads, tokens, tokens]`, can be seen by a forward hook.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import InvalidArgument

__all__ = ["Attention", "Block", "ViT"]


class Attention(nn.Module):
    """out(softmax(q(x) k(x)^T / sqrt(d)) v(x)), d the width of a head."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.out = nn.Linear(dim, dim)
        self.softmax = nn.Softmax(dim=-1)
        self.size = dim // heads

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (
            layer(x).view(b, n, -1, self.size).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = self.softmax(q @ k.transpose(-1, -2) * self.size**-0.5) @ v
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


class Block(nn.Module):
    """x + attention(norm1(x)), then x + fc2(gelu(fc1(norm2(x))))."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return result


class ViT(nn.Module):
    """Images `[batch, channels, size, size]` -> logits `[batch, classes]`.

    Args:
        size: side of the images.
        patch: side of a patch; divides `size`.
        channels: of the images.
        dim: width of the tokens; a multiple of `heads`.
        depth: blocks.
        heads: attention heads a block.
        hidden: width inside the MLPs; None: 2 * dim.
        classes: outputs.

    Raises:
        InvalidArgument: sizes that do not divide.
    """

    def __init__(
        self,
        size: int = 32,
        patch: int = 4,
        channels: int = 3,
        dim: int = 96,
        depth: int = 4,
        heads: int = 4,
        hidden: int | None = None,
        classes: int = 10,
    ) -> None:
        super().__init__()
        if size % patch or dim % heads:
            raise InvalidArgument(
                f"ViT: patch={patch} must divide size={size}, and heads={heads} dim={dim}"
            )
        self.patches = nn.Conv2d(channels, dim, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden or 2 * dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits
