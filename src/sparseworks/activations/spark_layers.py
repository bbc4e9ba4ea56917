"""The layers of the Spark Transformer (You, Wu et al. 2025), in place of an MLP and of attention.

    FFN(x)  = V [ act(StatTopk_k(K_1 x_1)) * (K_2 x_2) ],           x = (x_1, x_2)
    Attn(q) = V [ softmax(Topk_k(K_1 q_1)) * softplus(K_2 q_2) ],   q = (q_1, q_2), keys alike

The first part of the inputs predicts which units or tokens count and is their gate as well; the
second is touched for those alone. Parameters of the FFN are those of an MLP without gates. Tokens
that are not selected score -inf; mean and deviation are of the visible ones, all of which count
while they are no more than k; the product is not normalised again. How scores are scaled is our
choice (by the root of each part's width), and so is that the largest one always counts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.activations.spark import statistical_threshold, statistical_top_k
from sparseworks.core.errors import InvalidArgument

__all__ = ["SparkAttention", "SparkFeedForward"]


class SparkFeedForward(nn.Module):
    """About k of `hidden` units for each token.

    Args:
        width: d, of inputs and outputs.
        hidden: d_ff.
        k: units wanted; the paper has 0.08 d_ff.
        split: r, inputs of the predictor; None: half of them.
        activation: of the gates; its value at 0 is 0.
    """

    def __init__(
        self, width: int, hidden: int, k: int, split: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.gelu,
    ) -> None:  # fmt: skip
        super().__init__()
        self.split = width // 2 if split is None else split
        if not 0 < self.split < width or not 0 < k <= hidden:
            raise InvalidArgument(f"split={self.split} of {width} inputs, k={k} of {hidden} units")
        self.k, self.activation = k, activation
        self.gate = nn.Linear(self.split, hidden, bias=False)
        self.up = nn.Linear(width - self.split, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d]` to the same shape, all units computed."""
        out: Tensor = self.down(self.gates(x) * self.up(x[..., self.split :]))
        return out

    def gates(self, x: Tensor) -> Tensor:
        """`[..., d_ff]`, 0 where a unit is off."""
        return self.activation(statistical_top_k(self.gate(x[..., : self.split]), self.k))

    def gathered(self, x: Tensor) -> Tensor:
        """The same, token by token with the rows and columns of active units alone."""
        rows = []
        for token, gate in zip(x.flatten(0, -2), self.gates(x).flatten(0, -2), strict=True):
            on = gate.nonzero().squeeze(1)
            rows.append(
                self.down.weight[:, on] @ (gate[on] * (self.up.weight[on] @ token[self.split :]))
            )
        return torch.stack(rows).view(x.shape)

    def flops(self, active: float) -> float:
        """2 x multiplications of a token with so many units on: d d_ff + 3 d k for r = d/2."""
        width, hidden = self.down.weight.shape
        return 2 * (self.split * hidden + (2 * width - self.split) * active)


class SparkAttention(nn.Module):
    """Causal attention to about k tokens.

    Args:
        width: of inputs and outputs.
        heads: that divide it.
        k: tokens wanted; the paper has 256.
    """

    def __init__(self, width: int, heads: int, k: int) -> None:
        super().__init__()
        if width % heads or width // heads < 2 or k < 1:
            raise InvalidArgument(f"width={width}: of {heads} heads of 2 or more; k={k}: from 1")
        self.heads, self.k = heads, k
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, tokens, width]` to the same shape."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        half = q.shape[-1] // 2
        first, second = (
            a @ b.transpose(-2, -1) * a.shape[-1] ** -0.5
            for a, b in ((q[..., :half], k[..., :half]), (q[..., half:], k[..., half:]))
        )
        chosen = self.selected(first)
        weights = first.masked_fill(~chosen, -torch.inf).softmax(-1) * F.softplus(second)
        out: Tensor = self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))
        return out

    def selected(self, scores: Tensor) -> Tensor:
        """Bool, which of the visible tokens count, of scores `[..., length, length]`."""
        scores = scores.detach()
        visible = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
        seen = scores.masked_fill(~visible, -torch.inf)
        above = seen > statistical_threshold(scores, self.k, visible)
        return (above | (seen == seen.amax(-1, keepdim=True))) & visible
