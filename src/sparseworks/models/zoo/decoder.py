"""A small causal decoder of bytes, which trains in a minute on one core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ByteDecoder", "FeedForward"]


class ByteDecoder(nn.Module):
    """Pre-norm transformer decoder over 256 byte values.

    Args:
        width: of the hidden states.
        layers: blocks.
        heads: of the attention.
        feedforward: width inside the blocks.
        context: bytes at most.
        mlp: makes the MLP of each block, as its module `mlp`; None: the block's own layers, of
            width `feedforward`. One that `attends` finds the attention probabilities
            `[batch, heads, bytes, bytes]` in its attribute `attention` before each call.
        attention: makes the causal attention of each block, as its module `attention`, from
            `[batch, bytes, width]` to the same shape; None: softmax over all earlier bytes.
    """

    def __init__(
        self,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        feedforward: int = 256,
        context: int = 64,
        mlp: Callable[[], nn.Module] | None = None,
        attention: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            _Block(width, heads, feedforward, mlp, attention) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for table in (self.embed, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits `[batch, bytes, 256]` of the next byte."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.embed(input_ids) + self.position(places)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class FeedForward(nn.Module):
    """An MLP of two layers.

    Args:
        width: of inputs and outputs.
        hidden: between them.
        activation: of the hidden units.
        bias: of both layers.
    """

    def __init__(
        self, width: int, hidden: int, activation: Callable[[Tensor], Tensor] = F.gelu,
        bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, bias), nn.Linear(hidden, width, bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.activation(self.up(x)))
        return out


class _Block(nn.Module):
    def __init__(
        self, width: int, heads: int, feedforward: int, mlp: Callable[[], nn.Module] | None,
        attention: Callable[[], nn.Module] | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_feedforward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention: Any = None if attention is None else attention()
        if attention is None:
            self.qkv = nn.Linear(width, 3 * width, bias=False)
            self.out = nn.Linear(width, width, bias=False)
        if mlp is None:
            self.up, self.down = nn.Linear(width, feedforward), nn.Linear(feedforward, width)
        self.mlp: Any = None if mlp is None else mlp()

    def forward(self, x: Tensor) -> Tensor:
        h = self.before_attention(x)
        x = x + (self._attended(h) if self.attention is None else self.attention(h))
        h = self.before_feedforward(x)
        found: Tensor = self.down(F.gelu(self.up(h))) if self.mlp is None else self.mlp(h)
        return x + found

    def _attended(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if getattr(self.mlp, "attends", False):
            future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            self.mlp.attention = scores.masked_fill(future, -torch.inf).softmax(-1)
            mixed = self.mlp.attention @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return out
